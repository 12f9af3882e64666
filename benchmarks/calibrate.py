"""``python -m benchmarks.calibrate``: how sure a model should say it is of a choice.

Asks a split's questions with choices and without a thought, and fits the one number by which the
log-likelihoods of choices are to be divided: ``choice_temperature`` of the checkpoint's
``config.json``. It changes no answer. The last line of the output is one line of JSON.

    python -m benchmarks.calibrate --meta data/world/validation --bundle bundles/nano
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.predictions import meta_file, read_items
from benchmarks.scoring import calibration_error
from tinygiant.runtime import load
from tinygiant.runtime.errors import TinyGiantError, UsageError
from tinygiant.runtime.text import one_line

__all__ = ["fit_temperature", "main"]

_TEMPERATURES = np.geomspace(0.25, 8.0, 281)


def fit_temperature(
    probabilities: Sequence[NDArray[np.float64]], right: Sequence[int]
) -> tuple[float, list[float]]:
    """The temperature of the least mean negative log-likelihood of the right choices.

    Args:
        probabilities: of each question's choices, at temperature 1.
        right: index of the right choice of each question.

    Returns:
        The temperature, to 2.5 %, and the probability of each question's likeliest choice at it.
    """
    logs = [np.log(p + 1e-300) for p in probabilities]

    def shares(temperature: float) -> list[NDArray[np.float64]]:
        raised = [np.exp((row - row.max()) / temperature) for row in logs]
        return [row / row.sum() for row in raised]

    def loss(temperature: float) -> float:
        found = zip(shares(temperature), right, strict=True)
        return -float(np.mean([np.log(row[k] + 1e-300) for row, k in found]))

    best = min(_TEMPERATURES.tolist(), key=loss)
    return best, [float(row.max()) for row in shares(best)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, fit and print; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate", description=__doc__)
    parser.add_argument("--meta", type=Path, required=True, help="a split's folder, or its file")
    parser.add_argument("--bundle", type=Path, help="the embedded one if left out")
    parser.add_argument("--limit", type=int, help="so many questions")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        print(json.dumps(_calibrate(options)))
    except TinyGiantError as error:
        print(f"calibrate: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


def _calibrate(options: argparse.Namespace) -> dict[str, float]:
    items = [item for item in read_items(options.meta) if not item.open][: options.limit]
    if not items:
        raise UsageError(f"{options.meta} has no question with choices")
    model = load(options.bundle, threads=options.threads)
    given = model.config.choice_temperature
    folder = meta_file(options.meta).parent
    found, right = [], []
    for item in items:
        answer = model.ask(folder / item.audio_path, item.question, item.choices, think=False)
        if answer.choice_probabilities is None:
            raise UsageError(f"{model.config.name} gives no probabilities of choices")
        # At temperature 1, whatever the bundle divides by.
        raised = np.array(answer.choice_probabilities) ** given
        found.append(raised / raised.sum())
        right.append(list(item.choices).index(item.answer))
    hits = [int(row.argmax()) == k for row, k in zip(found, right, strict=True)]
    temperature, sure = fit_temperature(found, right)
    return {
        "n": len(items),
        "right": float(np.mean(hits)),
        "calibration_error_at_1": calibration_error([float(row.max()) for row in found], hits),
        "choice_temperature": round(temperature, 2),
        "calibration_error": calibration_error(sure, hits),
    }


if __name__ == "__main__":
    sys.exit(main())
