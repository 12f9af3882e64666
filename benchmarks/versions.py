"""Two checkouts of this project side by side: is the new one as fast and as small as the old one?

    python -m benchmarks.versions --old CHECKOUT PYTHON BUNDLE --new CHECKOUT PYTHON BUNDLE
        [--rounds 5] [--seconds 10 30] [--new-tokens 64] [--save NAME]

Each side is a folder of source, a Python in which it is installed, and a bundle that it can read.
Both run their own ``benchmarks.latency``, each time in a process of its own and by turns, so that
whatever else the machine does meets both alike. Every figure is the median over the processes; the
ratio is the median of the ratios of neighbours. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.report import command_line, write_result
from benchmarks.turns import median_ratio
from tinygiant.runtime.errors import TinyGiantError

__all__ = ["compare", "main"]

_STAGES = ("encode_s", "project_s", "prefill_s", "first_token_s", "decode_s", "total_s")


def run_latency(side: Sequence[str], options: Sequence[str]) -> dict[str, float]:
    """The figures of one process of ``side``, a checkout, its Python and a bundle, by name.

    Raises:
        TinyGiantError: the process failed.
    """
    checkout, python, bundle = map(os.path.abspath, side)
    process = subprocess.run(
        [python, "-m", "benchmarks.latency", "--bundle", bundle, "--rounds", "1", *options],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": checkout},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        reason = (process.stderr.strip() or "no message").splitlines()[-1]
        raise TinyGiantError(f"{side[0]} ended with code {process.returncode}: {reason}")
    data = json.loads(process.stdout.strip().splitlines()[-1])
    found = {name: data[name] for name in ("load_s", "cold_start_s")}
    found["peak_rss_mb"] = data["peak_rss_bytes"] / 1e6
    for row in data["rows"]:
        where = f"{row['seconds']:g} s"
        found |= {f"{where}: {stage}": row[stage] for stage in _STAGES}
        found[f"{where}: second_question_first_token_s"] = row["second_question_first_token_s"]
    return found


def compare(
    old: Sequence[dict[str, float]], new: Sequence[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Median of each figure on both sides, and of new over old among neighbours."""
    figures = {}
    for name in old[0]:
        before, after = ([run[name] for run in runs] for runs in (old, new))
        figures[name] = {
            "old": statistics.median(before),
            "new": statistics.median(after),
            "ratio": median_ratio(after, before),
        }
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for side in ("old", "new"):
        parser.add_argument(
            f"--{side}", nargs=3, required=True, metavar=("CHECKOUT", "PYTHON", "BUNDLE")
        )
    parser.add_argument("--seconds", nargs="+", default=["10", "30"], metavar="S")
    parser.add_argument("--new-tokens", default="64", metavar="N")
    parser.add_argument("--threads", default="2", metavar="N")
    parser.add_argument("--memory", choices=("default", "low"), default="default")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each side")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    passed = ["--seconds", *options.seconds, "--new-tokens", options.new_tokens]
    passed += ["--threads", options.threads, "--memory", options.memory]
    runs: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    try:
        for _ in range(options.rounds):
            for side, of_side in runs.items():
                of_side.append(run_latency(getattr(options, side), passed))
        data: dict[str, Any] = {"runs": runs, "figures": compare(runs["old"], runs["new"])}
        print(_table(data["figures"]))
        if options.save:
            command = command_line("benchmarks.versions", given)
            write_result(options.save, "versions", command, data)
    except TinyGiantError as error:
        print(f"benchmarks.versions: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data["figures"]))
    return 0


def _table(figures: dict[str, dict[str, float]]) -> str:
    lines = ["| figure | old | new | new / old |", "|---|---|---|---|"]
    for name, row in figures.items():
        lines.append(f"| {name} | {row['old']:.3f} | {row['new']:.3f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
