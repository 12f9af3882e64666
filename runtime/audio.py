"""Audio in: one verb, :func:`read_audio`, from whatever holds sound to mono float32 samples.

Every clip is accounted for (:class:`Audio`): seconds received, used and dropped, and a note for
everything the user should know, faults of the signal included. Unusable audio raises an
:class:`AudioError` of one line. :mod:`encoded` decodes files, and bounds what it decodes.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, BinaryIO, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from .encoded import (
    Decoded,
    EncodedFile,
    checked_channels,
    checked_rate,
    decode,
    limit_frames,
    resample,
    too_long,
)
from .errors import AudioError, UsageError
from .signal import Mixdown, mend

__all__ = ["MAX_AUDIO_S", "Audio", "AudioSource", "as_audio", "read_audio", "read_pcm", "resample"]

MAX_AUDIO_S = 300.0
# 40 dB above full scale: not loud but mis-scaled (16-bit values kept in a float file).
MAX_PEAK = 100.0
# A stream cannot be searched backwards, so its encoded bytes are held in memory.
MAX_STREAM_BYTES = 256 << 20

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)

AudioSource: TypeAlias = (
    str
    | os.PathLike[str]
    | BinaryIO
    | IO[bytes]
    | bytes
    | bytearray
    | memoryview
    | tuple[NDArray[Any], int]
    | Mapping[str, Any]
)


@dataclass(frozen=True, eq=False)
class Audio:
    """Mono sound, and an account of the source that it was read from.

    Attributes:
        samples: ``(n_samples,) float32``, full scale is -1..1, all finite, at least one.
        sampling_rate_hz: rate of ``samples``.
        source: name of the source, for messages.
        received_s: seconds that the source announced or delivered, whichever is longer.
        used_s: seconds in ``samples``.
        dropped_s: ``received_s - used_s``: announced, but missing or damaged.
        channels: channels of the source, averaged to one (one of them where they cancel).
        notes: one line for each thing the user should know; empty if nothing was wrong.
    """

    samples: NDArray[np.float32]
    sampling_rate_hz: int
    source: str
    received_s: float
    used_s: float
    dropped_s: float
    channels: int = 1
    notes: tuple[str, ...] = ()


def as_audio(source: AudioSource | Audio, max_audio_s: float) -> Audio:
    """The sound of ``source``, read by :func:`read_audio` unless the caller has read it already."""
    return source if isinstance(source, Audio) else read_audio(source, max_audio_s=max_audio_s)


def read_audio(source: AudioSource, *, max_audio_s: float = MAX_AUDIO_S) -> Audio:
    """Read a whole clip.

    Args:
        source: a path to any file that libsndfile reads (wav, flac, mp3, ogg, ...) or, where it is
            installed, FFmpeg (m4a, mp4, webm, ...); the bytes of such a file; a binary stream of
            them; ``(array, sampling_rate_hz)`` with an array of shape ``(n_samples,)`` or
            ``(n_samples, n_channels)``: floats in -1..1, or int16, int32, int8 or uint8 at full
            scale; or an entry of a data set, a mapping with ``array`` and ``sampling_rate`` (an
            array of two dimensions with its channels first, as Hugging Face has them), or with
            ``bytes`` or ``path``.
        max_audio_s: longest clip to accept.

    Raises:
        AudioTooLongError: the clip is longer than ``max_audio_s``.
        AudioError: there is no usable sound in the source.
        UsageError: ``max_audio_s`` is not a positive number.
    """
    _check_limit(max_audio_s)
    if isinstance(source, tuple):
        return _from_array(source, max_audio_s)
    if isinstance(source, Mapping):
        return _from_entry(source, max_audio_s)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(source, "audio bytes", max_audio_s)
    if isinstance(source, str | os.PathLike):
        return _undisturbed(lambda: _from_path(source, max_audio_s))
    if hasattr(source, "read"):
        name = _stream_name(source)
        content = _read_stream(source, name)
        if not content and _is_at_its_end(source):
            raise AudioError(
                f"{name}: was read to its end before, so nothing is left in it; go back to its "
                "start with seek(0)"
            )
        return _from_bytes(content, name, max_audio_s)
    raise AudioError(
        f"audio given as {type(source).__name__}: expected a path, bytes, a binary stream or "
        "(array, sampling_rate_hz); pass one of these"
    )


def read_pcm(
    source: str | os.PathLike[str] | IO[bytes],
    sampling_rate_hz: int,
    *,
    max_audio_s: float = MAX_AUDIO_S,
) -> Audio:
    """Read raw 16-bit little-endian mono PCM to the end of a file or a binary stream.

    Raises:
        AudioTooLongError: it holds more than ``max_audio_s``; reading stops there.
        AudioError: an absurd rate, no sample in it, or a file that cannot be read.
        UsageError: ``max_audio_s`` is not a positive number.
    """
    _check_limit(max_audio_s)
    if isinstance(source, str | os.PathLike):
        with _opened(source) as file:
            return _read_pcm(file, _path_name(source), sampling_rate_hz, max_audio_s)
    return _read_pcm(source, _stream_name(source), sampling_rate_hz, max_audio_s)


def _read_pcm(stream: IO[bytes], name: str, sampling_rate_hz: int, max_audio_s: float) -> Audio:
    rate_hz = checked_rate(sampling_rate_hz, name)
    limit_bytes = 2 * limit_frames(max_audio_s, rate_hz)
    pcm = bytearray()
    while block := _read_block(stream, name):
        pcm += block
        if len(pcm) > limit_bytes:
            raise too_long(name, None, max_audio_s)
    notes = []
    if len(pcm) % 2:
        notes.append("the last byte is half a 16-bit sample and was left out")
    samples = np.frombuffer(pcm, dtype="<i2", count=len(pcm) // 2).astype(np.float32) / 32_768.0
    return _audio(Decoded(samples, rate_hz, 1, None, tuple(notes)), name)


def _undisturbed(call: Callable[[], Audio]) -> Audio:
    """The result of ``call``, which runs where no interrupt can strike.

    Decoders call back into Python to read. An exception that an interrupt raised there could not
    pass through their native code: it would be printed, and lost. Interrupts reach the main thread
    alone, so decoders work in another, while this one waits.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    results: list[Audio] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work, daemon=True)
    try:
        worker.start()
    except RuntimeError:  # no memory for a thread
        return call()
    worker.join()
    if errors:
        raise errors[0]
    return results[0]


def _from_path(path: str | os.PathLike[str], max_audio_s: float) -> Audio:
    name = _path_name(path)
    with _opened(path) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return _from_file(file, name, max_audio_s)
        content = _read_stream(file, name)
    return _from_bytes(content, name, max_audio_s)


def _path_name(path: str | os.PathLike[str]) -> str:
    return _printable(os.fsdecode(path))


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[EncodedFile]:
    """The file at ``path``; what the system says against it becomes an AudioError."""
    name = _path_name(path)
    try:
        with EncodedFile(io.FileIO(path)) as file:
            yield file
    except AudioError:
        raise
    except FileNotFoundError as error:
        if _URL.match(name):
            raise AudioError(
                f"{name}: is a URL, and nothing is fetched from the network here; download it "
                "first (curl -LO URL), then give the file"
            ) from error
        raise AudioError(f"{name}: no such file; check the path to the audio") from error
    except IsADirectoryError as error:
        raise AudioError(
            f"{name}: is a folder, expected one audio file; name a file in it, or ask about all "
            "of them with --batch"
        ) from error
    except PermissionError as error:
        raise AudioError(f"{name}: not readable for this user; change its permissions") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name}: cannot be opened ({reason}); check the path") from error


def _from_bytes(content: bytes | bytearray | memoryview, name: str, max_audio_s: float) -> Audio:
    # Typeshed asks for a raw stream; at run time any object with readinto and seek will do.
    file = EncodedFile(cast(io.RawIOBase, io.BytesIO(content)))
    return _undisturbed(lambda: _from_file(file, name, max_audio_s))


def _from_file(file: EncodedFile, name: str, max_audio_s: float) -> Audio:
    return _audio(decode(file, name, max_audio_s), name)


def _from_entry(entry: Mapping[str, Any], max_audio_s: float) -> Audio:
    """An entry of a data set, decoded or not."""
    if entry.get("array") is not None and entry.get("sampling_rate") is not None:
        array = np.asarray(entry["array"])
        if array.ndim == 2 and array.shape[0] < array.shape[1]:
            array = array.T
        return _from_array((array, entry["sampling_rate"]), max_audio_s)
    if isinstance(entry.get("bytes"), bytes):
        return _from_bytes(entry["bytes"], "audio bytes", max_audio_s)
    if isinstance(entry.get("path"), str):
        return _from_path(entry["path"], max_audio_s)
    keys = _printable(", ".join(map(str, entry))) or "nothing"
    raise AudioError(
        f"audio given as a mapping with {keys}: expected array and sampling_rate, bytes, or path; "
        "pass one of these"
    )


def _from_array(source: tuple[Any, ...], max_audio_s: float) -> Audio:
    name = "audio array"
    if len(source) != 2 or not isinstance(source[0], np.ndarray):
        raise AudioError(
            f"{name}: expected (numpy array, sampling_rate_hz), found a tuple of "
            f"{', '.join(type(item).__name__ for item in source) or 'nothing'}; pass those two"
        )
    array, rate_hz = source[0], checked_rate(source[1], name)
    if array.ndim not in (1, 2) or (array.ndim == 2 and 0 < array.shape[0] < array.shape[1]):
        raise AudioError(
            f"{name}: shape {array.shape}, expected (n_samples,) or (n_samples, n_channels) with "
            "more samples than channels; reshape or transpose it"
        )
    channels = checked_channels(array.shape[1] if array.ndim == 2 else 1, name)
    if array.shape[0] > limit_frames(max_audio_s, rate_hz):
        raise too_long(name, array.shape[0] / rate_hz, max_audio_s)
    samples = _full_scale(array, name)
    mix = Mixdown()
    mix.add(samples.reshape(len(samples), channels))
    samples, notes = mix.finish()
    return _audio(Decoded(samples, rate_hz, channels, None, tuple(notes)), name)


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


def _audio(decoded: Decoded, name: str) -> Audio:
    """The last checks, and the accounting."""
    samples, rate_hz, notes = decoded.samples, decoded.rate_hz, list(decoded.notes)
    used_s = samples.size / rate_hz
    received_s = max(used_s, (decoded.announced_frames or 0) / rate_hz)
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
        channels=decoded.channels,
        notes=tuple(notes),
    )


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


def _is_at_its_end(stream: Any) -> bool:
    """Whether an empty stream is one that holds something in front of its position."""
    try:
        return bool(stream.seekable() and stream.tell() > 0)
    except (AttributeError, OSError, ValueError):
        return False


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


def _check_limit(max_audio_s: float) -> None:
    if not (math.isfinite(max_audio_s) and max_audio_s > 0):
        raise UsageError(f"--max-audio {max_audio_s}: expected a positive number of seconds")


def _stream_name(stream: Any) -> str:
    name = getattr(stream, "name", None)
    return _printable(name) if isinstance(name, str) else "audio stream"


def _printable(text: str) -> str:
    """On one line, whatever a file is called."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 200 else f"{text[:97]}...{text[-100:]}"
