"""The example with Ray Data, on a local Ray; skipped where Ray is not installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.runtime import TinyGiant

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ray_batch.py"
Tone = Callable[[float, int], NDArray[np.float32]]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'ray[data]'"
)


def test_a_local_ray_answers_as_the_library_does(
    tiny: TinyGiant, tiny_bundle: Path, tone: Tone, tmp_path: Path
) -> None:
    rows = []
    for number in range(12):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, tone(0.4 + number / 10, 16_000), 16_000)
        choices = ["a dog", "a siren"] if number % 2 else None
        rows.append({"audio": str(path), "question": f"What {number}?", "choices": choices})
    rows.append({"audio": "missing.wav", "question": "What?", "choices": None})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(EXAMPLE), str(questions), str(tmp_path / "out")]
    options = ["--bundle", str(tiny_bundle), "--max-new-tokens", "4"]
    small = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(2**27),
    }
    done = subprocess.run(
        [*command, *options],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | small,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    found = {}
    for file in (tmp_path / "out").glob("*.json*"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            found[row["audio"]] = row
    assert len(found) == 13
    for row in rows[:-1]:
        want = tiny.ask(row["audio"], row["question"], row["choices"], max_new_tokens=4)
        assert (found[row["audio"]]["answer"], found[row["audio"]]["error"]) == (want.text, None)
    assert found["missing.wav"]["answer"] is None
    assert found["missing.wav"]["error"].startswith("AudioError: missing.wav: no such file")
