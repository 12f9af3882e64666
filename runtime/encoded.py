"""From an encoded file to mono samples: all recordings in it, by libsndfile or FFmpeg.

Lengths are checked against the limit from the header, before anything is decoded, and again while
decoding in blocks, so that a forged header cannot exhaust memory.
"""

from __future__ import annotations

import io
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from . import media
from .errors import AudioError, AudioTooLongError
from .recordings import OPEN_ENDED_BYTES, Recording, Window, recordings
from .signal import Mixdown
from .text import counted, printable

__all__ = [
    "MAX_CHANNELS",
    "MAX_RATE_HZ",
    "MIN_RATE_HZ",
    "Decoded",
    "EncodedFile",
    "checked_channels",
    "checked_rate",
    "decode",
    "limit_frames",
    "resample",
    "too_long",
]

MIN_RATE_HZ, MAX_RATE_HZ = 1_000, 768_000
MAX_CHANNELS = 64

_BLOCK_FRAMES = 16_384
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_TRUNCATED_CHUNK = re.compile(r"^ *(?:data|SSND) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_RAW_SUFFIXES = (".raw", ".pcm", ".s16", ".s16le", ".sw")
_UNKNOWN_FORMAT = 1  # SF_ERR_UNRECOGNISED_FORMAT
# What is given for audio by mistake: how it begins, what it is, what to do.
_NO_AUDIO = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), kind, advice)
    for pattern, kind, advice in (
        (rb"<!doctype html|<html|<head", "a web page", "download the sound itself"),
        (rb"#EXTM3U|\[playlist\]|ffconcat", "a playlist", "give one of the files that it names"),
        (rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf|.{257}ustar", "an archive", "unpack it first"),
        (rb"%PDF", "a PDF document", "name an audio file"),
        (rb"\xff\xd8\xff|\x89PNG|GIF8", "a picture", "name an audio file"),
        (rb"MThd", "a MIDI file, notes without sound", "render it to wav first"),
        (
            rb"\x1f\x43\xb6\x75",
            "a later piece of a webm recording",
            "put it behind the first piece, which has the header",
        ),
    )
)
_LENGTH_HEADER = re.compile(rb"Xing|Info|VBRI")
# Shorter differences are rounding: of durations in milliseconds, of frames cut at the end.
_TOLERANCE_S = 0.05
# Bytes after the last recording that deserve a word; less is padding.
_LEAST_LEFTOVER_BYTES = 4_096


@dataclass(frozen=True, eq=False)
class Decoded:
    """The sound of a file.

    Attributes:
        samples: ``(n_samples,) float32``, mono.
        rate_hz: of ``samples``.
        channels: of the source, mixed down to one.
        announced_frames: what its headers announce; None if they do not say.
        notes: one line for each thing the user should know.
    """

    samples: NDArray[np.float32]
    rate_hz: int
    channels: int
    announced_frames: int | None
    notes: tuple[str, ...] = ()


def decode(file: EncodedFile, name: str, max_audio_s: float) -> Decoded:
    """Decode every recording in an encoded file, one behind the other.

    Args:
        file: a seekable file.
        name: of its source, for messages.
        max_audio_s: longest clip to accept, all recordings together.

    Raises:
        AudioTooLongError: they are longer than ``max_audio_s``.
        AudioError: the first of them cannot be read.
    """
    n_bytes = file.seek(0, os.SEEK_END)
    if n_bytes == 0:
        raise AudioError(f"{name}: is empty (0 bytes), expected audio; record or copy it again")
    file.seek(0)
    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
        raise AudioError(
            f"{name}: is a git-lfs pointer, not the audio itself; fetch it with `git lfs pull`"
        )
    parts: list[Decoded] = []
    notes: list[str] = []
    found = recordings(file, n_bytes, max_audio_s)
    for number, recording in enumerate(found, start=1):
        used_s = sum(part.samples.size / part.rate_hz for part in parts)
        try:
            part = _recording(file, recording, name, used_s, max_audio_s)
        except AudioTooLongError:
            raise
        except AudioError as error:
            if not parts:
                raise
            reason = str(error).removeprefix(f"{name}: ")
            notes.append(f"recording {number} of {len(found)} in it was left out: {reason}")
            continue
        parts.append(part)
        if recording.lead_bytes:
            lead = counted(recording.lead_bytes, "byte")
            notes.append(f"{lead} in front of it left out: not sound")
        if recording.holes:
            hole_bytes = counted(sum(end - start for start, end in recording.holes), "byte")
            notes.append(f"{hole_bytes} in its middle left out: not sound")
        if recording.leftover_bytes > _LEAST_LEFTOVER_BYTES:
            leftover = counted(recording.leftover_bytes, "byte")
            notes.append(f"{leftover} at its end left out: not sound")
    return _joined(parts, notes)


def _joined(parts: list[Decoded], notes: list[str]) -> Decoded:
    """One behind the other, at the rate of the first."""
    first = parts[0]
    if len(parts) == 1:
        return Decoded(
            first.samples,
            first.rate_hz,
            first.channels,
            first.announced_frames,
            (*first.notes, *notes),
        )
    samples = [resample(part.samples, part.rate_hz, first.rate_hz) for part in parts]
    announced = sum(
        sound.size
        if part.announced_frames is None
        else max(sound.size, round(part.announced_frames * first.rate_hz / part.rate_hz))
        for part, sound in zip(parts, samples, strict=True)
    )
    every = dict.fromkeys(note for part in parts for note in part.notes)
    lengths = " + ".join(f"{part.samples.size / part.rate_hz:.2f}" for part in parts[:5])
    more = " + ..." if parts[5:] else ""
    joined = f"{len(parts)} recordings in one file, all were read: {lengths}{more} s"
    return Decoded(
        np.concatenate(samples),
        first.rate_hz,
        max(part.channels for part in parts),
        announced,
        (joined, *every, *notes),
    )


def resample(samples: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample mono audio with soxr's high-quality recipe; the input itself if the rates agree."""
    if from_hz == to_hz:
        return samples
    return np.asarray(soxr.resample(samples, from_hz, to_hz, quality="HQ"), dtype=np.float32)


def checked_rate(rate_hz: Any, name: str) -> int:
    """The rate as an int.

    Raises:
        AudioError: it is no whole number of Hz, or an absurd one.
    """
    is_number = isinstance(rate_hz, int | float | np.integer | np.floating)
    if isinstance(rate_hz, bool) or not is_number or rate_hz != rate_hz or rate_hz % 1:
        raise AudioError(
            f"{name}: sampling rate {printable(repr(rate_hz))[:40]}, expected a whole number of Hz"
        )
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ:
        raise AudioError(
            f"{name}: sampling rate {str(rate_hz)[:40]} Hz, expected "
            f"{MIN_RATE_HZ}..{MAX_RATE_HZ} Hz; check the header or convert the audio"
        )
    return int(rate_hz)


def checked_channels(channels: int, name: str) -> int:
    """The number of channels.

    Raises:
        AudioError: it is not between 1 and 64.
    """
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(
            f"{name}: {channels} channels, expected 1..{MAX_CHANNELS}; mix it down first"
        )
    return channels


def limit_frames(max_audio_s: float, rate_hz: int) -> int:
    """The most frames that last no longer than ``max_audio_s``."""
    return math.floor(max_audio_s * rate_hz + 1e-6)


def too_long(name: str, duration_s: float | None, max_audio_s: float) -> AudioTooLongError:
    """The error for a clip of ``duration_s`` (None: unknown, but beyond the limit)."""
    found = "more" if duration_s is None else f"{duration_s:.10g} s"
    return AudioTooLongError(
        f"{name}: holds {found}, the limit is {max_audio_s:g} s; cut the audio, or raise the "
        "limit with --max-audio"
    )


class EncodedFile(io.BufferedReader):
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


def _recording(
    file: EncodedFile, recording: Recording, name: str, used_s: float, max_audio_s: float
) -> Decoded:
    """Decode one recording, ``used_s`` seconds into the clip."""
    head = _whole(file, recording).read(1 << 18)
    kind = media.kind_of(head)
    if kind is not None:
        window = _whole(file, recording)
        return _by_ffmpeg(window, kind, name, used_s, max_audio_s)
    try:
        return _by_libsndfile(file, recording, head, name, used_s, max_audio_s)
    except soundfile.LibsndfileError as error:
        refusal = AudioError(_unreadable(name, head, error))
        # Some containers hold what libsndfile knows and what it does not.
        if not media.may_know(head):
            raise refusal from error
    try:
        window = _whole(file, recording)
        return _by_ffmpeg(window, "such a file", name, used_s, max_audio_s)
    except AudioTooLongError:
        raise
    except AudioError as error:
        raise refusal from error


def _whole(file: EncodedFile, recording: Recording) -> EncodedFile:
    """A recording as it lies in the file."""
    window = Window(file, recording.start, recording.end, holes=recording.holes)
    return EncodedFile(window, 1 << 16)


def _body(file: EncodedFile, recording: Recording) -> EncodedFile:
    """The bytes for a decoder, with a right header in place of a wrong one."""
    window = Window(file, recording.body, recording.end, recording.head, recording.holes)
    return EncodedFile(window, 1 << 16)


def _by_libsndfile(
    file: EncodedFile, recording: Recording, head: bytes, name: str, used_s: float, max_s: float
) -> Decoded:
    with _ForwardSoundFile(_whole(file, recording)) as sound:
        rate_hz = checked_rate(sound.samplerate, name)
        channels = checked_channels(sound.channels, name)
        announced, notes = _announced_frames(sound, head)
        # libsndfile's own count: what a truncated file announces beyond its end is not there.
        held = min(announced or 0, sound.frames)
        if held > limit_frames(max_s - used_s, rate_hz):
            raise too_long(name, used_s + held / rate_hz, max_s)
        # libsndfile guesses the length of an MP3 without a length header and stops there.
        is_guess = sound.format == "MP3" and announced is None
        is_right = not (is_guess or recording.head or recording.body != recording.start)
        if is_right:
            mix, fault = _mixed(sound, name, used_s, max_s)
    if not is_right:
        body = _body(file, recording)
        piped = is_guess or not recording.head
        with (
            _piped(body) if piped else nullcontext(body) as source,
            _ForwardSoundFile(source, closefd=False) as sound,
        ):
            mix, fault = _mixed(sound, name, used_s, max_s)
    samples, mix_notes = mix.finish()
    notes += mix_notes
    if recording.announced_share < 1:
        announced = round(recording.announced_share * samples.size)
    surplus_s = 0.0 if announced is None else (samples.size - announced) / rate_hz
    if surplus_s > _TOLERANCE_S:
        notes.append(
            f"its header announces {(announced or 0) / rate_hz:.2f} s, but "
            f"{samples.size / rate_hz:.2f} s follow: read to the end"
        )
    if fault is not None and (announced is None or surplus_s < 0):
        notes.append(f"decoding stopped at {samples.size / rate_hz:.2f} s ({fault})")
    return Decoded(samples, rate_hz, channels, announced, tuple(notes))


def _by_ffmpeg(source: EncodedFile, kind: str, name: str, used_s: float, max_s: float) -> Decoded:
    with media.opened(source, kind, name, max_s - used_s) as sound:
        rate_hz = checked_rate(sound.rate_hz, name)
        channels = checked_channels(sound.channels, name)
        if sound.lasts_s is not None and sound.lasts_s > max_s - used_s + 1:
            raise too_long(name, used_s + sound.lasts_s, max_s)
        most_frames, mix = limit_frames(max_s - used_s, rate_hz), Mixdown()
        for block in sound.blocks():
            mix.add(block)
            if mix.n_frames > most_frames:
                raise too_long(name, None, max_s)
    samples, notes = mix.finish()
    announced = None
    if sound.announced_s is not None and sound.announced_s - samples.size / rate_hz > 0.1:
        announced = round(sound.announced_s * rate_hz)
    return Decoded(samples, rate_hz, channels, announced, (*notes, *sound.notes()))


def _announced_frames(sound: soundfile.SoundFile, head: bytes) -> tuple[int | None, list[str]]:
    """Frames the header announces (None: it does not say), and notes about the container."""
    frames = int(sound.frames)
    notes: list[str] = []
    if frames >= 1 << 62 or (sound.format == "MP3" and not _LENGTH_HEADER.search(head[:64])):
        return None, notes
    if sound.format == "FLAC" and frames == 0:
        return None, notes
    if "lacks an end-of-stream" in sound.extra_info:
        notes.append("the file ends without its end mark: audio may be missing at the end")
    chunk = _TRUNCATED_CHUNK.search(sound.extra_info)
    if chunk is not None:
        announced_bytes, held_bytes = int(chunk[1]), int(chunk[2])
        if held_bytes < announced_bytes < OPEN_ENDED_BYTES:
            frames = round(frames * announced_bytes / max(held_bytes, 1))
    return frames, notes


def _mixed(
    sound: soundfile.SoundFile, name: str, used_s: float, max_audio_s: float
) -> tuple[Mixdown, str | None]:
    """The sound up to the end, the limit or a fault, and the decoder's word on the fault."""
    most_frames = limit_frames(max_audio_s - used_s, sound.samplerate)
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
        if mix.n_frames > most_frames:
            raise too_long(name, None, max_audio_s)
    return mix, fault


@contextmanager
def _piped(file: EncodedFile) -> Iterator[int]:
    """The read end of a pipe through which the file's bytes come."""
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


def _unreadable(name: str, head: bytes, error: soundfile.LibsndfileError) -> str:
    reason = error.error_string.strip().rstrip(".")
    if "SF_INFO" in reason:
        return (
            f"{name}: its header gives no usable sampling rate (0 Hz or out of range), expected "
            f"{MIN_RATE_HZ}..{MAX_RATE_HZ} Hz; convert it, e.g. with ffmpeg"
        )
    for pattern, kind, advice in _NO_AUDIO:
        if pattern.match(head.lstrip()[:512]):
            return f"{name}: is {kind}, not audio; {advice}"
    if error.code == _UNKNOWN_FORMAT and name.lower().endswith((*_RAW_SUFFIXES, "<stdin>")):
        return (
            f"{name}: not audio with a header that says what it is, such as wav, flac, mp3 or ogg; "
            "if it is raw 16-bit mono, say its rate, e.g. --pcm-rate 16000"
        )
    more = "" if media.is_available() else "; more can be read after pip install 'tinygiant[media]'"
    return (
        f"{name}: not audio that can be read, or cut off too early ({reason}); expected wav, "
        f"flac, mp3, ogg, m4a or the like, convert it, e.g. with ffmpeg{more}"
    )
