"""How long a question takes, stage by stage, by length of the clip.

    python -m benchmarks.latency [--bundle DIR] [--seconds 2 5 10 30] [--rounds 5] [--save NAME]

Every figure is the median of several questions in one process, after one that is not counted. The
clips are seeded noise: what a stage costs does not depend on what is heard. The model is loaded
once; how long that took, and the peak of the process's memory, stand beside the table. The last
line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.report import command_line, write_result
from tinygiant.runtime import TinyGiantError, load
from tinygiant.runtime.pipeline import TinyGiant

__all__ = ["main", "measure"]

_RATE_HZ = 16_000
_QUESTION = "What is heard in this recording?"
STAGES = ("audio_s", "encode_s", "project_s", "prefill_s", "first_token_s", "decode_s", "total_s")


def measure(
    model: TinyGiant, seconds: Sequence[float], rounds: int, new_tokens: int
) -> list[dict[str, Any]]:
    """One row a clip length: the median of each stage in seconds, and tokens a second.

    A clip of other noise is asked about in every round, so that nothing was heard before.
    """
    rows = []
    for duration_s in seconds:
        answers = []
        for number in range(rounds + 1):
            noise = np.random.default_rng(number).standard_normal(round(duration_s * _RATE_HZ))
            clip = ((0.1 * noise).astype(np.float32), _RATE_HZ)
            answers.append(model.ask(clip, _QUESTION, max_new_tokens=new_tokens, max_audio_s=3600))
        counted = answers[1:]
        again = model.ask(clip, _QUESTION, max_new_tokens=new_tokens, max_audio_s=3600)
        row: dict[str, Any] = {"seconds": duration_s, "prompt_tokens": counted[0].tokens.prompt}
        for stage in STAGES:
            row[stage] = statistics.median(getattr(a.timings, stage) for a in counted)
        row["tokens_per_s"] = statistics.median(a.timings.tokens_per_s for a in counted)
        row["generated"] = statistics.median(a.tokens.generated for a in counted)
        row["real_time_factor"] = row["total_s"] / duration_s
        row["second_question_first_token_s"] = again.timings.first_token_s
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="default: the embedded one")
    parser.add_argument("--seconds", type=float, nargs="+", default=[2, 5, 10, 30], metavar="S")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", choices=("default", "low"), default="default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        start = time.perf_counter()
        model = load(options.bundle, threads=options.threads, memory=options.memory)
        load_s = time.perf_counter() - start
        rows = measure(model, options.seconds, options.rounds, options.new_tokens)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        data = {
            "model": model.config.name,
            "recipe": model.bundle.manifest.recipe.name,
            "weights": model.bundle.manifest.source.weights,
            "threads": options.threads,
            "memory": options.memory,
            "load_s": load_s,
            "peak_rss_bytes": peak_bytes,
            "rows": rows,
        }
        print(_table(data))
        command = command_line("benchmarks.latency", given)
        if options.save:
            write_result(options.save, "latency", command, data)
    except TinyGiantError as error:
        print(f"benchmarks.latency: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data))
    return 0


def _table(data: dict[str, Any]) -> str:
    lines = [
        f"{data['model']} {data['recipe']} ({data['weights']}), {data['threads']} threads, "
        f"memory {data['memory']}: loaded in {data['load_s']:.2f} s, "
        f"peak {data['peak_rss_bytes'] / 2**20:.0f} MiB",
        "",
        "| clip | encode | project | prefill | first token | tokens/s | total | x real time "
        "| first token, second question |",
        "|---" * 9 + "|",
    ]
    for row in data["rows"]:
        lines.append(
            f"| {row['seconds']:g} s | {row['encode_s']:.3f} s | {row['project_s']:.3f} s "
            f"| {row['prefill_s']:.3f} s | {row['first_token_s']:.3f} s "
            f"| {row['tokens_per_s']:.1f} | {row['total_s']:.3f} s "
            f"| {row['real_time_factor']:.2f} | {row['second_question_first_token_s']:.3f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
