"""Checks of the samples before any model is asked: silence, cancelling channels, offset, clipping.

Sound is float with full scale -1..1. Two faults are repaired, because that does no harm: an offset
is removed, and channels of opposite polarity are not averaged to nothing. Every finding gives a
note, one line for the user. Levels are peaks, in dB of full scale (dBFS).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["SILENT_PEAK", "Mixdown", "mend", "silent_choice", "why_unheard"]

Array = NDArray[np.float32]

# Ten steps of 16 bits, -70 dBFS: a converter's idle noise, dither, A-law's way to write zero.
SILENT_PEAK = 10 / 32_768
_QUIET_PEAK = 10 ** (-50 / 20)
_SHORTEST_S = 0.01  # one frame of every feature there is

_OFFSET = 0.001  # smaller ones do not matter, nor do those far below the sound itself
_OFFSET_OF_DEVIATION = 0.1

# Channels without relation leave 1 / n_channels of their energy in the mean. A quarter of that is
# left at a correlation of -0.75: each channel then holds most of what the others hold.
_CANCELLED = 0.25

# A sine has 0.8 times as many samples in the bin at its peak as in the two bins below, 1.5 times
# where its peak is rounded to a coarse step (u-law); one cut at 95 % of its height has 4 times.
_FULL_SCALE = 0.95
_CLIPPED_BIN = 1 / 64  # of the peak
_CLIPPED_RATIO = 4
_CLIPPED_SAMPLES = 20

_SAYS_NOTHING = re.compile(
    r"(?:(?:there is )?nothing(?: (?:is|can be) heard)?|(?:there is )?no sounds?"
    r"|(?:(?:the clip|it) is )?silen(?:ce|t))[.!]?",
    re.IGNORECASE | re.ASCII,
)


class Mixdown:
    """Channels to one, block by block: their mean, or one of them if the mean cancels."""

    def __init__(self) -> None:
        """Start without a sample."""
        self._mean, self._single = bytearray(), bytearray()
        self._channel: int | None = None  # the loudest where sound begins
        self._energies: NDArray[np.float64] | None = None
        self._mean_energy = 0.0

    @property
    def n_frames(self) -> int:
        """Frames taken so far."""
        return len(self._mean) // 4

    def add(self, frames: Array) -> None:
        """Take ``frames (n, n_channels)`` that follow those before."""
        mean = frames[:, 0].copy()
        with np.errstate(invalid="ignore", over="ignore"):  # who reads looks for infinities
            for channel in range(1, frames.shape[1]):
                mean += frames[:, channel]
            mean /= frames.shape[1]
            self._mean += mean.tobytes()
            if frames.shape[1] == 1:
                return
            energies = np.einsum("nc,nc->c", frames, frames).astype(np.float64)
            self._mean_energy += float(mean @ mean)
        self._energies = energies if self._energies is None else self._energies + energies
        if self._channel is None and energies.any():
            self._channel = int(energies.argmax())
        self._single += frames[:, self._channel or 0].tobytes()

    def finish(self) -> tuple[Array, list[str]]:
        """The mono samples ``(n,) float32``, and a note if they are not the mean."""
        if not self._cancels():
            return np.frombuffer(self._mean, np.float32), []
        note = (
            "the channels cancel each other (opposite polarity, as of a cable wired in reverse): "
            f"channel {(self._channel or 0) + 1} was used instead of their mean"
        )
        return np.frombuffer(self._single, np.float32), [note]

    def _cancels(self) -> bool:
        if self._energies is None:
            return False
        mean_square = float(self._energies.mean()) / max(self.n_frames, 1)
        unrelated = float(self._energies.mean()) / self._energies.size
        return mean_square > SILENT_PEAK**2 and self._mean_energy < _CANCELLED * unrelated


def mend(samples: Array, sampling_rate_hz: int) -> tuple[Array, list[str]]:
    """The finite ``samples (n,)``, at least one, without an offset; and a note for all found.

    The samples are returned as they are, to the bit, where there is nothing to mend.
    """
    duration_s = samples.size / sampling_rate_hz
    if duration_s < _SHORTEST_S:
        count = "1 sample" if samples.size == 1 else f"{samples.size} samples"
        return samples, [f"too short to hear anything: {count}, {1_000 * duration_s:.2g} ms"]
    notes = _clipping(samples)
    offset, deviation = float(samples.mean(dtype=np.float64)), float(samples.std(dtype=np.float64))
    if abs(offset) > max(_OFFSET, _OFFSET_OF_DEVIATION * deviation):
        samples = (samples - offset).astype(np.float32)
        notes.append(f"an offset of {100 * offset:.2g} % of full scale was removed")
    peak = _peak(samples)
    if peak <= SILENT_PEAK:
        notes.append(f"silent: no sample is above {_dbfs(SILENT_PEAK):.0f} dBFS")
    elif peak < _QUIET_PEAK:
        notes.append(
            f"very quiet: it peaks at {_dbfs(peak):.0f} dBFS, so that the answer is less certain; "
            "record it louder or closer"
        )
    return samples, notes


def why_unheard(samples: Array, sampling_rate_hz: int) -> str | None:
    """``silent`` or ``too short`` where mended ``samples (n,)`` hold nothing to hear; else None."""
    if samples.size < _SHORTEST_S * sampling_rate_hz:
        return "too short"
    return "silent" if _peak(samples) <= SILENT_PEAK else None


def silent_choice(choices: Sequence[str]) -> int | None:
    """Index of the one choice that says that nothing is heard, in plain English; None without."""
    found = [i for i, choice in enumerate(choices) if _SAYS_NOTHING.fullmatch(choice.strip())]
    return found[0] if len(found) == 1 else None


def _clipping(samples: Array) -> list[str]:
    """A note if the waveform is cut at its largest value, on either side."""
    n_clipped = sum(_n_at_peak(side) for side in (samples, -samples))
    if not n_clipped:
        return []
    return [
        f"clipped: {100 * n_clipped / samples.size:.2g} % of the samples lie at full scale, so "
        "that loud sounds are distorted; record it with less gain"
    ]


def _n_at_peak(side: Array) -> int:
    """How many samples lie at the largest value, 0 unless far more than shortly below it.

    The bins that are compared are at least as wide as the steps between values (of 8 bits, of
    u-law). A peak that is cut lasts: pulses and high tones have no three samples in a row there.
    """
    peak = float(side.max())
    if peak < _FULL_SCALE:
        return 0
    below = side[(side > peak * (1 - 3 * _CLIPPED_BIN)) & (side < peak)]
    step = peak - float(below.max()) if below.size else 0.0
    width = max(step, peak * _CLIPPED_BIN)
    at_peak = side > peak - 0.5 * width
    n_at_peak = int(at_peak.sum())
    n_below = int((side > peak - 2.5 * width).sum()) - n_at_peak
    n_lasting = int((at_peak[2:] & at_peak[1:-1] & at_peak[:-2]).sum())
    is_cut = n_at_peak >= max(_CLIPPED_SAMPLES, _CLIPPED_RATIO * n_below)
    return n_at_peak if is_cut and 4 * n_lasting >= n_at_peak else 0


def _peak(samples: Array) -> float:
    return float(max(samples.max(), -samples.min()))


def _dbfs(level: float) -> float:
    return float(20 * np.log10(level))
