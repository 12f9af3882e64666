"""How far apart two of this process's processors lie: how long a byte takes there and back.

    python -m benchmarks.cores

Processors that share a cache pass it on within some tens of nanoseconds (and as many for Python's
own loop); those of two chiplets or sockets take a few times as long, and everything that two
threads share waits for it. A virtual machine's processors are moved between chiplets while it
runs, so a figure of two threads holds for where they lay: ``benchmarks.turns`` looks each round.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["apart_ns", "main"]

_ROUNDS = 3000
_MOST_SPINS = 100_000_000  # some seconds
_PINNABLE = hasattr(os, "sched_setaffinity") and hasattr(os, "fork")
_ROOT = Path(__file__).resolve().parent.parent


def apart_ns() -> float | None:
    """Nanoseconds between the first and the last processor and back; None where it can't be told.

    It is measured in processes of their own, because this one may have threads and a lock on them.
    """
    if not _two_processors():
        return None
    command = [sys.executable, "-m", "benchmarks.cores"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> int:
    """Print the figure alone."""
    processors = _two_processors()
    if not processors:
        print("benchmarks.cores: there are no two processors to choose", file=sys.stderr)
        return 1
    print(_there_and_back_ns(*processors))
    return 0


def _two_processors() -> tuple[int, ...]:
    """The first and the last that this process may use; none where there are no two to choose."""
    usable = sorted(os.sched_getaffinity(0)) if _PINNABLE else []
    return (usable[0], usable[-1]) if len(usable) > 1 else ()


def _there_and_back_ns(first: int, second: int) -> float:
    """The tenth percentile: a processor that does something else now and then is not far away.

    Raises:
        TimeoutError: the other processor was not heard of for seconds.
    """
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    if child == 0:
        try:
            os.sched_setaffinity(0, {second})
            for _ in range(_ROUNDS):
                _wait_for(shared, 1)
                shared[0] = 2
        finally:
            os._exit(0)
    os.sched_setaffinity(0, {first})
    taken = []
    for _ in range(_ROUNDS):
        start = time.perf_counter_ns()
        shared[0] = 1
        _wait_for(shared, 2)
        taken.append(time.perf_counter_ns() - start)
    os.waitpid(child, 0)
    return sorted(taken)[_ROUNDS // 10]


def _wait_for(shared: mmap.mmap, value: int) -> None:
    # Bounded: of two processes one may be ended, and the other would spin for ever.
    for _ in range(_MOST_SPINS):
        if shared[0] == value:
            return
    raise TimeoutError(f"no answer within {_MOST_SPINS} looks")


if __name__ == "__main__":
    raise SystemExit(main())
