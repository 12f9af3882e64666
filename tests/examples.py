"""``python -m tests.examples``: run every ``$`` command of examples/README.md and compare.

What a command prints, to either stream, must be what the README shows, but for times. ``--write``
puts what is printed there instead.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

__all__ = ["README", "expected", "main", "printed", "without_times"]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "examples" / "README.md"
_SHOWN = re.compile(r"^\$ (.+)\n((?:(?!\$ |```).*\n)*)", re.MULTILINE)


def expected(text: str) -> list[tuple[str, str]]:
    """Every command of a document and what it shows below it, up to the next one."""
    return [(command, output.strip("\n")) for command, output in _SHOWN.findall(text)]


def printed(command: str) -> str:
    """What a command prints in the repository's root, with the programs of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "TINYGIANT_BUNDLE"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} 2>&1"],
        cwd=ROOT,
        env=environment | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def without_times(text: str) -> str:
    """The text with every duration of a computation, and what follows from it, as one letter."""
    text = re.sub(r"\d+(\.\d+)? ?(ms|s)\b", "T", text)
    return re.sub(r"\d+(\.\d+)?(?= a second)", "N", text)


def main(arguments: list[str]) -> int:
    """Compare, or write; returns 0 if everything is as shown."""
    text = README.read_text(encoding="utf-8")
    differing = 0
    for command, shown in expected(text):
        found = printed(command)
        if without_times(found) != without_times(shown):
            differing += 1
            print(f"$ {command}\n--- shown\n{shown}\n--- printed\n{found}\n")
            text = text.replace(f"$ {command}\n{shown}\n" if shown else f"$ {command}\n",
                                f"$ {command}\n{found}\n")  # fmt: skip
    if "--write" in arguments:
        README.write_text(text, encoding="utf-8")
        return 0
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
