"""Outside of what a model was made for, it says so; what cannot fit is refused beforehand."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.models.config import preset
from tinygiant.runtime import AudioRead, AudioTooLongError, TinyGiant, UsageError, load
from tinygiant.runtime.config import (
    ModelConfig,
    PromptPart,
    Scope,
    config_from_dict,
    config_to_dict,
)
from tinygiant.runtime.scope import longest_clip_s, require_positions, scope_notes

Tone = Callable[[float, int], NDArray[np.float32]]
MADE_FOR = Scope(0.5, 8.0, ("choices", "open"), ("en",))
NANO = preset("nano").runtime


def notes(
    scope: Scope,
    seconds: float = 4.0,
    question: str = "What is heard?",
    *,
    has_choices: bool = True,
    thinks: bool = True,
) -> tuple[str, ...]:
    return scope_notes(scope, seconds, question, has_choices=has_choices, thinks=thinks)


@pytest.mark.parametrize("seconds", [0.5, 4.0, 8.0, 8.5])
def test_inside_nothing_is_said(seconds: float) -> None:
    assert notes(MADE_FOR, seconds) == ()
    assert notes(MADE_FOR, seconds, has_choices=False) == ()
    assert (
        notes(MADE_FOR, seconds, "Ist es ein Hund?") == ()
    )  # the language of Latin is not guessed


def test_what_is_not_known_is_not_said() -> None:
    for seconds in (0.01, 3_000.0):
        for has_choices in (True, False):
            assert notes(Scope(), seconds, "何?", has_choices=has_choices, thinks=False) == ()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"seconds": 16.0}, "the clip has 16 s, and this model was trained on clips of 0.5 to 8 s"),
        ({"seconds": 0.1}, "the clip has 0.1 s, and this model was trained on clips of 0.5 to 8 s"),
        ({"thinks": False}, "not trained for answering without a thought"),
        ({"thinks": False, "has_choices": False}, "without choices and without a thought"),
        ({"question": "\u97f3\u58f0\u306f?"}, "trained on questions in en only"),
    ],
)
def test_each_way_to_lie_outside_has_its_line(asked: dict[str, object], words: str) -> None:
    [note] = notes(MADE_FOR, **asked)  # type: ignore[arg-type]
    assert words in note
    assert note.endswith("the answer is less certain")


def test_one_bound_alone() -> None:
    assert "of at most 8 s" in notes(Scope(longest_s=8.0), 20.0)[0]
    assert "of at least 1 s" in notes(Scope(shortest_s=1.0), 0.2)[0]


def test_it_goes_from_checkpoint_to_bundle() -> None:
    config = dataclasses.replace(preset("nano"), scope=MADE_FOR)
    written = json.loads(json.dumps(config_to_dict(config.runtime)))
    assert config_from_dict(ModelConfig, written).scope == MADE_FOR
    del written["scope"]  # bundles of format 2 from before the field
    assert config_from_dict(ModelConfig, written).scope == Scope()


def test_notes_come_with_the_clip(tiny_bundle: Path, tone: Tone) -> None:
    model = load(tiny_bundle, threads=1)
    model.config = dataclasses.replace(model.config, scope=Scope(1.0, 2.0, ("open",)))
    events = model.stream((tone(3.0, 8_000), 8_000), "What?", ["a", "b"], max_new_tokens=1)
    read = next(events)
    assert isinstance(read, AudioRead)
    assert [note.partition(":")[0] for note in read.audio.notes] == [
        "the clip has 3 s, and this model was trained on clips of 1 to 2 s",
        "this model was not trained for questions with choices",
    ]


# --- positions ----------------------------------------------------------------------------------


def test_the_longest_clip_is_the_longest_that_fits() -> None:
    """Counted by hand: 4,096 positions, a row for each 0.1 s, 96 tokens besides."""
    assert longest_clip_s(NANO, 96) == pytest.approx(400.0)
    assert longest_clip_s(NANO, 5_000) == 0
    full = dataclasses.replace(NANO, audio_context="full")
    assert longest_clip_s(full, 96) == 13 * 30  # chunks of 300 rows
    parts = NANO.prompt.parts
    twice = dataclasses.replace(
        NANO, prompt=dataclasses.replace(NANO.prompt, parts=(*parts, PromptPart("audio")))
    )
    assert longest_clip_s(twice, 96) == pytest.approx(200.0)
    assert longest_clip_s(dataclasses.replace(full, beyond_chunk="dropped"), 96) == np.inf


def test_positions_are_required_exactly() -> None:
    chunks = [30.0] * 13 + [10.0]
    require_positions(NANO, chunks, 60, 36, "clip.wav")
    with pytest.raises(AudioTooLongError, match=r"clip.wav: holds 400.1 s, .* room for 400 s"):
        require_positions(NANO, [30.0] * 13 + [10.1], 60, 36, "clip.wav")
    with pytest.raises(UsageError, match="lower --max-new-tokens"):
        require_positions(NANO, [1.0], 60, 4_036, "clip.wav")


def test_what_cannot_fit_is_refused_before_anything_runs(
    tiny: TinyGiant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """420 s were encoded first."""
    monkeypatch.setattr(tiny, "_encode", lambda audio: pytest.fail("encoded"))
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 420 * 1_000).astype(np.float32)
    with pytest.raises(AudioTooLongError, match=r"this model has room for \d+\.?\d* s"):
        tiny.ask((noise, 1_000), "What?", max_audio_s=500)


def test_what_is_written_may_be_fitted_to_the_room_there_is(tiny: TinyGiant, tone: Tone) -> None:
    """Programs send a large ``max_tokens`` by habit: beside a long clip it was an error."""
    clip, limit = (tone(250.0, 8_000), 8_000), tiny.config.decoder.max_positions
    with pytest.raises(UsageError, match="leave no room"):
        tiny.ask(clip, "What is heard?", max_new_tokens=limit)
    for choices in (None, ["a dog", "a siren"]):
        answer = tiny.ask(clip, "What is heard?", choices, max_new_tokens=limit, fit=True)
        [note] = [note for note in answer.audio.notes if "new tokens" in note]
        [n_new, n_asked] = map(int, re.findall(r"\d+", note))
        assert n_asked == limit and 0 < n_new < limit - answer.tokens.prompt
        # It is the largest number that fits, and no note is there where all of it does.
        whole = tiny.ask(clip, "What is heard?", choices, max_new_tokens=n_new)
        assert (whole.text, whole.raw_text) == (answer.text, answer.raw_text)
        assert not any("new tokens" in note for note in whole.audio.notes)
        with pytest.raises(AudioTooLongError):
            tiny.ask(clip, "What is heard?", choices, max_new_tokens=n_new + 1)
    with pytest.raises(UsageError):  # not even one token fits
        long = tone(299.0, 8_000), 8_000
        tiny.ask(long, "What is heard? " * 400, max_new_tokens=limit, fit=True)
