"""Engines by turns: each in a process of its own, or in this one, while the others wait.

Whatever else a machine does then meets all alike. :func:`race` runs the rounds, in an order that is
rotated; what other programs compute meanwhile is measured, for a run on a busy machine is no
comparison.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "Here",
    "Runner",
    "WorkerError",
    "WorkerProcess",
    "busiest",
    "busy_jiffies",
    "busy_warning",
    "environment",
    "last_line",
    "median_ratio",
    "others_s",
    "process_jiffies",
    "race",
    "rotated",
]

ROOT = Path(__file__).resolve().parent.parent
SETTLE_S = 0.3  # threads that spin for a moment after their work come to rest
_BUSY_CORES = 0.2

Round = dict[str, Any]


def race(
    runners: Mapping[str, Runner],
    rounds: int,
    requests: Mapping[str, Round] | None = None,
    *,
    tell: Callable[[str], None] = lambda line: None,
    lost: Callable[[str, WorkerError], None] | None = None,
) -> dict[str, list[Round]]:
    """What each round of each engine took, after a first one that only warms up.

    Args:
        runners: the engines, loaded.
        rounds: rounds that count.
        requests: what to ask of an engine, beside the round's number as ``seed``.
        tell: is called with a line at each round's beginning.
        lost: is called with an engine that fails, which is then left out. Without it, all ends.

    Raises:
        WorkerError: an engine failed.
    """
    found: dict[str, list[Round]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        tell(f"round {number} of {rounds}")
        for name in rotated([*found], number):
            time.sleep(SETTLE_S)
            request = {} if requests is None else requests[name]
            try:
                found[name].append(runners[name].ask(request | {"seed": number}))
            except WorkerError as error:
                if lost is None:
                    raise
                lost(name, error)
                del found[name]
        if number == 0:
            for name in found:
                found[name].clear()
                runners[name].others_cores.clear()
    return found


def busiest(runners: Iterable[Runner]) -> float:
    """The most cores that other programs used in a round."""
    return max((cores for runner in runners for cores in runner.others_cores), default=0.0)


def rotated(items: Sequence[Any], by: int) -> list[Any]:
    """``items``, beginning with the one at ``by``."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def busy_jiffies(stat: str) -> int:
    """What all processors have computed, idling and waiting aside: of ``/proc/stat`` (proc(5))."""
    user, nice, system, _idle, _waiting, *others = map(int, stat.splitlines()[0].split()[1:9])
    return user + nice + system + sum(others)


def process_jiffies(stat: str) -> int:
    """What a process has computed, user and system: of ``/proc/PID/stat`` (proc(5))."""
    fields = stat.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def others_s(pid: int) -> float:
    """Seconds that processors have computed for other processes; 0 where nothing tells."""
    try:
        of_all = Path("/proc/stat").read_text(encoding="ascii")
        own = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or it has ended, which a worker's next read tells
        return 0.0
    return (busy_jiffies(of_all) - process_jiffies(own)) / os.sysconf("SC_CLK_TCK")


def busy_warning(others_cores: float) -> list[str]:
    """A line for the table if other programs used that many cores, none if they hardly did."""
    if others_cores <= _BUSY_CORES:
        return []
    return [
        f"NOT A COMPARISON: other programs used up to {others_cores:.1f} cores in a round; run it "
        "again on a quiet machine"
    ]


class WorkerError(Exception):
    """A worker that cannot be used; the message says why."""


class Runner(ABC):
    """An engine that does a round when it is asked, in the process ``pid``.

    Attributes:
        others_cores: how many cores other programs used, for each round.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.others_cores: list[float] = []

    @abstractmethod
    def answer(self, request: Round) -> Round:
        """What a round took."""

    def ask(self, request: Round) -> Round:
        """One round and what it took; other programs' work is kept."""
        before_s, start_s = others_s(self._pid), time.perf_counter()
        answer = self.answer(request)
        seconds = time.perf_counter() - start_s
        self.others_cores.append(max(others_s(self._pid) - before_s, 0.0) / seconds)
        return answer


class Here(Runner):
    """An engine in this process."""

    def __init__(self, answer: Callable[[Round], Round]) -> None:
        super().__init__(os.getpid())
        self._answer = answer

    def answer(self, request: Round) -> Round:
        """See :class:`Runner`."""
        return self._answer(request)


class WorkerProcess(Runner):
    """A worker: started, asked for rounds, ended."""

    def __init__(self, command: Sequence[str], log: Path, threads: int, timeout_s: float) -> None:
        self._log, self._timeout_s = log, timeout_s
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=environment(threads),
                text=True,
            )
        super().__init__(self._popen.pid)
        self.started: Round = {}
        self.peak_rss_bytes = 0

    def wait_until_loaded(self) -> None:
        """Return when the worker is ready; raises WorkerError if it ends first."""
        self.started = self._read()

    def answer(self, request: Round) -> Round:
        """See :class:`Runner`; raises WorkerError if the worker ends or is too slow."""
        assert self._popen.stdin is not None
        try:
            self._popen.stdin.write(json.dumps(request) + "\n")
            self._popen.stdin.flush()
        except OSError as error:
            raise WorkerError(self._reason()) from error
        return self._read()

    def _read(self) -> Round:
        assert self._popen.stdout is not None
        timer = threading.Timer(self._timeout_s, self._popen.kill)
        timer.start()
        try:
            line = self._popen.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(self._reason())
        answer: Round = json.loads(line)
        self.peak_rss_bytes = answer["peak_rss_bytes"]
        return answer

    def _reason(self) -> str:
        code = self._popen.wait()
        if code < 0:  # its last line would be of something else
            return f"died of {signal.Signals(-code).name}"
        return last_line(self._log) or f"ended with {code}"

    def close(self) -> None:
        """End the worker."""
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def last_line(log: Path) -> str:
    """The last line with text in it; empty if there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def environment(threads: int) -> dict[str, str]:
    """Offline, and the repository's root where ``benchmarks`` is found."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
