"""The options of ``tg-run``, its help, and which of them go together."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import math
import os
import shlex
from collections.abc import Sequence
from typing import NoReturn

from ..errors import UsageError

__all__ = [
    "SHELLS",
    "OneLineParser",
    "at_least_one",
    "check_words",
    "make_parser",
    "parse",
    "seconds",
]

SHELLS = ("bash", "zsh")

_USAGE = """tg-run CLIP QUESTION [options]
       tg-run CLIP [options]                      many questions about one clip
       tg-run --mic[=DEVICE] [QUESTION] [options]
       tg-run --batch QUESTIONS.jsonl -o OUT.jsonl [options]
       tg-run --batch FOLDER --question QUESTION -o OUT.jsonl [options]
       tg-run doctor"""

_DESCRIPTION = """\
Ask a question about a sound. Runs on this computer alone; nothing is sent anywhere."""

_EPILOG = """\
examples:
  tg-run street.wav "What is happening here?"
  tg-run street.wav "Which sound comes first?" --choices "a dog" "a siren" "a bell"
  tg-run -q street.wav "Is anybody speaking?" --no-think --choices yes no
  tg-run street.wav                  many questions; :help lists the commands
  tg-run --mic "What was that?"      listens until the sound ends
  tg-run --batch clips/ --question "Is there an alarm?" --choices yes no -o alarms.jsonl
  ffmpeg -i film.mkv -t 60 -f wav - | tg-run - "Who is speaking?"
  arecord -d 5 -f S16_LE -r 16000 -t raw | tg-run - "What was that?" --pcm-rate 16000
  tg-run doctor                      check this machine and say what to do

The model first thinks (Plan, Audio Analysis, Logic, Summary), then answers. With --choices the
answer is always exactly one of them. The answer goes to standard output, everything else to
standard error.

exit codes:
  0 answered · 1 unforeseen failure · 2 wrong options · 3 audio cannot be used · 4 bundle missing
  or damaged · 5 question or choices cannot be asked · 8 output cannot be written · 9 an extra is
  not installed · 11 a batch with items that could not be answered · 130 interrupted · 141 the
  reader of the output closed it

environment:
  TINYGIANT_BUNDLE   bundle to use where --bundle is not given
  TINYGIANT_DEBUG=1  show the traceback of a failure
"""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other failure."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with the message, and the command that helps."""
        message = message.removeprefix("argument ")
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = self._unknown(unknown.split())
        raise UsageError(f"{message}; see {self.prog} --help")

    def _unknown(self, words: list[str]) -> str:
        """What is wrong with words that are left over."""
        word = next((word for word in words if word.startswith("-")), words[0]).partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        like = difflib.get_close_matches(word, known, n=1)
        return f"there is no option {word}" + (f", did you mean {like[0]}?" if like else "")


def check_words(clip: str, question: str | None) -> None:
    """Refuse a question that is a file: a second clip, or the first behind its question.

    Raises:
        UsageError: it is one.
    """
    if question is None or not os.path.splitext(question)[1] or not os.path.isfile(question):
        return
    if os.path.exists(clip):
        raise _second_clip(question)
    raise UsageError(
        f"the clip comes first, then the question: tg-run {shlex.quote(question)} "
        f"{shlex.quote(clip)}"
    )


def _second_clip(clip: str) -> UsageError:
    return UsageError(
        f"{clip} is a second clip, and a question is about one; ask about many with --batch FOLDER "
        "--question QUESTION, or compare two with --second CLIP2 if the model hears two"
    )


def make_parser() -> argparse.ArgumentParser:
    """The parser of ``tg-run``; :func:`parse` checks which options go together."""
    parser = OneLineParser(
        prog="tg-run",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "clip", metavar="CLIP", nargs="?",
        help="audio file (wav, flac, mp3, ogg; m4a, mp4, webm and others with FFmpeg); - reads "
        "standard input",
    )  # fmt: skip
    parser.add_argument(
        "question", metavar="QUESTION", nargs="?",
        help="the question, in plain words; without it, tg-run asks you for questions",
    )  # fmt: skip
    # Words too many; see _check.
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)
    _add_asking(parser.add_argument_group("asking"))
    _add_sound(parser.add_argument_group("sound"))
    _add_output(parser.add_argument_group("output"))
    _add_batch(parser.add_argument_group("many clips"))
    _add_model(parser.add_argument_group("model"))
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options in ``arguments``.

    Raises:
        UsageError: an unknown option, a wrong value, or options that do not go together.
    """
    # After -- everything is a clip or a question, even if it begins with a dash.
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    # An option with an optional value would take the question for its value.
    words = ["--mic=" if word == "--mic" else word for word in arguments[:end]]
    options = make_parser().parse_intermixed_args(words)
    for word in arguments[end + 1 :]:
        if options.clip is None:
            options.clip = word
        elif options.question is None:
            options.question = word
        else:
            options.more.append(word)
    if options.mic is not None and options.question is None:
        options.clip, options.question = None, options.clip
    _check(options)
    return options


def _add_asking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--choices", nargs="+", metavar="CHOICE", help="2 to 26 possible answers; give them last"
    )
    group.add_argument(
        "--no-think", action="store_true",
        help="answer without a thought; with --choices, give the probability of each",
    )  # fmt: skip
    group.add_argument(
        "--max-new-tokens", type=at_least_one, default=512, metavar="N",
        help="most tokens to write, thought and answer; with --choices, most of the thought "
        "(%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--raw", action="store_true",
        help="do not enforce the form of an answer, to study the model's own text",
    )  # fmt: skip


def _add_sound(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--second", metavar="CLIP2",
        help="a second clip, for models that compare two",
    )  # fmt: skip
    group.add_argument(
        "--mic", nargs="?", const="", metavar="DEVICE",
        help="record from the microphone until a sound has ended; --mic=DEVICE chooses a device "
        "by number or part of its name",
    )  # fmt: skip
    group.add_argument("--list-devices", action="store_true", help="list microphones and exit")
    group.add_argument(
        "--max-audio", type=seconds, default=300.0, metavar="S",
        help="longest clip to accept, in seconds (%(default)g); a model may have room for less",
    )  # fmt: skip
    group.add_argument(
        "--pcm-rate", type=at_least_one, metavar="HZ",
        help="the clip is raw samples without a header: 16-bit little-endian mono at this rate",
    )  # fmt: skip


def _add_output(group: argparse._ArgumentGroup) -> None:
    form = group.add_mutually_exclusive_group()
    form.add_argument(
        "--json", action="store_true", help="print one JSON object instead of streaming text"
    )
    form.add_argument(
        "--jsonl", action="store_true", help="print a line of JSON for each event; answer last"
    )
    group.add_argument(
        "-q", "--quiet", action="store_true", help="print only the answer, and no progress"
    )
    group.add_argument(
        "--picture", metavar="OUT.png",
        help="plot the sound, the model's attention and the answer",
    )  # fmt: skip


def _add_batch(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--batch", metavar="SOURCE",
        help="a folder of clips, or a .jsonl file (audio, question; optional choices and id)",
    )  # fmt: skip
    group.add_argument("--question", dest="each", metavar="Q", help="question about every clip")
    group.add_argument(
        "-o", "--output", metavar="OUT.jsonl",
        help="the answers, a line each; items that it already holds are not asked again",
    )  # fmt: skip
    group.add_argument(
        "--parallel", type=at_least_one, metavar="N",
        help="items in work at a time, with the same answers; default: 4, fewer if memory is short",
    )  # fmt: skip


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--bundle", metavar="DIR", help="the model to use; default: the built-in one"
    )
    group.add_argument(
        "--threads",
        type=at_least_one,
        metavar="N",
        help="threads to compute with; default: physical cores",
    )
    group.add_argument(
        "--memory", choices=("default", "low"), default="default",
        help="low: load each part when it is needed and release it (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--provider", default="cpu", metavar="P",
        help="what computes: cpu, cuda, tensorrt, openvino, coreml; or one for each part, such as "
        "encoders=tensorrt,decoder=cuda (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--no-speculation", action="store_true",
        help="do not draft tokens ahead; the answers are the same, often slower",
    )  # fmt: skip
    group.add_argument(
        "--no-verify", action="store_true", help="do not check the hashes of the bundle's files"
    )
    group.add_argument(
        "--no-memory-check", action="store_true",
        help="load the model even if memory is too small for it",
    )  # fmt: skip
    version = f"tg-run {_version('tinygiant')} (onnxruntime {_version('onnxruntime')})"
    group.add_argument("--version", action="version", version=version)
    group.add_argument(
        "--completion", choices=SHELLS,
        help="print a completion script and exit: eval \"$(tg-run --completion bash)\"",
    )  # fmt: skip


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if options.completion or options.list_devices:
        return
    if options.more:
        clips = [word for word in (options.question, *options.more) if os.path.isfile(word)]
        if clips:
            raise _second_clip(clips[0])
        raise UsageError(
            f"{' '.join(options.more)!r} is left over; put a question of several words in quotes; "
            "see tg-run --help"
        )
    if options.batch is not None:
        if options.clip is not None or options.mic is not None:
            raise UsageError(
                "--batch SOURCE already says which clips; leave out CLIP, QUESTION and --mic "
                "(one question for a whole folder goes into --question)"
            )
        if options.output is None:
            raise UsageError("--batch needs a file for its answers; add -o OUT.jsonl")
        if options.output == "-":
            raise UsageError(
                "-o - given, but a batch resumes from its output, which must be a file; add "
                "-o OUT.jsonl, and read it while it grows with tail -f"
            )
        for name in ("json", "jsonl", "picture", "pcm_rate", "second"):
            if getattr(options, name):
                option = name.replace("_", "-")
                raise UsageError(f"--{option} does not go with --batch; leave it out")
        return
    for name, option in (("each", "--question"), ("output", "-o"), ("parallel", "--parallel")):
        if getattr(options, name) is not None:
            raise UsageError(f"{option} needs --batch; for one clip: tg-run CLIP QUESTION")
    if options.mic is not None and options.clip is not None:
        raise UsageError("--mic records the clip; give only the question: --mic QUESTION")
    if options.mic is None and options.clip is None:
        if options.choices is not None:
            raise UsageError(
                f"--choices took all words after it ({', '.join(map(repr, options.choices))}), and "
                "no clip is left; give the clip and the question first, --choices last"
            )
        raise UsageError("no clip given; name an audio file, or use --mic; see tg-run --help")
    if options.clip == "-" and options.question is None:
        raise UsageError(
            "standard input is the clip, so the question has to be given: tg-run - QUESTION"
        )
    if options.second is not None and options.question is None:
        raise UsageError("--second needs a question about the two clips; give one")
    if options.picture is not None and options.question is None:
        raise UsageError("--picture plots one answer, and no question is given; add one")
    if options.picture is not None and not options.picture.lower().endswith(".png"):
        raise UsageError(f"--picture {options.picture}: expected a name that ends in .png")
    if options.pcm_rate is not None and options.mic is not None:
        raise UsageError("--pcm-rate describes a file or standard input; leave it out with --mic")


def at_least_one(text: str) -> int:
    """An option's value as a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number of at least 1")
    return number


def seconds(text: str) -> float:
    """An option's value as a time."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected a number of seconds above 0")
    return number


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
