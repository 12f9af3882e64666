"""``python -m benchmarks.figures``: tables and the picture, from ``benchmarks/results/*.json``.

    python -m benchmarks.figures accuracy benchmarks/results/mmar-nano-*.json     Markdown
    python -m benchmarks.figures ablation benchmarks/results/ablation-*.json      Markdown
    python -m benchmarks.figures size benchmarks/results/mmar-nano-*.json -o docs/accuracy.png
    python -m benchmarks.figures quality benchmarks/results/quality-smollm2.json -o PICTURE

The paper's numbers are on MMAR; results on the synthetic world answer other, easier questions, and
are never comparable with them. Every table and the picture say what was asked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import read_results
from benchmarks.scoring import MODALITIES, wilson_interval
from tinygiant.runtime.errors import MissingDependencyError, TinyGiantError, UsageError
from tinygiant.runtime.text import one_line

__all__ = [
    "PAPER",
    "ablation_table",
    "accuracy_table",
    "draw_quality",
    "draw_sizes",
    "front",
    "main",
]

SHORT = dict(zip(MODALITIES, ("S", "M", "Sp", "S-M", "S-Sp", "M-Sp", "S-M-Sp"), strict=True))
VARIANTS = {
    "vanilla": (False, False),
    "no intent query": (False, True),
    "no CLAP gate": (True, False),
    "full": (True, True),
}
_ROWS = (*SHORT.values(), "mixtures", "overall")
# TinyGiantALM (Interspeech 2026): accuracy on MMAR in %, by variant, in the order of the modalities
# and overall. Its table has no row for all mixtures.
PAPER = {
    "vanilla": (33.94, 35.92, 39.80, 9.09, 38.99, 43.90, 45.83, 38.00),
    "no intent query": (38.79, 33.50, 44.56, 18.18, 40.37, 36.59, 41.67, 39.70),
    "no CLAP gate": (38.79, 35.44, 43.54, 36.36, 47.71, 50.00, 54.17, 42.70),
    "full": (47.27, 37.86, 46.94, 45.45, 49.08, 58.54, 41.67, 46.40),
}
_EXACT = 1e-5  # of a divergence: rounding
PAPER_N = 1_000
PAPER_CHANCE = 29.3
# 732.3 M in the encoders, 596.0 M in the decoder, about 30 M in the projector, two bytes each.
PAPER_SIZE_BYTES = 2 * 1_358_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table or draw the picture; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        results = read_results(options.results, "quality" if options.what == "quality" else "mmar")
        if options.what == "accuracy":
            print(accuracy_table(results))
        elif options.what == "ablation":
            print(ablation_table(results))
        elif options.what == "size":
            print(draw_sizes(results, options.output))
        else:
            print(draw_quality(results[0], options.output))
    except TinyGiantError as error:
        print(f"figures: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return 0


def accuracy_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: one row a run; accuracy in % by modality, 95 % interval, size, time."""
    columns = [name for name in SHORT if any(name in r["result"]["by_modality"] for r in results)]
    lines = [
        "| run | questions | n | "
        + " | ".join(SHORT[name] for name in columns)
        + " | all | 95 % | chance | MB | s / question |",
        "|" + "---|" * (len(columns) + 8),
    ]
    for result in results:
        scored, by_modality = result["result"], result["result"]["by_modality"]
        low, high = scored["ci95"]
        cells = [
            f"{result['model']['name']} {result['model']['recipe']}",
            result["questions"]["name"],
            str(scored["n"]),
            *(_percent(by_modality[c]["accuracy"]) if c in by_modality else "–" for c in columns),
            f"**{_percent(scored['accuracy'])}**",
            f"{_percent(low)}–{_percent(high)}",
            _percent(scored["chance"]),
            f"{result['model']['size_bytes'] / 1e6:.1f}",
            f"{scored['s_per_question']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablation_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown in the paper's form: modalities by variants, mean ± standard deviation over seeds.

    The paper's own table (MMAR) follows it.

    Raises:
        UsageError: runs over different questions, or the same checkpoint twice.
    """
    if len({result["questions"]["sha256"] for result in results}) > 1:
        raise UsageError("the results are over different questions; give results of one set")
    checkpoints = [result["model"]["checkpoint_sha256"] for result in results]
    if len(set(checkpoints)) < len(checkpoints):
        raise UsageError("two results are of the same checkpoint; give one a seed and variant")
    groups: dict[str, list[dict[str, tuple[int, int]]]] = {name: [] for name in VARIANTS}
    switches = {switch: name for name, switch in VARIANTS.items()}
    for result in results:
        model = result["model"]
        variant = switches[(model["intent_query"], model["semantic_gate"])]
        groups[variant].append(_counts(result["result"]))
    counts = groups[next(name for name, runs in groups.items() if runs)][0]
    head = "| | n | " + " | ".join(VARIANTS) + " |\n|---|---|" + "---|" * len(VARIANTS)
    title = f"{results[0]['questions']['name']}, % right, mean ± standard deviation over seeds:"
    lines = [title, "", head]
    for row in _ROWS:
        if row in counts:
            cells = [_spread([run[row] for run in runs if row in run]) for runs in groups.values()]
            lines.append(f"| {row} | {counts[row][1]} | {' | '.join(cells)} |")
    lines.append(f"| seeds | | {' | '.join(str(len(runs)) for runs in groups.values())} |")
    lines += ["", "The paper, on MMAR:", "", head.replace("| n ", "").replace("|---|", "|", 1)]
    for position, row in enumerate((*SHORT.values(), "overall")):
        cells = [f"{PAPER[variant][position]:.2f}" for variant in VARIANTS]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_sizes(results: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw accuracy against the size of the weights on disk; returns ``path``.

    A large circle with its 95 % interval for all questions, small marks for each modality, a dashed
    line for chance. The paper's point is drawn too, on other questions.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib is missing: pip install matplotlib") from error
    points = [
        (
            "TinyGiantALM in the paper (1.5 B, 16 bit), MMAR",
            PAPER_SIZE_BYTES,
            PAPER["full"][-1],
            wilson_interval(round(PAPER["full"][-1] / 100 * PAPER_N), PAPER_N),
            dict(zip(SHORT.values(), PAPER["full"], strict=False)),
        )
    ]
    for result in results:
        model, scored = result["model"], result["result"]
        groups = scored["by_modality"]
        points.append(
            (
                f"{model['name']} {model['recipe']}, {result['questions']['name']}",
                model["size_bytes"],
                100 * scored["accuracy"],
                scored["ci95"],
                {SHORT[k]: 100 * v["accuracy"] for k, v in groups.items() if k in SHORT},
            )
        )
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    marks = dict(zip(SHORT.values(), "sv^<>Pd", strict=True))
    for number, (label, size_bytes, accuracy, (low, high), modalities) in enumerate(points):
        colour, size_mb = f"C{number}", size_bytes / 1e6
        bar = [[accuracy - 100 * low], [100 * high - accuracy]]
        axis.errorbar(
            [size_mb], [accuracy], bar, fmt="o", color=colour, ms=9, capsize=4, label=label
        )
        for place, (short, mark) in enumerate(marks.items(), start=2):
            if short in modalities:  # next to the point, in the order of the legend
                axis.plot(size_mb * 1.05**place, modalities[short], mark, color=colour, ms=4)
    chances = {r["questions"]["name"]: 100 * r["result"]["chance"] for r in results}
    for place, (questions, chance) in enumerate(({"MMAR": PAPER_CHANCE} | chances).items()):
        axis.axhline(chance, color="grey", lw=0.8, ls="--")
        axis.annotate(
            f"chance, {questions}", (1 - 0.3 * place, chance),
            xycoords=("axes fraction", "data"), ha="right", color="grey", fontsize=8,
            va="bottom" if place else "top",
        )  # fmt: skip
    for short, mark in marks.items():
        axis.plot([], [], mark, color="grey", ms=4, ls="none", label=short)
    axis.set(xscale="log", ylim=(0, 100), xlabel="weights on disk (MB)", ylabel="right answers (%)")
    axis.set_title("Accuracy against model size (sets of questions differ, see legend)", size=11)
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other is better than in both: ``(speed, loss)``, by speed."""
    best: list[str] = []
    for name, (_, loss) in sorted(points.items(), key=lambda item: (-item[1][0], item[1][1])):
        if not best or loss < points[best[-1]][1]:
            best.append(name)
    return best[::-1]


def draw_quality(data: Mapping[str, Any], path: Path) -> Path:
    """Draw what decoders of a real model lose against how fast they are; returns ``path``.

    Of ``benchmarks.quality --speed``: the divergence from float32, of the last copy of the model,
    which is the one that was timed. The line joins those of which none is faster and closer.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        UsageError: nothing was timed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib is missing: pip install matplotlib") from error
    timed = [row for row in data["rows"] if "decode_tokens_per_s" in row]
    timed = [row for row in timed if row["all"]["divergence"] > _EXACT]
    if not timed:
        raise UsageError("no decoder was timed; run benchmarks.quality with --speed")
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axis, stage in zip(figure.subplots(1, 2, sharey=True), ("prefill", "decode"), strict=True):
        points = {
            row["name"]: (row[f"{stage}_tokens_per_s"], row["all"]["divergence"]) for row in timed
        }
        axis.plot(*zip(*(points[name] for name in front(points)), strict=True), color="C0", lw=1)
        for name, point in points.items():
            peer = name.startswith("llama.cpp")
            axis.plot(*point, "s" if peer else "o", color="grey" if peer else "C0")
            axis.annotate(name, point, xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set(yscale="log", xlabel=f"{stage}, tokens a second")
        axis.margins(x=0.15)
    figure.axes[0].set_ylabel("divergence from float32, nats a token (less is closer)")
    figure.suptitle(
        f"{data['model']}, {timed[0]['copy']} copy, {data['threads']} threads; "
        "+prompts: of the tokens behind a prompt",
        size=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _counts(scored: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Right answers and questions, by row of the ablation table."""
    groups = scored["by_modality"]
    counts = {SHORT[k]: (v["correct"], v["n"]) for k, v in groups.items() if k in SHORT}
    mixed = [v for k, v in groups.items() if k.startswith("mix-")]
    if mixed:
        counts["mixtures"] = (sum(v["correct"] for v in mixed), sum(v["n"] for v in mixed))
    return counts | {"overall": (scored["correct"], scored["n"])}


def _spread(counts: Sequence[tuple[int, int]]) -> str:
    shares = [100 * correct / n for correct, n in counts]
    if not shares:
        return "–"
    mean = f"{statistics.fmean(shares):.2f}"
    return f"{mean} ± {statistics.stdev(shares):.2f}" if len(shares) > 1 else mean


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, help_text in (
        ("accuracy", "table: one row a run, accuracy by modality"),
        ("ablation", "table: the paper's ablation, mean and spread over seeds"),
        ("size", "plot: accuracy against model size"),
        ("quality", "plot: what decoders lose against how fast they are"),
    ):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
        if name in ("size", "quality"):
            command.add_argument("-o", "--output", type=Path, required=True, metavar="PICTURE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
