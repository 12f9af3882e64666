"""What a checkpoint's encoders know: linear classifiers on their outputs.

    python -m benchmarks.probe CHECKPOINT --learn SPLIT ... --test SPLIT [--clips 500]
        [--cache .cache/probe] [--save NAME]

A SPLIT is a folder that ``python -m tinygiant.models.world`` wrote, ``DIR/train`` for example, with
clips that the encoders were not trained on. The streams that the projector would read are pooled
over the time that a thing sounds, and ridge regression on the pooled rows tells, of ``--test``'s
clips, a major melody from a minor one, a near sound from a far one, a woman's voice from a man's.
What a linear classifier cannot tell, training the decoder will hardly bring out. Shares are printed
beside that of the more frequent label; the last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import command_line, write_result
from tinygiant.models.checkpoint import WEIGHTS_FILE, load
from tinygiant.models.training.streams import cache_streams
from tinygiant.models.world.dataset import WorldDataset
from tinygiant.models.world.scene import Scene
from tinygiant.runtime.errors import TinyGiantError

__all__ = ["QUESTIONS", "Probe", "examples", "main", "pooled"]

Array = NDArray[np.floating[Any]]

QUESTIONS = ("major", "near", "woman")
_RIDGES = (30.0, 300.0)  # of standardised rows
_BEGINNING_S = 0.8  # of a melody: its first notes
_TAIL_S = 0.2  # after a sound: its echo


def pooled(streams: Array, start_s: float, end_s: float, row_s: float) -> Array:
    """``(rows, size)``, one row each ``row_s``: those of a stretch of time, one at least."""
    first = int(start_s / row_s + 1e-6)
    last = max(first + 1, int(np.ceil(end_s / row_s - 1e-6)))
    return streams[first:last]


def examples(scene: Scene, streams: Array, row_s: float) -> Iterator[tuple[str, Array, bool]]:
    """A question, what is known of it, ``(size,)`` of the question's own, and the true answer."""
    if scene.music is not None:
        rows = pooled(streams, scene.music.start_s, scene.music.end_s, row_s)
        beginning = rows[: round(_BEGINNING_S / row_s)]
        known = [rows.mean(0), rows.std(0), beginning.mean(0)]
        yield "major", np.concatenate(known), scene.music.major
    for sound in scene.sounds:
        rows = pooled(streams, sound.start_s, sound.end_s + _TAIL_S, row_s)
        if len(rows):
            yield "near", np.concatenate([rows.mean(0), rows.max(0)]), sound.near
    if scene.speech is not None:
        rows = pooled(streams, scene.speech.start_s, scene.speech.end_s, row_s)
        yield "woman", rows.mean(0), scene.speech.gender == "woman"


class Probe:
    """A linear classifier by ridge regression on rows of unit variance; the bias is not held."""

    def __init__(self, rows: Array, labels: NDArray[np.bool_], ridge: float) -> None:
        """Learn from ``rows (n, size)``, ``labels (n,)``."""
        self._mean, self._scale = rows.mean(0), rows.std(0) + 1e-6
        scaled, target = self._scaled(rows), np.where(labels, 1.0, -1.0)
        self._bias = target.mean()
        moments = scaled.T @ scaled + ridge * np.eye(rows.shape[1])
        self._weights = np.linalg.solve(moments, scaled.T @ (target - self._bias))

    def __call__(self, rows: Array) -> NDArray[np.bool_]:
        """The answers, ``(n,)``."""
        answers: NDArray[np.bool_] = self._scaled(rows) @ self._weights + self._bias > 0
        return answers

    def _scaled(self, rows: Array) -> Array:
        return (rows - self._mean) / self._scale


def summarize(
    learnt: Sequence[tuple[str, Array, bool]], tested: Sequence[tuple[str, Array, bool]]
) -> list[dict[str, Any]]:
    """A row a question and ridge: how many examples, and the shares that are right."""
    found = []
    for question in QUESTIONS:
        (rows, labels), (others, truth) = (_of(question, of) for of in (learnt, tested))
        for ridge in _RIDGES:
            probe = Probe(rows, labels, ridge)
            found.append(
                {
                    "question": question,
                    "ridge": ridge,
                    "n_learnt": len(rows),
                    "n_tested": len(others),
                    "learnt": float((probe(rows) == labels).mean()),
                    "tested": float((probe(others) == truth).mean()),
                    "more_frequent": float(max(truth.mean(), 1 - truth.mean())),
                }
            )
    return found


def _of(
    question: str, examples: Sequence[tuple[str, Array, bool]]
) -> tuple[Array, NDArray[np.bool_]]:
    of = [(known, answer) for name, known, answer in examples if name == question]
    return np.array([known for known, _ in of], np.float64), np.array([answer for _, answer in of])


def _read(options: argparse.Namespace, folders: Sequence[Path]) -> list[tuple[str, Array, bool]]:
    model = load(options.checkpoint)
    weights = hashlib.sha256((options.checkpoint / WEIGHTS_FILE).read_bytes()).hexdigest()
    found: list[tuple[str, Array, bool]] = []
    for folder in folders:
        dataset = WorldDataset(folder, options.clips)
        data = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        streams = cache_streams(
            model, dataset, options.cache / data, fingerprint=f"{weights} {len(dataset)}"
        )
        for index in range(len(dataset)):
            rows = streams.streams(index)
            found += examples(dataset.scene(index), rows, model.config.runtime.row_s)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--learn", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--test", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--clips", type=int, help="of each split, in whole shards")
    parser.add_argument("--cache", type=Path, default=Path(".cache/probe"), metavar="DIR")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        rows = summarize(_read(options, options.learn), _read(options, options.test))
        print(
            "| question | ridge | learnt from | right of them | tested on | right | more frequent |"
        )
        print("|---" * 7 + "|")
        for row in rows:
            print(
                f"| {row['question']} | {row['ridge']:g} | {row['n_learnt']} "
                f"| {row['learnt']:.1%} | {row['n_tested']} | {row['tested']:.1%} "
                f"| {row['more_frequent']:.1%} |"
            )
        if options.save:
            command = command_line("benchmarks.probe", given)
            write_result(options.save, "probe", command, {"rows": rows})
    except TinyGiantError as error:
        print(f"benchmarks.probe: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
