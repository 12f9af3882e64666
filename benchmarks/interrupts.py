"""Ctrl-C at many moments of a command, from its first import on: one line, code 130, no traceback.

    python -m benchmarks.interrupts --moments 60

Each command is first run to its end (a server until it serves), which says how long it takes; then
as often as ``--moments`` says, with a SIGINT at moments spread evenly from the one in which Python
begins to import the command to its end. Right is the exit code 130 with ``PROGRAM: interrupted`` as
the last line of standard error, beside what is told on the way; a server or a sensor that was at
work may end that in order, with 130 as well; a question may be answered before, with code 0.
``early`` counts Python's own traceback before the program's first line could run. The last line
of the output is the report as JSON; the exit code is 1 if anything else came out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[1]
CLIP = ROOT / "examples" / "tiger-and-birds.flac"
# Program, its module, its arguments, and the words after which it goes on for ever.
COMMANDS: tuple[tuple[str, str, tuple[str, ...], str | None], ...] = (
    ("tg-run", "tinygiant.runtime.cli.main", (str(CLIP), "What is heard?"), None),
    ("tg-serve", "tinygiant.runtime.serve.start", ("--port", "0"), "http://"),
    ("tg-listen", "tinygiant.runtime.listen.start", ("-", "--pcm-rate", "16000"), "listening to"),
)


def main() -> int:
    """Interrupt every command; returns 0 if each ended as it should."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=60)
    parser.add_argument("--out", type=Path, help="write the report there as well")
    options = parser.parse_args()
    report = {name: interrupted(options.moments, name, *rest) for name, *rest in COMMANDS}
    text = json.dumps(report)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(found["wrong"] for found in report.values()))


def interrupted(
    moments: int, program: str, module: str, arguments: tuple[str, ...], ready: str | None
) -> dict[str, Any]:
    """What came of a SIGINT at each moment."""
    whole_s = max(duration_s(module, arguments, ready) for _ in range(3))
    outcomes: Counter[str] = Counter()
    wrong: list[dict[str, Any]] = []
    slowest_s = 0.0
    for moment in range(moments):
        after_s = whole_s * moment / moments
        with begun(module, arguments) as process:
            time.sleep(after_s)
            process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            told = process.communicate(timeout=60)[1].decode()
        slowest_s = max(slowest_s, time.monotonic() - sent)
        outcome = judged(process.returncode, told, program)
        outcomes[outcome] += 1
        if outcome == "wrong":
            wrong.append({"after_s": round(after_s, 3), "code": process.returncode, "told": told})
    return {
        "whole_s": round(whole_s, 2),
        **outcomes,
        "slowest_end_s": round(slowest_s, 2),
        "wrong": wrong,
    }


def judged(code: int, told: str, program: str) -> str:
    """How a command ended."""
    lines = told.splitlines()
    if "Traceback" in told:  # main() begins by taking care of interrupts
        is_early = lines[-1] == "KeyboardInterrupt" and ", in main\n" not in told
        return "early" if is_early else "wrong"
    if not all(line.startswith(f"{program}: ") for line in lines):
        return "wrong"
    if code == 130 and lines and lines[-1] == f"{program}: interrupted":
        return "interrupted"
    if code == 130 and program != "tg-run":  # it was serving, or listening, and ended that
        return "ended in order"
    return "finished" if code == 0 else "wrong"


class begun:
    """A command that is just about to import its program."""

    def __init__(self, module: str, arguments: tuple[str, ...]) -> None:
        """Start it and wait for that moment."""
        reader, writer = os.pipe()
        code = f"import os; os.write({writer}, b'.'); from {module} import main; exit(main())"
        self._popen = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(writer,),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)

    def __enter__(self) -> subprocess.Popen[bytes]:
        return self._popen

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.wait()


def duration_s(module: str, arguments: tuple[str, ...], ready: str | None) -> float:
    """How long a command takes to its end, or until it says that it is ready."""
    with begun(module, arguments) as process:
        start = time.monotonic()
        assert process.stderr is not None
        for line in process.stderr:
            if ready is not None and ready in line.decode():
                break
        return time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
