"""How long a question takes, stage by stage, by length of the clip.

    python -m benchmarks.latency [--bundle DIR] [--seconds 2 5 10 30] [--rounds 5] [--save NAME]

Every figure is the median of several questions in one process, after one that is not counted. The
clips are seeded noise: the cost of a stage does not depend on the content. Nothing is drafted, for
the gain from drafts depends on the text (``benchmarks.speculation``). Gaps are the times between
one piece of text and the next, as a reader sees them. The model is loaded once; how long that took,
and the peak of the process's memory, are printed with the table, and so is a cold start: from the
start of ``tg-run`` in a process of its own to its first token (the files are in the system's
cache). The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from benchmarks.report import command_line, write_result
from tinygiant.runtime import Answer, Finished, TextPiece, TinyGiantError, load
from tinygiant.runtime.pipeline import TinyGiant

__all__ = ["cold_start_s", "main", "measure"]

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
        answers, gaps_s = [], []
        for number in range(rounds + 1):
            clip = (_noise(duration_s, number), _RATE_HZ)
            answer, gaps = _timed(model, clip, new_tokens)
            answers.append(answer)
            gaps_s.append(gaps)
        counted = answers[1:]
        again = model.ask(clip, _QUESTION, max_new_tokens=new_tokens, max_audio_s=3600, raw=True)
        row: dict[str, Any] = {
            "seconds": duration_s,
            "heard_s": counted[0].audio.used_s,
            "prompt_tokens": counted[0].tokens.prompt,
        }
        for stage in STAGES:
            row[stage] = statistics.median(getattr(a.timings, stage) for a in counted)
        row["tokens_per_s"] = statistics.median(a.timings.tokens_per_s for a in counted)
        row["generated"] = statistics.median(a.tokens.generated for a in counted)
        for percent in (50, 95):
            gaps = np.concatenate(gaps_s[1:])
            row[f"gap_p{percent}_s"] = float(np.percentile(gaps, percent)) if gaps.size else 0.0
        row["real_time_factor"] = row["total_s"] / duration_s
        row["second_question_first_token_s"] = again.timings.first_token_s
        rows.append(row)
    return rows


def _noise(duration_s: float, seed: int) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).standard_normal(round(duration_s * _RATE_HZ))
    return (0.1 * noise).astype(np.float32)


def _timed(model: TinyGiant, clip: Any, new_tokens: int) -> tuple[Answer, NDArray[np.float64]]:
    """An answer, and the seconds between the pieces of its text."""
    times_s = []
    for event in model.stream(
        clip, _QUESTION, max_new_tokens=new_tokens, max_audio_s=3600, raw=True
    ):
        if isinstance(event, TextPiece):
            times_s.append(time.perf_counter())
        elif isinstance(event, Finished):
            return event.answer, np.diff(times_s)
    raise AssertionError("the stream ended without an answer")


def cold_start_s(bundle: str | None, seconds: float, options: Sequence[str]) -> float:
    """From the start of a process to its first token, for a clip of ``seconds``.

    Raises:
        TinyGiantError: the process wrote no token.
    """
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "noise.wav"
        soundfile.write(clip, _noise(seconds, 0), _RATE_HZ)
        command = [sys.executable, "-m", "tinygiant.runtime.cli.main", "--jsonl", "-q", *options]
        command += [] if bundle is None else ["--bundle", bundle]
        start_s = time.perf_counter()
        with subprocess.Popen(
            [*command, str(clip), _QUESTION], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line)["event"] == "text":
                    process.kill()
                    return time.perf_counter() - start_s
    raise TinyGiantError("the cold start wrote no token; see its message above")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.latency",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="default: the built-in one")
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
        # Without drafts: noise, and random weights above all, repeat themselves as no answer does.
        model = load(
            options.bundle, threads=options.threads, memory=options.memory, speculate=False
        )
        load_s = time.perf_counter() - start
        rows = measure(model, options.seconds, options.rounds, options.new_tokens)
        options_cold = ["--threads", str(options.threads), "--memory", options.memory]
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        data = {
            "model": model.config.name,
            "recipe": model.bundle.manifest.recipe.name,
            "weights": model.bundle.manifest.source.weights,
            "threads": options.threads,
            "memory": options.memory,
            "load_s": load_s,
            "peak_rss_bytes": peak_bytes,
            "cold_start_s": cold_start_s(options.bundle, options.seconds[0], options_cold),
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
        f"peak {data['peak_rss_bytes'] / 2**20:.0f} MiB; first token of a fresh process after "
        f"{data['cold_start_s']:.2f} s ({data['rows'][0]['seconds']:g} s of audio)",
        "",
        "| clip | encode | project | prefill | first token | tokens/s | gap p50, p95 | total "
        "| x real time | first token, second question |",
        "|---" * 10 + "|",
    ]
    for row in data["rows"]:
        heard = "" if row["heard_s"] == row["seconds"] else f", {row['heard_s']:g} s heard"
        lines.append(
            f"| {row['seconds']:g} s{heard} | {row['encode_s']:.3f} s | {row['project_s']:.3f} s "
            f"| {row['prefill_s']:.3f} s | {row['first_token_s']:.3f} s "
            f"| {row['tokens_per_s']:.1f} "
            f"| {1e3 * row['gap_p50_s']:.1f}, {1e3 * row['gap_p95_s']:.1f} ms "
            f"| {row['total_s']:.3f} s "
            f"| {row['real_time_factor']:.2f} | {row['second_question_first_token_s']:.3f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
