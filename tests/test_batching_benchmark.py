"""``benchmarks.batching``: faster only counts where the answers are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import batching, turns
from tinygiant.runtime import Answer, AskOptions, AudioError, TinyGiant, TinyGiantError

Tone = Callable[[float, int], NDArray[np.float32]]


@pytest.fixture
def answer(tiny: TinyGiant, tone: Tone, monkeypatch: pytest.MonkeyPatch) -> Answer:
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    monkeypatch.setattr(turns, "apart_ns", lambda: 30.0)
    options = AskOptions(max_new_tokens=4)
    return tiny.ask((tone(0.5, 16_000), 16_000), "What is heard?", options=options)


def test_ways_that_agree_are_timed(answer: Answer) -> None:
    found, around = batching.measure({"one": lambda: [answer], "several": lambda: [answer]}, 3)
    assert {name: len(times) for name, times in found.items()} == {"one": 3, "several": 3}
    assert around["cores_apart"]["rounds_not_counted"] == 0


def test_an_answer_that_differs_or_fails_ends_it(answer: Answer) -> None:
    other = dataclasses.replace(answer, text=answer.text + "!")
    with pytest.raises(TinyGiantError, match="several: 1 of 2 answers are others"):
        ways = {"one": lambda: [answer, answer], "several": lambda: [answer, other]}
        batching.measure(ways, 1)
    with pytest.raises(TinyGiantError, match="several: a question was not answered: no sound"):
        batching.measure({"one": lambda: [answer], "several": lambda: [AudioError("no sound")]}, 1)
