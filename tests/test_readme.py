"""What the README shows is what happens: its examples are run, with the model that is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLIP = ROOT / "examples" / "tiger-and-birds.flac"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("") for line in block.splitlines()]
    # Those of the public models need a checkpoint that is not here.
    return [line for line in lines if re.match(r"(cat \S+ \| )?tg-run [^:]", line + " ")
            and not line.startswith("tg-run:") and "--bundle mizar" not in line]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the clip that the examples ask about."""
    samples, rate_hz = soundfile.read(CLIP)
    soundfile.write(tmp_path / "street.wav", samples, rate_hz)
    return tmp_path


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if k != "TINYGIANT_BUNDLE"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment | {"PATH": path, "XDG_STATE_HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_there_are_examples() -> None:
    assert len(commands()) >= 4 and len(blocks("python")) == 1


@pytest.mark.parametrize("command", commands())
def test_every_tg_run_example_runs(folder: Path, command: str) -> None:
    done = run(folder, ["bash", "-o", "pipefail", "-c", command])
    assert done.returncode == 0, done.stderr
    assert done.stdout or "# a conversation" in command


def test_the_python_example_runs(folder: Path) -> None:
    done = run(folder, [sys.executable, "-c", blocks("python")[0]])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] in ("a dog", "a siren")


def test_the_demo_prints_what_is_shown() -> None:
    """Line by line, but for times."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defaults = dict(re.findall(r"^DEMO_(\w+) \?= (.*)$", makefile, re.MULTILINE))
    first, second = defaults["QUESTION"], defaults["SECOND"]
    shown = next(block for block in blocks("") if block.startswith("tg-run: "))
    asked = run(ROOT, ["tg-run", defaults["CLIP"], first])
    again = run(ROOT, ["tg-run", "-q", defaults["CLIP"], second])
    assert (asked.returncode, again.returncode) == (0, 0), asked.stderr + again.stderr

    def lines(text: str) -> list[str]:
        """Without blank ones; notes without their numbers, in any order among the others."""
        found = [line for line in text.splitlines() if line.strip()]
        return sorted(re.sub(r"[\d.]+", "0", x) if x.startswith("tg-run:") else x for x in found)

    assert lines(asked.stderr + asked.stdout + second + "\n" + again.stdout) == lines(shown)
    assert "<" not in asked.stdout and first in README
