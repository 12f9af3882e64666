"""What ``tg-run`` writes: the answer to standard output, everything else to standard error.

Four styles of an answer: ``text``, as it is written, each part under its heading; ``answer``, the
answer alone; ``json``, one object; ``jsonl``, a line an event.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Literal

from ..answer import Section
from ..errors import StorageError, TinyGiantError
from ..text import counted, one_line, printable
from .interrupt import cleaned_up

if TYPE_CHECKING:
    from ..events import Answer, Event, PromptRead, TextPiece

__all__ = [
    "DEBUG_VARIABLE",
    "Progress",
    "Style",
    "TextWriter",
    "debugging",
    "report_error",
    "show",
]

DEBUG_VARIABLE = "TINYGIANT_DEBUG"
Style = Literal["text", "answer", "json", "jsonl"]

_HEADINGS: dict[Section, str] = {
    "plan": "Plan",
    "audio_analysis": "Audio Analysis",
    "logic": "Logic",
    "summary": "Summary",
    "answer": "Answer",
    "other": "Thought",
}


def show(
    events: Iterable[Event], style: Style, progress: Progress, choices: Sequence[str] | None
) -> tuple[Answer, PromptRead]:
    """Write the answer as it comes; returns it, with the intent attention and the gate.

    Raises:
        StorageError: standard output cannot be written.
        TinyGiantError: whatever ``events`` raises.
    """
    from ..events import Finished, PromptRead
    from .records import event_record, json_line

    writer = TextWriter(sys.stdout, show=style == "text")
    encoding = getattr(sys.stdout, "encoding", None)
    try:
        with cleaned_up(writer.break_off):
            for event in events:
                if style == "jsonl":
                    writer.write(json_line(event_record(event), encoding=encoding))
                writer.take(event)
                progress.show(event)
                if isinstance(event, PromptRead):
                    seen = event
                if isinstance(event, Finished):
                    answer = event.answer
    except BrokenPipeError:
        raise
    except BaseException:
        writer.break_off()
        raise
    if style == "json":
        writer.write(json_line(answer.to_dict(), encoding=encoding))
    elif style == "answer":
        writer.write(printable(answer.text, keep="\n\t") + "\n")
    progress.summary(answer, choices)
    return answer, seen


class TextWriter:
    """Writes the text as it comes: each part under its heading, without surrounding blank lines."""

    def __init__(self, out: IO[str], *, show: bool) -> None:
        """Write to ``out``; of events nothing, unless ``show``."""
        self._out = out
        self._show = show
        self._section: Section | None = None
        self._space = ""  # white space that is written once text follows

    def take(self, event: Event) -> None:
        """Write what there is to see of an event."""
        from ..events import Finished, TextPiece

        if self._show and isinstance(event, TextPiece) and not event.markup:
            self._piece(event)
        elif self._show and isinstance(event, Finished):
            self._end(event.answer)

    def break_off(self) -> None:
        """End the line that was being written, if any."""
        if self._section is not None:
            self.write("\n")

    def write(self, text: str) -> None:
        """Write ``text`` at once.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(f"the answer cannot be written: {error.strerror}") from error

    def _piece(self, piece: TextPiece) -> None:
        text = printable(piece.text, keep="\n\t")
        if piece.section != self._section:
            text = text.lstrip()
            if not text:
                return
            gap = "" if self._section is None else "\n\n"
            self.write(f"{gap}{_HEADINGS[piece.section]}:\n")
            self._section, self._space = piece.section, ""
        body = text.rstrip()
        if body:
            self.write(self._space + body)
            self._space = ""
        self._space += text[len(body) :]

    def _end(self, answer: Answer) -> None:
        self.break_off()
        if not answer.text:
            self.write("(no answer)\n")


class Progress:
    """One line on standard error for each stage."""

    def __init__(self, *, silent: bool) -> None:
        """Say nothing if ``silent``."""
        self.silent = silent

    def loaded(self, weights: str, model: str, providers: Mapping[str, Sequence[str]]) -> None:
        """Warn of a model that has learned nothing; say what computes if not the CPU alone."""
        if any(tuple(names) != ("cpu",) for names in providers.values()):
            where = (f"{name} on {' and '.join(names)}" for name, names in providers.items())
            self.line(", ".join(where))
        if weights == "seeded-random":
            self.line(f"{printable(model)} has random weights: its answers mean nothing")

    def show(self, event: Event) -> None:
        """Report the audio that was received, and the time of the encoders."""
        from .. import events

        if isinstance(event, events.AudioRead):
            audio = event.audio
            seconds = f"{audio.used_s:.2f} s of audio"
            if audio.dropped_s:
                seconds = f"{audio.used_s:.2f} of {audio.received_s:.2f} s of audio used"
            self.line(f"{audio.source}: {seconds}")
            for note in audio.notes:
                self.line(f"note: {printable(note)}")
        elif isinstance(event, events.StreamsReady) and (event.cached or event.encode_s):
            how = "heard before" if event.cached else f"listened in {event.encode_s:.2f} s"
            self.line(how)

    def summary(self, answer: Answer, choices: Sequence[str] | None) -> None:
        """Say how sure the choice is, how much was written and how long it took."""
        timings, tokens = answer.timings, answer.tokens
        if choices is not None and answer.choice_probabilities is not None:
            shares = zip(answer.choice_probabilities, choices, strict=True)
            ranked = sorted(shares, key=lambda share: -share[0])
            self.line(", ".join(f"{100 * p:.1f} % {printable(text)}" for p, text in ranked))
            self.line(f"{timings.total_s:.2f} s in all")
            return
        if not tokens.generated:  # nothing to hear
            self.line(f"{timings.total_s:.2f} s in all")
            return
        thought = (answer.plan, answer.audio_analysis, answer.logic, answer.summary)
        ended = "the unfinished part was closed" if any(thought) else "the answer ends there"
        if answer.finish_reason == "length":
            self.line(f"note: --max-new-tokens reached; {ended}")
        elif answer.finish_reason == "loop":
            self.line(f"note: the model repeated itself; {ended}")
        written = counted(tokens.generated, "token")
        self.line(
            f"{written} at {timings.tokens_per_s:.1f} a second, the first after "
            f"{timings.first_token_s:.2f} s; {timings.total_s:.2f} s in all"
        )

    @property
    def is_terminal(self) -> bool:
        """Whether a line can be written over."""
        return sys.stderr is not None and sys.stderr.isatty()

    def line(self, text: str) -> None:
        """Write a line."""
        self._write(text, end="\n")

    def status(self, text: str) -> None:
        """Write a line that the next one replaces, where that is possible."""
        self._write(text, end="\r" if self.is_terminal else "\n")

    def _write(self, text: str, *, end: str) -> None:
        if not self.silent and sys.stderr is not None:
            erase = "\x1b[K" if self.is_terminal else ""
            print(f"{erase}tg-run: {text}", file=sys.stderr, flush=True, end=end)


def debugging() -> bool:
    """Whether failures are to show where they come from."""
    return os.environ.get(DEBUG_VARIABLE) == "1"


def report_error(error: BaseException) -> int:
    """Write the one line that a failure ends in to standard error; returns its exit code."""
    message, code = one_line(error), TinyGiantError.exit_code
    if isinstance(error, TinyGiantError):
        code = error.exit_code
    elif isinstance(error, MemoryError):
        message = f"memory ran out ({message}); use --memory low, or end other programs"
    else:
        kind = type(error).__name__
        message = f"unforeseen {kind}: {message}; set {DEBUG_VARIABLE}=1 to see where"
    if sys.stderr is not None:
        print(f"tg-run: {message}", file=sys.stderr)
    return code
