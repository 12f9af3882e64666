"""What the runtime gives back: which mappings it may drop, and that nothing is lost by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tinygiant.runtime import load
from tinygiant.runtime.ort import sessions
from tinygiant.runtime.ort.sessions import unchanged_mappings

SMAPS = """\
7f0000000000-7f0000004000 rw-p 00000000 fe:00 12                         /b/onnx/g.onnx.data
Rss:                  12 kB
Anonymous:             0 kB
AnonHugePages:         0 kB
7f0000008000-7f000000c000 rw-p 00000000 fe:00 12                         /b/onnx/g.onnx.data
Rss:                  12 kB
Anonymous:             4 kB
7f0000010000-7f0000012000 r--p 00000000 fe:00 13                         /b-other/lib.so
Rss:                   8 kB
Anonymous:             0 kB
7f0000020000-7f0000030000 rw-p 00000000 00:00 0
Rss:                  64 kB
Anonymous:             0 kB
"""


def test_only_unchanged_pages_of_the_bundle_may_go() -> None:
    assert unchanged_mappings(SMAPS, Path("/b")) == {(0x7F0000000000, 0x7F0000004000)}


@pytest.mark.skipif(sessions.sys.platform != "linux", reason="madvise")
def test_answers_are_the_same_after_everything_was_given_back(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).standard_normal(8_000).astype(np.float32)
    clip = (0.1 * noise, 16_000)
    expected = load(tiny_bundle, threads=1).ask(clip, "What is heard?", max_new_tokens=8)
    monkeypatch.setattr(sessions, "_LARGE_BUNDLE_BYTES", 0)
    monkeypatch.setattr(sessions, "_LARGE_INPUT_BYTES", 0)
    for memory in ("default", "low"):
        model = load(tiny_bundle, threads=1, memory=memory)
        for _ in range(2):
            found = model.ask(clip, "What is heard?", max_new_tokens=8)
            assert found.raw_text == expected.raw_text
