r"""The model's text taken apart: the thought's four parts and the answer, as it is being written.

Two spellings are understood, in any case and mixed: CoTA's tags (``<think>``, ``<PLANNING>``,
``<CAPTION>``, ``<REASONING>``, ``<SUMMARY>``, ``<RESPONSE>``) and headings at the start of a line
(``Plan:``, ``**Audio Analysis**``, ``## Logic``, ``4. Summary:``). Truncated and malformed text is
never an error and never lost: :class:`AnswerParser` cuts its input into pieces which, joined, give
the text again, whatever the sizes of the input were.

Rules. A part lasts until the next tag or heading. ``</think>`` or ``<RESPONSE>`` ends the thought;
headings count only before that; inside a response only ``</RESPONSE>`` is markup; after it nothing
is. Text without any thought is the answer, as a model that does not think writes it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["AnswerParser", "ParsedAnswer", "Section", "TextPiece", "parse_answer", "section_of"]

Section = Literal["plan", "audio_analysis", "logic", "summary", "answer", "other"]
"""Where a piece of text belongs; ``other`` is a thought outside the four parts, or a trailer."""

_PART_OF_NAME: dict[str, Section] = {
    "plan": "plan",
    "planning": "plan",
    "audio analysis": "audio_analysis",
    "audio_analysis": "audio_analysis",
    "caption": "audio_analysis",
    "logic": "logic",
    "reasoning": "logic",
    "summary": "summary",
}
_NAMES = "|".join(sorted(_PART_OF_NAME, key=len, reverse=True))
_FLAGS = re.IGNORECASE | re.ASCII  # without ASCII, a Kelvin sign would be a k
_TAG = re.compile(rf"</?(?P<name>{_NAMES}|think|response)>", _FLAGS)
_RESPONSE_END = re.compile(r"</(?P<name>response)>", _FLAGS)
_TAG_STARTS = frozenset(
    f"<{slash}{name}"[:end]
    for name in (*_PART_OF_NAME, "think", "response")
    for slash in ("", "/")
    for end in range(1, len(slash + name) + 2)
)
# Hashes, a number and bold are optional, but a name is a heading only in bold, before a colon or
# alone on its line. White space is bounded, so that deciding about a line costs constant time.
_HEADING = re.compile(
    rf"[ \t]{{0,4}}(?:#{{1,6}}[ \t]{{0,4}})?(?:\d{{1,2}}[.)][ \t]{{0,4}})?"
    rf"(?:(?P<bold>\*\*|__)(?P<bold_name>{_NAMES}):?(?P=bold):?"
    rf"|(?P<name>{_NAMES})[ \t]{{0,4}}(?::|$))[ \t]{{0,4}}",
    _FLAGS,
)
# Every beginning of a heading matches this; so do a few other texts, which then wait for nothing.
_HEADING_START = re.compile(
    r"[ \t]{0,4}#{0,6}[ \t]{0,4}\d{0,2}[.)]?[ \t]{0,4}[*_]{0,2}"
    r"(?P<word>[a-z]{0,10}(?:[ _][a-z]{0,10})?)[ \t:*_]{0,12}",
    _FLAGS,
)
_SLICE_CHARS = 256  # a long text is cut in slices, so that cost stays linear


def section_of(tag: str) -> Section:
    """Where the text inside ``<tag>`` belongs; ``other`` if it is none of the thought's parts."""
    return _PART_OF_NAME.get(tag.lower(), "other")


@dataclass(frozen=True)
class TextPiece:
    """A piece of the model's text; ``markup`` marks tags and headings, which are not shown.

    Joined, the pieces are the text.
    """

    text: str
    section: Section
    markup: bool = False


@dataclass(frozen=True)
class ParsedAnswer:
    """The parts of a whole text, without markup and surrounding white space.

    ``answer`` is the text of ``<RESPONSE>``, else what follows the thought. ``unparsed`` holds the
    rest: thoughts outside the four parts, text around the response.
    """

    plan: str
    audio_analysis: str
    logic: str
    summary: str
    answer: str
    unparsed: str


class AnswerParser:
    """Cuts a growing text into pieces and sorts them, for :meth:`result` at the end.

    With ``thinking`` the text is known to begin with a thought, even if it does not say so; a
    ``plain`` text is an answer as a whole, whatever it spells.
    """

    def __init__(self, *, thinking: bool = False, plain: bool = False) -> None:
        self._phase: Literal["start", "thought", "after", "response", "trailer"] = (
            "trailer" if plain else "thought" if thinking else "start"
        )
        self._section: Section = "other" if thinking else "answer"
        self._held = ""  # the end of the text, while it may still become a tag or a heading
        self._line_start = True
        self._texts: dict[str, list[str]] = defaultdict(list)

    def feed(self, text: str) -> list[TextPiece]:
        """Take more text; returns the pieces that are decided by now."""
        pieces: list[TextPiece] = []
        for start in range(0, len(text), _SLICE_CHARS):
            self._held += text[start : start + _SLICE_CHARS]
            pieces += self._cut(final=False)
        return pieces

    def finish(self) -> list[TextPiece]:
        """The text has ended: returns the last pieces."""
        return list(self._cut(final=True))

    def result(self) -> ParsedAnswer:
        """The parts of everything fed so far; after :meth:`finish`, of the whole text."""
        response, loose = self._text("response"), self._text("answer")
        rest = [self._text("other"), loose if response else ""]
        return ParsedAnswer(
            plan=self._text("plan"),
            audio_analysis=self._text("audio_analysis"),
            logic=self._text("logic"),
            summary=self._text("summary"),
            answer=response or loose,
            unparsed="\n".join(filter(None, rest)),
        )

    def _text(self, key: str) -> str:
        return "".join(self._texts[key]).strip()

    def _cut(self, *, final: bool) -> Iterator[TextPiece]:
        """Cut what is decided off the held text, a piece at a time."""
        while self._held:
            if self._line_start and self._phase in ("start", "thought"):
                line, newline, _ = self._held.partition("\n")
                if not final and not newline and _may_become_heading(line):
                    return
                if heading := _HEADING.match(line):
                    yield self._take_heading(heading)
                    continue
            tag = self._next_tag()
            end = self._end_of_plain(tag, final=final)
            if end > 0:
                yield self._take(end)
            elif tag is not None:
                yield self._take_tag(tag)
            else:
                return

    def _next_tag(self) -> re.Match[str] | None:
        if self._phase == "trailer":
            return None
        return (_RESPONSE_END if self._phase == "response" else _TAG).search(self._held)

    def _end_of_plain(self, tag: re.Match[str] | None, *, final: bool) -> int:
        """Length of the plain text that the held text begins with.

        It ends before a tag, before what may become one, and behind each line break, after which
        there may be a heading.
        """
        held, end = self._held, len(self._held)
        if tag is not None:
            end = tag.start()
        elif not final and self._phase != "trailer":
            opening = held.rfind("<")
            if opening >= 0 and held[opening:].lower() in _TAG_STARTS:
                end = opening
        newline = held.find("\n", 0, end)
        return end if newline < 0 else newline + 1

    def _take(self, end: int, *, markup: bool = False) -> TextPiece:
        text, self._held = self._held[:end], self._held[end:]
        self._line_start = text.endswith("\n")
        key = "response" if self._phase == "response" else self._section
        # Markup separates: a part that comes twice keeps its halves on lines of their own.
        self._texts[key].append("\n" if markup else text)
        return TextPiece(text, self._section, markup)

    def _take_heading(self, heading: re.Match[str]) -> TextPiece:
        self._enter("thought", _PART_OF_NAME[(heading["bold_name"] or heading["name"]).lower()])
        return self._take(heading.end(), markup=True)

    def _take_tag(self, tag: re.Match[str]) -> TextPiece:
        name = tag["name"].lower()
        opens = not tag.group().startswith("</")
        if name == "response" and opens:
            self._enter("response", "answer")
        elif name == "response" and self._phase == "response":
            self._enter("trailer", "other")
        elif name == "think" and not opens:
            self._enter("after", "answer")
        elif name == "think" or (name in _PART_OF_NAME and self._phase == "thought" and not opens):
            self._enter("thought", "other")
        elif opens:
            self._enter("thought", _PART_OF_NAME[name])
        piece = self._take(tag.end(), markup=True)
        self._line_start = True
        return piece

    def _enter(
        self, phase: Literal["thought", "after", "response", "trailer"], section: Section
    ) -> None:
        if phase in ("thought", "after"):
            # What looked like an answer so far came before a thought, or was one without its tag.
            self._texts["other"] += self._texts.pop("answer", [])
        self._phase, self._section = phase, section


def parse_answer(text: str) -> ParsedAnswer:
    """The parts of a whole text; see the module's rules. Never raises."""
    parser = AnswerParser()
    parser.feed(text)
    parser.finish()
    return parser.result()


def _may_become_heading(line: str) -> bool:
    start = _HEADING_START.fullmatch(line)
    if start is None:
        return False
    word = start["word"].lower().rstrip(" _")
    return any(name.startswith(word) for name in _PART_OF_NAME)
