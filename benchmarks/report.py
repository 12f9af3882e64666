"""Results on disk: one JSON file a measurement, with all that is needed to repeat it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinygiant.runtime.errors import StorageError, UsageError

__all__ = [
    "RESULTS",
    "command_line",
    "commit",
    "machine",
    "read_results",
    "versions",
    "write_result",
]

RESULTS = Path(__file__).resolve().parent / "results"

_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers")


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory and system of this computer; no names of hosts or users."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_name(),
        "architecture": platform.machine(),
        "cores": usable,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }


def versions(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Python's version and those of the installed ``packages``."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that is checked out, ``-dirty`` if tracked files differ; None outside git."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line(module: str, arguments: Sequence[str]) -> str:
    """How ``python -m module`` was called, fit for a shell."""
    return shlex.join(["python", "-m", module, *arguments])


def write_result(
    name: str, benchmark: str, command: str, data: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Write ``folder/name.json``: ``data`` and where, when, how and with what it was measured.

    Raises:
        UsageError: ``name`` is no plain file name.
        StorageError: the file cannot be written.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UsageError(f"result name {name!r}: use letters, digits, dots, dashes, underscores")
    result = {
        "name": name,
        "benchmark": benchmark,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **data,
    }
    path = folder / f"{name}.json"
    partial = path.with_suffix(".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def read_results(paths: Sequence[Path], benchmark: str) -> list[dict[str, Any]]:
    """The results of one benchmark among the files, in their order.

    Raises:
        UsageError: a file is not a result, or none is of this benchmark.
    """
    results = []
    for path in paths:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["benchmark"] == benchmark:
                results.append(result)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: not a result file ({error})") from error
    if not results:
        raise UsageError(f"no result of benchmark {benchmark} among {len(paths)} files")
    return results


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    match = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor()


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    done = subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout.strip()
