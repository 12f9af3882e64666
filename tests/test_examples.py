"""What examples/README.md shows is what the installed model prints."""

from __future__ import annotations

import pytest

from tests.examples import README, expected, printed, without_times

SHOWN = expected(README.read_text(encoding="utf-8"))


def test_every_clip_is_asked_about() -> None:
    clips = {path.name for path in README.parent.glob("*.flac")}
    assert len(clips) == 4
    assert all(any(clip in command for command, _ in SHOWN) for clip in clips)
    assert sum("--choices" not in command for command, _ in SHOWN) >= 5


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_the_command_prints_what_is_shown(command: str, shown: str) -> None:
    assert shown
    assert without_times(printed(command)) == without_times(shown)
