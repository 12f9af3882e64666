"""An aarch64 system in a folder: Debian's Python and libc, and the real wheels of the runtime.

Contract: :func:`build` makes the folder once, from Debian's signed archive (apt, as an ordinary
user) and PyPI (pip), both at the versions of ``constraints.txt`` where those name one;
:func:`command` runs a program in it under ``qemu-aarch64-static`` as one of :data:`BOARDS`.
Nothing is installed on the machine itself.

Two things user-mode emulation does not give, so the folder holds them: onnxruntime reads
``/proc/cpuinfo`` (with an x86 one it dies) and the list of processors under ``/sys``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BOARDS", "Board", "build", "command"]

QEMU = "qemu-aarch64-static"
SUITE, PYTHON = "bookworm", "3.11"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DEBS = [
    "libbz2-1.0",
    "libc6",
    "libcrypt1",
    "libexpat1",
    "libffi8",
    "libgcc-s1",
    "liblzma5",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libssl3",
    "libstdc++6",
    "libuuid1",
    "python3.11-minimal",
    "zlib1g",
]
WHEELS = [
    "cffi",
    "flatbuffers",
    "numpy",
    "onnxruntime",
    "packaging",
    "protobuf",
    "pycparser",
    "soundfile",
    "soxr",
    "tokenizers",
    "typing_extensions",
]


@dataclass(frozen=True)
class Board:
    """A core as ``/proc/cpuinfo`` and qemu describe it."""

    name: str
    cpu: str
    part: str
    variant: str
    revision: int
    features: str

    def cpuinfo(self, n_cores: int = 2) -> str:
        """What Linux shows in ``/proc/cpuinfo``."""
        return "".join(
            f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: {self.features}\n"
            f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: {self.variant}\n"
            f"CPU part\t: {self.part}\nCPU revision\t: {self.revision}\n\n"
            for core in range(n_cores)
        )


BOARDS = (
    Board("Raspberry Pi 4", "cortex-a72", "0xd08", "0x0", 3, "fp asimd evtstrm crc32 cpuid"),
    Board(
        "Raspberry Pi 5",
        "cortex-a76",
        "0xd0b",
        "0x4",
        1,
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc "
        "dcpop asimddp",
    ),
)


def build(cache: Path, constraints: Path) -> Path:
    """The system's folder below ``cache``; what is there already is kept."""
    missing = [tool for tool in (QEMU, "apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing or not KEYRING.exists():
        sys.exit(
            f"test-arm: needs {', '.join(missing) or KEYRING}; on Debian run: "
            "apt install qemu-user-static debian-archive-keyring"
        )
    versions = dict(re.findall(r"^(\S+)==(\S+)$", constraints.read_text(), re.MULTILINE))
    root = cache / "sysroot"
    stamp = cache / "sysroot.stamp"
    wanted = "\n".join([SUITE, *DEBS, *(f"{name}=={versions[name]}" for name in WHEELS)])
    if stamp.exists() and stamp.read_text() == wanted:
        return root
    shutil.rmtree(root, ignore_errors=True)
    for deb in _debs(cache / "apt"):
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    for wheel in _wheels(cache / "wheels", versions):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "site")
    processors = root / "sys/devices/system/cpu"
    processors.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (processors / name).write_text("0-1\n")
    (root / "proc").mkdir()
    stamp.write_text(wanted)
    return root


def command(root: Path, board: Board, namespace: Path) -> list[str]:
    """How to start Python as ``board``; append a script or ``-m`` and a module.

    ``namespace`` is the folder that holds ``tinygiant/``. One board at a time: the folder has one
    ``/proc/cpuinfo``.
    """
    (root / "proc/cpuinfo").write_text(board.cpuinfo())
    qemu = [QEMU, "-L", str(root), "-cpu", board.cpu]
    return [*qemu, "-E", f"PYTHONPATH={namespace}:{root / 'site'}", f"{root}/usr/bin/python3.11"]


def _debs(folder: Path) -> list[Path]:
    for part in ("state/lists/partial", "cache/archives/partial", "debs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    sources = folder / "sources.list"
    sources.write_text(
        f"deb [arch=arm64 signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n"
    )
    settings = {
        "Dir::State": folder / "state",
        "Dir::State::status": os.devnull,
        "Dir::Cache": folder / "cache",
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": os.devnull,
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
    subprocess.run([*apt, "update"], check=True)
    subprocess.run([*apt, "download", *DEBS], check=True, cwd=folder / "debs")
    return sorted((folder / "debs").glob("*_arm64.deb"))


def _wheels(folder: Path, versions: dict[str, str]) -> list[Path]:
    # pip matches a platform's number exactly, so every manylinux in use is named.
    platforms = [f"--platform=manylinux_2_{n}_aarch64" for n in (17, 24, 26, 27, 28, 31)]
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}"),
            *(*platforms, "--platform=manylinux2014_aarch64", f"--dest={folder}"),
            *(f"{name}=={versions[name]}" for name in WHEELS),
        ],
        check=True,
    )
    return sorted(folder.glob("*.whl"))
