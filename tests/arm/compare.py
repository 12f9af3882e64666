"""Does the runtime give the same answers on Arm? ``make test-arm``.

For each recipe a nano bundle with seeded weights is exported once, run here, and run with the real
aarch64 wheels under emulation as each board of :data:`sysroot.BOARDS`. An emulated core lacks what
the real one lacks: a kernel with an instruction the board does not have would end the run.

The gate: fp32 gives the same tokens and the same choice; int8 and int4 keep the recipe's own
limits, measured against this machine's run of the same bundle. Emulation is slow, so the clip lasts
a second and the text few tokens; speeds mean nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
from sysroot import BOARDS, Board, build, command

from tinygiant.quantize.recipes import RECIPES, Recipe
from tinygiant.runtime.bundle import Bundle

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
FP32_ERROR = 1e-4  # of every stage; summation order differs between processors
LIMIT_S = 3_600


def main() -> int:
    options = _options()
    cache = options.cache.resolve()
    work = cache / "work"
    work.mkdir(parents=True, exist_ok=True)
    root = build(cache, REPOSITORY / "constraints.txt")
    namespace = _namespace(cache)
    clip = _clip(work / "clip.wav")
    failures = 0
    for name in options.recipes or _recipes(options.bundle):
        bundle = options.bundle or _bundle(cache / "bundles" / name, name)
        reference = work / f"{name}-here.npz"
        tokens = str(options.tokens)
        run = [str(HERE / "answers.py"), str(bundle), str(clip)]
        here = [sys.executable, *run, str(reference), tokens]
        subprocess.run(here, check=True, timeout=LIMIT_S)
        for board in BOARDS:
            if options.cpus and board.cpu not in options.cpus:
                continue
            found = work / f"{name}-{board.cpu}.npz"
            start = time.perf_counter()
            subprocess.run(
                [*command(root, board, namespace), *run, str(found), tokens],
                check=True,
                timeout=LIMIT_S,
            )
            report = compare(found, reference, RECIPES[name])
            failures += not report["passed"]
            seconds = round(time.perf_counter() - start, 1)
            print(json.dumps({"recipe": name, "cpu": board.cpu, "seconds": seconds} | report))
    for board in BOARDS:
        _doctor(command(root, board, namespace), board)
    return 1 if failures else 0


def compare(found: Path, reference: Path, recipe: Recipe) -> dict[str, object]:
    """Errors of each stage and tokens, and whether they are within the gate."""
    with np.load(found) as a, np.load(reference) as b:
        stages = ("features", "streams", "audio_embeds", "logits")
        errors = {
            stage: float(np.linalg.norm(a[stage] - b[stage]) / np.linalg.norm(b[stage]))
            for stage in stages
        }
        logits = b["logits"]
        second, best = np.partition(logits, -2, axis=1)[:, -2:].T
        decided = best - second > recipe.tie_margin * logits.std(axis=1)
        agree = a["logits"].argmax(1) == logits.argmax(1)
        same_tokens = bool(np.array_equal(a["tokens"], b["tokens"]))
        same_choice = bool(a["choice"] == b["choice"])
    if recipe.name == "fp32":
        passed = same_tokens and same_choice and max(errors.values()) <= FP32_ERROR
    else:
        limit = recipe.relative_errors["decoder"]
        share = agree[decided].mean() if decided.any() else 1.0
        passed = errors["logits"] <= limit and share >= recipe.token_agreement
    return {
        "passed": bool(passed),
        "same_tokens": same_tokens,
        "same_choice": same_choice,
        "agreement": f"{agree.sum()}/{agree.size}",
        "different_tokens": len(set(logits.argmax(1).tolist())),
        "decided": f"{(agree & decided).sum()}/{decided.sum()}",
        "relative_error": {stage: float(f"{error:.2e}") for stage, error in errors.items()},
    }


def _doctor(python: list[str], board: Board) -> None:
    """The doctor must see the board for what it is."""
    run = subprocess.run(
        [*python, "-m", "tinygiant.runtime.cli.doctor", "--json", "--no-speed", "--no-bundle"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    found = {item["check"]: item["found"] for item in json.loads(run.stdout)["findings"]}
    print(json.dumps({"cpu": board.cpu, "doctor": found["processor"], "kernels": found["kernels"]}))
    has_dot_product = "asimddp" in board.features
    assert ("no dot product" not in found["kernels"]) == has_dot_product, found["kernels"]


def _bundle(target: Path, recipe: str) -> Path:
    if not target.exists():
        subprocess.run(
            [
                *(sys.executable, "-m", "tinygiant.export.cli", "--preset", "nano"),
                *("--random-weights", "0", "--recipe", recipe, "--output", str(target)),
            ],
            check=True,
        )
    return target


def _recipes(bundle: Path | None) -> list[str]:
    """All recipes, or the one that a bundle was made with."""
    return list(RECIPES) if bundle is None else [Bundle.open(bundle).manifest.recipe.name]


def _clip(path: Path) -> Path:
    """A second of a swelling tone at a rate that must be resampled both ways."""
    rate_hz = 22_050
    t = np.arange(rate_hz) / rate_hz
    noise = np.random.default_rng(3).standard_normal(t.size)
    samples = 0.4 * np.sin(2 * np.pi * 0.7 * t) * np.sin(2 * np.pi * 440 * t) + 0.02 * noise
    soundfile.write(path, samples.astype(np.float32), rate_hz, subtype="PCM_16")
    return path


def _namespace(cache: Path) -> Path:
    package = cache / "namespace" / "tinygiant"
    package.mkdir(parents=True, exist_ok=True)
    link = package / "runtime"
    if not link.is_symlink():
        link.symlink_to(REPOSITORY / "runtime")
    return package.parent


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=REPOSITORY / ".cache" / "arm")
    parser.add_argument("--bundle", type=Path, help="compare this bundle")
    parser.add_argument("--recipes", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--cpus", nargs="+", choices=[board.cpu for board in BOARDS])
    parser.add_argument("--tokens", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
