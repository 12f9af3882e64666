"""``tg-run``: ask a question about a clip from the command line.

The answer goes to standard output as it is written; progress, notes and timings go to standard
error, so that output can be piped. Whatever goes wrong ends in one line and an exit code of
:mod:`tinygiant.runtime.errors`; 130 after an interrupt, 141 if the reader of the output left.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, NoReturn

from tinygiant.runtime.answer import Section
from tinygiant.runtime.errors import StorageError, TinyGiantError, UsageError
from tinygiant.runtime.interrupt import INTERRUPTED, exit_on_interrupt
from tinygiant.runtime.text import one_line, printable

if TYPE_CHECKING:
    from tinygiant.runtime.audio import Audio
    from tinygiant.runtime.events import Answer, Event, TextPiece

__all__ = ["main"]

DEBUG_VARIABLE = "TINYGIANT_DEBUG"

_DESCRIPTION = """\
Ask a question about a sound. Runs on this computer alone; nothing is sent anywhere."""

_EPILOG = """\
examples:
  tg-run street.wav "What is happening here?"
  tg-run street.wav "Which sound comes first?" --choices "a dog" "a siren" "a bell"
  tg-run -q street.wav "Is anybody speaking?" --choices yes no
  ffmpeg -i film.mkv -f wav - | tg-run - "Who is speaking?" --max-audio 600
  arecord -d 5 -f S16_LE -r 16000 -t raw | tg-run - "What was that?" --pcm-rate 16000
  tg-run doctor                      is this machine fit, and if not, what to do?

The model first thinks (Plan, Audio Analysis, Logic, Summary), then answers. With --choices the
answer is always exactly one of them. The answer goes to standard output, everything else to
standard error.

exit codes:
  0 answered · 1 unforeseen failure · 2 wrong options · 3 audio cannot be used · 4 bundle missing
  or damaged · 5 question or choices cannot be asked · 8 output cannot be written · 130 interrupted
  · 141 the reader of the output left

environment:
  TINYGIANT_BUNDLE   bundle to use where --bundle is not given
  TINYGIANT_DEBUG=1  show the traceback of a failure
"""

_HEADINGS: dict[Section, str] = {
    "plan": "Plan",
    "audio_analysis": "Audio Analysis",
    "logic": "Logic",
    "summary": "Summary",
    "answer": "Answer",
    "other": "Thought",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tg-run`` on ``arguments`` (the process's own if None); returns the exit code."""
    if arguments is None:
        exit_on_interrupt("tg-run: interrupted\n")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal can show
    try:
        return _guarded(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Python flushes standard output once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _guarded(arguments: Sequence[str] | None) -> int:
    debug = os.environ.get(DEBUG_VARIABLE) == "1"
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if words[:1] == ["doctor"]:
            from tinygiant.runtime import doctor

            return doctor.main(words[1:])
        _run(_parser().parse_args(arguments))
        return 0
    except BrokenPipeError:
        raise
    except TinyGiantError as error:
        if debug:
            raise
        return _fail(one_line(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        return _fail(
            f"unforeseen {kind}: {one_line(error)}; set {DEBUG_VARIABLE}=1 to see where",
            TinyGiantError.exit_code,
        )


def _run(options: argparse.Namespace) -> None:
    # Imported here, so that --help is instant and an interrupt while loading is handled.
    from tinygiant.runtime.events import Finished
    from tinygiant.runtime.pipeline import load
    from tinygiant.runtime.prompt import check_choices, check_question

    # What is wrong with the input is said before a large model is loaded.
    check_question(options.question)
    if options.choices is not None:
        check_choices(options.choices)
    audio = _read(options)
    progress = _Progress(silent=options.quiet)
    model = load(
        options.bundle,
        threads=options.threads,
        memory=options.memory,
        verify=not options.no_verify,
    )
    progress.loaded(model.bundle.manifest.source.weights, model.config.name)
    writer = _TextWriter(sys.stdout, show=not (options.json or options.quiet))
    events = model.stream(
        audio,
        options.question,
        options.choices,
        max_new_tokens=options.max_new_tokens,
        max_audio_s=options.max_audio,
    )
    for event in events:
        progress.show(event)
        writer.take(event)
        if isinstance(event, Finished):
            answer = event.answer
    if options.json:
        writer.line(json.dumps(answer.to_dict(), ensure_ascii=False))
    elif options.quiet:
        writer.line(printable(answer.text, keep="\n\t"))


def _read(options: argparse.Namespace) -> Audio:
    from tinygiant.runtime.audio import read_audio, read_pcm

    if options.clip != "-":
        if options.pcm_rate is not None:
            raise UsageError("--pcm-rate describes standard input; name - as the clip")
        return read_audio(options.clip, max_audio_s=options.max_audio)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("- reads audio from standard input, which is a terminal; pipe audio in")
    stream = sys.stdin.buffer
    if options.pcm_rate is None:
        return read_audio(stream, max_audio_s=options.max_audio)
    return read_pcm(stream, options.pcm_rate, max_audio_s=options.max_audio)


class _TextWriter:
    """Writes the text as it comes: each part under its heading, without surrounding blank lines."""

    def __init__(self, out: IO[str], *, show: bool) -> None:
        self._out = out
        self._show = show
        self._section: Section | None = None
        self._space = ""  # white space that is written once text follows

    def take(self, event: Event) -> None:
        from tinygiant.runtime.events import Finished, TextPiece

        if self._show and isinstance(event, TextPiece) and not event.markup:
            self._piece(event)
        elif self._show and isinstance(event, Finished):
            self._end(event.answer)

    def line(self, text: str) -> None:
        self._write(text + "\n")

    def _piece(self, piece: TextPiece) -> None:
        text = printable(piece.text, keep="\n\t")
        if piece.section != self._section:
            text = text.lstrip()
            if not text:
                return
            gap = "" if self._section is None else "\n\n"
            self._write(f"{gap}{_HEADINGS[piece.section]}:\n")
            self._section, self._space = piece.section, ""
        body = text.rstrip()
        if body:
            self._write(self._space + body)
            self._space = ""
        self._space += text[len(body) :]

    def _end(self, answer: Answer) -> None:
        if self._section is not None:
            self._write("\n")
        if not answer.text:
            self._write("(no answer)\n")

    def _write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise StorageError(f"the answer cannot be written: {error.strerror}") from error


class _Progress:
    """One line on standard error for each stage."""

    def __init__(self, *, silent: bool) -> None:
        self._silent = silent

    def loaded(self, weights: str, model: str) -> None:
        if weights == "seeded-random":
            self._line(f"{printable(model)} has random weights: what it answers means nothing")

    def show(self, event: Event) -> None:
        from tinygiant.runtime import events

        if isinstance(event, events.AudioRead):
            audio = event.audio
            dropped = f", {audio.dropped_s:.2f} s missing" if audio.dropped_s else ""
            self._line(f"{audio.source}: {audio.used_s:.2f} s of audio{dropped}")
            for note in audio.notes:
                self._line(f"note: {printable(note)}")
        elif isinstance(event, events.StreamsReady):
            how = "heard before" if event.cached else f"listened in {event.encode_s:.2f} s"
            self._line(how)
        elif isinstance(event, events.Finished):
            self._summary(event.answer)

    def _summary(self, answer: Answer) -> None:
        timings, tokens = answer.timings, answer.tokens
        if answer.finish_reason == "length":
            self._line(
                f"note: the model was stopped after --max-new-tokens; {tokens.generated} written"
            )
        self._line(
            f"{tokens.generated} tokens at {timings.tokens_per_s:.1f} a second, the first after "
            f"{timings.first_token_s:.2f} s; {timings.total_s:.2f} s in all"
        )

    def _line(self, text: str) -> None:
        if not self._silent and sys.stderr is not None:
            print(f"tg-run: {text}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other failure."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see tg-run --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tg-run",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "clip", metavar="CLIP", help="audio file (wav, flac, mp3, ogg, ...); - reads standard input"
    )
    parser.add_argument("question", metavar="QUESTION", help="what to ask, in plain words")
    parser.add_argument(
        "--choices", nargs="+", metavar="CHOICE", help="2 to 26 possible answers; give them last"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of streaming text"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print the answer alone, and no progress"
    )
    parser.add_argument("--bundle", metavar="DIR", help="the model to use; default: the one inside")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=512, metavar="N",
        help="how much the model may write; with --choices, how much it may think (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--max-audio", type=float, default=300.0, metavar="S",
        help="longest clip to accept, in seconds (%(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--pcm-rate", type=_positive, metavar="HZ",
        help="standard input is raw 16-bit little-endian mono at this rate",
    )  # fmt: skip
    parser.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="threads to compute with; default: physical cores",
    )
    parser.add_argument(
        "--memory", choices=("default", "low"), default="default",
        help="low: load each part when it is needed and release it (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the bundle's files with its hashes"
    )
    version = f"tg-run {_version('tinygiant')} (onnxruntime {_version('onnxruntime')})"
    parser.add_argument("--version", action="version", version=version)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _fail(message: str, code: int) -> int:
    if sys.stderr is not None:
        print(f"tg-run: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
