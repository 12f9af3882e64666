"""Audio in: one verb, :func:`read_audio`, from whatever holds sound to mono float32 samples.

What comes in is accounted for (:class:`Audio`): seconds received, used and dropped, and a note for
everything a listener should know, the signal's own faults included. What cannot be used ends in an
:class:`AudioError` of one line.
Lengths are checked against the limit from the header, before anything is decoded, and again while
decoding in blocks, so that a forged header cannot exhaust memory.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, TypeAlias, cast

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from .errors import AudioError, AudioTooLongError, UsageError
from .signal import Mixdown, mend

__all__ = ["MAX_AUDIO_S", "Audio", "AudioSource", "read_audio", "read_pcm", "resample"]

MAX_AUDIO_S = 300.0
MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
MAX_CHANNELS = 64
# 40 dB above full scale: not loud but mis-scaled (16-bit values kept in a float file).
MAX_PEAK = 100.0
# A stream cannot be searched backwards, so its encoded bytes are held in memory.
MAX_STREAM_BYTES = 256 << 20

_BLOCK_FRAMES = 16_384
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Writers that do not know the length yet leave one of the largest sizes a header can hold.
_OPEN_ENDED_BYTES = 0x7FFF_F000
_TRUNCATED_CHUNK = re.compile(r"^ *(?:data|SSND) *: (\d+) \(should be (\d+)\)", re.MULTILINE)

AudioSource: TypeAlias = (
    str
    | os.PathLike[str]
    | BinaryIO
    | IO[bytes]
    | bytes
    | bytearray
    | memoryview
    | tuple[NDArray[Any], int]
)


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono sound and what became of the source it was read from.

    Attributes:
        samples: ``(n_samples,) float32``, full scale is -1..1, all finite, at least one.
        sampling_rate_hz: rate of ``samples``.
        source: name of the source, for messages.
        received_s: seconds that the source announced or delivered, whichever is longer.
        used_s: seconds in ``samples``.
        dropped_s: ``received_s - used_s``: announced, but missing or damaged.
        channels: channels of the source, averaged to one (one of them where they cancel).
        notes: one line for each thing a listener should know; empty for a sound source.
    """

    samples: NDArray[np.float32]
    sampling_rate_hz: int
    source: str
    received_s: float
    used_s: float
    dropped_s: float
    channels: int = 1
    notes: tuple[str, ...] = ()


def resample(samples: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample mono audio with soxr's high-quality recipe; the input itself if the rates agree."""
    if from_hz == to_hz:
        return samples
    return np.asarray(soxr.resample(samples, from_hz, to_hz, quality="HQ"), dtype=np.float32)


def read_audio(source: AudioSource, *, max_audio_s: float = MAX_AUDIO_S) -> Audio:
    """Read a whole clip.

    Args:
        source: a path to any file libsndfile reads (wav, flac, mp3, ogg, ...), the bytes of such a
            file, a binary stream of them, or ``(array, sampling_rate_hz)`` with an array of shape
            ``(n_samples,)`` or ``(n_samples, n_channels)``: floats in -1..1, or int16, int32, int8
            or uint8 at full scale.
        max_audio_s: longest clip to accept.

    Raises:
        AudioTooLongError: the clip is longer than ``max_audio_s``.
        AudioError: there is no usable sound in the source.
        UsageError: ``max_audio_s`` is not a positive number.
    """
    _check_limit(max_audio_s)
    if isinstance(source, tuple):
        return _from_array(source, max_audio_s)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(source, "audio bytes", max_audio_s)
    if isinstance(source, str | os.PathLike):
        return _from_path(source, max_audio_s)
    if hasattr(source, "read"):
        name = _stream_name(source)
        return _from_bytes(_read_stream(source, name), name, max_audio_s)
    raise AudioError(
        f"audio given as {type(source).__name__}: expected a path, bytes, a binary stream or "
        "(array, sampling_rate_hz); pass one of these"
    )


def read_pcm(
    stream: IO[bytes], sampling_rate_hz: int, *, max_audio_s: float = MAX_AUDIO_S
) -> Audio:
    """Read raw 16-bit little-endian mono PCM until the stream ends.

    Raises:
        AudioTooLongError: the stream holds more than ``max_audio_s``; reading stops there.
        AudioError: an absurd rate, or no sample in the stream.
        UsageError: ``max_audio_s`` is not a positive number.
    """
    _check_limit(max_audio_s)
    name = _stream_name(stream)
    rate_hz = _checked_rate(sampling_rate_hz, name)
    limit_bytes = 2 * _limit_frames(max_audio_s, rate_hz)
    pcm = bytearray()
    while block := _read_block(stream, name):
        pcm += block
        if len(pcm) > limit_bytes:
            raise _too_long(name, None, max_audio_s)
    notes = []
    if len(pcm) % 2:
        notes.append("the last byte is half a 16-bit sample and was left out")
    samples = np.frombuffer(pcm, dtype="<i2", count=len(pcm) // 2).astype(np.float32) / 32_768.0
    return _audio(samples, rate_hz, name, channels=1, notes=notes)


def _from_path(path: str | os.PathLike[str], max_audio_s: float) -> Audio:
    name = _printable(os.fsdecode(path))
    try:
        with _EncodedFile(io.FileIO(path)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return _from_file(file, name, max_audio_s)
            encoded = _read_stream(file, name)
    except FileNotFoundError as error:
        raise AudioError(f"{name}: no such file; check the path to the audio") from error
    except IsADirectoryError as error:
        raise AudioError(f"{name}: is a folder, expected one audio file; name a file") from error
    except PermissionError as error:
        raise AudioError(f"{name}: not readable for this user; change its permissions") from error
    except (OSError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: cannot be opened ({reason}); check the path") from error
    return _from_bytes(encoded, name, max_audio_s)


def _from_bytes(encoded: bytes | bytearray | memoryview, name: str, max_audio_s: float) -> Audio:
    # Typeshed asks for a raw stream; at run time any object with readinto and seek will do.
    return _from_file(_EncodedFile(cast(io.RawIOBase, io.BytesIO(encoded))), name, max_audio_s)


def _from_file(file: _EncodedFile, name: str, max_audio_s: float) -> Audio:
    """Decode an encoded file from a seekable stream."""
    n_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(1 << 18)
    file.seek(0)
    if n_bytes == 0:
        raise AudioError(f"{name}: is empty (0 bytes), expected audio; record or copy it again")
    if head.startswith(_LFS_POINTER):
        raise AudioError(
            f"{name}: is a git-lfs pointer, not the audio itself; fetch it with `git lfs pull`"
        )
    try:
        with _ForwardSoundFile(file) as sound:
            rate_hz = _checked_rate(sound.samplerate, name)
            channels = _checked_channels(sound.channels, name)
            announced, notes = _announced_frames(sound, head)
            # libsndfile's own count: what a truncated file announces beyond its end is not there.
            held = min(announced or 0, sound.frames)
            if held > _limit_frames(max_audio_s, rate_hz):
                raise _too_long(name, held / rate_hz, max_audio_s)
            mix, fault = _decode(sound, name, max_audio_s)
            is_mp3 = sound.format == "MP3"
    except soundfile.LibsndfileError as error:
        raise AudioError(_unreadable(name, error)) from error
    if is_mp3 and n_bytes - file.tell() > 4_096:
        # libsndfile guesses the length of an MP3 without a length header and stops there; from a
        # pipe it does not guess.
        with suppress(soundfile.LibsndfileError), _piped(file) as pipe:
            with _ForwardSoundFile(pipe, closefd=False) as sound:
                whole, fault = _decode(sound, name, max_audio_s)
            mix = max(mix, whole, key=lambda found: found.n_frames)
    samples, mix_notes = mix.finish()
    notes += mix_notes
    if fault is not None:
        notes.append(f"decoding stopped at {samples.size / rate_hz:.2f} s ({fault})")
    return _audio(samples, rate_hz, name, channels, announced, notes)


def _from_array(source: tuple[Any, ...], max_audio_s: float) -> Audio:
    name = "audio array"
    if len(source) != 2 or not isinstance(source[0], np.ndarray):
        raise AudioError(
            f"{name}: expected (numpy array, sampling_rate_hz), found a tuple of "
            f"{', '.join(type(item).__name__ for item in source) or 'nothing'}; pass those two"
        )
    array, rate_hz = source[0], _checked_rate(source[1], name)
    if array.ndim not in (1, 2) or (array.ndim == 2 and 0 < array.shape[0] < array.shape[1]):
        raise AudioError(
            f"{name}: shape {array.shape}, expected (n_samples,) or (n_samples, n_channels) with "
            "more samples than channels; reshape or transpose it"
        )
    channels = _checked_channels(array.shape[1] if array.ndim == 2 else 1, name)
    if array.shape[0] > _limit_frames(max_audio_s, rate_hz):
        raise _too_long(name, array.shape[0] / rate_hz, max_audio_s)
    samples = _full_scale(array, name)
    mix = Mixdown()
    mix.add(samples.reshape(len(samples), channels))
    mono, notes = mix.finish()
    return _audio(mono, rate_hz, name, channels, notes=notes)


def _full_scale(array: NDArray[Any], name: str) -> NDArray[np.float32]:
    """Any accepted number type as float32 in -1..1."""
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128.0) / 128.0
    if array.dtype.kind == "i" and array.dtype.itemsize <= 4:
        scale = 2.0 ** (8 * array.dtype.itemsize - 1)
        return (array.astype(np.float64) / scale).astype(np.float32)
    raise AudioError(
        f"{name}: numbers of type {array.dtype}, expected floats in -1..1, or int8, int16, int32 "
        "or uint8 at full scale; convert it"
    )


class _EncodedFile(io.BufferedReader):
    """Encoded bytes as libsndfile's callbacks should meet them."""

    # soundfile would judge the format by the name's ending, where the content decides.
    name = ""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Stay in place when a damaged header sends the decoder before the start.

        An exception in a callback cannot reach the caller: it would be printed.
        """
        try:
            return super().seek(offset, whence)
        except (OSError, ValueError):
            return self.tell()


class _ForwardSoundFile(soundfile.SoundFile):  # type: ignore[misc]
    """A sound file read from start to end only.

    soundfile seeks after each block of a seekable file, which fails where libsndfile does not know
    the length (a FLAC that was written to a pipe).
    """

    def seekable(self) -> bool:
        """Never: nothing here goes back."""
        return False


def _announced_frames(sound: soundfile.SoundFile, head: bytes) -> tuple[int | None, list[str]]:
    """Frames the header announces (None: it does not say), and notes about the container."""
    frames = int(sound.frames)
    notes: list[str] = []
    if frames >= 1 << 62 or (sound.format == "MP3" and b"Xing" not in head and b"Info" not in head):
        return None, notes
    if "lacks an end-of-stream" in sound.extra_info:
        notes.append("the file ends without its end mark: audio may be missing at the end")
    chunk = _TRUNCATED_CHUNK.search(sound.extra_info)
    if chunk is not None:
        announced_bytes, held_bytes = int(chunk[1]), int(chunk[2])
        if held_bytes < announced_bytes < _OPEN_ENDED_BYTES:
            frames = round(frames * announced_bytes / max(held_bytes, 1))
    return frames, notes


def _decode(
    sound: soundfile.SoundFile, name: str, max_audio_s: float
) -> tuple[Mixdown, str | None]:
    """The sound up to the end, the limit or a fault, and the decoder's word on the fault."""
    limit_frames = _limit_frames(max_audio_s, sound.samplerate)
    block = np.empty((_BLOCK_FRAMES, sound.channels), dtype=np.float32)
    mix, fault = Mixdown(), None
    while fault is None:
        block.fill(np.nan)
        try:
            n_read = len(sound.read(out=block))
        except soundfile.LibsndfileError as error:
            # What was decoded before the fault is in the block already: keep it.
            fault = error.error_string.removeprefix("Error : ").rstrip(".")
            n_read = int(np.isfinite(block).all(axis=1).sum())
        if n_read == 0:
            break
        mix.add(block[:n_read])
        if mix.n_frames > limit_frames:
            raise _too_long(name, None, max_audio_s)
    return mix, fault


def _audio(
    samples: NDArray[np.float32],
    rate_hz: int,
    name: str,
    channels: int,
    announced_frames: int | None = None,
    notes: list[str] | None = None,
) -> Audio:
    """The last checks, and the accounting."""
    notes = list(notes or [])
    used_s = samples.size / rate_hz
    received_s = max(used_s, (announced_frames or 0) / rate_hz)
    if samples.size == 0:
        announced = f" although its header announces {received_s:.2f} s" if received_s else ""
        raise AudioError(f"{name}: holds no samples{announced}; record or copy it again")
    finite = np.isfinite(samples)
    if not finite.all():
        raise AudioError(
            f"{name}: {samples.size - int(finite.sum())} of {samples.size} samples are NaN or "
            f"infinite, the first at {finite.argmin() / rate_hz:.3f} s; expected finite numbers, "
            "repair or convert the audio"
        )
    peak = float(max(samples.max(), -samples.min()))
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name}: samples reach {peak:.4g}, expected -1..1; divide by the full scale of the "
            "original integers (32768 for 16 bit)"
        )
    if peak > 1.5:
        notes.append(f"samples reach {peak:.3g} times full scale")
    if received_s > used_s:
        notes.append(
            f"truncated: its header announces {received_s:.2f} s, {used_s:.2f} s could be read"
        )
    samples, found = mend(samples, rate_hz)
    notes += found
    return Audio(
        samples=samples,
        sampling_rate_hz=rate_hz,
        source=name,
        received_s=received_s,
        used_s=used_s,
        dropped_s=received_s - used_s,
        channels=channels,
        notes=tuple(notes),
    )


@contextmanager
def _piped(file: _EncodedFile) -> Iterator[int]:
    """The read end of a pipe through which the file's bytes come."""
    file.seek(0)
    read_end, write_end = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError), open(write_end, "wb") as sink:
            shutil.copyfileobj(file, sink)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        yield read_end
    finally:
        os.close(read_end)
        feeder.join()


def _read_stream(stream: IO[bytes], name: str) -> bytes:
    encoded = bytearray()
    while block := _read_block(stream, name):
        encoded += block
        if len(encoded) > MAX_STREAM_BYTES:
            raise AudioError(
                f"{name}: more than {MAX_STREAM_BYTES >> 20} MiB on a stream; "
                "write it to a file and name that file"
            )
    return bytes(encoded)


def _read_block(stream: IO[bytes], name: str) -> bytes:
    try:
        block = stream.read(1 << 16)
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: reading failed ({error}); check the source") from error
    if block is not None and not isinstance(block, bytes):
        raise AudioError(
            f"{name}: a stream of {type(block).__name__}, expected bytes; open it in binary mode"
        )
    return block or b""


def _unreadable(name: str, error: soundfile.LibsndfileError) -> str:
    reason = error.error_string.strip().rstrip(".")
    if "SF_INFO" in reason:
        return (
            f"{name}: its header gives no usable sampling rate (0 Hz or out of range), expected "
            f"{MIN_RATE_HZ}..{MAX_RATE_HZ} Hz; convert it, e.g. with ffmpeg"
        )
    return (
        f"{name}: not audio that can be read, or cut off too early ({reason}); expected wav, "
        "flac, mp3, ogg or another file libsndfile knows, convert it, e.g. with ffmpeg"
    )


def _checked_rate(rate_hz: Any, name: str) -> int:
    is_number = isinstance(rate_hz, int | float | np.integer | np.floating)
    if isinstance(rate_hz, bool) or not is_number or rate_hz != rate_hz or rate_hz % 1:
        raise AudioError(
            f"{name}: sampling rate {_printable(repr(rate_hz))}, expected a whole number of Hz"
        )
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(
            f"{name}: sampling rate {_printable(str(rate_hz))} Hz, expected "
            f"{MIN_RATE_HZ}..{MAX_RATE_HZ} Hz; check the header or convert the audio"
        )
    return int(rate_hz)


def _checked_channels(channels: int, name: str) -> int:
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(
            f"{name}: {channels} channels, expected 1..{MAX_CHANNELS}; mix it down first"
        )
    return channels


def _check_limit(max_audio_s: float) -> None:
    if not (math.isfinite(max_audio_s) and max_audio_s > 0):
        raise UsageError(f"--max-audio {max_audio_s}: expected a positive number of seconds")


def _limit_frames(max_audio_s: float, rate_hz: int) -> int:
    return math.floor(max_audio_s * rate_hz + 1e-6)


def _too_long(name: str, duration_s: float | None, max_audio_s: float) -> AudioTooLongError:
    found = "more" if duration_s is None else f"{duration_s:.10g} s"
    return AudioTooLongError(
        f"{name}: holds {found}, the limit is {max_audio_s:g} s; cut the audio, or raise the "
        "limit with --max-audio"
    )


def _stream_name(stream: Any) -> str:
    name = getattr(stream, "name", None)
    return _printable(name) if isinstance(name, str) else "audio stream"


def _printable(text: str) -> str:
    """On one line, whatever a file is called."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 200 else f"{text[:97]}...{text[-100:]}"
