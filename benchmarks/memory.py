"""The memory of a question, stage by stage, and its parts.

    python -m benchmarks.memory [--bundle DIR] [--seconds 30] [--modes default low] [--save NAME]

Every mode runs in a process of its own. The peak of a stage is the most that was resident while it
ran; the other figures are what is resident at its end: anonymous memory (the heap, with the copies
of weights that onnxruntime has packed for its kernels), pages of the bundle's files, pages of other
files (programs and libraries), and the share that is this process's alone (PSS counts a page that
n processes map as 1/n). The clip is seeded noise. The last line printed is one JSON object.

Linux only: the figures are the kernel's (proc(5): smaps, and clear_refs, which resets the peak).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import command_line, write_result
from tinygiant.runtime import TinyGiantError
from tinygiant.runtime.bundle import Bundle, default_bundle_path
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.events import PromptRead
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import Graph, SessionSettings
from tinygiant.runtime.pipeline import TinyGiant

__all__ = ["Stage", "main", "measure", "read_smaps"]

_RATE_HZ = 16_000
_QUESTION = "What is heard in this recording?"
_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Stage:
    """Resident bytes: the peak of a stage, and the parts at its end."""

    stage: str
    seconds: float
    peak_bytes: int
    rss_bytes: int
    anonymous_bytes: int
    bundle_bytes: int
    other_files_bytes: int
    pss_bytes: int


def read_smaps(text: str, root: Path) -> dict[str, int]:
    """Bytes in ``/proc/PID/smaps``: rss, pss, anonymous, and bundle, files below ``root``."""
    sums = dict.fromkeys(("rss", "pss", "anonymous", "bundle"), 0)
    of_bundle = False
    for line in text.splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):  # "7f00-7f10 r--p 00000000 fe:00 123    /path"
            fields = line.split(maxsplit=5)
            of_bundle = len(fields) == 6 and Path(fields[5]).is_relative_to(root)
            continue
        kind = key[:-1].lower()
        if kind in ("rss", "pss", "anonymous"):
            size_bytes = 1024 * int(rest.split()[0])
            sums[kind] += size_bytes
            if of_bundle and kind != "pss":  # a copied page is anonymous
                sums["bundle"] += size_bytes if kind == "rss" else -size_bytes
    return sums


class _Meter:
    """Reads this process's memory at the end of each stage."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.stages: list[Stage] = []
        self.suffix = ""
        self._begin()

    def end(self, stage: str) -> None:
        """What was used since the last end counts for ``stage``."""
        seconds = time.perf_counter() - self._start
        status = (_PROCESS / "status").read_text(encoding="ascii", errors="replace")
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        smaps = (_PROCESS / "smaps").read_text(encoding="utf-8", errors="replace")
        found = read_smaps(smaps, self._root)
        self.stages.append(
            Stage(
                stage + self.suffix,
                seconds,
                1024 * int(peak.split()[1]),
                found["rss"],
                found["anonymous"],
                found["bundle"],
                found["rss"] - found["anonymous"] - found["bundle"],
                found["pss"],
            )
        )
        self._begin()

    def _begin(self) -> None:
        (_PROCESS / "clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        self._start = time.perf_counter()


class _WatchedPool(GraphPool):
    """Ends a stage when an encoder or the projector has been used."""

    def watch(self, meter: _Meter) -> None:
        """Tell ``meter`` from now on."""
        self._meter = meter

    @contextmanager
    def use(self, name: str) -> Iterator[Graph]:
        with super().use(name) as graph:
            yield graph
        if self._bundle.config.graphs[name] != "decoder":
            self._meter.end(name)


def measure(
    path: Path, mode: str, *, seconds: float, threads: int, new_tokens: int
) -> list[dict[str, Any]]:
    """The stages of two questions about a clip, and of one about another, in this fresh process."""
    bundle = Bundle.open(path, verify=False)
    meter = _Meter(bundle.root)
    meter.end("start")
    pool = _WatchedPool(bundle, SessionSettings(threads=threads), keep=mode == "default")
    pool.watch(meter)
    model = TinyGiant(bundle, pool)
    pool.load_all()
    pool.release()
    meter.end("load")
    for seed, question in ((0, ""), (0, ", second question"), (1, ", second clip")):
        noise = np.random.default_rng(seed).standard_normal(round(seconds * _RATE_HZ))
        clip = ((0.1 * noise).astype(np.float32), _RATE_HZ)
        meter.suffix = question
        events = model.stream(
            clip, _QUESTION, max_new_tokens=new_tokens, max_audio_s=3600, raw=True
        )
        for event in events:
            if isinstance(event, PromptRead):
                meter.end("prefill")
        meter.end("decode")
    return [asdict(stage) for stage in meter.stages]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="default: the built-in one")
    parser.add_argument("--seconds", type=float, default=30, metavar="S")
    parser.add_argument("--threads", type=int, default=2)
    modes_known = ("default", "low")
    parser.add_argument("--modes", nargs="+", choices=modes_known, default=modes_known)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        if not (_PROCESS / "clear_refs").exists():
            raise UsageError("memory is read from /proc, which this system lacks: use Linux")
        bundle = Bundle.open(options.bundle or default_bundle_path())
        modes = {}
        for mode in options.modes:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                keywords = {
                    "seconds": options.seconds,
                    "threads": options.threads,
                    "new_tokens": options.new_tokens,
                }
                modes[mode] = pool.apply(measure, (bundle.root, mode), keywords)
        data = {
            "model": bundle.config.name,
            "recipe": bundle.manifest.recipe.name,
            "weights": bundle.manifest.source.weights,
            "threads": options.threads,
            "seconds": options.seconds,
            "peak_bytes": {
                mode: max(stage["peak_bytes"] for stage in stages) for mode, stages in modes.items()
            },
            "modes": modes,
        }
        print(_table(data))
        if options.save:
            write_result(options.save, "memory", command_line("benchmarks.memory", given), data)
    except TinyGiantError as error:
        print(f"benchmarks.memory: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data))
    return 0


def _table(data: dict[str, Any]) -> str:
    columns = ("peak", "rss", "anonymous", "bundle", "other_files", "pss")
    lines = [
        f"{data['model']} {data['recipe']} ({data['weights']}), {data['threads']} threads, "
        f"clip of {data['seconds']:g} s; MiB",
    ]
    for mode, stages in data["modes"].items():
        lines += [
            "",
            f"memory {mode}: peak {data['peak_bytes'][mode] / 2**20:.0f} MiB",
            "",
            "| stage | peak | resident at its end | anonymous | bundle | other files | PSS |",
            "|---" * 7 + "|",
        ]
        for stage in stages:
            cells = [f"{stage[f'{column}_bytes'] / 2**20:.0f}" for column in columns]
            lines.append(f"| {stage['stage']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
