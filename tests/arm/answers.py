"""Run a bundle and write down what came out; on any processor, with the runtime alone.

    python answers.py BUNDLE CLIP OUT.npz N_TOKENS

Writes the intermediate results of every stage, the greedy tokens, the choice, and the logits after
each of a fixed row of tokens: those a model with random weights writes are all alike.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from tinygiant.runtime import load, read_audio
from tinygiant.runtime.bundle import Bundle
from tinygiant.runtime.encode import encode
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import SessionSettings
from tinygiant.runtime.preprocess import preprocess

QUESTION = "What is heard first?"
CHOICES = ["a dog", "a siren", "the bell rings"]


def main() -> None:
    path, clip, out, count = sys.argv[1:]
    n_tokens = int(count)
    start = time.perf_counter()
    bundle = Bundle.open(path)
    chunks = preprocess(read_audio(clip), bundle.config)
    pool = GraphPool(bundle, SessionSettings(threads=1, spin=False))
    encoded = encode(chunks, pool, bundle.config)
    del pool

    model = load(path, threads=1, verify=False, spin=False, speculate=False)
    prepared = model.prepare(clip, QUESTION)
    with model.decoder(prepared.embeds.shape[1] + n_tokens) as decoder:
        first = decoder.prefill(prepared.embeds)
        tokens = list(decoder.generate(first, max_new_tokens=n_tokens, stop_ids=()))
        decoder.truncate(prepared.embeds.shape[1])
        vocab_size = bundle.config.decoder.vocab_size
        given = np.random.default_rng(0).integers(vocab_size, size=n_tokens).tolist()
        logits = [first, *(decoder.step([token])[-1] for token in given)]
        del decoder
    del model

    model = load(path, threads=1, memory="low", verify=False, spin=False)
    answer = model.ask(clip, QUESTION, CHOICES, max_new_tokens=2)
    np.savez(
        Path(out),
        features=chunks[0].windows[bundle.config.encoders[0].graph][0],
        streams=np.concatenate([array.ravel() for array in encoded[0].inputs.values()]),
        audio_embeds=prepared.projections[0].audio_embeds,
        logits=np.stack(logits),
        tokens=np.array(tokens),
        choice=np.array(answer.choice_index),
        seconds=np.array(time.perf_counter() - start),
    )


if __name__ == "__main__":
    main()
