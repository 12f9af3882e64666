"""The clocks behind every speed table: each stage's seconds are that stage's, on a forged clock.

A stage whose seconds were another's would make every table in the documents wrong without a test
noticing, so here each part of the model takes a number of seconds of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.runtime import Finished, TinyGiant, load, stages
from tinygiant.runtime.ort.sessions import Binding, Graph

Tone = Callable[[float, int], NDArray[np.float32]]

ENCODER_S, PROJECTOR_S, DECODER_RUN_S = 1.0, 20.0, 300.0


@pytest.fixture
def now() -> list[float]:
    """The time of the forged clock, in seconds."""
    return [0.0]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tiny_bundle: object, now: list[float]) -> TinyGiant:
    """The tiny model on a clock that only running a graph moves."""
    model = load(tiny_bundle, threads=1, speculate=False)  # type: ignore[arg-type]
    run, run_bound = Graph.run, Binding.run

    def forged_run(self: Graph, inputs: Any) -> Any:
        now[0] += PROJECTOR_S if self.name == "projector" else ENCODER_S
        return run(self, inputs)

    def forged_step(self: Binding) -> None:
        now[0] += DECODER_RUN_S
        run_bound(self)

    monkeypatch.setattr(Graph, "run", forged_run)
    monkeypatch.setattr(Binding, "run", forged_step)
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return model


def test_each_stage_has_its_own_seconds(timed: TinyGiant, tone: Tone) -> None:
    clip = (tone(2.0, 16_000), 16_000)
    timed.ask(clip, "What?", max_new_tokens=1, raw=True)  # the constant prefix is known from now on
    found = timed.ask((tone(2.5, 16_000), 16_000), "What is heard?", max_new_tokens=4, raw=True)
    times, n_tokens = found.timings, found.tokens.generated
    assert n_tokens == 4
    assert times.audio_s == 0
    assert times.encode_s == 2 * ENCODER_S  # Whisper's window and one event window
    assert times.project_s == PROJECTOR_S
    assert times.prefill_s == DECODER_RUN_S
    before = times.encode_s + times.project_s + times.prefill_s
    # The first token is known from the prompt's logits; the three others take a step each.
    assert times.first_token_s == before
    assert times.decode_s == 3 * DECODER_RUN_S
    assert times.total_s == before + times.decode_s
    assert times.tokens_per_s == n_tokens / times.decode_s


def test_a_second_question_has_no_encoder_seconds(timed: TinyGiant, tone: Tone) -> None:
    clip = (tone(2.0, 16_000), 16_000)
    first = timed.ask(clip, "What?", max_new_tokens=1).timings
    second = timed.ask(clip, "Which?", max_new_tokens=1).timings
    assert (first.encode_s, first.encode_cached) == (2 * ENCODER_S, False)
    assert (second.encode_s, second.encode_cached) == (0.0, True)
    assert second.project_s == PROJECTOR_S


def test_the_time_that_a_reader_takes_is_not_the_models(
    timed: TinyGiant, tone: Tone, now: list[float]
) -> None:
    """Whoever prints or sends each event slowly does not make the model slow."""
    clip = (tone(2.0, 16_000), 16_000)
    timed.ask(clip, "What?", max_new_tokens=1)  # the constant prefix is known from now on
    alone = timed.ask(clip, "What?", max_new_tokens=4, raw=True).timings
    for event in timed.stream(clip, "What?", max_new_tokens=4, raw=True):
        now[0] += 7_000.0
        if isinstance(event, Finished):
            assert event.answer.timings.total_s == alone.total_s
            assert event.answer.timings.first_token_s == alone.first_token_s
