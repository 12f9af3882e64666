"""A microphone that is none, but real for PortAudio: PulseAudio's null sink, heard through ALSA.

A daemon of its own runs in a folder, with a sink that plays nowhere; what is played there is heard
by ``tg-listen --device virtual_microphone`` through sounddevice, PortAudio and ALSA's plugin. Needs
Debian's ``pulseaudio pulseaudio-utils libasound2-plugins libportaudio2``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

__all__ = ["DEVICE", "Daemon", "missing"]

DEVICE = "virtual_microphone"
_ALSA_CONFIG = Path("/usr/share/alsa/alsa.conf")


def missing() -> list[str]:
    """What is not installed of all that it takes."""
    names = [name for name in ("pulseaudio", "pactl", "paplay") if shutil.which(name) is None]
    if not any(Path("/usr/lib").glob("*/alsa-lib/libasound_module_pcm_pulse.so")):
        names.append("libasound2-plugins")
    try:
        import sounddevice  # noqa: F401
    except (ImportError, OSError):
        names.append("PortAudio")
    return names


class Daemon:
    """PulseAudio with one sink that plays nowhere; what is in ``env`` lets others find it."""

    def __init__(self, folder: Path, rate_hz: int = 16_000) -> None:
        """Start it, with its files in ``folder``; the microphone has ``rate_hz``."""
        self._folder = folder
        self.sink = f"module-null-sink sink_name=vm rate={rate_hz} channels=1"
        (folder / "asound.conf").write_text(
            f"<{_ALSA_CONFIG}>\n"
            f'pcm.{DEVICE} {{ type pulse device "vm.monitor" hint {{ show on }} }}\n'
        )
        self.env = os.environ | {
            "PULSE_SERVER": f"unix:{folder}/native",
            "PULSE_RUNTIME_PATH": str(folder),
            "PULSE_STATE_PATH": str(folder),
            "PULSE_COOKIE": str(folder / "cookie"),
            "ALSA_CONFIG_PATH": str(folder / "asound.conf"),
        }
        self.start()

    def start(self) -> None:
        """Start it, also again."""
        options = ["-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no"]
        modules = [
            f"module-native-protocol-unix auth-anonymous=1 socket={self._folder}/native",
            self.sink,
        ]
        loads = [word for module in modules for word in ("-L", module)]
        self._popen = subprocess.Popen(
            ["pulseaudio", *options, *loads],
            env=self.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while self.control("info").returncode != 0:
            if time.monotonic() > end:
                raise TimeoutError("PulseAudio does not answer")
            time.sleep(0.01)

    def control(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """What ``pactl`` says."""
        return subprocess.run(["pactl", *words], env=self.env, capture_output=True, check=False)

    def play(self, path: Path) -> None:
        """Play a file to its end; the microphone hears it."""
        subprocess.run(["paplay", "--device=vm", str(path)], env=self.env, check=True, timeout=600)

    def end(self) -> None:
        """End it."""
        self._popen.terminate()
        self._popen.wait(20)
