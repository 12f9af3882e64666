"""Small signal tools of the world, all at 48 kHz: noise, band filter, sweep, level, room.

Filters act in the frequency domain (zero phase), which is exact for whole events and needs no
library beyond numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "RATE_HZ",
    "Audio",
    "band",
    "coloured",
    "convolve",
    "loudness",
    "muffle",
    "noise",
    "room_response",
    "swept",
]

RATE_HZ = 48_000
Audio = NDArray[np.float32]


def _fft_size(n: int) -> int:
    """A length >= n whose only factors are 2, 3 and 5 (a multiple of a power of two near n/12)."""
    step = 1 << max(0, (n // 12).bit_length() - 1)
    multiple = -(-n // step)
    while multiple not in (1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18, 20, 24, 25, 27, 30):
        multiple += 1
    return multiple * step


def noise(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """White noise ``(n,)`` of standard deviation 1."""
    return rng.standard_normal(n)


def band(x: NDArray[np.float64], low_hz: float, high_hz: float) -> NDArray[np.float64]:
    """Keep ``low_hz .. high_hz`` of ``x (n,)``, with skirts of 12 dB an octave."""
    size = _fft_size(x.size)
    spectrum = np.fft.rfft(x, size)
    f = np.maximum(np.fft.rfftfreq(size, 1 / RATE_HZ), 1.0)
    spectrum *= 1 / (1 + (low_hz / f) ** 2) / (1 + (f / high_hz) ** 2)
    return np.fft.irfft(spectrum, size)[: x.size]


def coloured(x: Audio, slope: float) -> Audio:
    """White noise ``x (n,)`` made to fall ``slope`` times 3 dB an octave above 30 Hz."""
    if slope == 0:
        return x
    size = _fft_size(x.size)
    f = np.maximum(np.fft.rfftfreq(size, 1 / RATE_HZ), 30.0)
    return np.fft.irfft(np.fft.rfft(x, size) * f ** (-slope / 2), size)[: x.size].astype(np.float32)


def muffle(x: Audio, cutoff_hz: float) -> Audio:
    """Take the highs off ``x (n,)``: 6 dB an octave above ``cutoff_hz``."""
    size = _fft_size(x.size)
    f = np.fft.rfftfreq(size, 1 / RATE_HZ)
    spectrum = np.fft.rfft(x, size) / np.sqrt(1 + (f / cutoff_hz) ** 2)
    return np.fft.irfft(spectrum, size)[: x.size].astype(np.float32)


def swept(frequency_hz: NDArray[np.float64]) -> NDArray[np.float64]:
    """Phase, in radians, of a tone whose frequency at each sample is given."""
    return 2 * np.pi * np.cumsum(frequency_hz) / RATE_HZ


def loudness(x: Audio) -> float:
    """RMS of the loudest 50 ms of ``x``: what makes short and long events equally loud."""
    window = min(x.size, RATE_HZ // 20)
    energy = np.concatenate([[0.0], np.cumsum(x.astype(np.float64) ** 2)])
    return float(np.sqrt(max(1e-12, (energy[window:] - energy[:-window]).max() / window)))


def room_response(rt60_s: float, wet: float, cutoff_hz: float, rng: np.random.Generator) -> Audio:
    """Impulse response: the direct path, then echoes and noise of ``wet`` times its energy.

    The tail is low-passed at ``cutoff_hz``, as walls and air do; its length is ``rt60_s``. The
    first reflections, off floor, walls and desk, are single echoes within 5 to 40 ms.
    """
    n = round(rt60_s * RATE_HZ)
    t = np.arange(n) / RATE_HZ
    tail = band(noise(rng, n) * np.exp(-6.9 * t / rt60_s), 100, cutoff_hz)
    tail[: RATE_HZ // 200] = 0.0
    echoes = rng.integers(RATE_HZ // 200, RATE_HZ // 25, 6)
    tail[echoes] += (
        rng.choice([-1, 1], 6) * 12 * float(np.abs(tail).mean()) * np.exp(-t[echoes] / 0.02)
    )
    tail *= np.sqrt(wet / max(1e-12, float(np.sum(tail**2))))
    tail[0] = 1.0
    return tail.astype(np.float32)


def convolve(x: Audio, response: Audio) -> Audio:
    """Full convolution, ``(x.size + response.size - 1,) float32``."""
    n = x.size + response.size - 1
    size = _fft_size(n)
    product = np.fft.rfft(x, size) * np.fft.rfft(response, size)
    return np.fft.irfft(product, size)[:n].astype(np.float32)
