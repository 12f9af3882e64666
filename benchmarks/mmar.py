"""``python -m benchmarks.mmar``: accuracy on MMAR, or on a split of the synthetic world.

Runs a bundle through the runtime (or a checkpoint through PyTorch), writes the official submission
lines and scores them with the official match. The last line of the output is one line of JSON.

    python -m benchmarks.mmar --meta MMAR-meta.jsonl --audio MMAR --bundle bundles/nano-int8 \\
        -o runs/nano-int8.jsonl --save mmar-nano-int8
    python -m benchmarks.mmar --meta data/world/test          # a split: meta.jsonl and audio/
    python -m benchmarks.mmar --meta data/world/test/open.jsonl   # the same without choices
    python -m benchmarks.mmar --meta data/world/test/fresh.jsonl  # and in fresh wordings
    python -m benchmarks.mmar score predictions.jsonl --meta MMAR-meta.jsonl
    python -m benchmarks.mmar compare fp32.jsonl int8.jsonl --meta data/world/test

An item that fails is answered with its first choice (an open one with nothing), so that the
submission is complete; its error goes to standard error and the failures are counted. A run that
was cut off goes on with the same command.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.answering import Answerer, Question, Reply, RuntimeAnswerer
from benchmarks.predictions import RunLog, file_sha256, meta_file, read_items, read_predictions
from benchmarks.report import command_line, write_result
from benchmarks.scoring import (
    Item,
    agreement,
    breakdown,
    calibration_error,
    compare,
    string_match,
    tally,
    well_formed,
)
from tinygiant.runtime.errors import BundleError, StorageError, TinyGiantError, UsageError
from tinygiant.runtime.text import one_line, printable

__all__ = ["answer_items", "main", "score"]

MAX_NEW_TOKENS = 512
_FIELDS = {"modality": "modality", "category": "category", "sub_category": "sub-category"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or ``score`` or ``compare`` predictions; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"score": _score, "compare": _compare}
    command, rest = (
        (commands[arguments[0]], arguments[1:])
        if arguments and arguments[0] in commands
        else (_run, arguments)
    )
    try:
        command(rest, command_line("benchmarks.mmar", arguments))
    except TinyGiantError as error:
        print(f"mmar: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mmar: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def answer_items(items: Sequence[Item], audio: Path, answerer: Answerer, log: RunLog) -> None:
    """Answer every item that ``log`` does not have yet, and write it there at once.

    Raises:
        BundleError: the model is damaged; nothing can be answered any more.
        UsageError: none of the audio files is there.
        StorageError: the log cannot be written.
    """
    if not any(_audio_file(audio, item).is_file() for item in items):
        raise UsageError(
            f"none of the {len(items)} audio files is there, the first would be "
            f"{_audio_file(audio, items[0])}; name their folder with --audio"
        )
    todo = [item for item in items if item.id not in log.answers]
    batches = [todo[i : i + answerer.batch_size] for i in range(0, len(todo), answerer.batch_size)]
    for batch in _progress(batches, done=len(items) - len(todo), total=len(items)):
        for item, reply, seconds, error in _answer_batch(batch, audio, answerer):
            if error is not None:
                print(f"mmar: {item.id} failed: {error}", file=sys.stderr)
            log.add(
                item.id,
                reply.answer,
                reply.thought,
                seconds=seconds,
                error=error,
                confidence=reply.confidence,
            )


def score(
    items: Sequence[Item], answers: Mapping[str, str], thoughts: Mapping[str, str]
) -> dict[str, Any]:
    """Accuracy overall and by modality, category and sub-category; agreement of the thoughts.

    Raises:
        UsageError: no answer, or one to a question that is not among the items.
    """
    unknown = sorted(answers.keys() - {item.id for item in items})
    if unknown or not answers:
        found = f"{len(unknown)} answers to unknown questions ({unknown[0]})" if unknown else "none"
        raise UsageError(f"the predictions do not belong to these questions: {found}")
    result: dict[str, Any] = tally(items, answers).to_dict()
    result["n_questions"] = len(items)
    plain = [answers[item.id] for item in items if item.open and item.id in answers]
    if plain:
        result["well_formed"] = sum(map(well_formed, plain)) / len(plain)
    silent = [i for i in items if i.answer == "Nothing is heard." and i.id in answers]
    if silent:
        said = [" ".join(("", *answers[i.id].lower().split(), "")) for i in silent]
        result["silence"] = {
            "n": len(silent),
            "says_nothing": sum(" nothing " in text for text in said),
        }
    for field in _FIELDS:
        groups = breakdown(items, answers, field)
        result[f"by_{field}"] = {name: group.to_dict() for name, group in groups.items()}
    result["agreement"] = agreement(items, answers, thoughts)
    return result


def _run(arguments: Sequence[str], command: str) -> None:
    options = _run_parser().parse_args(arguments)
    items = read_items(options.meta)
    audio = options.audio or meta_file(options.meta).parent
    answerer = _load(options)
    made_with = {
        "model": answerer.identity,
        "questions": file_sha256(meta_file(options.meta)),
        "max_new_tokens": options.max_new_tokens,
    }
    if options.no_think:
        made_with["think"] = False
    with tempfile.TemporaryDirectory() as scratch:
        log = RunLog(options.output or Path(scratch) / "predictions.jsonl", made_with)
        answer_items(items[: options.limit], audio, answerer, log)
        result = score(items, log.answers, log.thoughts)
    seconds = [details["seconds"] for details in log.details.values()]
    sure = [
        (log.details[i.id]["confidence"], string_match(i.answer, log.answers[i.id], i.choices))
        for i in items
        if "confidence" in log.details.get(i.id, {})
    ]
    if sure:
        result["calibration_error"] = calibration_error(*zip(*sure, strict=True))
    result |= {
        "failed": sum(details["error"] is not None for details in log.details.values()),
        "wall_s": round(sum(seconds), 2),
        "s_per_question": round(sum(seconds) / len(seconds), 4),
    }
    data = {
        "questions": {
            "name": _set_name(options.meta), "sha256": made_with["questions"], "n": len(items)
        },
        "model": answerer.about,
        "settings": {
            "max_new_tokens": options.max_new_tokens,
            "think": not options.no_think,
            "threads": options.threads,
            "batch_size": options.parallel if options.torch is None else answerer.batch_size,
        },
        "result": result,
    }  # fmt: skip
    if options.save is not None:
        path = write_result(options.save, "mmar", command, data)
        print(f"mmar: result in {path}", file=sys.stderr)
    _print_score(result, f"{answerer.about['name']} ({answerer.about['recipe']})")
    print(json.dumps({"model": answerer.about, "questions": data["questions"], **result}))


def _score(arguments: Sequence[str], command: str) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mmar score", description="Score a file of predictions."
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS")
    _add_meta(parser)
    options = parser.parse_args(arguments)
    result = score(read_items(options.meta), *read_predictions(options.predictions))
    _print_score(result, options.predictions.name)
    print(json.dumps(result))


def _compare(arguments: Sequence[str], command: str) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mmar compare",
        description="Compare two runs over the questions that both answered: difference in points, "
        "discordant pairs and the exact two-sided McNemar test.",
    )
    parser.add_argument("a", type=Path, metavar="A", help="predictions, for example of fp32")
    parser.add_argument("b", type=Path, metavar="B", help="predictions, for example of int8")
    _add_meta(parser)
    options = parser.parse_args(arguments)
    items = read_items(options.meta)
    (answers_a, _), (answers_b, _) = (read_predictions(p) for p in (options.a, options.b))
    modalities = dict.fromkeys(item.modality for item in items)
    rows = {"all": compare(items, answers_a, answers_b)}
    for modality in sorted(modalities):
        rows[modality] = compare(
            [item for item in items if item.modality == modality], answers_a, answers_b
        )
    if rows["all"].n == 0:
        raise UsageError(f"{options.a} and {options.b} have no question in common")
    print(f"{'':24}{'n':>6}{'A':>8}{'B':>8}{'B - A':>8}{'only A':>8}{'only B':>8}{'p':>9}")
    for name, row in rows.items():
        if row.n:
            print(
                f"{printable(name):24}{row.n:6}{100 * row.accuracy_a:8.2f}"
                f"{100 * row.accuracy_b:8.2f}{row.difference_points:+8.2f}"
                f"{row.only_a:8}{row.only_b:8}{row.p_value:9.4f}"
            )
    print(json.dumps({name: row.to_dict() for name, row in rows.items() if row.n}))


def _load(options: argparse.Namespace) -> Answerer:
    if options.torch is None:
        return RuntimeAnswerer(
            options.bundle,
            max_new_tokens=options.max_new_tokens,
            threads=options.threads,
            think=not options.no_think,
            parallel=options.parallel,
        )
    if options.no_think or options.parallel > 1:
        raise UsageError("--no-think and --parallel are for bundles: leave out --torch")
    import torch  # here, so that bundles can be measured where there is no PyTorch

    from benchmarks.torch_reference import TorchReference

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return TorchReference(
        options.torch,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch,
        device=options.device,
    )


def _answer_batch(
    batch: Sequence[Item], audio: Path, answerer: Answerer
) -> Iterable[tuple[Item, Reply, float, str | None]]:
    """Replies, seconds an item and errors; when a batch fails, its items are asked one by one."""
    questions = [Question(_audio_file(audio, i), i.question, i.choices, i.open) for i in batch]
    start = time.perf_counter()
    try:
        replies, error = answerer.answer(questions), None
    except (BundleError, StorageError):
        raise
    except Exception as failure:
        if len(batch) > 1:
            for item in batch:
                yield from _answer_batch([item], audio, answerer)
            return
        # The first choice of an open question is its right answer.
        given = "" if batch[0].open else batch[0].choices[0]
        replies, error = [Reply(given, "")], one_line(failure)
    seconds = (time.perf_counter() - start) / len(batch)
    for item, reply in zip(batch, replies, strict=True):
        yield item, reply, seconds, error


def _audio_file(folder: Path, item: Item) -> Path:
    return folder / item.audio_path


def _progress(
    batches: Sequence[Sequence[Item]], *, done: int, total: int
) -> Iterable[Sequence[Item]]:
    """The batches, with a progress bar where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from batches
        return
    with tqdm(total=total, initial=done, unit="question", disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch))


def _print_score(result: Mapping[str, Any], title: str) -> None:
    print(f"{printable(title):40}{'n':>6}{'right':>7}{'%':>8}   95 % interval  chance")
    _print_row("all", result)
    for field, heading in _FIELDS.items():
        print(heading)
        for name, group in result[f"by_{field}"].items():
            _print_row(f"  {name}", group)
    if result["n"] < result["n_questions"]:
        print(
            f"{result['n_questions'] - result['n']} of {result['n_questions']} have no prediction"
        )
    if result["agreement"] is not None:
        print("thoughts, compared with the answer given and with the scene")
        for name, value in result["agreement"].items():
            if name != "n" and value is not None:
                print(
                    f"  {name.replace('_', ' '):38}{result['agreement']['n']:6}{100 * value:15.2f}"
                )
    if "well_formed" in result:
        print(f"well formed, of the answers without choices: {100 * result['well_formed']:.1f} %")
    if "silence" in result:
        silence = result["silence"]
        print(f"silence: {silence['says_nothing']} of {silence['n']} say that nothing is heard")
    if "calibration_error" in result:
        print(f"expected calibration error: {100 * result['calibration_error']:.1f} points")
    if "wall_s" in result:
        print(
            f"{result['wall_s']:.1f} s in all, {result['s_per_question']:.3f} s a question; "
            f"{result['failed']} failed"
        )


def _print_row(name: str, group: Mapping[str, Any]) -> None:
    low, high = group["ci95"]
    print(
        f"{printable(name):40}{group['n']:6}{group['correct']:7}{100 * group['accuracy']:8.2f}"
        f"{100 * low:8.2f}..{100 * high:6.2f}{100 * group['chance']:8.2f}"
    )


def _set_name(meta: Path) -> str:
    file = meta_file(meta)
    split = f"synthetic {file.resolve().parent.name}"
    named = {
        "meta.jsonl": split,
        "open.jsonl": f"{split}, open",
        "fresh.jsonl": f"{split}, open, fresh wordings",
    }
    return named.get(file.name, file.stem)


def _add_meta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--meta", type=Path, required=True, metavar="META",
        help="MMAR-meta.jsonl, or the folder of a split of the synthetic world",
    )  # fmt: skip


def _run_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mmar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_meta(parser)
    parser.add_argument(
        "--audio", type=Path, metavar="DIR",
        help="what audio_path is relative to; default: the folder of META",
    )  # fmt: skip
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="default: the model inside the runtime"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE",
        help="predictions; the same command goes on with them. Default: not kept",
    )  # fmt: skip
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--max-new-tokens", type=_positive, default=MAX_NEW_TOKENS, metavar="N",
        help="bound of the thought (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--no-think", action="store_true", help="answer without a thought")
    parser.add_argument(
        "--parallel", type=_positive, default=1, metavar="N",
        help="questions in work at a time, with the same answers (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: physical cores")
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    torch = parser.add_argument_group("PyTorch instead of a bundle")
    torch.add_argument("--torch", type=Path, metavar="CHECKPOINT", help="a checkpoint's folder")
    torch.add_argument(
        "--batch", type=_positive, default=1, metavar="N",
        help="questions at a time (%(default)s); more is faster and may differ in the last bits",
    )  # fmt: skip
    torch.add_argument("--device", default="cpu", help="of torch (%(default)s)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
