"""Which questions are asked about a sound, and what their answers are worth."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from tests.listen_stub import FakeModel, a_sound
from tinygiant.runtime.errors import BundleError
from tinygiant.runtime.listen.questions import Asker, Reply, is_due
from tinygiant.runtime.listen.settings import QuestionSettings

YES_NO = ("yes", "no")


def ask(model: FakeModel, *questions: QuestionSettings, **sound: Any) -> tuple[Reply, ...]:
    return Asker(model, questions).ask(a_sound(**sound))


def test_every_question_hears_the_sound_and_then_it_is_forgotten() -> None:
    model = FakeModel({"Who?": "a dog", "Where?": "far"})
    first, second = ask(
        model,
        QuestionSettings(name="who", ask="Who?"),
        QuestionSettings(name="where", ask="Where?"),
    )
    assert [first.answer.text, second.answer.text] == ["a dog", "far"]  # type: ignore[union-attr]
    assert model.heard[0] is model.heard[1]
    assert model.heard[0].source == "hall" and model.heard[0].used_s == 0.5
    assert model.n_forgotten == 1


def test_the_first_question_decides_and_is_asked_once() -> None:
    questions = [
        QuestionSettings(name=name, ask=name, only_if="Is it a dog?") for name in ("size", "mood")
    ]
    model = FakeModel({"Is it a dog?": ("no", 0.8)})
    replies = ask(model, *questions)
    assert [(reply.status, reply.reason) for reply in replies] == [("not_asked", "only_if")] * 2
    assert replies[0].probability == pytest.approx(0.2)
    assert model.asked == ["Is it a dog?"]
    model = FakeModel({"Is it a dog?": ("yes", 0.8)})
    assert [reply.status for reply in ask(model, *questions)] == ["answered"] * 2
    assert model.asked == ["Is it a dog?", "size", "mood"]


def test_a_yes_that_is_not_sure_enough_does_not_let_through() -> None:
    question = QuestionSettings(only_if="Is it a dog?", confidence=0.7)
    [reply] = ask(FakeModel({"Is it a dog?": ("yes", 0.6)}), question)
    assert (reply.status, reply.reason) == ("not_asked", "only_if")


@pytest.mark.parametrize(("share", "status"), [(0.69, "unsure"), (0.7, "answered")])
def test_below_the_confidence_an_answer_is_unsure_and_not_told(share: float, status: str) -> None:
    question = QuestionSettings(ask="Dog?", choices=YES_NO, think=False, confidence=0.7)
    [reply] = ask(FakeModel({"Dog?": ("yes", share)}), question)
    assert (reply.status, reply.notify) == (status, status == "answered")
    assert reply.probability == share


def test_only_some_answers_are_worth_telling_and_only_those_begin_a_rest() -> None:
    question = QuestionSettings(ask="Dog?", choices=YES_NO, notify=("yes",), refractory_s=10.0)
    model = FakeModel({"Dog?": "no"})
    asker = Asker(model, [question])

    def at(start_s: float, source: str = "hall") -> tuple[str, str | None, bool]:
        [reply] = asker.ask(a_sound(start_s=start_s, source=source))
        return reply.status, reply.reason, reply.notify

    assert at(0.0) == ("answered", None, False)
    model.answers["Dog?"] = "yes"
    assert at(1.0) == ("answered", None, True)
    assert at(10.9) == ("not_asked", "refractory", False)
    assert at(10.9, "garden") == ("answered", None, True)  # each source by itself
    assert at(11.0) == ("answered", None, True)
    assert at(0.5) == ("answered", None, True)  # the source was opened anew by a reload


def test_a_question_that_fails_ends_no_other() -> None:
    model = FakeModel({"A?": BundleError("the graph failed"), "B?": "fine"})  # type: ignore[dict-item]
    first, second = ask(
        model, QuestionSettings(name="a", ask="A?"), QuestionSettings(name="b", ask="B?")
    )
    assert (first.status, second.status) == ("failed", "answered")
    assert first.error == {"kind": "BundleError", "exit_code": 4, "message": "the graph failed"}


def test_a_question_for_another_source_is_not_there() -> None:
    question = QuestionSettings(sources=("garden",))
    assert ask(FakeModel(), question) == ()
    assert len(ask(FakeModel(), question, source="garden")) == 1


def test_out_of_hours_nothing_is_asked() -> None:
    model = FakeModel()
    when = datetime(2026, 11, 30, 12, 0).timestamp()
    [reply] = ask(model, QuestionSettings(hours=("22:00-06:00",)), when=when)
    assert (reply.status, reply.reason, model.asked) == ("not_asked", "schedule", [])


@pytest.mark.parametrize(
    ("hours", "days", "when", "due"),
    [
        (None, None, "2026-11-30 03:00", True),
        (None, ("mon",), "2026-11-30 03:00", True),  # a Monday
        (None, ("tue",), "2026-11-30 03:00", False),
        (("07:00-09:00",), None, "2026-11-30 07:00", True),
        (("07:00-09:00",), None, "2026-11-30 09:00", False),
        (("22:00-24:00",), None, "2026-11-30 23:59", True),
        (("22:00-06:00",), None, "2026-11-30 23:00", True),
        (("22:00-06:00",), None, "2026-11-30 05:59", True),
        (("22:00-06:00",), None, "2026-11-30 06:00", False),
        # A night belongs to the day it began.
        (("22:00-06:00",), ("sun",), "2026-11-30 05:00", True),
        (("22:00-06:00",), ("mon",), "2026-11-30 05:00", False),
        (("22:00-06:00",), ("mon",), "2026-11-30 22:00", True),
        (("07:00-08:00", "12:00-13:00"), None, "2026-11-30 12:30", True),
    ],
)
def test_hours_and_days(hours: Any, days: Any, when: str, due: bool) -> None:
    question = QuestionSettings(hours=hours, days=days)
    assert is_due(question, datetime.fromisoformat(when)) is due
