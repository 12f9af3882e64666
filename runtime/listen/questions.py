"""The questions about one sound: which are asked, in which order, and what their answers are worth.

For each question in turn: is it for this source and this time of day, did it tell something just
now (refractory time), does the first question (``only_if``) let it through, and is the model
sure enough? What is not asked says why. Time of day is this computer's; the refractory time is that
of the stream, so that a clock that jumps changes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol

from ..asking import AskOptions
from ..audio import Audio, read_audio
from ..cli.records import error_record
from ..events import Answer
from .ear import Sound
from .settings import DAYS, YES_NO, QuestionSettings, minutes

__all__ = ["Asker", "Model", "Reply", "is_due"]

Status = Literal["answered", "unsure", "not_asked", "failed"]


class Model(Protocol):
    """What is asked: :class:`~tinygiant.runtime.pipeline.TinyGiant`."""

    def ask(
        self,
        audio: Audio,
        question: str,
        choices: Sequence[str] | None = None,
        options: AskOptions = AskOptions(),  # noqa: B008 - frozen
    ) -> Answer:
        """Answer a question about a clip."""
        ...

    def forget(self) -> None:
        """Keep nothing of the clips heard so far."""
        ...


@dataclass(frozen=True)
class Reply:
    """What became of one question.

    Attributes:
        question: as it was set.
        status: ``answered``; ``unsure``, below the confidence; ``not_asked``; ``failed``.
        reason: why it was not asked: ``schedule``, ``refractory`` or ``only_if``.
        answer: the model's, if it was asked.
        probability: of the choice that was taken, where choices were scored.
        notify: an answer worth telling.
        error: what failed: kind, exit code and message.
    """

    question: QuestionSettings
    status: Status
    reason: str | None = None
    answer: Answer | None = None
    probability: float | None = None
    notify: bool = False
    error: dict[str, Any] | None = None


class Asker:
    """Asks a model the same questions about one sound after another.

    Attributes:
        questions: may be exchanged at any time, for the next sound.
    """

    def __init__(self, model: Model, questions: Sequence[QuestionSettings]) -> None:
        """Ask ``model``, in the order of ``questions``."""
        self.questions = tuple(questions)
        self._model = model
        self._told_s: dict[tuple[str, str], float] = {}

    def ask(self, sound: Sound) -> tuple[Reply, ...]:
        """Ask what is to be asked about ``sound``; one question's failure ends no other."""
        audio = read_audio((sound.samples, sound.rate_hz))
        audio = dataclasses.replace(audio, source=sound.source)
        first: dict[str, tuple[bool, float]] = {}
        replies = []
        for question in self.questions:
            if question.sources is not None and sound.source not in question.sources:
                continue
            try:
                reply = self._reply(question, sound, audio, first)
            except Exception as error:
                reply = Reply(question, "failed", error=error_record(error))
            if reply.notify:
                self._told_s[question.name, sound.source] = sound.start_s
            replies.append(reply)
        self._model.forget()
        return tuple(replies)

    def _reply(
        self,
        question: QuestionSettings,
        sound: Sound,
        audio: Audio,
        first: dict[str, tuple[bool, float]],
    ) -> Reply:
        if not is_due(question, datetime.fromtimestamp(sound.time)):
            return Reply(question, "not_asked", "schedule")
        told_s = self._told_s.get((question.name, sound.source))
        if told_s is not None and 0.0 <= sound.start_s - told_s < question.refractory_s:
            return Reply(question, "not_asked", "refractory")
        if question.only_if is not None:
            if question.only_if not in first:
                first[question.only_if] = self._is_yes(question.only_if, audio)
            yes, share = first[question.only_if]
            if not yes or share < (question.confidence or 0.0):
                return Reply(question, "not_asked", "only_if", probability=share)
        answer = self._model.ask(audio, question.ask, question.choices, question.options)
        shares, index = answer.choice_probabilities, answer.choice_index
        probability = None if shares is None or index is None else shares[index]
        if probability is not None and probability < (question.confidence or 0.0):
            return Reply(question, "unsure", answer=answer, probability=probability)
        notify = question.notify is None or answer.text in question.notify
        return Reply(question, "answered", answer=answer, probability=probability, notify=notify)

    def _is_yes(self, question: str, audio: Audio) -> tuple[bool, float]:
        """Whether a first question is answered with yes, and the probability of that."""
        answer = self._model.ask(audio, question, YES_NO, AskOptions(think=False))
        shares = answer.choice_probabilities or (0.0, 0.0)
        return answer.choice_index == 0, shares[0]


def is_due(question: QuestionSettings, when: datetime) -> bool:
    """Whether a question is asked at a local time; a span over midnight has the day it began."""
    days = question.days or DAYS
    if question.hours is None:
        return DAYS[when.weekday()] in days
    minute = 60 * when.hour + when.minute
    yesterday = DAYS[(when - timedelta(days=1)).weekday()]
    for span in question.hours:
        start, end = minutes(span)
        if start < end:
            due = start <= minute < end and DAYS[when.weekday()] in days
        else:
            due = (minute >= start and DAYS[when.weekday()] in days) or (
                minute < end and yesterday in days
            )
        if due:
            return True
    return False
