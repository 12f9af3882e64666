"""Linear classifiers on what encoders give: their arithmetic, on rows whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import probe
from tinygiant.models.world.scene import Scene


def test_rows_are_those_of_the_time_that_something_sounds() -> None:
    streams = np.arange(10.0)[:, None]  # row n begins after n / 10 s
    assert probe.pooled(streams, 0.3, 0.55, 0.1).ravel().tolist() == [3, 4, 5]
    assert probe.pooled(streams, 0.3, 0.5, 0.1).ravel().tolist() == [3, 4]
    assert probe.pooled(streams, 0.72, 0.73, 0.1).ravel().tolist() == [7]  # one at least
    assert probe.pooled(streams, 1.2, 1.4, 0.1).size == 0


def test_what_is_known_of_a_thing_is_its_own_stretch() -> None:
    scene = SimpleNamespace(
        music=SimpleNamespace(start_s=0.0, end_s=1.6, major=True),
        sounds=[
            SimpleNamespace(start_s=2.0, end_s=2.3, near=False),
            SimpleNamespace(start_s=9.0, end_s=9.5, near=True),  # beyond what was heard
        ],
        speech=SimpleNamespace(start_s=3.0, end_s=3.2, gender="woman"),
    )
    streams = np.arange(40.0)[:, None]
    found = list(probe.examples(cast("Scene", scene), streams, 0.1))
    assert [(name, answer) for name, _, answer in found] == [
        ("major", True), ("near", False), ("woman", True),
    ]  # fmt: skip
    music, sound, speech = (known.tolist() for _, known, _ in found)
    assert music == [7.5, pytest.approx(np.std(np.arange(16))), 3.5]
    assert sound == [22.0, 24.0]  # 20 to 24: with its echo
    assert speech == [30.5]
    silent = SimpleNamespace(music=None, sounds=[], speech=None)
    assert list(probe.examples(cast("Scene", silent), streams, 0.1)) == []


def test_the_weights_are_those_of_the_least_loss() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 4)) * [1, 10, 0.1, 3] + [0, 5, -2, 0]
    labels = rng.random(50) < 0.3
    found = probe.Probe(rows, labels, 7.0)
    x = (rows - rows.mean(0)) / rows.std(0)
    target = np.where(labels, 1.0, -1.0)

    def loss(weights: Any, bias: float) -> float:
        return float(np.square(x @ weights + bias - target).sum() + 7.0 * np.square(weights).sum())

    least = loss(found._weights, found._bias)
    for step in (-1e-3, 1e-3):
        assert loss(found._weights, found._bias + step) > least
        for axis in np.eye(4):
            assert loss(found._weights + step * axis, found._bias) > least


def rows_of(n: int, knows: bool, seed: int) -> list[tuple[str, Any, bool]]:
    """Rows whose second channel, by far the smallest, tells ``near``; or nothing does."""
    rng = np.random.default_rng(seed)
    found = []
    for question in probe.QUESTIONS:
        for _ in range(n):
            row, answer = rng.standard_normal(20) * 100, bool(rng.random() < 0.25)
            if knows and question == "near":
                row[1] = (0.01 if answer else -0.01) + 0.001 * rng.standard_normal()
            found.append((question, row, answer))
    return found


def test_what_is_known_is_told_of_other_examples_and_what_is_not_is_chance() -> None:
    table = probe.summarize(rows_of(600, True, 1), rows_of(400, True, 2))
    for row in table:
        assert (row["n_learnt"], row["n_tested"]) == (600, 400)
        assert row["more_frequent"] == pytest.approx(0.75, abs=0.06)
        if row["question"] == "near":
            assert row["tested"] >= 0.99
        else:  # learnt by heart at most
            assert row["tested"] <= row["more_frequent"] + 0.03
    assert [row["question"] for row in table[::2]] == list(probe.QUESTIONS)
    assert [row["ridge"] for row in table[:2]] == [30.0, 300.0]


def test_a_folder_that_is_no_split_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["checkpoints/nano", "--learn", "nowhere", "--test", "nowhere"]
    assert probe.main(arguments) != 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.probe: nowhere holds no complete shard")
