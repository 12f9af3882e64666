"""What the tests of ``tg-listen`` share: a room with known sounds, a model that is not one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygiant.runtime.asking import AskOptions
from tinygiant.runtime.audio import Audio
from tinygiant.runtime.events import Answer, AudioAccount, Timings, TokenCounts
from tinygiant.runtime.listen.ear import Block, Sound

RATE_HZ = 16_000


def room(seconds: float, db: float = -62.0, *, rate_hz: int = RATE_HZ, seed: int = 0) -> Any:
    """White noise of a level, full scale being 0 dB."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(round(seconds * rate_hz)) * 10.0 ** (db / 20.0)


def add(samples: Any, at_s: float, seconds: float, db: float = -20.0, seed: int = 1) -> None:
    """Put a burst of noise into ``samples``."""
    start = round(at_s * RATE_HZ)
    samples[start : start + round(seconds * RATE_HZ)] += room(seconds, db, seed=seed)


def pcm(samples: Any) -> NDArray[np.int16]:
    """As 16-bit numbers."""
    return np.rint(np.asarray(samples).clip(-1, 1) * 32_767).astype(np.int16)


def a_sound(
    number: int = 1, *, start_s: float = 0.0, when: float = 0.0, source: str = "hall"
) -> Sound:
    """A sound of half a second."""
    return Sound(
        source,
        number,
        when,
        start_s,
        0.5,
        pcm(room(0.5, -20.0)),
        RATE_HZ,
        -20.0,
        -62.0,
        False,
        False,
    )


def an_answer(text: str, choices: Sequence[str] | None, shares: Sequence[float] | None) -> Answer:
    """An answer of the published form."""
    return Answer(
        text=text,
        plan="",
        audio_analysis="",
        logic="",
        summary="",
        unparsed="",
        raw_text=text,
        choice_index=None if choices is None else list(choices).index(text),
        finish_reason="stop",
        model="fake",
        timings=Timings(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False, 0.0),
        audio=AudioAccount("hall", 1.0, 1.0, 0.0, RATE_HZ, 1, 1, ()),
        tokens=TokenCounts(1, 1, 1),
        choice_probabilities=None if shares is None else tuple(shares),
        choice_scoring=None if shares is None else "sum_of_log_probabilities",
    )


class FakeModel:
    """Answers with what ``answers`` holds for a question: a text, or a text and its probability."""

    def __init__(
        self,
        answers: dict[str, str | tuple[str, float]] | None = None,
        *,
        before: Callable[[], object] = lambda: None,
    ) -> None:
        self.answers = answers or {}
        self.before = before
        self.asked: list[str] = []
        self.heard: list[Audio] = []
        self.n_forgotten = 0

    def ask(
        self,
        audio: Audio,
        question: str,
        choices: Sequence[str] | None = None,
        options: AskOptions = AskOptions(),  # noqa: B008 - frozen
    ) -> Answer:
        self.before()
        self.asked.append(question)
        self.heard.append(audio)
        found = self.answers.get(question, choices[0] if choices else "a dog")
        if isinstance(found, Exception):
            raise found
        text, share = found if isinstance(found, tuple) else (found, 0.9)
        shares = None
        if choices is not None and not options.think:
            rest = (1.0 - share) / (len(choices) - 1)
            shares = [share if choice == text else rest for choice in choices]
        return an_answer(text, choices, shares)

    def forget(self) -> None:
        self.n_forgotten += 1


class FakeSource:
    """Plays blocks; an exception among them is raised, a function is called, None is a sign."""

    may_return = True

    def __init__(self, *acts: Any, rate_hz: int = RATE_HZ, can_wait: bool = False) -> None:
        self.acts: Iterator[Any] = iter(acts)
        self.rate_hz = rate_hz
        self.n_bad = 0
        self.n_overflows = 0
        self.can_wait = can_wait

    def blocks(self) -> Iterator[Block | None]:
        for act in self.acts:
            if isinstance(act, Exception):
                raise act
            if callable(act):
                act()
                continue
            if act is None:
                yield None
                continue
            for start in range(0, act.size, 512):
                yield act[start : start + 512]


def wait_for(true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        threading.Event().wait(0.01)
