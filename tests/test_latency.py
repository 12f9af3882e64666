"""The latency benchmark counts what the runtime says, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import latency


def test_the_last_line_holds_every_clip_and_stage(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seconds", "0.5", "31", "--rounds", "2", "--new-tokens", "3", "--threads", "1"]
    assert latency.main(["--bundle", str(tiny_bundle), *options]) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    short, long = data["rows"]
    assert (short["seconds"], long["seconds"]) == (0.5, 31)
    assert (short["heard_s"], long["heard_s"]) == (0.5, 31)
    dropped = data | {"rows": [short, long | {"heard_s": 20.0}]}
    first, second = latency._table(dropped).splitlines()[-2:]
    assert first.startswith("| 0.5 s | ")
    assert second.startswith("| 31 s, 20 s heard | ")
    # clip context: 5 audio tokens against 300 and 10
    assert long["prompt_tokens"] - short["prompt_tokens"] == 310 - 5
    assert long["encode_s"] > short["encode_s"] > 0
    for row in data["rows"]:
        stages = ("audio_s", "encode_s", "project_s", "prefill_s", "decode_s")
        # Medians of parts need not add up to the median of sums, but they come near.
        assert sum(row[stage] for stage in stages) == pytest.approx(row["total_s"], rel=0.3)
        # The encoders are skipped the second time.
        assert row["second_question_first_token_s"] < row["first_token_s"]
        assert 0 < row["gap_p50_s"] <= row["gap_p95_s"]
    assert data["weights"] == "seeded-random"
    # A process has to start and to load first.
    assert data["cold_start_s"] > data["load_s"] + short["first_token_s"]


def test_a_missing_bundle_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(["--bundle", str(tmp_path / "none")]) == 4
    assert capsys.readouterr().err.count("\n") == 1
