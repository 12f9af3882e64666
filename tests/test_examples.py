"""What examples/README.md, docs/usage.md and docs/batch.md show is what the model here prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples import DOCUMENTS, README, as_shown, comparable, expected, furnish, printed

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
    assert comparable(printed(command)) == comparable(shown)


IN_DOCS = [
    pytest.param(command, shown, id=command)
    for document in DOCUMENTS[1:]
    for command, shown in expected(document.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of docs/ leave is there for those after them."""
    made = tmp_path_factory.mktemp("docs")
    furnish(made)
    return made


@pytest.mark.parametrize(("command", "shown"), IN_DOCS)
def test_the_command_in_docs_prints_what_is_shown(folder: Path, command: str, shown: str) -> None:
    """usage.md once showed the answers of a model before."""
    assert comparable(as_shown(printed(command, folder), shown)) == comparable(shown)


def test_docs_are_compared_by_what_matters() -> None:
    assert comparable("listened in 0.5 s") == comparable("listened in 2 s")
    assert comparable("99.1 % tiger") != comparable("99.2 % tiger")
    assert comparable("0.5 % tiger") != comparable("0.5 % lion")
    assert comparable('"x": [0.1, 0.25') == comparable('"x": [-0.125, 0.1, 0.')
    assert comparable("3 birds") != comparable("4 birds")
    assert as_shown("a\nb\nc", "a\n...") == "a\n..."
    assert as_shown("a\nb", "a") == "a\nb"
