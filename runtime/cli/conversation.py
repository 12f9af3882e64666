"""Many questions about one clip: the prompt that ``tg-run CLIP`` opens.

A line is a question, or a command if it begins with a colon. The clip's encoder outputs stay in the
model's cache, so that only the first question waits for the encoders. An error is reported and ends
only its line; an unwritable standard output ends the conversation.

On a terminal Ctrl-C cancels the current answer (a running encoder finishes first) and Ctrl-D
leaves. Lines may be piped in as well: then Ctrl-C ends the command, and the exit code is that of
the first line that failed.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import StorageError, UsageError
from .interrupt import raise_on_interrupt
from .terminal import Progress, Style, debugging, report_error, show

if TYPE_CHECKING:
    from ..asking import AskOptions
    from ..audio import Audio
    from ..pipeline import TinyGiant

__all__ = ["Conversation", "dropped_path", "history_path", "question_lines"]

_HISTORY_LINES = 1_000
_LEAVING = {":quit", ":exit", ":q", "quit", "exit"}  # the words are no questions either
_HELP = """\
Write a question about the clip, or one of these:
  :load PATH           another clip
  :mic [DEVICE]        a clip from the microphone
  :choices A | B | C   answers to choose from; without any, the answer is free again
  :json                switch between JSON and text
  :help                this list
  :quit                leave, as Ctrl-D does; Ctrl-C cancels an answer"""


class Conversation:
    """The state of a conversation: the clip, the choices and the form of the answers."""

    def __init__(
        self,
        model: TinyGiant,
        audio: Audio,
        progress: Progress,
        *,
        choices: Sequence[str] | None,
        style: Style,
        options: AskOptions,
    ) -> None:
        """Talk about ``audio``; the other arguments are those of a single question."""
        self.audio = audio
        self.choices = choices
        self.style: Style = style
        self._plain_style: Style = style if style in ("text", "answer") else "text"
        self._model = model
        self._progress = progress
        self._options = options
        self._commands: dict[str, Callable[[str], None]] = {
            ":load": self._load,
            ":mic": self._listen,
            ":choices": self._choose,
            ":json": self._switch_json,
            ":help": self._help,
        }

    def run(self, lines: Iterator[str | None]) -> int:
        """Answer ``lines`` until they end or one of them leaves; None stands for an interrupt.

        Returns:
            Exit code of the first line that failed; 0 if none did.

        Raises:
            StorageError: standard output cannot be written.
        """
        first_failure = 0
        for line in lines:
            if line is None or not line.strip():
                continue
            if line.strip().lower() in _LEAVING:
                break
            try:
                self.take(line.strip())
            except (BrokenPipeError, StorageError):
                raise
            except KeyboardInterrupt:
                if not _is_terminal():
                    raise
                self._progress.line("cancelled")
            except Exception as error:
                if debugging():
                    raise
                code = report_error(error)
                first_failure = first_failure or code
        return first_failure

    def take(self, line: str) -> None:
        """Answer one question or obey one command.

        Raises:
            TinyGiantError: it cannot be done; the conversation is as it was.
        """
        if not line.startswith(":"):
            self._ask(line)
            return
        name, _, argument = line.partition(" ")
        if name not in self._commands:
            raise UsageError(f"unknown command {name}; :help lists the commands")
        self._commands[name](argument.strip())

    def _ask(self, question: str) -> None:
        events = self._model.stream(self.audio, question, self.choices, self._options)
        show(events, self.style, self._progress, self.choices)

    def _load(self, path: str) -> None:
        from ..audio import read_audio

        if not path:
            raise UsageError(":load without a path; say which clip: :load PATH")
        self.audio = read_audio(dropped_path(path), max_audio_s=self._options.max_audio_s)
        self._progress.line(f"{self.audio.source}: {self.audio.used_s:.2f} s of audio")

    def _listen(self, device: str) -> None:
        from .microphone import record

        self.audio = record(device or None, self._progress, max_audio_s=self._options.max_audio_s)

    def _choose(self, text: str) -> None:
        from ..prompt import check_choices

        choices = [choice.strip() for choice in text.split("|")] if text else None
        if choices is not None:
            check_choices(choices)
        self.choices = choices
        self._progress.line("choices: " + (" | ".join(choices) if choices else "none"))

    def _switch_json(self, _: str) -> None:
        self.style = "json" if self.style != "json" else self._plain_style
        self._progress.line(f"answers as {'JSON' if self.style == 'json' else 'text'}")

    def _help(self, _: str) -> None:
        print(_HELP, file=sys.stderr)


@contextmanager
def question_lines(*, silent: bool) -> Iterator[Iterator[str | None]]:
    """The lines of standard input; on a terminal with a prompt, editing and a history."""
    if not _is_terminal():
        yield _piped_lines()
        return
    raise_on_interrupt()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if not silent:
        print("tg-run: ask about the clip; :help lists more, Ctrl-D leaves", file=sys.stderr)
    with _history(history_path()):
        yield _typed_lines()


def history_path() -> Path:
    """Where questions are remembered: ``$XDG_STATE_HOME/tinygiant/history``."""
    state = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(state) if os.path.isabs(state) else Path("~/.local/state").expanduser()
    return folder / "tinygiant" / "history"


def dropped_path(text: str) -> str:
    """The path in ``text``: as it is, or as shells and terminals write one that is dropped on them.

    That is in quotes, with a backslash before each space, or as a ``file://`` URL.
    """
    if os.path.exists(text):
        return text
    if text.startswith("file://"):
        from urllib.parse import unquote, urlsplit

        return unquote(urlsplit(text).path)
    with suppress(ValueError):  # an apostrophe
        [text] = shlex.split(text)
    return os.path.expanduser(text)


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _typed_lines() -> Iterator[str | None]:
    while True:
        try:
            # Editing needs the prompt on standard output, unless that goes elsewhere.
            if sys.stdout.isatty():
                yield input("? ")
            else:
                print("? ", end="", file=sys.stderr, flush=True)
                yield input()
        except KeyboardInterrupt:
            print(file=sys.stderr)
            yield None
        except EOFError:
            print(file=sys.stderr)
            return


def _piped_lines() -> Iterator[str | None]:
    if sys.stdin is None:
        return
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace")


@contextmanager
def _history(path: Path) -> Iterator[None]:
    """Line editing with the questions of earlier conversations, as far as that is possible."""
    try:
        import readline
    except ImportError:  # Python without it, as on Windows
        yield
        return
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
