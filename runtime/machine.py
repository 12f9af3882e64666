"""What the system says about itself: processor, memory, heat. Linux; elsewhere little is known.

Everything is read below a root folder, so that tests can forge a machine.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine"]

_MAX_FILE_BYTES = 2**20


# (implementer, part) of /proc/cpuinfo, from Arm's technical reference manuals (MIDR_EL1).
_ARM_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd49"): "Neoverse-N2",
}


@dataclass(frozen=True)
class Machine:
    """What the system says about itself, read below ``root`` so that tests can forge it."""

    root: Path = Path("/")
    architecture: str = platform.machine()

    def text(self, path: str) -> str:
        """A small file's text; empty where there is none."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(_MAX_FILE_BYTES).decode("utf-8", "replace").strip("\0 \n")
        except OSError:
            return ""

    def cpu(self) -> tuple[str, frozenset[str], int]:
        """Model of the processor, its features, logical cores."""
        fields: dict[str, str] = {}
        n_cores = 0
        for line in self.text("proc/cpuinfo").splitlines():
            key, _, value = line.partition(":")
            n_cores += key.strip() == "processor"
            fields.setdefault(key.strip(), value.strip())
        model = self.text("proc/device-tree/model") or fields.get("model name", "")
        core = _ARM_CORES.get((fields.get("CPU implementer", ""), fields.get("CPU part", "")), "")
        names = [name for name in (model, core) if name] or [platform.processor() or "unknown"]
        features = fields.get("flags", "") or fields.get("Features", "")
        return ", ".join(names), frozenset(features.split()), n_cores or os.cpu_count() or 1

    def memory(self) -> tuple[int, int] | None:
        """Bytes in all and available, both within a container's limit; None if unknown."""
        meminfo = self.text("proc/meminfo")
        fields: dict[str, str] = dict(re.findall(r"^(\w+): +(\d+) kB", meminfo, re.MULTILINE))
        if "MemTotal" not in fields:
            return None
        total = int(fields["MemTotal"]) * 1024
        available = int(fields.get("MemAvailable", fields["MemTotal"])) * 1024
        limit, used = (self.text(f"sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        if limit.isdecimal() and int(limit) < total:
            total = int(limit)
            available = min(available, total - (int(used) if used.isdecimal() else 0))
        return total, available

    def temperature_c(self) -> float | None:
        """The hottest thermal zone in degrees Celsius; None if there is none."""
        zones = sorted((self.root / "sys/class/thermal").glob("thermal_zone*"))
        readings = [self.text(f"{zone.relative_to(self.root)}/temp") for zone in zones]
        degrees = [int(text) / 1000 for text in readings if re.fullmatch(r"-?\d{1,7}", text)]
        return max(degrees, default=None)

    def throttled(self) -> int | None:
        """A Raspberry Pi's throttling bits; None on other machines."""
        found = self.text("sys/devices/platform/soc/soc:firmware/get_throttled")
        found = found or _output(["vcgencmd", "get_throttled"]).removeprefix("throttled=")
        try:
            return int(found, 16)
        except ValueError:
            return None


def _output(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
