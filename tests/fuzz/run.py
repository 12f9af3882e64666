"""Search for inputs that break a parser: ``make fuzz``.

    python -m tests.fuzz.run [--seconds N] [--targets NAME ...]

Each target of ``targets.py`` runs in a process of its own, starting from its seeds: under atheris
(libFuzzer, guided by the coverage of this project's Python code) where the extra ``fuzz`` is
installed, else on damaged copies of the seeds and of one another, unguided. Inputs that break
something are kept in ``.cache/fuzz/TARGET/``; give one to ``--replay`` to see the failure again.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.fuzz.targets import TARGETS, damaged

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "fuzz"
MAX_INPUT_BYTES = 16_384
INPUT_LIMIT_S = 20
MEMORY_MIB = 2_048
N_KEPT = 200  # damaged inputs that are damaged again


def main() -> int:
    options = _options()
    if options.replay:
        [name] = options.targets
        TARGETS[name].check(options.replay.read_bytes())
        return 0
    is_guided = not options.unguided and importlib.util.find_spec("atheris") is not None
    if options.inside:
        search = _fuzz if is_guided else _damage
        search(options.targets[0], options.seconds, Path(options.inside))
        return 0
    if not is_guided:
        print(
            "fuzz: without coverage; for guided search (Linux, Python 3.11 to 3.13): "
            "pip install 'tinygiant[fuzz]'",
            file=sys.stderr,
        )
    failures = 0
    for name in options.targets:
        report = _report(name, options.seconds, is_guided=is_guided)
        failures += bool(report["findings"])
        print(json.dumps(report), flush=True)
    return 1 if failures else 0


def _report(name: str, seconds: int, *, is_guided: bool) -> dict[str, object]:
    findings = CACHE / name
    findings.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    # In memory where that can be: thousands of small files a second. libFuzzer ends the process
    # without cleaning up, so the files of the target lie in here too.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(TARGETS[name].seeds()):
            (corpus / f"seed-{number}").write_bytes(seed)
        run = subprocess.run(
            [
                *(sys.executable, "-m", "tests.fuzz.run", "--targets", name),
                *("--seconds", str(seconds), "--inside", str(corpus)),
                *([] if is_guided else ["--unguided"]),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            env=os.environ | {"TMPDIR": folder},
            check=False,
        )
    executions = re.findall(r"^#(\d+)", run.stderr, re.MULTILINE)
    found = [] if run.returncode == 0 else sorted(path.name for path in findings.iterdir())
    if run.returncode != 0:
        (findings / "log.txt").write_text(run.stderr[-20_000:])
        found = found or [f"exit code {run.returncode}, see {findings / 'log.txt'}"]
    return {
        "target": name,
        "guided": is_guided,
        "seconds": round(time.perf_counter() - start),
        "executions": int(executions[-1]) if executions else 0,
        "findings": found,
    }


def _damage(name: str, seconds: int, corpus: Path) -> None:
    """Damage the seeds, and what came of them; a finding is kept and raised."""
    signal.signal(signal.SIGALRM, _too_slow)
    generator = np.random.default_rng(int.from_bytes(os.urandom(8)))
    inputs = [path.read_bytes() for path in sorted(corpus.iterdir())]
    n_seeds, n_executions = len(inputs), 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for data in damaged(inputs[int(generator.integers(len(inputs)))], generator):
            data = data[:MAX_INPUT_BYTES]
            signal.alarm(INPUT_LIMIT_S)
            try:
                TARGETS[name].check(data)
                used_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
                assert used_mib < MEMORY_MIB, f"{used_mib} MiB of memory"
            except BaseException:
                (CACHE / name / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)
                raise
            finally:
                signal.alarm(0)
            n_executions += 1
            if len(inputs) < n_seeds + N_KEPT:
                inputs.append(data)
            else:
                inputs[n_seeds + int(generator.integers(N_KEPT))] = data
    print(f"#{n_executions}", file=sys.stderr)


def _too_slow(*_: object) -> None:
    raise AssertionError(f"took more than {INPUT_LIMIT_S} s")


def _fuzz(name: str, seconds: int, corpus: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    # A bound of the system, so that an allocation by a forged header fails instead of succeeding.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check = TARGETS[name].check
    with atheris.instrument_imports(include=["tinygiant"], enable_loader_override=False):
        for seed in TARGETS[name].seeds()[:1]:
            check(seed)
    atheris.Setup(
        [
            name,
            str(corpus),
            f"-max_total_time={seconds}",
            f"-max_len={MAX_INPUT_BYTES}",
            f"-timeout={INPUT_LIMIT_S}",
            f"-rss_limit_mb={MEMORY_MIB}",
            f"-artifact_prefix={CACHE / name}/",
            "-print_final_stats=1",
        ],
        check,
    )
    atheris.Fuzz()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=300, help="for each target (%(default)s)")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input, one target")
    parser.add_argument("--unguided", action="store_true", help="do not use atheris")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
