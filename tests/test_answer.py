"""The thought block taken apart: both spellings, broken ones, and any text in any pieces."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinygiant.runtime.answer import AnswerParser, ParsedAnswer, TextPiece, parse_answer

PARTS = ("I will listen.", "A dog barks twice.", "Dogs bark.", "So a dog.", "a dog")

COTA = (
    "<think>\n<PLANNING>\n{}\n</PLANNING>\n<CAPTION>\n{}\n</CAPTION>\n<REASONING>\n{}\n"
    "</REASONING>\n<SUMMARY>\n{}\n</SUMMARY>\n</think>\n<RESPONSE>\n{}\n</RESPONSE>"
)
SPELLINGS = {
    "cota": COTA,
    "cota, upper case": COTA.replace("think", "THINK"),
    "cota, lower case": COTA.lower(),
    "markdown": "<think>\n## Plan\n{}\n## Audio Analysis\n{}\n### Logic:\n{}\n# Summary\n{}\n"
    "</think>\n{}",
    "bold": "<think>\n**Plan**\n{}\n**Audio Analysis:** {}\n**Logic**: {}\n__Summary__\n{}\n"
    "</think>\n\n{}",
    "numbered": "<think>\n1. Plan: {}\n2. Audio Analysis: {}\n3) **Logic:** {}\n4. Summary\n{}\n"
    "</think>\n<RESPONSE>{}</RESPONSE>",
    "plain": "<think>Plan: {}\nAudio Analysis:\n{}\nLogic : {}\nSUMMARY\n{}</think>{}",
    "mixed": "<THINK>\nPlan: {}\n<CAPTION>{}</CAPTION>\nReasoning:\n{}\n<SUMMARY>{}</THINK>"
    "<response>\n{}</response>",
    "never closed": "<think>\n<PLANNING>\n{}\n<CAPTION>\n{}\n<REASONING>\n{}\n<SUMMARY>\n{}\n"
    "<RESPONSE>\n{}",
    "without think": "Plan: {}\nAudio Analysis: {}\nLogic: {}\nSummary: {}\n</think>\n{}",
}

MARKUP = st.sampled_from(
    [
        *("<think>", "</think>", "<PLANNING>", "</PLANNING>", "<CAPTION>", "</REASONING>"),
        *("<SUMMARY>", "<RESPONSE>", "</RESPONSE>", "</response>", "<Plan>", "<audio_analysis>"),
        *("<", "</", "<th", "<RESP", ">", "**", "__", "#", ":", "1.", "\n", "\n\n", " ", "\t"),
        *("Plan", "Plan:", "**Plan**", "**Plan", "##Logic", "Logic:", "Summary", "Audio"),
        *(" Analysis:", "audio analysis", "\nAudio Analysis:  ", "\n## Logic\n"),
    ]
)
TEXT = st.lists(st.one_of(MARKUP, st.text(max_size=4)), max_size=30).map("".join)


def pieces_of(chunks: list[str]) -> tuple[list[TextPiece], ParsedAnswer]:
    parser = AnswerParser()
    pieces = [piece for chunk in chunks for piece in parser.feed(chunk)]
    pieces += parser.finish()
    return pieces, parser.result()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_parts(spelling: str) -> None:
    assert parse_answer(SPELLINGS[spelling].format(*PARTS)) == ParsedAnswer(*PARTS, unparsed="")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_pieces_know_their_section_while_they_are_written(spelling: str) -> None:
    text = SPELLINGS[spelling].format(*PARTS)
    pieces, parsed = pieces_of(list(text))
    shown: dict[str, str] = {}
    for piece in pieces:
        if not piece.markup:
            shown[piece.section] = shown.get(piece.section, "") + piece.text
    names = ("plan", "audio_analysis", "logic", "summary", "answer")
    assert tuple(shown[name].strip() for name in names) == PARTS
    assert shown.get("other", "").strip() == ""
    assert parsed == ParsedAnswer(*PARTS, unparsed="")


def test_a_text_without_thought_is_the_answer() -> None:
    assert parse_answer("A dog.\nPlan B is a cat.").answer == "A dog.\nPlan B is a cat."


def test_a_truncated_thought_keeps_what_there_is() -> None:
    parsed = parse_answer("<think>\n<PLANNING>\nlisten</PLANNING>\n<CAPTION>\na dog ba")
    assert parsed == ParsedAnswer("listen", "a dog ba", "", "", "", "")


def test_thoughts_outside_the_parts_are_kept() -> None:
    parsed = parse_answer("<think>hm\nPlan: p\n</think>so <RESPONSE>x</RESPONSE> bye")
    assert parsed == ParsedAnswer("p", "", "", "", "x", "hm\n\n bye\nso")


def test_a_thought_without_its_opening_is_not_the_answer() -> None:
    assert parse_answer("it barks</think>a dog") == ParsedAnswer(
        "", "", "", "", "a dog", "it barks"
    )


def test_a_known_thought_needs_no_opening() -> None:
    parser = AnswerParser(thinking=True)
    pieces = parser.feed("hm</think>\n<RESPONSE>a dog</RESPONSE>")
    assert [(piece.text, piece.section) for piece in pieces if not piece.markup] == [
        ("hm", "other"), ("\n", "answer"), ("a dog", "answer"),
    ]  # fmt: skip
    assert parser.result() == ParsedAnswer("", "", "", "", "a dog", "hm")


def test_a_part_that_comes_twice_is_joined() -> None:
    assert parse_answer("<think>Plan: a\nLogic: b\nPlan: c</think>d").plan == "a\n\nc"


@pytest.mark.parametrize(
    "line",
    ["Plan of attack", "Logic dictates it", "**Planning ahead**", "1. Plans", "The Plan: x",
     "Summary of it", "plan B:", "#hashtag", "Audio: loud", "* Plan it"],
)  # fmt: skip
def test_prose_is_not_a_heading(line: str) -> None:
    parsed = parse_answer(f"<think>{line}\n</think>x")
    assert parsed == ParsedAnswer("", "", "", "", "x", line)


def test_markup_inside_a_response_is_text() -> None:
    parsed = parse_answer("<RESPONSE>Plan: <b> <SUMMARY>\nLogic: x</RESPONSE>")
    assert parsed.answer == "Plan: <b> <SUMMARY>\nLogic: x"


def test_lookalike_letters_are_not_markup() -> None:
    text = "<thin\u212a> \u017fummary: x <re\u017fponse>"  # Kelvin sign, long s
    assert parse_answer(text).answer == text


def test_text_is_not_held_back_for_long() -> None:
    parser = AnswerParser()
    waiting = 0
    for character in "<think>\nPlan: one two three\nAudio is loud here.\n<b>and</b> so on, " * 5:
        waiting += 1 - sum(len(piece.text) for piece in parser.feed(character))
        assert waiting <= 24


@given(TEXT)
def test_no_text_is_lost(text: str) -> None:
    pieces, parsed = pieces_of([text])
    assert "".join(piece.text for piece in pieces) == text
    kept = "".join(vars(parsed).values())
    for piece in pieces:
        if not piece.markup:
            for word in piece.text.split():
                assert word in kept


@given(TEXT, st.lists(st.integers(0, 200)))
@example("Plan:     x", [10])
@example("<think>\n**Plan**:\n", [9, 12, 15])
def test_the_sizes_of_the_pieces_do_not_matter(text: str, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts})
    chunks = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    pieces, parsed = pieces_of(chunks)
    assert "".join(piece.text for piece in pieces) == text
    assert parsed == parse_answer(text)
    by_character, same = pieces_of(list(text))
    assert same == parsed
    assert _by_section(pieces) == _by_section(by_character)


def _by_section(pieces: list[TextPiece]) -> list[tuple[str, bool, str]]:
    merged: list[tuple[str, bool, str]] = []
    for piece in pieces:
        if merged and merged[-1][:2] == (piece.section, piece.markup):
            merged[-1] = (*merged[-1][:2], merged[-1][2] + piece.text)
        else:
            merged.append((piece.section, piece.markup, piece.text))
    return merged


@pytest.mark.parametrize("unit", ["<", "<think>", "\n", "Plan: ", "**", "a", " ", "</RESPONSE"])
def test_cost_is_linear(unit: str) -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        parse_answer(unit * (n // len(unit)))
        return time.process_time() - start

    seconds(1000)
    assert seconds(200_000) < 3.0
