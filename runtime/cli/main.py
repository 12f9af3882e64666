"""``tg-run``: ask a question about a clip from the command line.

The answer goes to standard output as it is written; progress, notes and timings go to standard
error, so that output can be piped. Whatever goes wrong ends in one line and an exit code of
:mod:`tinygiant.runtime.errors`; 130 after an interrupt, 141 if the reader of the output left.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import UsageError
from .interrupt import INTERRUPTED, exit_on_interrupt
from .options import parse
from .terminal import Progress, Style, complain, debugging, show
from .watching import watched

if TYPE_CHECKING:
    from ..audio import Audio, AudioSource
    from ..pipeline import TinyGiant

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tg-run`` on ``arguments`` (the process's own if None); returns the exit code."""
    if arguments is None:
        return watched("tg-run", _main)
    return _main(arguments)


def _main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:
        exit_on_interrupt("tg-run: interrupted\n")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal can show
    try:
        return _guarded(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("tg-run: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _guarded(words: list[str]) -> int:
    try:
        if words[:1] == ["doctor"]:
            from . import doctor

            return doctor.main(words[1:])
        return _run(parse(words))
    except BrokenPipeError:
        raise
    except Exception as error:
        if debugging():
            raise
        return complain(error)


def _run(options: argparse.Namespace) -> int:
    progress = Progress(silent=options.quiet)
    if options.completion:
        from .completion import script

        print(script(options.completion), end="")
        return 0
    if options.list_devices:
        from .microphone import devices

        print("\n".join(devices()))
        return 0
    if options.batch is not None:
        return _batch(options, progress)
    if options.question is None:
        return _converse(options, progress)
    return _ask(options, progress)


def _ask(options: argparse.Namespace, progress: Progress) -> int:
    # Imported here, so that --help is instant and an interrupt while loading is handled.
    from ..audio import read_audio
    from ..prompt import check_choices, check_question

    # What is wrong with the input is said before a large model is loaded.
    check_question(options.question)
    if options.choices is not None:
        check_choices(options.choices)
    if options.picture is not None:
        from . import picture

        picture.check(options.picture)
    audio = _read(options, progress)
    clips: list[AudioSource | Audio] = [audio]
    if options.second is not None:
        clips.append(read_audio(options.second, max_audio_s=options.max_audio))
    model = _load(options, progress)
    events = model.stream(
        clips,
        options.question,
        options.choices,
        think=not options.no_think,
        max_new_tokens=options.max_new_tokens,
        max_audio_s=options.max_audio,
    )
    answer, seen = show(events, _style(options), progress, options.choices)
    if options.picture is not None:
        figure = picture.draw(audio, model.config, seen, answer, options.question)
        picture.save(figure, options.picture)
    return 0


def _converse(options: argparse.Namespace, progress: Progress) -> int:
    from ..prompt import check_choices
    from .conversation import Conversation, question_lines

    if options.choices is not None:
        check_choices(options.choices)
    audio = _read(options, progress)
    conversation = Conversation(
        _load(options, progress),
        audio,
        progress,
        choices=options.choices,
        style=_style(options),
        think=not options.no_think,
        max_new_tokens=options.max_new_tokens,
        max_audio_s=options.max_audio,
    )
    with question_lines(silent=options.quiet) as lines:
        return conversation.run(lines)


def _batch(options: argparse.Namespace, progress: Progress) -> int:
    from .batch import Output, read_items, run

    items = read_items(options.batch, options.each, options.choices)
    with Output.open(options.output, items) as output:
        if output.left:
            run(
                output,
                _load(options, progress),
                progress,
                think=not options.no_think,
                max_new_tokens=options.max_new_tokens,
                max_audio_s=options.max_audio,
            )
        output.require_complete()
    return 0


def _style(options: argparse.Namespace) -> Style:
    if options.json:
        return "json"
    if options.jsonl:
        return "jsonl"
    return "answer" if options.quiet else "text"


def _load(options: argparse.Namespace, progress: Progress) -> TinyGiant:
    from ..pipeline import load

    model = load(
        options.bundle,
        threads=options.threads,
        memory=options.memory,
        verify=not options.no_verify,
        provider=options.provider,
        check_memory=not options.no_memory_check,
        speculate=not options.no_speculation,
    )
    progress.loaded(model.bundle.manifest.source.weights, model.config.name, model.providers)
    return model


def _read(options: argparse.Namespace, progress: Progress) -> Audio:
    from ..audio import read_audio, read_pcm

    if options.mic is not None:
        from .microphone import record

        return record(options.mic or None, progress, max_audio_s=options.max_audio)
    if options.clip != "-":
        return read_audio(options.clip, max_audio_s=options.max_audio)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("- reads audio from standard input, which is a terminal; pipe audio in")
    stream = sys.stdin.buffer
    if options.pcm_rate is None:
        return read_audio(stream, max_audio_s=options.max_audio)
    return read_pcm(stream, options.pcm_rate, max_audio_s=options.max_audio)


if __name__ == "__main__":
    sys.exit(main())
