"""What examples/README.md shows is what the installed model prints."""

from __future__ import annotations

import re

import pytest

from tests.examples import README, expected, printed, without_times

SHOWN = expected(README.read_text(encoding="utf-8"))


def test_every_clip_is_asked_about() -> None:
    clips = {path.name for path in README.parent.glob("*.flac")}
    assert len(clips) == 4
    assert all(any(clip in command for command, _ in SHOWN) for clip in clips)
    assert sum("--choices" not in command for command, _ in SHOWN) >= 5


def test_the_first_minute_of_the_front_page_is_taken_from_there() -> None:
    """It once showed the answers of a model before, right ones among them."""
    front = (README.parents[1] / "README.md").read_text(encoding="utf-8")
    table = front.split("| clip | question | nano |\n")[1].split("\n\n")[0].splitlines()[1:]
    answers: dict[str, list[str]] = {}
    for command, shown in SHOWN:
        answers.setdefault(command.split('"')[1], []).extend(shown.splitlines())
    assert len(table) >= 5
    for row in table:
        _, question, said = (cell.strip() for cell in row.strip("|").split("|"))
        assert re.sub(r" \([^)]*\)$", "", said) in answers[question], question


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_command_prints_what_is_shown(command: str, shown: str) -> None:
    assert shown
    assert without_times(printed(command)) == without_times(shown)
