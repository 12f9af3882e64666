"""Public models against what their original code computed, through the whole runtime.

    python -m tests.golden FOLDER [mizar] [mellow]

``FOLDER`` holds outputs of the original PyTorch code on synthetic weights and signals:
``make_checkpoint.py`` (writes a checkpoint in the public format), ``signals.py`` (writes the
clips), the tokenizer and, for each model, an ``.npz`` of what came out. This program makes the
checkpoint, imports it as ``tg-export`` does, in float32, asks the runtime about the audio files,
and compares what enters the decoder, the prompt's token ids, the first logits and 24 greedy ids.

Limits are the data's own: log-mel 2e-2 dB (rms 1e-3), rows 5e-4 (rms 5e-5), logits 2e-2; all ids
equal, or different from a step on whose two best logits lie within 0.05. Needs 2 GB of disk and
some minutes for each model. Exit code 1 if anything is outside.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygiant.export.exporter import write_bundle
from tinygiant.models.family import family
from tinygiant.quantize.recipes import recipe
from tinygiant.runtime import TinyGiant, load
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.preprocess import preprocess
from tinygiant.runtime.tokenizer import Tokenizer

SIGNALS = ("chirp44", "tones16", "mixed48")
TOKENIZER = "smollm2-tokenizer.json"
N_TOKENS = 24
TIE = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=["mizar", "mellow"])
    options = parser.parse_args()
    n_outside = 0
    for name in options.models:
        with tempfile.TemporaryDirectory() as scratch:
            for label, found, limit in _compare(name, options.folder, Path(scratch)):
                outside = not found <= limit
                n_outside += outside
                print(f"{name:7} {label:32} {found:9.2g}  limit {limit:g}{'  OUTSIDE' * outside}")
    print("all within the limits" if not n_outside else f"{n_outside} outside the limits")
    return int(n_outside > 0)


def _compare(name: str, folder: Path, scratch: Path) -> Iterator[tuple[str, float, float]]:
    """Every figure and its limit."""
    checkpoint, bundle = scratch / f"{name}.ckpt", scratch / "bundle"
    _python(folder / "make_checkpoint.py", name, "1", checkpoint, "--module-prefix")
    _python(folder / "signals.py", scratch)
    bundle.mkdir()
    source = family(name).open(checkpoint, tokenizer=folder / TOKENIZER)
    write_bundle(source, bundle, recipe("fp32"))
    del source
    checkpoint.unlink()
    model = load(bundle, threads=1)
    tokenizer = Tokenizer.from_file(bundle / "tokenizer.json")
    yield from _token_cases(name, folder, model, tokenizer)
    golden = np.load(folder / f"{name}-seed1.npz")
    for signal in SIGNALS:
        audio = scratch / f"{signal}.wav"
        (chunk,) = preprocess(read_audio(audio), model.config)
        ((features,),) = chunk.windows.values()
        yield from _errors(
            f"{signal} log-mel",
            features[0, 0, ::16],
            golden[f"{signal}.logmel_every16"],
            2e-2,
            1e-3,
        )
        for key in ("q0", "q1"):
            if f"{signal}.{key}.greedy_ids" in golden:
                yield from _question(model, audio, signal, key, golden, tokenizer)


def _question(
    model: TinyGiant, audio: Path, signal: str, key: str, golden: Any, tokenizer: Tokenizer
) -> Iterator[tuple[str, float, float]]:
    listed = [str(one) for one in golden[f"{key}.choices"]] if f"{key}.choices" in golden else []
    question = str(golden[f"{key}.question" if f"{key}.question" in golden else f"{key}.prompt"])
    prepared = model.prepare(audio, question, listed or None)
    where = f"{signal} {key}"
    (projection,) = prepared.projections[:1]
    yield from _errors(
        f"{where} rows", projection.audio_embeds[0], golden[f"{signal}.rows"], 5e-4, 5e-5
    )
    ids = prepared.asked.prompt.parts[-1]
    yield f"{where} prompt ids unlike", float(ids != tuple(golden[f"{key}.ids"].tolist())), 0
    n_rows = prepared.embeds.shape[1]
    yield f"{where} prompt length off", abs(n_rows - int(golden[f"{signal}.{key}.prefix_len"])), 0
    with model.decoder(n_rows + N_TOKENS) as decoder:
        logits = decoder.prefill(prepared.embeds)
        wanted = golden[f"{signal}.{key}.logits_every97"]
        yield f"{where} logits", float(np.abs(logits[::97] - wanted).max()), 2e-2
        written = list(decoder.generate(logits, max_new_tokens=N_TOKENS, stop_ids=frozenset()))
        del decoder
    wanted_ids = golden[f"{signal}.{key}.greedy_ids"].tolist()
    margins = golden[f"{signal}.{key}.greedy_margin"]
    same = next((i for i, pair in enumerate(zip(written, wanted_ids, strict=True)) if
                 pair[0] != pair[1]), N_TOKENS)  # fmt: skip
    excused = same < N_TOKENS and margins[same] < TIE
    yield f"{where} ids unlike", 0.0 if excused else float(N_TOKENS - same), 0
    if not listed:
        answer = model.ask(audio, question, max_new_tokens=N_TOKENS)
        hidden = set(model.config.answer.hidden_token_ids)
        text = tokenizer.decode(token for token in wanted_ids if token not in hidden)
        yield f"{where} text unlike", 0.0 if excused else float(answer.raw_text != text), 0


def _token_cases(
    name: str, folder: Path, model: TinyGiant, tokenizer: Tokenizer
) -> Iterator[tuple[str, float, float]]:
    cases = json.loads((folder / "token-cases.json").read_text(encoding="utf-8"))["cases"]
    lower = model.config.prompt.lower_case
    for number, case in enumerate(cases, 1):
        text = case["text"].lower() if lower else case["text"]
        ids = tokenizer.encode(text)[: model.config.prompt.max_tokens]
        yield f"token case {number} unlike", float(ids != case[f"{name}_ids"]), 0


def _errors(
    label: str, found: NDArray[Any], wanted: NDArray[Any], limit: float, limit_rms: float
) -> Iterator[tuple[str, float, float]]:
    difference = found.astype(np.float64) - wanted
    yield f"{label} max", float(np.abs(difference).max()), limit
    yield f"{label} rms", float(np.sqrt(np.mean(difference**2))), limit_rms


def _python(*command: object) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
