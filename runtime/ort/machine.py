"""The system's own data: processor, memory, heat. On Linux; elsewhere little is known.

Everything is read below a root folder, so that tests can forge a machine.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from collections.abc import Iterator
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

    def physical_cores(self) -> int:
        """Physical cores this process may use: those it may run on, within its container's quota.

        Threads of one core have the same list of siblings.
        """
        try:
            allowed = os.sched_getaffinity(0)
        except AttributeError:  # not Linux
            return max(os.cpu_count() or 1, 1)
        topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        cores = {self.text(topology.format(cpu)) or str(cpu) for cpu in allowed}
        return max(1, min(len(cores), self._cpu_quota() or len(cores)))

    def _cpu_quota(self) -> int | None:
        """Whole cores of cgroup v2's ``cpu.max`` ("150000 100000": one and a half); None: all."""
        found = re.fullmatch(r"(\d+) ([1-9]\d*)", self.text("sys/fs/cgroup/cpu.max"))
        return max(1, int(found[1]) // int(found[2])) if found else None

    def memory(self) -> tuple[int, int] | None:
        """Bytes in all and available, both within the limits of control groups; None if unknown."""
        meminfo = self.text("proc/meminfo")
        fields: dict[str, str] = dict(re.findall(r"^(\w+): +(\d+) kB", meminfo, re.MULTILINE))
        if "MemTotal" not in fields:
            return None
        total = int(fields["MemTotal"]) * 1024
        available = int(fields.get("MemAvailable", fields["MemTotal"])) * 1024
        for limit, used, _ in self._memory_groups():
            if limit < total:
                total = limit
            available = min(available, max(limit - used, 0))
        return total, available

    def obtainable_bytes(self) -> int | None:
        """The most memory that this process might yet get, swap included; None if unknown.

        Nothing that could be freed counts as taken: file caches, and what swap has room for.
        """
        memory = self.memory()
        if memory is None:
            return None
        swap = re.search(r"^SwapFree: +(\d+) kB", self.text("proc/meminfo"), re.MULTILINE)
        swap_bytes = 1024 * int(swap[1]) if swap else 0
        obtainable = memory[1] + swap_bytes
        for limit, used, group_swap in self._memory_groups():
            own = swap_bytes if group_swap is None else min(group_swap, swap_bytes)
            obtainable = min(obtainable, max(limit - used, 0) + own)
        return obtainable

    def address_space_bytes(self) -> int | None:
        """Address space that this process has left (``ulimit -v``); None if it is not bounded."""
        found = re.search(
            r"^Max address space +(\d+) ", self.text("proc/self/limits"), re.MULTILINE
        )
        pages = self.text("proc/self/statm").split(" ")[0]
        if found is None or not pages.isdecimal():
            return None
        return max(int(found[1]) - int(pages) * resource.getpagesize(), 0)

    def _memory_groups(self) -> Iterator[tuple[int, int, int | None]]:
        """Limit, use that cannot be dropped, and swap left, of this process's control groups.

        A group is bound by those above it. In a container its own group is seen as the root.
        """
        for line in (self.text("proc/self/cgroup") or "0::/").splitlines():
            _, controllers, own = [*line.split(":", 2), "", ""][:3]
            if controllers == "":
                top, limit, used, swap = "sys/fs/cgroup", "memory.max", "memory.current", True
            elif "memory" in controllers.split(","):
                top, limit, swap = "sys/fs/cgroup/memory", "memory.limit_in_bytes", False
                used = "memory.usage_in_bytes"
            else:
                continue
            parts = [part for part in own.split("/") if part not in ("", "..")]
            for n_parts in range(len(parts), -1, -1):
                group = "/".join([top, *parts[:n_parts]])
                limit_bytes = self._number(f"{group}/{limit}")
                if limit_bytes is None:
                    continue
                cached = self._file_cache_bytes(f"{group}/memory.stat")
                held = max((self._number(f"{group}/{used}") or 0) - cached, 0)
                yield limit_bytes, held, self._group_swap(group) if swap else None

    def _group_swap(self, group: str) -> int | None:
        """Swap that a control group (v2) has left; None if it is not bounded."""
        limit = self._number(f"{group}/memory.swap.max")
        if limit is None:
            return None
        return max(limit - (self._number(f"{group}/memory.swap.current") or 0), 0)

    def _file_cache_bytes(self, path: str) -> int:
        """The file cache of a control group, below it included; the kernel drops it at need."""
        stat: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", self.text(path), re.MULTILINE))
        return sum(
            int(stat.get(f"total_{name}", stat.get(name, "0")))
            for name in ("inactive_file", "active_file")
        )

    def _number(self, path: str) -> int | None:
        """A file that holds one number; None if there is none, as for "max"."""
        text = self.text(path)
        return int(text) if re.fullmatch(r"\d{1,20}", text) else None

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
