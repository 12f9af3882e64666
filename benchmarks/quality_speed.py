"""How fast decoders of one model are, ours and llama.cpp's, by turns: for ``benchmarks.quality``.

In every round each engine reads a prompt of 400 tokens and writes 64 more. Ours run in this
process, llama.cpp in one of its own for each kind, with flash attention and without; of these two
the faster one counts, for prompts and for tokens apart. An engine that waits computes nothing.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_workers import RuntimeDecoder
from benchmarks.turns import (
    Here,
    Runner,
    WorkerError,
    WorkerProcess,
    median_ratio,
    race,
    surroundings,
)
from tinygiant.runtime.errors import MissingDependencyError

__all__ = ["BASELINE", "race_decoders", "summarize"]

BASELINE = "llama.cpp-Q8_0"
PROMPT_TOKENS, STEPS = 400, 64
_FLASH = "-flash"

Rounds = Mapping[str, Sequence[Mapping[str, float]]]


def race_decoders(
    ours: Mapping[str, RuntimeDecoder],
    peers: Mapping[str, Path],
    python: Path,
    *,
    rounds: int,
    threads: int,
) -> tuple[dict[str, list[dict[str, float]]], dict[str, Any]]:
    """Seconds of each round by engine, and how many cores other programs used at the most.

    Args:
        ours: decoders that this process runs.
        peers: folders with a ``model.gguf`` each.
        python: the Python that has llama.cpp.
        rounds: rounds that count; one more goes before them.
        threads: threads of every engine.

    Raises:
        MissingDependencyError: llama.cpp fails.
    """
    request = {"prompt_tokens": PROMPT_TOKENS, "steps": STEPS}
    runners: dict[str, Runner] = {name: Here(of.round) for name, of in ours.items()}
    try:
        with contextlib.ExitStack() as stack:
            for name, folder in peers.items():
                for flash in ("", _FLASH):
                    command = [str(python), "-m", "benchmarks.peer_workers", f"llama.cpp{flash}"]
                    command += ["--model", str(folder), "--threads", str(threads)]
                    worker = WorkerProcess(command, folder / f"log{flash}.txt", threads, 600)
                    stack.callback(worker.close)
                    worker.wait_until_loaded()
                    runners[name + flash] = worker
            found = race(runners, rounds, dict.fromkeys(runners, request))
    except WorkerError as error:
        raise MissingDependencyError(f"llama.cpp: {error}") from error
    return found, surroundings(runners.values())


def summarize(rounds: Rounds) -> dict[str, dict[str, Any]]:
    """Tokens a second of each engine, and their ratio to llama.cpp's Q8_0, by stage.

    Figures are medians over the rounds; a ratio is the median of the rounds' ratios.
    """
    n_tokens = {"prefill": PROMPT_TOKENS, "decode": STEPS}
    rows: dict[str, dict[str, Any]] = {}
    for stage, count in n_tokens.items():
        rates = {name: [count / of[f"{stage}_s"] for of in all_] for name, all_ in rounds.items()}
        for name in [name for name in rates if name.endswith(_FLASH)]:
            flash, plain = rates.pop(name), name.removesuffix(_FLASH)
            rates[plain] = max(rates[plain], flash, key=statistics.median)
        for name, of in rates.items():
            row = rows.setdefault(name, {})
            row[f"{stage}_tokens_per_s"] = statistics.median(of)
            row[f"{stage}_range"] = [min(of), max(of)]
            if BASELINE in rates:
                row[f"{stage}_of_q8_0"] = median_ratio(of, rates[BASELINE])
    return rows
