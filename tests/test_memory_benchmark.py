"""The memory benchmark adds up what the kernel reports, and runs in both modes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SMAPS = """\
7f0000000000-7f0000004000 rw-p 00000000 fe:00 12                         /b/onnx/g.onnx.data
Size:                 16 kB
Rss:                  12 kB
Pss:                   6 kB
Anonymous:             4 kB
VmFlags: rd mr mw me ac
7f0000010000-7f0000012000 r--p 00000000 fe:00 13                         /b-other/lib.so
Rss:                   8 kB
Pss:                   2 kB
Anonymous:             0 kB
7f0000020000-7f0000030000 rw-p 00000000 00:00 0
Rss:                  64 kB
Pss:                  64 kB
Anonymous:            64 kB
"""


def test_smaps_are_added_up_by_kind() -> None:
    found = memory.read_smaps(SMAPS, Path("/b"))
    # Of the 12 KiB of the bundle's mapping 4 are copies, counted as anonymous.
    assert found == {
        "rss": 84 * 1024,
        "pss": 72 * 1024,
        "anonymous": 68 * 1024,
        "bundle": 8 * 1024,
    }


def test_both_modes_and_every_stage_are_reported(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seconds", "0.5", "--new-tokens", "3", "--threads", "1"]
    assert memory.main(["--bundle", str(tiny_bundle), *options]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    asked = ["whisper_encoder", "htsat_encoder", "projector", "prefill", "decode"]
    again = [f"{stage}, second question" for stage in asked[2:]]
    other = [f"{stage}, second clip" for stage in asked]
    for mode in ("default", "low"):
        stages = data["modes"][mode]
        assert [row["stage"] for row in stages] == ["start", "load", *asked, *again, *other]
        for row in stages:
            parts = row["anonymous_bytes"] + row["bundle_bytes"] + row["other_files_bytes"]
            assert row["rss_bytes"] == parts
            assert row["pss_bytes"] <= row["rss_bytes"]
        assert data["peak_bytes"][mode] == max(row["peak_bytes"] for row in stages)
