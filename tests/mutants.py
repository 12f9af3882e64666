"""``make mutants``: damage the code in known ways, and see that a test fails of each.

Each mutant is a fault that a reader could overlook, with the tests that are to notice it. A copy of
the repository is damaged, never the repository. A mutant counts as killed only if a test *failed*:
not if the tests could not be collected, and not if they ran out of time. Before anything is damaged
the same tests must pass. The texts that are replaced must occur exactly once: a mutant that no
longer fits the code is an error, not a success.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

__all__ = ["MUTANTS", "Mutant", "main"]

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600.0
FAILED = 1  # pytest's exit code where tests ran and some failed


@dataclass(frozen=True)
class Mutant:
    """A fault: in ``file`` the text ``old`` becomes ``new``; ``tests`` are to notice it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def problem(self, root: Path) -> str | None:
        """Why the mutant does not fit the code below ``root``; None if it does."""
        path = root / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        count = path.read_text(encoding="utf-8").count(self.old)
        return None if count == 1 else f"{self.old!r:.60} occurs {count} times in {self.file}"


def copy_repository(target: Path) -> Path:
    """The files that git knows or would take, below ``target``."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def run_tests(root: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """pytest's exit code below ``root``, None if it ran out of time, and its last line."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", *tests]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command,
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"no result after {TIMEOUT_S:.0f} s"
    lines = (run.stdout.strip() or run.stderr.strip()).splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    return run.returncode, (failed or lines or ["no output"])[-1]


def verdict(mutant: Mutant, root: Path) -> tuple[str, str]:
    """``killed``, ``survived`` or ``broken``, and why."""
    path = root / mutant.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, line = run_tests(root, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    if code == FAILED:
        return "killed", line
    return ("survived" if code == 0 else "broken"), line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every mutant whose name matches; 0 if all were killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="only names that match this pattern")
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tested at a time")
    options = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if re.search(options.pattern, mutant.name)]
    stale = [f"{m.name}: {problem}" for m in MUTANTS if (problem := m.problem(ROOT))]
    if stale or not chosen:
        print("\n".join(stale or [f"no mutant matches {options.pattern!r}"]), file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copies.put(copy_repository(Path(scratch) / str(number)))
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        code, line = run_tests(copy_repository(Path(scratch) / "sound"), tests)
        if code != 0:
            print(f"the tests do not pass on the sound code: {line}", file=sys.stderr)
            return 2

        def judge(mutant: Mutant) -> str:
            root, start = copies.get(), time.monotonic()
            try:
                found, line = verdict(mutant, root)
            finally:
                copies.put(root)
            spent_s = time.monotonic() - start
            print(f"{found:8} {mutant.name} ({spent_s:.0f} s): {line}", flush=True)
            return found

        with ThreadPoolExecutor(options.jobs) as executor:
            verdicts = list(executor.map(judge, chosen))
    n_killed = verdicts.count("killed")
    print(f"{n_killed} of {len(chosen)} mutants killed")
    return 0 if n_killed == len(chosen) else 1


MUTANTS: tuple[Mutant, ...] = ()


if __name__ == "__main__":
    sys.exit(main())
