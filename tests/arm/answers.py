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
from tinygiant.runtime.chunks import split_chunks
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import SessionSettings
from tinygiant.runtime.prompt import build_prompt
from tinygiant.runtime.streams import encode_chunks, project
from tinygiant.runtime.tokenizer import Tokenizer

QUESTION = "What is heard first?"
CHOICES = ["a dog", "a siren", "the bell rings"]


def main() -> None:
    path, clip, out, count = sys.argv[1:]
    n_tokens = int(count)
    start = time.perf_counter()
    bundle = Bundle.open(path)
    pool = GraphPool(bundle, SessionSettings(threads=1, spin=False))
    tokenizer = Tokenizer.from_file(bundle.file(bundle.manifest.tokenizer))
    embeddings = TokenEmbeddings.open(bundle)
    prompt = build_prompt(QUESTION, None, tokenizer, bundle.config.prompt)
    chunks = split_chunks(read_audio(clip), bundle.config)
    streams = encode_chunks(chunks, pool, bundle.config)
    instruction = embeddings.lookup(prompt.instruction_ids)[None]
    rows = [projection.audio_embeds for projection in project(streams, instruction, pool)]
    prefix, suffix = (
        embeddings.lookup(ids)[None] for ids in (prompt.prefix_ids, prompt.suffix_ids)
    )
    embeds = np.concatenate([prefix, *rows, suffix], axis=1)

    with pool.use("decoder_model") as graph:
        config = bundle.config.decoder
        capacity, kv_type = embeds.shape[1] + n_tokens, bundle.manifest.kv_cache
        decoder = Decoder(graph, embeddings, config, capacity, kv_type=kv_type)
        first = decoder.prefill(embeds)
        tokens = list(decoder.generate(first, max_new_tokens=n_tokens, stop_ids=()))
        decoder.cache.truncate(embeds.shape[1])
        given = np.random.default_rng(0).integers(config.vocab_size, size=n_tokens).tolist()
        logits = [first, *(decoder.step([token])[-1] for token in given)]
    del pool, decoder, graph

    model = load(path, threads=1, memory="low", verify=False, spin=False)
    answer = model.ask(clip, QUESTION, CHOICES, max_new_tokens=2)
    np.savez(
        Path(out),
        features=chunks[0].temporal_features,
        streams=streams[0].streams,
        audio_embeds=rows[0],
        logits=np.stack(logits),
        tokens=np.array(tokens),
        choice=np.array(answer.choice_index),
        seconds=np.array(time.perf_counter() - start),
    )


if __name__ == "__main__":
    main()
