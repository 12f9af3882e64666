"""Windowed-sinc resampling as torchaudio does it, in numpy.

Models that were trained on audio resampled by torchaudio depend on its kernel: another good
resampler changes the outputs of such an encoder by a few per cent. :func:`sinc_resample` equals
``torchaudio.functional.resample`` with its defaults (Hann window, 6 zero crossings, rolloff 0.99)
to the rounding of float32, including torchaudio's phases, which it computes in single precision.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["sinc_kernel", "sinc_resample"]

_ZERO_CROSSINGS, _ROLLOFF = 6, 0.99


def sinc_resample(samples: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample mono audio ``(n,)``; the input itself if the rates agree.

    Returns:
        ``(ceil(n * to_hz / from_hz),) float32``; beyond its ends the audio counts as silence.
    """
    if from_hz == to_hz:
        return samples
    step, n_phases = _ratio(from_hz, to_hz)
    n_out = -(-samples.size * n_phases // step)
    n_blocks = -(-n_out // n_phases)
    width = _width(step, n_phases)
    padded = np.zeros(width + n_blocks * step + width + step, dtype=np.float32)
    padded[width : width + samples.size] = samples
    firsts, taps = _phases(step, n_phases)
    n_taps = taps.shape[1]
    # Windows that overlap are no matrix to BLAS; every so many of them do not.
    apart = -(-n_taps // step)
    windows = np.lib.stride_tricks.sliding_window_view(padded, n_taps)
    out = np.empty((n_phases, n_blocks), dtype=np.float32)
    for phase, first in enumerate(firsts):
        of_phase = windows[first::step][:n_blocks]
        for block in range(min(apart, n_blocks)):
            out[phase, block::apart] = of_phase[block::apart] @ taps[phase]
    return np.ascontiguousarray(out.T).reshape(-1)[:n_out]


@lru_cache(maxsize=8)
def sinc_kernel(from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """The filters of all phases, read-only.

    Returns:
        ``(to / g, 2 * width + from / g) float32``, where ``g`` is the rates' common divisor: row
        ``i`` gives output samples ``i, i + to / g, ...``.
    """
    step, n_phases = _ratio(from_hz, to_hz)
    width = _width(step, n_phases)
    kernel = _taps(np.arange(n_phases), np.arange(-width, width + step), step, n_phases)
    kernel.flags.writeable = False
    return kernel


@lru_cache(maxsize=8)
def _phases(step: int, n_phases: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of each phase its first tap's place in a padded block, and its taps, ``(n_phases, n_taps)``.

    The taps of a phase lie around its position; the rest of its kernel's row is zero.
    """
    width = _width(step, n_phases)
    phases = np.arange(n_phases)
    firsts = phases * step // n_phases
    taps = _taps(phases, firsts[:, None] + np.arange(-width, width + 1), step, n_phases)
    taps.flags.writeable = firsts.flags.writeable = False
    return firsts, taps


def _taps(
    phases: NDArray[np.int64], offsets: NDArray[np.int64], step: int, n_phases: int
) -> NDArray[np.float32]:
    """Weights of input samples at ``offsets`` from a block's first, for each of its ``phases``.

    ``offsets`` are the same for all phases, ``(n_taps,)``, or each one's, ``(n_phases, n_taps)``.
    """
    base = min(step, n_phases) * _ROLLOFF
    # Single precision is torchaudio's: exact phases move features by up to 0.16 dB at 44.1 kHz.
    positions = (-phases.astype(np.float32) / np.float32(n_phases)).astype(np.float64)
    time = (positions[:, None] + offsets / step) * base
    np.clip(time, -_ZERO_CROSSINGS, _ZERO_CROSSINGS, out=time)
    window = np.cos(time * math.pi / _ZERO_CROSSINGS / 2) ** 2
    return np.asarray(np.sinc(time) * window * (base / step), dtype=np.float32)


def _ratio(from_hz: int, to_hz: int) -> tuple[int, int]:
    divisor = math.gcd(from_hz, to_hz)
    return from_hz // divisor, to_hz // divisor


def _width(step: int, n_phases: int) -> int:
    """Input samples on each side of an output sample that it hears."""
    return math.ceil(_ZERO_CROSSINGS * step / (min(step, n_phases) * _ROLLOFF))
