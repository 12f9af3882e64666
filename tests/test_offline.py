"""Nothing the project runs reaches for the network."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinygiant.models.checkpoint import save
from tinygiant.models.tinygiant import TinyGiantALM

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
GUARD = ROOT / "tests" / "no_network"
KERNEL_GUARD = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")


class Offline:
    """Runs commands in a process without network and keeps the log of what they tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "network.log"

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "ORT_"))}
        environment |= {
            "PYTHONPATH": str(GUARD),
            "NO_NETWORK_LOG": str(self.log),
            # an empty cache: what is not in the repository would have to be fetched
            "HF_HOME": str(self.folder / "hf"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "HOME": str(self.folder),
        }
        return subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.folder,
            timeout=300,
            check=False,
        )

    def attempts(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def offline(tmp_path: Path) -> Offline:
    return Offline(tmp_path)


def test_the_guard_sees_python_sockets(offline: Offline) -> None:
    attempt = "import urllib.request; urllib.request.urlopen('http://localhost:9')"
    result = offline.run(sys.executable, "-c", attempt)
    assert result.returncode == 1
    assert "socket.getaddrinfo" in offline.attempts()


@pytest.mark.skipif(not KERNEL_GUARD, reason="the kernel's filter is for Linux")
def test_the_guard_ends_native_sockets(offline: Offline) -> None:
    attempt = "import ctypes; ctypes.CDLL(None).socket(2, 1, 0)"
    assert offline.run(sys.executable, "-c", attempt).returncode == -signal.SIGSYS


def test_telemetry_is_off_before_onnxruntime_is_imported(offline: Offline) -> None:
    # The audit event of an import comes before the module's first line runs.
    code = """
import os, sys
def watch(event, arguments):
    if event == "import" and arguments[0] == "onnxruntime":
        print("telemetry disabled:", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.addaudithook(watch)
import importlib
importlib.import_module(sys.argv[1])
"""
    modules = ("runtime.ort.sessions", "runtime.pipeline", "quantize.dynamic", "export.exporter")
    for module in (f"tinygiant.{name}" for name in modules):
        result = offline.run(sys.executable, "-c", code, module)
        assert result.stdout.splitlines() == ["telemetry disabled: 1"], result.stderr
    assert offline.attempts() == ""


@pytest.mark.parametrize("command", ["tg-run", "tg-serve", "tg-listen", "tg-export", "tg-train"])
def test_help_opens_no_socket(offline: Offline, command: str) -> None:
    result = offline.run(SCRIPTS / command, "--help")
    assert result.returncode == 0, result.stderr
    assert offline.attempts() == ""


def test_an_answer_opens_no_socket(offline: Offline, tiny_bundle: Path) -> None:
    clip = ROOT / "examples" / "tiger-and-birds.flac"
    model = ("--bundle", tiny_bundle, "--max-new-tokens", "4")
    result = offline.run(SCRIPTS / "tg-run", clip, "What is heard?", *model)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert offline.attempts() == ""


def test_an_export_opens_no_socket(
    offline: Offline, tiny_model: TinyGiantALM, tokenizer_file: Path, tmp_path: Path
) -> None:
    save(tiny_model, tmp_path / "checkpoint", tokenizer=tokenizer_file)
    options = ("--output", "bundle", "--recipe", "fp32", "--threads", "1")
    result = offline.run(SCRIPTS / "tg-export", "checkpoint", *options)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    assert offline.attempts() == ""
