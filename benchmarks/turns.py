"""Engines by turns: each in a process of its own, or in this one, while the others wait.

Whatever else a machine does then meets all alike. :func:`race` runs the rounds, in an order that is
rotated; what other programs compute meanwhile is measured, for a run on a busy machine is no
comparison, and how far apart the processors lie, for a virtual machine's are moved.
"""

from __future__ import annotations

import contextlib
import itertools
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

from benchmarks.cores import apart_ns

__all__ = [
    "Here",
    "Runner",
    "WorkerError",
    "WorkerProcess",
    "busy_jiffies",
    "environment",
    "joined",
    "last_line",
    "median_ratio",
    "others_s",
    "process_jiffies",
    "race",
    "rotated",
    "surroundings",
    "surroundings_lines",
]

ROOT = Path(__file__).resolve().parent.parent
SETTLE_S = 0.3  # threads that spin for a moment after their work come to rest
_BUSY_CORES = 0.2
_MOVED = 1.5  # of the least distance seen: within a chiplet it varies by a third, across by more
_MOST_ROUNDS = 3  # times those asked for, while processors lie apart

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

    A round in which the processors lay farther apart than in another does not count, and is run
    again. If that holds for every round, all count, and :func:`surroundings_lines` says so.

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
    for number in range(_MOST_ROUNDS * rounds + 1):
        near = _near([runners[name] for name in found]) if number else []
        if len(near) == rounds or not found:
            break
        tell(f"round {number}, {len(near)} of {rounds} done")
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
                runners[name].apart_ns.clear()
    near = _near([runners[name] for name in found])
    return {
        name: [done[number] for number in near or range(len(done))] for name, done in found.items()
    }


def _near(runners: Sequence[Runner]) -> list[int]:
    """The rounds in which the processors lay as near to each other as they ever did."""
    rounds = zip(*(runner.apart_ns for runner in runners), strict=True)
    farthest = [max(itertools.chain(*of)) for of in rounds]
    limit = _MOVED * min(_distances(runners), default=0.0)
    return [number for number, ns in enumerate(farthest) if ns <= limit]


def _distances(runners: Sequence[Runner]) -> list[float]:
    return [ns for runner in runners for seen in runner.apart_ns for ns in seen]


def surroundings(runners: Iterable[Runner]) -> dict[str, Any]:
    """For a result: what else the machine did while ``runners`` ran.

    ``others_cores``: the most cores that other programs used in a round. ``cores_apart``: the least
    and the most nanoseconds between the processors, how many rounds counted (which may be fewer
    than were asked for), how many did not because they lay apart, and how many count although they
    were moved.
    """
    of = [*runners]
    if not of:
        return {}
    seen = _distances(of)
    n_rounds, n_near = len(of[0].apart_ns), len(_near(of))
    return {
        "others_cores": max((cores for one in of for cores in one.others_cores), default=0.0),
        "cores_apart": {
            "least_ns": min(seen, default=0.0),
            "most_ns": max(seen, default=0.0),
            "rounds_counted": n_near or n_rounds,
            "rounds_not_counted": n_rounds - n_near if n_near else 0,
            "rounds_moved": 0 if n_near else n_rounds,
        },
    }


def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The :func:`surroundings` of two races; either may be empty."""
    if not one or not other:
        return dict(one or other)
    first, second = one["cores_apart"], other["cores_apart"]
    return {
        "others_cores": max(one["others_cores"], other["others_cores"]),
        "cores_apart": {
            "least_ns": min(first["least_ns"], second["least_ns"]),
            "most_ns": max(first["most_ns"], second["most_ns"]),
            **{key: first[key] + second[key] for key in first if key.startswith("rounds_")},
        },
    }


def surroundings_lines(data: Mapping[str, Any]) -> list[str]:
    """Lines for the table about a result's :func:`surroundings`; none if nothing has to be said."""
    lines = []
    if (cores := data.get("others_cores", 0.0)) > _BUSY_CORES:
        lines.append(
            f"NOT A COMPARISON: other programs used up to {cores:.1f} cores in a round; run it "
            "again on a quiet machine"
        )
    apart = data.get("cores_apart", {})
    for key, what in (
        ("rounds_not_counted", f"rounds did not count, {apart.get('rounds_counted')} did"),
        ("rounds_moved", "rounds are NOT A COMPARISON, run them again"),
    ):
        if apart.get(key):
            lay = f"{apart['least_ns']:.0f} to {apart['most_ns']:.0f} ns"
            lines.append(f"{apart[key]} {what}: processors lay {lay} apart and were moved")
    return lines


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


class WorkerError(Exception):
    """A worker that cannot be used; the message says why."""


class Runner(ABC):
    """An engine that does a round when it is asked, in the process ``pid``.

    Attributes:
        others_cores: how many cores other programs used, for each round.
        apart_ns: how far apart the processors lay before and after each round; 0 where that cannot
            be told.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.others_cores: list[float] = []
        self.apart_ns: list[tuple[float, float]] = []

    @abstractmethod
    def answer(self, request: Round) -> Round:
        """What a round took."""

    def ask(self, request: Round) -> Round:
        """One round and what it took; other programs' work is kept."""
        before_ns = apart_ns() or 0.0
        before_s, start_s = others_s(self._pid), time.perf_counter()
        answer = self.answer(request)
        seconds = time.perf_counter() - start_s
        self.others_cores.append(max(others_s(self._pid) - before_s, 0.0) / seconds)
        self.apart_ns.append((before_ns, apart_ns() or 0.0))
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
