"""``python -m tests.examples``: run every ``$`` command of the documents below and compare.

What a command prints, to either stream, must be what the document shows, but for times and JSON's
numbers with a fraction. ``--write`` puts what is printed there instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

__all__ = [
    "DOCUMENTS",
    "README",
    "ROOT",
    "as_shown",
    "comparable",
    "expected",
    "furnish",
    "main",
    "printed",
]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "examples" / "README.md"
# Its commands run in the repository's root, those of the others in a folder of their own.
DOCUMENTS = (README, ROOT / "docs" / "usage.md", ROOT / "docs" / "batch.md")
_SHOWN = re.compile(r"^\$ (.+)\n((?:(?!\$ |```).*\n)*)", re.MULTILINE)
_CLIP = ROOT / "examples" / "tiger-and-birds.flac"
# What they print depends on the machine's devices.
_NOT_HERE = ("--mic",)


def furnish(folder: Path) -> None:
    """Put the files there that the commands of docs/ speak of."""
    shutil.copy(_CLIP, folder)
    (folder / "twice.flac").write_bytes(2 * _CLIP.read_bytes())
    soundfile.write(folder / "long.wav", np.zeros(100 * 8_000), 8_000, subtype="PCM_16")
    (folder / "clips").mkdir()
    shutil.copy(_CLIP, folder / "clips")
    (folder / "clips" / "broken.wav").write_bytes(b"no sound")


def expected(text: str) -> list[tuple[str, str]]:
    """Every command of a document and what it shows below it, up to the next one."""
    return [
        (command, output.strip("\n"))
        for command, output in _SHOWN.findall(text)
        if not any(word in command for word in _NOT_HERE)
    ]


def printed(command: str, folder: Path = ROOT) -> str:
    """What a command prints in a folder, with the programs of this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "TINYGIANT_BUNDLE"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} 2>&1"],
        cwd=folder,
        env=environment | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def comparable(text: str) -> str:
    """The text without what no two runs share.

    Durations, and what follows from them, are one letter, and so are JSON's numbers with a
    fraction; a list of these that was cut off ends where it begins. Percentages stay.
    """
    text = re.sub(r"\d+(\.\d+)? ?(ms|s)\b", "T", text)
    text = re.sub(r"\d+(\.\d+)?(?= a second)", "N", text)
    text = re.sub(r"-?\d+\.\d+(e-?\d+)?\b(?! %)", "F", text)
    return re.sub(r"\[(F|[\d., -])+$", "[", text, flags=re.MULTILINE)


def as_shown(found: str, shown: str) -> str:
    """As much of ``found`` as a document shows: the lines before one of three dots."""
    lines = shown.splitlines()
    if lines and lines[-1] == "...":
        return "\n".join([*found.splitlines()[: len(lines) - 1], "..."])
    return found


def _compare(document: Path, write: bool) -> int:
    """How many commands of a document print something else; writes that down if asked to."""
    text = document.read_text(encoding="utf-8")
    differing = 0
    with tempfile.TemporaryDirectory() as scratch:
        furnish(Path(scratch))
        for command, shown in expected(text):
            found = printed(command, ROOT if document == README else Path(scratch))
            found = as_shown(found, shown)
            if comparable(found) != comparable(shown):
                differing += 1
                print(f"$ {command}\n--- shown\n{shown}\n--- printed\n{found}\n")
                text = text.replace(f"$ {command}\n{shown}\n" if shown else f"$ {command}\n",
                                    f"$ {command}\n{found}\n")  # fmt: skip
    if write:
        document.write_text(text, encoding="utf-8")
    return differing


def main(arguments: list[str]) -> int:
    """Compare, or write; returns 0 if everything is as shown."""
    write = "--write" in arguments
    differing = sum(_compare(document, write) for document in DOCUMENTS)
    return 1 if differing and not write else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
