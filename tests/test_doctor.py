"""``tg-run doctor``: forged machines, forged packages, damaged bundles, dying imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinygiant.runtime.bundle import Bundle
from tinygiant.runtime.cli import doctor
from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.cli.doctor import Finding, examine, main
from tinygiant.runtime.ort.machine import Machine
from tinygiant.runtime.ort.memory import estimated_bytes

PI4 = "fp asimd evtstrm crc32 cpuid"
PI5 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def board(
    root: Path,
    *,
    features: str = PI4,
    part: str = "0xd08",
    free_mib: int = 3_000,
    temperature: int | None = None,
    throttled: str | None = None,
) -> Machine:
    """A Raspberry Pi with four cores and 3,800 MiB."""
    cpuinfo = "".join(
        f"processor\t: {core}\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU part\t: {part}\n\n"
        for core in range(4)
    )
    files = {
        "proc/cpuinfo": cpuinfo,
        "proc/meminfo": f"MemTotal: {3_800 * 1024} kB\nMemAvailable: {free_mib * 1024} kB\n",
        "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    }
    if temperature is not None:
        files["sys/class/thermal/thermal_zone0/temp"] = f"{temperature}\n"
    if throttled is not None:
        files["sys/devices/platform/soc/soc:firmware/get_throttled"] = throttled
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return Machine(root, "aarch64")


def of(findings: list[Finding], check: str) -> list[Finding]:
    return [finding for finding in findings if finding.check == check]


@pytest.fixture
def no_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the imports in processes of their own, which take seconds."""
    monkeypatch.setattr(doctor, "_imports", lambda machine: iter(()))


def look(machine: Machine, bundle: Path | None = None) -> list[Finding]:
    return list(examine(bundle, machine=machine, bundle=bundle is not None, speed=False))


def test_a_pi_4_has_no_dot_product(tmp_path: Path, no_imports: None) -> None:
    findings = look(board(tmp_path))
    [processor] = of(findings, "processor")
    assert "Raspberry Pi 4 Model B Rev 1.4, Cortex-A72; aarch64; 4 logical" in processor.found
    [kernels] = of(findings, "kernels")
    assert kernels.level == "note"
    assert "no dot product" in kernels.found
    assert kernels.advice


def test_a_pi_5_has_one(tmp_path: Path, no_imports: None) -> None:
    findings = look(board(tmp_path, features=PI5, part="0xd0b"))
    assert "Cortex-A76" in of(findings, "processor")[0].found
    assert of(findings, "kernels") == [
        Finding("kernels", "ok", "dot product: int8 and int4 have fast kernels")
    ]


@pytest.mark.parametrize(
    ("bits", "level", "now", "advice"),
    [
        ("0", "ok", "now: none; since start: none", ""),
        (
            "50005",
            "warning",
            "now: under-voltage, throttled; since start: under-voltage, thr",
            "pow",
        ),
        ("80000", "note", "now: none; since start: soft temperature limit", "cool the board"),
    ],
)
def test_throttling_bits(
    tmp_path: Path, no_imports: None, bits: str, level: str, now: str, advice: str
) -> None:
    [finding] = of(look(board(tmp_path, throttled=bits)), "throttling")
    assert finding.level == level
    assert finding.found.startswith(now)
    assert advice in finding.advice
    assert bool(advice) == bool(finding.advice)


@pytest.mark.parametrize(
    "path", ["etc/nv_tegra_release", "proc/driver/nvidia/version"], ids=["Jetson", "GPU"]
)
def test_an_idle_gpu_is_told(tmp_path: Path, path: str) -> None:
    machine = board(tmp_path)
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text("R36 (release)")
    told, advice = doctor._providers(machine, ["CPUExecutionProvider"])
    assert told.found == "--provider can be cpu"
    assert (advice.level, "onnxruntime-gpu" in advice.advice) == ("note", True)
    (told,) = doctor._providers(machine, ["CUDAExecutionProvider", "CPUExecutionProvider"])
    assert told.found == "--provider can be cpu, cuda"


def test_heat(tmp_path: Path, no_imports: None) -> None:
    assert of(look(board(tmp_path, temperature=54_500)), "temperature")[0].level == "ok"
    hot = of(look(board(tmp_path, temperature=84_000)), "temperature")[0]
    assert (hot.level, hot.found) == ("warning", "84 C")


@pytest.mark.parametrize(
    "cpuinfo", ["", "garbage", "processor : 0\nFeatures\n\0\0", "x" * 3_000_000]
)
def test_a_system_that_tells_nonsense(tmp_path: Path, no_imports: None, cpuinfo: str) -> None:
    machine = board(tmp_path)
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    (tmp_path / "proc/meminfo").write_text("MemTotal: many kB")
    (tmp_path / "sys/class/thermal/thermal_zone0").mkdir(parents=True)
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").write_text("hot")
    assert machine.memory() is None
    assert machine.temperature_c() is None
    findings = look(machine)
    assert not [finding for finding in findings if "could not be checked" in finding.found]
    assert len(of(findings, "processor")) == 1


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    machine = board(tmp_path)
    assert machine.memory() == (3_800 * 2**20, 3_000 * 2**20)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text(f"{512 * 2**20}\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text(f"{100 * 2**20}\n")
    assert machine.memory() == (512 * 2**20, 412 * 2**20)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.memory() == (3_800 * 2**20, 3_000 * 2**20)


@pytest.mark.parametrize(
    ("package", "version", "machine", "level"),
    [
        ("onnxruntime", "1.21.0", "aarch64", "broken"),
        ("onnxruntime", "1.21.1", "aarch64", "broken"),
        ("onnxruntime", "1.26.0", "aarch64", "warning"),
        ("onnxruntime", "1.32.0", "aarch64", None),
        ("onnxruntime", "1.24.1", "x86_64", "warning"),
        ("onnxruntime", "1.26.0", "x86_64", None),
        ("soundfile", "0.11.0", "aarch64", "warning"),
    ],
)
def test_known_bad_versions_are_named_with_their_source(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_imports: None,
    package: str,
    version: str,
    machine: str,
    level: str | None,
) -> None:
    monkeypatch.setattr(doctor, "_minimum_versions", dict)
    monkeypatch.setattr(doctor, "_installed", lambda name: version if name == package else "99.0")
    board(tmp_path)
    found = [f for f in of(look(Machine(tmp_path, machine)), package) if "https://" in f.found]
    assert {f.level for f in found} == ({level} if level else set())
    assert all(f.advice.startswith(f"run: pip install '{package}>=") for f in found)


def test_missing_old_and_double_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_imports: None
) -> None:
    versions = {"numpy": "1.20.0", "onnxruntime": "1.32.0", "onnxruntime-gpu": "1.32.0"}
    monkeypatch.setattr(doctor, "_installed", versions.get)
    monkeypatch.setattr(doctor, "_minimum_versions", lambda: {"numpy": "1.26", "soxr": "0.5"})
    findings = look(board(tmp_path))
    assert of(findings, "numpy")[0].level == "broken"
    assert of(findings, "numpy")[0].advice == "run: pip install 'numpy>=1.26'"
    assert of(findings, "soxr")[0] == Finding(
        "soxr", "broken", "not installed", "run: pip install 'soxr>=0.5'"
    )
    assert "several builds" in of(findings, "onnxruntime")[-1].found


def test_the_packages_own_metadata_gives_the_least_versions() -> None:
    minimum = doctor._minimum_versions()
    assert set(minimum) == {"numpy", "onnxruntime", "tokenizers", "soundfile", "soxr"}
    assert minimum["onnxruntime"] == "1.27"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (f"import os; os.kill(os.getpid(), {int(signal.SIGILL)})", "illegal instruction"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})", "crashes"),
        (f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})", "killed"),
        ("import no_such_package", "ModuleNotFoundError"),
        ("raise ImportError('GLIBC_2.99 not found\\x1b[2J')", "GLIBC_2.99 not found"),
        ("import time; time.sleep(60)", "took more than"),
    ],
)
def test_an_import_that_dies_is_told(code: str, fault: str) -> None:
    output, found, advice = doctor._probe(code, 3.0)
    assert output == ""
    assert fault in found
    assert found.isprintable()
    assert advice


def test_a_process_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert "no process can be started" in doctor._probe("pass", 3.0)[1]


def test_a_failing_check_is_a_finding_of_its_own() -> None:
    def failing() -> object:
        yield Finding("a", "ok", "first")
        raise RuntimeError("no\nway")

    first, second = doctor._guarded("a", failing())
    assert first.found == "first"
    assert (second.level, second.found) == ("warning", "could not be checked: RuntimeError: no way")


def test_a_good_bundle(tmp_path: Path, tiny_bundle: Path, no_imports: None) -> None:
    findings = look(board(tmp_path), tiny_bundle)
    assert of(findings, "bundle")[0].level == "ok"
    assert "random" in of(findings, "bundle")[1].found  # the tiny model is seeded
    assert of(findings, "memory")[0].level == "ok"


def test_git_lfs_pointers_are_all_counted(
    tmp_path: Path, bundle_copy: Path, no_imports: None
) -> None:
    for name in ("embed_tokens.npy", "onnx/projector.onnx.data"):
        (bundle_copy / name).write_bytes(LFS)
    [finding] = of(look(board(tmp_path), bundle_copy), "bundle")
    assert finding.level == "broken"
    assert "git-lfs pointers lie in their place" in finding.found
    assert "embed_tokens.npy, onnx/projector.onnx.data" in finding.found
    assert "git lfs pull" in finding.advice


def test_a_changed_byte_and_a_stray_file(
    tmp_path: Path, bundle_copy: Path, no_imports: None
) -> None:
    (bundle_copy / "notes.txt").write_text("mine")
    assert "notes.txt" in of(look(board(tmp_path), bundle_copy), "bundle")[-1].found
    weights = bundle_copy / "onnx/projector.onnx.data"
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    [finding] = of(look(board(tmp_path), bundle_copy), "bundle")
    assert finding.level == "broken"
    assert "projector.onnx.data was changed" in finding.found
    assert "export the bundle again" in finding.advice


@pytest.mark.parametrize(
    ("free_mib", "total_mib", "level", "advice"),
    [
        (1_000, 3_800, "ok", ""),
        (600, 3_800, "warning", "--memory low"),
        (100, 3_800, "warning", "end other programs"),
        (100, 200, "broken", "smaller recipe"),
    ],
)
def test_memory_is_compared_with_what_the_bundle_needs(
    tmp_path: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_mib: int,
    total_mib: int,
    level: str,
    advice: str,
) -> None:
    monkeypatch.setattr(doctor, "estimated_bytes", lambda bundle: (900 * 2**20, 500 * 2**20))
    machine = board(tmp_path, free_mib=free_mib)
    meminfo = f"MemTotal: {total_mib * 1024} kB\nMemAvailable: {free_mib * 1024} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    [finding] = doctor._memory(machine, Bundle.open(tiny_bundle, verify=False))
    assert finding.level == level
    assert advice in finding.advice


def test_swap_and_a_bounded_address_space_are_told(tmp_path: Path, tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle, verify=False)
    _, low = estimated_bytes(bundle)
    machine = board(tmp_path, free_mib=1)
    (tmp_path / "proc/self").mkdir()
    (tmp_path / "proc/self/statm").write_text("0 0")
    (tmp_path / "proc/self/limits").write_text(f"Max address space  {90 << 20}  unlimited  bytes")
    meminfo = f"MemTotal: {low // 2048} kB\nMemAvailable: 1024 kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    space, memory = doctor._memory(machine, bundle)
    assert (space.level, space.found) == (
        "warning",
        "90 MiB are left of what ulimit -v allows",
    )
    assert memory.level == "broken"
    (tmp_path / "proc/meminfo").write_text(meminfo + f"SwapFree: {low // 1024} kB\n")
    (tmp_path / "proc/self/limits").write_text("Max address space  unlimited unlimited  bytes")
    (memory,) = doctor._memory(machine, bundle)
    assert memory.level == "warning"
    assert f"swap has room for {low // 2**20} MiB" in memory.found


def test_what_a_question_needs_is_not_underestimated(tiny_bundle: Path) -> None:
    """Against the peak of a real question in a process of its own."""
    code = (
        "import re, sys, numpy; from tinygiant.runtime import load\n"
        "load(sys.argv[1], threads=1).ask((numpy.ones(16000, 'f4') / 9, 16000), 'What?',"
        "max_new_tokens=2)\n"
        # not ru_maxrss, which counts the parent's memory at the fork
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle)], capture_output=True, text=True, check=True
    )
    default, low = estimated_bytes(Bundle.open(tiny_bundle))
    assert low <= default
    assert int(run.stdout) * 1024 <= 1.1 * default


def test_the_whole_command(
    bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--bundle", str(bundle_copy), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    checks = {finding["check"]: finding for finding in report["findings"]}
    assert "--provider can be cpu" in checks["providers"]["found"]
    assert "tokens a second" in checks["speed"]["found"]
    (bundle_copy / "tokenizer.json").unlink()
    assert main(["--bundle", str(bundle_copy), "--no-speed"]) == 1
    out = capsys.readouterr().out
    assert "tokenizer.json is missing" in out
    assert out.endswith("1 broken\n")


def test_tg_run_has_a_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--no-bundle", "--json", "--nonsense"]) == 2
    assert capsys.readouterr().err.startswith("tg-run doctor: there is no option --nonsense")


def test_wrong_options_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_broken_numpy_does_not_stop_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy/__init__.py").write_text(
        "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    )
    run = subprocess.run(
        [sys.executable, "-m", "tinygiant.runtime.cli.doctor", "--no-bundle", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert run.returncode == 1
    found = {f["check"]: f for f in json.loads(run.stdout)["findings"]}
    for package in ("numpy", "onnxruntime"):
        assert "illegal instruction" in found[f"import {package}"]["found"]
