"""``tg-run``: ask a question about a clip from the command line.

The answer goes to standard output as it is written; progress, notes and timings go to standard
error, so that output can be piped. A failure is one line and an exit code of
:mod:`tinygiant.runtime.errors`; 130 after an interrupt, 141 if the reader of the output left.
"""

from __future__ import annotations

import os
import sys

# Everything else is imported once an interrupt is taken care of.
from .interrupt import INTERRUPTED, cleaned_up, exit_from_native_code, exit_on_interrupt

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from ..asking import AskOptions, Clips
    from ..audio import Audio
    from ..pipeline import TinyGiant
    from .terminal import Progress, Style

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tg-run`` on ``arguments`` (the process's own if None); returns the exit code."""
    if arguments is not None:
        return _main(list(arguments))
    exit_on_interrupt("tg-run")
    from .watching import watched

    return watched("tg-run", _process)


def _process() -> int:
    """The command in a process of its own."""
    exit_from_native_code()
    from .streams import prepare_streams

    prepare_streams()
    return _main(sys.argv[1:])


def _main(words: list[str]) -> int:
    try:
        return _guarded(words)
    except KeyboardInterrupt:
        if sys.stderr is not None:
            print("tg-run: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes standard output once more at exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _guarded(words: list[str]) -> int:
    from .options import parse
    from .terminal import debugging, report_error

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
        return report_error(error)


def _run(options: argparse.Namespace) -> int:
    from .streams import require_output
    from .terminal import Progress

    progress = Progress(silent=options.quiet)
    if options.batch is not None:
        return _batch(options, progress)
    require_output()
    if options.completion:
        from .completion import script

        print(script(options.completion), end="")
        return 0
    if options.list_devices:
        from .microphone import devices

        print("\n".join(devices()))
        return 0
    if options.question is None:
        return _converse(options, progress)
    return _ask(options, progress)


def _ask(options: argparse.Namespace, progress: Progress) -> int:
    # Imported here, so that --help is instant.
    from ..audio import read_audio
    from ..prompt import check_choices, check_question
    from .terminal import show

    # What is wrong with the input is said before a large model is loaded.
    check_question(options.question)
    if options.choices is not None:
        check_choices(options.choices)
    if options.picture is not None:
        from . import picture

        picture.check(options.picture)
    audio = _read(options, progress)
    clips: Clips = audio
    if options.second is not None:
        clips = [audio, read_audio(options.second, max_audio_s=options.max_audio)]
    model = _load(options, progress)
    events = model.stream(clips, options.question, options.choices, _ask_options(options))
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
        options=_ask_options(options),
    )
    with question_lines(silent=options.quiet) as lines:
        return conversation.run(lines)


def _batch(options: argparse.Namespace, progress: Progress) -> int:
    from .batch import Output, left_out, read_items, run

    items = read_items(options.batch, options.each, options.choices)
    with Output.open(options.output, items) as output, cleaned_up(output.close):
        if others := left_out(options.batch):
            progress.line(f"note: {others}")
        if output.left:
            model = _load(options, progress)
            run(output, model, progress, _ask_options(options), options.parallel)
        output.require_complete()
    return 0


def _ask_options(options: argparse.Namespace) -> AskOptions:
    from ..asking import AskOptions

    return AskOptions(
        think=not options.no_think,
        max_new_tokens=options.max_new_tokens,
        max_audio_s=options.max_audio,
        raw=options.raw,
    )


def _style(options: argparse.Namespace) -> Style:
    if options.json:
        return "json"
    if options.jsonl:
        return "jsonl"
    return "answer" if options.quiet else "text"


def _load(options: argparse.Namespace, progress: Progress) -> TinyGiant:
    from ..loading import load

    model = load(
        options.bundle,
        threads=options.threads,
        memory=options.memory,
        verify=not options.no_verify,
        provider=options.provider,
        check_memory=not options.no_memory_check,
        speculate=not options.no_speculation,
        many=options.batch is not None and options.parallel != 1,
    )
    progress.loaded(model.bundle.manifest.source.weights, model.config.name, model.providers)
    return model


def _read(options: argparse.Namespace, progress: Progress) -> Audio:
    from ..audio import read_audio, read_pcm
    from ..errors import UsageError
    from .options import check_words

    if options.mic is not None:
        from .microphone import record

        return record(options.mic or None, progress, max_audio_s=options.max_audio)
    if options.clip == "-":
        if sys.stdin is None or sys.stdin.isatty():
            is_what = "closed" if sys.stdin is None else "a terminal"
            raise UsageError(
                f"- reads the clip from standard input, which is {is_what}; pipe audio in, or name "
                "a file"
            )
        stream = sys.stdin.buffer
        if options.pcm_rate is None:
            return read_audio(stream, max_audio_s=options.max_audio)
        return read_pcm(stream, options.pcm_rate, max_audio_s=options.max_audio)
    check_words(options.clip, options.question)
    if options.pcm_rate is None:
        return read_audio(options.clip, max_audio_s=options.max_audio)
    return read_pcm(options.clip, options.pcm_rate, max_audio_s=options.max_audio)


if __name__ == "__main__":
    sys.exit(main())
