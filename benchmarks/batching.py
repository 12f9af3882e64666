"""Questions a second, several at a time against one at a time; the answers must be the same.

    python -m benchmarks.batching [--bundle DIR] [--parallel 2 4 8] [--workers 0 1] [--save NAME]

Each round asks the same questions one after another (``ask``), then in every other way
(``ask_many``), and nothing that was heard is remembered from one to the next. Every question has a
clip of its own: a part of those in ``examples/``, each a little louder than the one before it, so
that each is encoded. Figures are medians over the rounds, ratios are of medians of the same run.
``--threads`` may have two numbers, one for asking one at a time and one for asking several: small
products gain nothing by a second thread, which then is better spent on another question. Random
weights answer without drafts, for what they write repeats itself as no answer does; what the form
of an answer dictates is read at once all the same, in every way. The last line printed is one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.report import command_line, write_result
from benchmarks.turns import Here, race, surroundings, surroundings_lines
from tinygiant.runtime import Answer, AskOptions, Query, TinyGiantError, load, read_audio
from tinygiant.runtime.pipeline import TinyGiant
from tinygiant.runtime.speculation import Speculation

__all__ = ["main", "measure", "questions"]

_CLIPS = Path(__file__).resolve().parents[1] / "examples"
_ASKED: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("What is heard?", None),
    ("Which of these is heard?", ("a bird", "a drum", "rain", "a flute")),
    ("How many sounds are there?", None),
    ("Which sound comes first?", ("a voice", "an animal", "a bell")),
)


def questions(n: int, seconds: float | None, new_tokens: int) -> list[Query]:
    """``n`` questions about different clips, cut or repeated to ``seconds`` if that is given."""
    clips = [read_audio(path) for path in sorted(_CLIPS.glob("*.flac"))]
    found = []
    for number in range(n):
        clip = clips[number % len(clips)]
        samples = clip.samples * (1 - 0.5 * number / n)
        if seconds is not None:
            n_samples = round(seconds * clip.sampling_rate_hz)
            samples = samples.take(range(n_samples), mode="wrap")
        question, choices = _ASKED[number // len(clips) % len(_ASKED)]
        options = AskOptions(max_new_tokens=new_tokens)
        found.append(Query((samples, clip.sampling_rate_hz), question, choices, options))
    return found


def measure(
    asks: dict[str, Callable[[], Iterable[Answer | Exception]]], n_rounds: int
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every round by the way of asking, and what else the machine did.

    Raises:
        TinyGiantError: a question was not answered, or not as in the first way.
    """
    wanted: list[Answer] = []

    def engine(name: str, ask: Callable[[], Iterable[Answer | Exception]]) -> Here:
        def round_of(request: dict[str, Any]) -> dict[str, Any]:
            start_s = time.perf_counter()
            answers = [*ask()]
            taken_s = time.perf_counter() - start_s
            errors = [answer for answer in answers if isinstance(answer, Exception)]
            if errors:
                raise TinyGiantError(f"{name}: a question was not answered: {errors[0]}")
            whole = [answer for answer in answers if isinstance(answer, Answer)]
            wanted[:] = wanted or whole
            differ = sum(map(_differ, wanted, whole))
            if differ:
                raise TinyGiantError(f"{name}: {differ} of {len(wanted)} answers are others")
            return {"seconds": taken_s}

        return Here(round_of)

    runners = {name: engine(name, ask) for name, ask in asks.items()}
    rounds = race(runners, n_rounds, tell=lambda line: print(line, file=sys.stderr))
    seconds = {name: [done["seconds"] for done in of] for name, of in rounds.items()}
    return seconds, surroundings(runners.values())


def _differ(one: Answer, other: Answer) -> bool:
    return (one.raw_text, one.text, one.choice_probabilities) != (
        other.raw_text,
        other.text,
        other.choice_probabilities,
    )


def _rows(
    seconds: dict[str, list[float]], n_questions: int, one: str
) -> dict[str, dict[str, float]]:
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        name: {
            "questions_per_s": n_questions / median_s,
            "ratio": medians[one] / median_s,
            "fastest_s": min(seconds[name]),
            "slowest_s": max(seconds[name]),
        }
        for name, median_s in medians.items()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded one")
    parser.add_argument("--parallel", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], metavar="N")
    parser.add_argument("--questions", type=int, default=32, metavar="N")
    parser.add_argument("--seconds", type=float, metavar="S", help="length of the clips")
    parser.add_argument("--new-tokens", type=int, default=512, metavar="N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        data = _measured(options)
        if options.save:
            write_result(options.save, "batching", command_line("benchmarks.batching", given), data)
    except TinyGiantError as error:
        print(f"benchmarks.batching: {error}", file=sys.stderr)
        return error.exit_code
    for line in surroundings_lines(data):
        print(line)
    for name, row in data["rows"].items():
        print(f"{name:44}{row['questions_per_s']:9.3f} a second{row['ratio']:7.2f} x")
    print(json.dumps(data))
    return 0


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    models = {threads: load(options.bundle, threads=threads) for threads in options.threads}
    manifest = models[options.threads[0]].bundle.manifest
    asked = questions(options.questions, options.seconds, options.new_tokens)
    ways: dict[str, Callable[[], Iterable[Answer | Exception]]] = {}
    for threads, model in models.items():
        ways[f"one at a time, threads {threads}"] = _one_by_one(model, asked)
    for (threads, model), parallel, workers in itertools.product(
        models.items(), options.parallel, options.workers
    ):
        name = f"parallel {parallel}, workers {workers}, threads {threads}"
        ways[name] = _several(model, asked, parallel, workers)
    with contextlib.ExitStack() as stack:
        if manifest.source.weights != "trained":
            no_drafts = mock.patch.object(Speculation, "is_worth_it", lambda self: False)
            stack.enter_context(no_drafts)
        seconds, around = measure(ways, options.rounds)
    first = models[options.threads[0]]
    first.forget()
    answers = [first.ask(q.audio, q.question, q.choices, q.options) for q in asked]
    return {
        "model": manifest.model.name,
        "recipe": manifest.recipe.name,
        "weights": manifest.source.weights,
        "questions": len(asked),
        "clip_s": statistics.mean(answer.audio.used_s for answer in answers),
        "prompt_tokens": statistics.mean(answer.tokens.prompt for answer in answers),
        "generated_tokens": statistics.mean(answer.tokens.generated for answer in answers),
        "same_bits": {n: not m._trials.differs for n, m in models.items()},
        **around,
        "rows": _rows(seconds, len(asked), next(iter(ways))),
        "stages_s": {
            stage: statistics.mean(getattr(answer.timings, stage) for answer in answers)
            for stage in ("audio_s", "encode_s", "project_s", "prefill_s", "decode_s")
        },
    }


def _one_by_one(model: TinyGiant, asked: Sequence[Query]) -> Callable[[], Iterable[Answer]]:
    def ask() -> Iterable[Answer]:
        model.forget()
        return [model.ask(q.audio, q.question, q.choices, q.options) for q in asked]

    return ask


def _several(
    model: TinyGiant, asked: Sequence[Query], parallel: int, workers: int
) -> Callable[[], Iterable[Answer | Exception]]:
    def ask() -> Iterable[Answer | Exception]:
        model.forget()
        return model.ask_many(asked, parallel=parallel, workers=workers)

    return ask


if __name__ == "__main__":
    sys.exit(main())
