"""``tg-run doctor``: can this machine run the model, and if not, what to do?

The contract: every check is a :class:`Finding` that says what was found and, unless all is well,
what to do; a check that fails to look is a finding, never a traceback. Packages are imported in
processes of their own, so that one that dies of an illegal instruction is found and named. This
module itself imports the standard library alone and writes nothing to the disk.

Levels: ``ok``, ``note`` (good to know), ``warning`` (works, but not well), ``broken``. The exit
code is 1 if something is broken, else 0.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .. import media
from ..bundle import (
    MANIFEST_NAME,
    Bundle,
    default_bundle_path,
)
from ..errors import BundleError, TinyGiantError, UsageError
from ..files import LFS_SIGNATURE
from ..ort.machine import Machine
from ..ort.memory import estimated_bytes
from ..ort.providers import PROVIDERS, available_names
from ..text import counted, one_line, printable
from .options import OneLineParser

__all__ = ["KNOWN_BAD", "Finding", "KnownBad", "Level", "examine", "main"]

Level = Literal["ok", "note", "warning", "broken"]

MIB = 2**20
IMPORT_LIMIT_S = 120
SPEED_LIMIT_S = 120
HOT_C = 80.0  # a Raspberry Pi starts to slow down here
ADDRESS_SPARE_BYTES = 200 * MIB  # threads reserve far more addresses than they use memory

_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "soundfile", "soxr")

_DESCRIPTION = """\
Check this machine, the installed packages and the bundle, and say what to do about each problem.
Nothing is changed, downloaded or sent."""


@dataclass(frozen=True)
class Finding:
    """The result of one check: one line, and what to do unless all is well."""

    check: str
    level: Level
    found: str
    advice: str = ""


@dataclass(frozen=True)
class KnownBad:
    """Versions of a package known to fail: from ``first`` to before ``fixed_in``.

    ``machine`` is a pattern of ``platform.machine()``; ``source`` is where the failure is recorded.
    """

    package: str
    first: str
    fixed_in: str
    machine: str
    level: Level
    problem: str
    source: str


KNOWN_BAD = (
    KnownBad(
        "onnxruntime", "1.21.0", "1.22.0", "aarch64|arm64", "broken",
        "dies with an illegal instruction on cores such as Cortex-A72 (Raspberry Pi 4)",
        "https://github.com/microsoft/onnxruntime/issues/23957",
    ),
    KnownBad(
        "onnxruntime", "1.24.0", "1.24.2", ".*", "warning",
        "refuses weights that are symbolic links",
        "https://github.com/microsoft/onnxruntime/issues/27353",
    ),
    KnownBad(
        "onnxruntime", "1.24.0", "1.27.0", "aarch64|arm64", "warning",
        "leaks memory in a cache of its Arm convolutions",
        "https://github.com/microsoft/onnxruntime/issues/28231",
    ),
    KnownBad(
        "soundfile", "0", "0.12.1", ".*", "warning",
        "brings a libsndfile without mp3",
        "https://github.com/bastibe/python-soundfile/releases/tag/0.12.1",
    ),
)  # fmt: skip


# get_throttled, https://www.raspberrypi.com/documentation/computers/os.html#get_throttled
_THROTTLED_NOW = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tg-run doctor``; returns the exit code."""
    try:
        options = _parser().parse_args(arguments)
        findings = []
        for finding in examine(options.bundle, bundle=not options.no_bundle, speed=options.speed):
            findings.append(finding)
            if not options.json:
                print(_line(finding), flush=True)
        n_broken = sum(finding.level == "broken" for finding in findings)
        if options.json:
            report = {"ok": not n_broken, "findings": [asdict(finding) for finding in findings]}
            print(json.dumps(report, ensure_ascii=False))
        else:
            print(f"\n{n_broken or 'nothing'} broken", flush=True)
    except UsageError as error:
        print(f"tg-run doctor: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    return TinyGiantError.exit_code if n_broken else 0


def examine(
    bundle_path: str | os.PathLike[str] | None = None,
    *,
    machine: Machine | None = None,
    bundle: bool = True,
    speed: bool = True,
) -> Iterator[Finding]:
    """Make every check; findings come as they are made.

    Args:
        bundle_path: the bundle to check; the one ``tg-run`` would use if None.
        machine: where to read from.
        bundle: check the bundle, its memory and (with ``speed``) how fast it answers.
        speed: answer a question about two seconds of noise and estimate from it.
    """
    machine = machine or Machine()
    path = default_bundle_path() if bundle_path is None else Path(bundle_path)
    importable = True
    for name, check in (
        ("processor", _processor(machine)),
        ("temperature", _temperature(machine)),
        ("python", _python()),
        ("packages", _packages(machine)),
        ("imports", _imports(machine)),
        ("formats", _formats()),
    ):
        for finding in _guarded(name, check):
            importable &= not (finding.check.startswith("import ") and finding.level == "broken")
            yield finding
    if not bundle:
        return
    opened: list[Bundle] = []
    yield from _guarded("bundle", _bundle(path, opened))
    if opened:
        yield from _guarded("memory", _memory(machine, opened[0]))
        if speed and importable:
            yield from _guarded("speed", _speed(opened[0]))


def _guarded(name: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a check; its failure is one too."""
    try:
        yield from findings
    except Exception as error:
        yield Finding(
            name,
            "warning",
            f"could not be checked: {type(error).__name__}: {one_line(error)}",
            "report this line",
        )


def _processor(machine: Machine) -> Iterator[Finding]:
    model, features, n_cores = machine.cpu()
    shown = " ".join(name for name in _FEATURES if name in features) or "no features read"
    line = f"{printable(model)}; {machine.architecture}; {n_cores} logical cores; {shown}"
    yield Finding("processor", "ok", line)
    if machine.architecture in ("aarch64", "arm64"):
        if not features:
            yield Finding("kernels", "note", "the system does not list the processor's features")
        elif "asimddp" in features:
            more = " and i8mm" if "i8mm" in features else ""
            yield Finding("kernels", "ok", f"dot product{more}: int8 and int4 have fast kernels")
        else:
            yield Finding(
                "kernels",
                "note",
                "no dot product: int8 and int4 work, without their fast kernels",
                "compare fp32, int8 and int4 bundles with tg-run doctor --bundle before choosing",
            )
    elif machine.architecture in ("x86_64", "AMD64"):
        if features & {"avx512_vnni", "avx_vnni"}:
            yield Finding("kernels", "ok", "VNNI: int8 and int4 have fast kernels")
        elif "avx2" in features:
            yield Finding(
                "kernels",
                "note",
                "AVX2 without VNNI: int8 products saturate unless weights use 7 bits",
                "nothing to do for bundles of tg-export: their encoders' weights use 7 bits",
            )
        else:
            yield Finding(
                "kernels", "warning", "no AVX2: everything is slow", "use a newer machine"
            )
    else:
        yield Finding(
            "kernels", "warning", f"{machine.architecture}: no wheels are known for it",
            "use a 64-bit system on x86-64 or Arm",
        )  # fmt: skip


_FEATURES = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def _temperature(machine: Machine) -> Iterator[Finding]:
    degrees = machine.temperature_c()
    if degrees is not None:
        hot = degrees >= HOT_C
        yield Finding(
            "temperature",
            "warning" if hot else "ok",
            f"{degrees:.0f} C",
            "cool it (heat sink, fan): a hot processor slows itself down" if hot else "",
        )
    bits = machine.throttled()
    if bits is not None:
        now = [name for bit, name in _THROTTLED_NOW.items() if bits >> bit & 1]
        before = [name for bit, name in _THROTTLED_NOW.items() if bits >> (bit + 16) & 1]
        power = "use the power supply made for the board" if bits & 0x10001 else ""
        cool = "cool the board" if bits & 0xE000E else ""
        yield Finding(
            "throttling",
            "warning" if now else "note" if before else "ok",
            f"now: {', '.join(now) or 'none'}; since start: {', '.join(before) or 'none'}",
            "; ".join(part for part in (power, cool) if part),
        )
    governor = machine.text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor == "powersave":
        yield Finding(
            "governor", "note", "the processor runs at its lowest clock (powersave)",
            "echo ondemand | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )  # fmt: skip


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    found = f"{platform.python_implementation()} {version}, {8 * _pointer_bytes()} bits"
    if _pointer_bytes() != 8:
        yield Finding(
            "python", "broken", found, "install a 64-bit system: there are no wheels for 32 bits"
        )
    elif not (3, 11) <= sys.version_info[:2] <= (3, 14):
        yield Finding("python", "warning", found, "use Python 3.11 to 3.14")
    else:
        yield Finding("python", "ok", found)


def _pointer_bytes() -> int:
    return 8 if sys.maxsize > 2**32 else 4


def _packages(machine: Machine) -> Iterator[Finding]:
    minimum = _minimum_versions()
    for package in _PACKAGES:
        version = _installed(package)
        if version is None and package == "onnxruntime":
            version = next(filter(None, map(_installed, _ONNXRUNTIMES[1:])), None)
        if version is None:
            yield Finding(
                package, "broken", "not installed", f"run: {_pip(package, minimum.get(package))}"
            )
            continue
        bad = [entry for entry in KNOWN_BAD if _applies(entry, package, version, machine)]
        for entry in bad:
            yield Finding(
                package, entry.level, f"{version} {entry.problem} ({entry.source})",
                f"run: {_pip(package, max(entry.fixed_in, minimum.get(package, '0'), key=_key))}",
            )  # fmt: skip
        if _key(version) < _key(minimum.get(package, "0")):
            yield Finding(
                package, "broken", f"{version}, at least {minimum[package]} is needed",
                f"run: {_pip(package, minimum[package])}",
            )  # fmt: skip
        elif not bad:
            yield Finding(package, "ok", version)
    builds = [name for name in _ONNXRUNTIMES if _installed(name) is not None]
    if len(builds) > 1:
        yield Finding(
            "onnxruntime", "warning", f"several builds are installed: {', '.join(builds)}",
            f"they overwrite each other; run: pip uninstall {' '.join(builds)}, then install one",
        )  # fmt: skip


_ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")


def _applies(entry: KnownBad, package: str, version: str, machine: Machine) -> bool:
    return (
        entry.package == package
        and _key(entry.first) <= _key(version) < _key(entry.fixed_in)
        and re.fullmatch(entry.machine, machine.architecture) is not None
    )


def _imports(machine: Machine) -> Iterator[Finding]:
    for package in _PACKAGES:
        code = f"import {package}"
        if package == "onnxruntime":
            code = (
                "from tinygiant.runtime.ort.machine import Machine; import onnxruntime;"
                "print(Machine().physical_cores(), *onnxruntime.get_available_providers())"
            )
        output, fault, advice = _probe(code, IMPORT_LIMIT_S)
        if fault:
            yield Finding(f"import {package}", "broken", fault, advice)
            continue
        yield Finding(f"import {package}", "ok", "works")
        if package == "onnxruntime":
            cores, *providers = output.split()
            yield Finding(
                "threads", "ok", f"{counted(int(cores), 'physical core')} to compute with"
            )
            yield from _providers(machine, providers)


def _formats() -> Iterator[Finding]:
    """Which clips can be read."""
    if media.is_available():
        yield Finding("formats", "ok", "wav, flac, mp3, ogg; through FFmpeg m4a, mp4, webm, ...")
    else:
        yield Finding(
            "formats", "note", "wav, flac, mp3, ogg; not m4a, mp4, webm: FFmpeg is not installed",
            "run: pip install 'tinygiant[media]', or install the program ffmpeg",
        )  # fmt: skip


def _providers(machine: Machine, installed: Sequence[str]) -> Iterator[Finding]:
    """What --provider can be; a graphics processor that lies idle."""
    names = available_names(installed)
    yield Finding("providers", "ok", f"--provider can be {', '.join(names)}")
    if "cuda" in names:
        return
    for path, name in (("etc/nv_tegra_release", "Jetson"), ("proc/driver/nvidia/version", "GPU")):
        if machine.text(path):
            yield Finding(
                "providers", "note", f"an NVIDIA {name} that this onnxruntime does not use",
                f"replace onnxruntime by {PROVIDERS['cuda'].wheel}; never install both",
            )  # fmt: skip
            return


def _bundle(path: Path, opened: list[Bundle]) -> Iterator[Finding]:
    pointers = _lfs_pointers(path)
    if pointers:
        yield Finding(
            "bundle", "broken",
            f"{printable(path)}: weights are missing, git-lfs pointers lie in their place: "
            + ", ".join(printable(name) for name in pointers[:3]),
            "run: git lfs install && git lfs pull",
        )  # fmt: skip
        return
    try:
        bundle = Bundle.open(path, verify=True)
        for name in bundle.manifest.graphs:
            bundle.read_graph(name)
    except BundleError as error:
        message, _, advice = one_line(error).rpartition("; ")
        yield Finding(
            "bundle", "broken", message or advice, advice if message else "export the bundle again"
        )
        return
    opened.append(bundle)
    manifest = bundle.manifest
    size_bytes = sum(entry.size_bytes for entry in manifest.files)
    yield Finding(
        "bundle", "ok",
        f"{printable(bundle.root)}: {printable(manifest.model.name)}, "
        f"{printable(manifest.recipe.name)}, {size_bytes / 1e6:.1f} MB, all "
        f"{len(manifest.files)} hashes match",
    )  # fmt: skip
    if manifest.source.weights != "trained":
        yield Finding(
            "bundle", "note", "its weights are random: its answers mean nothing",
            "use it for measuring only",
        )  # fmt: skip
    installed = next(filter(None, map(_installed, _ONNXRUNTIMES)), "0")
    if _key(installed) < _key(manifest.min_onnxruntime):
        yield Finding(
            "bundle", "broken", f"needs onnxruntime {manifest.min_onnxruntime}, found {installed}",
            f"run: {_pip('onnxruntime', manifest.min_onnxruntime)}",
        )  # fmt: skip
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    present = (p.relative_to(bundle.root).as_posix() for p in _files(bundle.root))
    if extra := sorted(set(present) - listed):
        yield Finding(
            "bundle", "note",
            f"{counted(len(extra), 'file')} that the manifest does not list: "
            + ", ".join(map(printable, extra[:3])),
            "remove them; they are never read",
        )  # fmt: skip


def _files(folder: Path) -> Iterator[Path]:
    """Regular files of a folder, at most some thousands."""
    for number, path in enumerate(folder.rglob("*")):
        if number > 5_000:
            return
        if path.is_file():
            yield path


def _lfs_pointers(folder: Path) -> list[str]:
    found = []
    for path in _files(folder):
        if path.stat().st_size < 1_024:
            with path.open("rb") as file:
                if file.read(len(LFS_SIGNATURE)) == LFS_SIGNATURE:
                    found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def _memory(machine: Machine, bundle: Bundle) -> Iterator[Finding]:
    memory = machine.memory()
    default, low = estimated_bytes(bundle)
    needs = f"the bundle needs about {default // MIB} MiB, {low // MIB} with --memory low"
    space = machine.address_space_bytes()
    if space is not None:
        level: Level = "ok" if default + ADDRESS_SPARE_BYTES <= space else "warning"
        yield Finding(
            "address space", level, f"{space // MIB} MiB are left of what ulimit -v allows",
            "raise ulimit -v: native code may end without it" if level == "warning" else "",
        )  # fmt: skip
    if memory is None:
        yield Finding("memory", "note", f"the system does not say how much is free; {needs}")
        return
    total, available = memory
    found = f"{available // MIB} of {total // MIB} MiB are free; {needs}"
    swap_bytes = max((machine.obtainable_bytes() or 0) - available, 0)
    if swap_bytes >= MIB:
        found += f"; swap has room for {swap_bytes // MIB} MiB"
    if default <= available:
        yield Finding("memory", "ok", found)
    elif low <= available:
        yield Finding("memory", "warning", found, "use --memory low, or end other programs")
    elif low <= total + swap_bytes:
        yield Finding("memory", "warning", found, "end other programs and use --memory low")
    else:
        yield Finding("memory", "broken", found, "use a smaller recipe (int4) or a larger board")


_SPEED = """
import json, sys, numpy
from tinygiant.runtime import load
model = load(sys.argv[1], memory="low", verify=False)
noise = numpy.random.default_rng(0).standard_normal(32_000).astype("float32") * 0.05
answer = model.ask((noise, 16_000), "What is heard?", max_new_tokens=16)
print(json.dumps({"prompt": answer.tokens.prompt, "rate": answer.timings.tokens_per_s,
    "encode": answer.timings.encode_s, "prefill": answer.timings.prefill_s,
    "total": answer.timings.total_s}))
"""


def _speed(bundle: Bundle) -> Iterator[Finding]:
    output, fault, advice = _probe(_SPEED, SPEED_LIMIT_S, str(bundle.root))
    if fault:
        level: Level = "warning" if "seconds" in fault else "broken"
        yield Finding("speed", level, f"a question about 2 s of sound: {fault}", advice)
        return
    took: dict[str, Any] = json.loads(output)
    estimate_s = took["encode"] + took["prefill"] + 128 / max(took["rate"], 1e-3)
    yield Finding(
        "speed", "ok",
        f"2 s of sound: encoders {took['encode']:.2f} s, prompt of {took['prompt']} tokens "
        f"{took['prefill']:.2f} s, then {took['rate']:.1f} tokens a second; "
        f"an answer of 128 tokens takes about {estimate_s:.1f} s",
    )  # fmt: skip


def _probe(code: str, limit_s: float, *arguments: str) -> tuple[str, str, str]:
    """Run Python code in a process of its own: its output, or what went wrong and what to do."""
    environment = os.environ | {"ORT_DISABLE_TELEMETRY": "1"}
    try:
        run = subprocess.run(
            [sys.executable, "-P", "-c", code, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"took more than {limit_s:g} seconds", "end other programs; try again"
    except OSError as error:
        return "", f"no process can be started: {one_line(error)}", "check the system's limits"
    if run.returncode == 0:
        return run.stdout, "", ""
    if run.returncode < 0:
        number = -run.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return "", *_DEATHS.get(name, (f"ended by signal {name}", "check the system's log"))
    lines = run.stderr.strip().splitlines() or ["no message"]
    return (
        "",
        printable(lines[-1])[:300],
        "install the packages again: pip install --force-reinstall",
    )


_DEATHS = {
    "SIGILL": (
        "dies of an illegal instruction: the wheel uses one this processor lacks",
        "install another version of the package",
    ),
    "SIGBUS": ("dies of a bus error", "check the disk: a file may be cut short"),
    "SIGKILL": ("was killed, most likely because memory ran out", "use --memory low, or add swap"),
    "SIGSEGV": ("crashes (segmentation fault)", "install another version of the package"),
}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minimum_versions() -> dict[str, str]:
    """The least versions this package asks for, by its own metadata."""
    try:
        required = importlib.metadata.requires("tinygiant") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    bare = (re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in required)
    return {match[1]: match[2] for match in bare if match}


def _pip(package: str, minimum: str | None) -> str:
    return f"pip install '{package}>={minimum}'" if minimum else f"pip install {package}"


def _key(version: str) -> tuple[int, ...]:
    numbers = [int(number) for number in re.findall(r"\d+", version)[:3]]
    return tuple(numbers + [0] * (3 - len(numbers)))


def _line(finding: Finding) -> str:
    line = f"{finding.level:8} {finding.check:20} {finding.found}"
    return f"{line}\n{'':29} -> {finding.advice}" if finding.advice else line


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="tg-run doctor",
        description=_DESCRIPTION,
        epilog="exit codes: 0 nothing is broken · 1 something is · 2 wrong options",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--bundle", metavar="DIR", help="the bundle to check")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--no-bundle", action="store_true", help="check only the machine")
    parser.add_argument(
        "--no-speed", dest="speed", action="store_false", help="do not measure the speed"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
