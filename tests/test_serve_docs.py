"""The requests of docs/serving.md, as they are written there, with the model that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.serve_stub import Live, live
from tinygiant.runtime import TinyGiant, load

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


CLIP = ROOT / "examples" / "tiger-and-birds.flac"


@pytest.fixture(scope="module")
def model() -> TinyGiant:
    return load(threads=1)


@pytest.fixture(scope="module")
def server(model: TinyGiant) -> Iterator[Live]:
    with live(model) as running:
        yield running


def examples(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)


def run(server: Live, *command: str) -> str:
    code = command[-1].replace("http://127.0.0.1:8517", server.url)
    done = subprocess.run(
        [*command[:-1], code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_examples(server: Live, model: TinyGiant) -> None:
    whole, short = examples("sh")
    assert '"content":"tiger"' in run(server, "bash", "-c", whole)
    answer = model.ask(CLIP, "What animal is heard in the speech?").text
    assert run(server, "bash", "-c", short) == f"{answer}\n"


def test_the_client_s_example(server: Live) -> None:
    (code,) = examples("python")
    assert run(server, sys.executable, "-c", code) in ("bird chirp\n", "speech\n")


def test_the_example_of_the_page_is_answered_right(model: TinyGiant) -> None:
    example = ROOT / "runtime" / "serve" / "example.mp3"
    choices = ["monkey", "tiger", "spider", "rabbit"]
    answer = model.ask(example, "What animal is heard in the speech?", choices)
    assert answer.text == "tiger"
    # It is the clip of examples/, which says how it was made.
    ours, theirs = (soundfile.read(path)[0] for path in (example, CLIP))
    n_samples = min(len(ours), len(theirs))
    assert np.corrcoef(ours[:n_samples], theirs[:n_samples])[0, 1] > 0.95
