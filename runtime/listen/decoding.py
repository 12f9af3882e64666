"""Bytes of a stream to mono 16-bit samples: raw PCM, or WAV as it arrives.

A WAV header decides rate, format and channels itself. Its length is believed only where it can be
true: recorders that do not know the length yet write 0 or one of the largest numbers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..encoded import MAX_CHANNELS, MAX_RATE_HZ, MIN_RATE_HZ
from ..errors import AudioError, UsageError
from .ear import Block
from .settings import SourceSettings

__all__ = ["StreamDecoder"]

_MAX_HEADER_BYTES = 1 << 16
_OPEN_ENDED_BYTES = 0x7FFF_0000
_ENCODED = {
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"FORM": "AIFF",
    b"caff": "CAF",
}
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE


@dataclass(frozen=True)
class _Form:
    """How samples lie in the stream."""

    kind: str  # "s" or "f"
    width: int  # bytes a sample
    channels: int
    rate_hz: int


class StreamDecoder:
    """Bytes in, samples out; half a frame waits for the rest.

    Attributes:
        n_bad: samples so far that were no number; they became silence.
    """

    def __init__(self, settings: SourceSettings, name: str, *, open_ended: bool = False) -> None:
        """Read what ``settings`` describe, or WAV.

        With ``open_ended`` the length in a WAV header means nothing: the file is being written.
        """
        self.n_bad = 0
        self._name = name
        self._settings = settings
        self._open_ended = open_ended
        self._bytes = bytearray()
        self._form: _Form | None = None
        self._left: int | None = None  # bytes of sound to come; None: until the end

    @property
    def rate_hz(self) -> int | None:
        """Rate of the samples, once it is known."""
        return None if self._form is None else self._form.rate_hz

    def feed(self, data: bytes) -> Block:
        """The samples that ``data`` completes, ``(n,) int16``.

        Raises:
            AudioError: a WAV header that is damaged, or of a format that is not read.
            UsageError: raw samples of which the rate is not known.
        """
        self._bytes += data
        if self._form is None:
            self._form = self._header()
        if self._form is None:
            return np.zeros(0, np.int16)
        n_frame = self._form.width * self._form.channels
        n_bytes = len(self._bytes) if self._left is None else min(len(self._bytes), self._left)
        n_bytes -= n_bytes % n_frame
        frames = bytes(self._bytes[:n_bytes])
        del self._bytes[:n_bytes]
        if self._left is not None:
            self._left -= n_bytes
            if self._left < n_frame:  # what follows the sound in a WAV file
                self._bytes.clear()
        return self._mono(frames, self._form)

    def require_header(self) -> None:
        """The stream has ended: its beginning must have been whole.

        Raises:
            AudioError: it held nothing, or less than a header.
        """
        if self._form is None:
            raise AudioError(
                f"{self._name}: ended after {len(self._bytes)} bytes, before any sound; expected "
                "raw samples or WAV"
            )

    def _mono(self, data: bytes, form: _Form) -> Block:
        if (form.kind, form.width, form.channels) == ("s", 2, 1):
            return np.frombuffer(data, "<i2").astype(np.int16)
        samples = _floats(data, form)
        if form.kind == "f":
            bad = ~np.isfinite(samples)
            if bad.any():
                self.n_bad += int(bad.sum())
                samples = np.where(bad, np.float32(0.0), samples)
        if form.channels > 1:
            samples = samples.reshape(-1, form.channels).mean(axis=1, dtype=np.float32)
        whole: Block = np.rint(samples * 32_768.0).clip(-32_768, 32_767).astype(np.int16)
        return whole

    def _header(self) -> _Form | None:
        """The form of the samples, once their beginning tells; the header is then gone."""
        if len(self._bytes) < 12:
            return None
        if bytes(self._bytes[:4]) not in (b"RIFF", b"RF64") or self._bytes[8:12] != b"WAVE":
            settings = self._settings
            for magic, kind in _ENCODED.items():
                if self._bytes.startswith(magic):
                    raise UsageError(
                        f"{self._name}: is {kind}, and a stream is WAV or raw samples; decode it: "
                        "ffmpeg -i FILE -f wav - | tg-listen -, or ask tg-run about the clip"
                    )
            if settings.rate_hz is None:
                raise UsageError(
                    f"{self._name}: no WAV header, so these are raw samples, and their rate is not "
                    "known; give it (--pcm-rate, or rate_hz in the file)"
                )
            kind, width = settings.format[0], int(settings.format[1:3]) // 8
            return _Form(kind, width, settings.channels, settings.rate_hz)
        form, at = None, 12
        while len(self._bytes) >= at + 8:
            name, size = struct.unpack_from("<4sI", self._bytes, at)
            if name == b"data":
                if form is None:
                    raise AudioError(f"{self._name}: a WAV header without its format; record again")
                unknown = self._open_ended or size == 0 or size >= _OPEN_ENDED_BYTES
                self._left = None if unknown else size
                del self._bytes[: at + 8]
                return form
            if at + 8 + size > _MAX_HEADER_BYTES:
                raise AudioError(f"{self._name}: a WAV header without sound; record it again")
            if len(self._bytes) < at + 8 + size:
                return None
            if name == b"fmt ":
                form = _wav_form(bytes(self._bytes[at + 8 : at + 8 + size]), self._name)
            at += 8 + size + size % 2
        return None


def _wav_form(chunk: bytes, name: str) -> _Form:
    """The format chunk of a WAV file."""
    if len(chunk) < 16:
        raise AudioError(f"{name}: a WAV header whose format is cut off; record it again")
    tag, channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", chunk)
    if tag == _EXTENSIBLE and len(chunk) >= 26:
        [tag] = struct.unpack_from("<H", chunk, 24)
    kind = {_PCM: "s", _FLOAT: "f"}.get(tag)
    if (kind, bits) not in (("s", 16), ("s", 24), ("s", 32), ("f", 32)):
        raise AudioError(
            f"{name}: WAV of encoding {tag} with {bits} bits, expected 16, 24 or 32 bits or 32-bit "
            "floats; convert it: ffmpeg ... -c:a pcm_s16le -f wav -"
        )
    if not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ or not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(
            f"{name}: {channels} channels at {rate_hz} Hz in its header, expected 1..{MAX_CHANNELS}"
            f" at {MIN_RATE_HZ}..{MAX_RATE_HZ} Hz; record it again"
        )
    assert kind is not None
    return _Form(kind, bits // 8, channels, rate_hz)


def _floats(data: bytes, form: _Form) -> NDArray[np.float32]:
    """Interleaved samples as floats, full scale being -1..1."""
    if form.kind == "f":
        return np.frombuffer(data, "<f4").astype(np.float32)
    if form.width == 3:
        packed = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded = np.zeros((packed.shape[0], 4), np.uint8)
        padded[:, 1:] = packed
        data, width = padded.tobytes(), 4
    else:
        width = form.width
    return (np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)).astype(np.float32)
