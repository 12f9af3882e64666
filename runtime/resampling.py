"""The windowed-sinc resampler that some encoders were trained with.

:func:`resample_sinc` gives what torchaudio's ``Resample`` gives with its defaults (Hann window,
width 6, roll-off 0.99). Where a model was trained behind it, its kernel is part of the model's
features: with soxr in its place, rows of such encoders move by a third of their deviation.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["resample_sinc"]

_WIDTH, _ROLL_OFF = 6, 0.99  # zero crossings on each side; share of the band that is kept


def resample_sinc(samples: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample mono audio ``(n,)`` with a windowed sinc; the input itself if the rates agree.

    Returns:
        ``(ceil(n * to_hz / from_hz),) float32``.
    """
    if from_hz == to_hz:
        return samples
    divisor = math.gcd(from_hz, to_hz)
    old, new = from_hz // divisor, to_hz // divisor
    kernels, margin = _sinc_kernels(old, new)  # (taps, new)
    padded = np.pad(samples, (margin, margin + old))
    spans = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[0])[::old]
    n_samples = -(-samples.size * new // old)
    return np.ascontiguousarray((spans @ kernels).reshape(-1)[:n_samples], dtype=np.float32)


@lru_cache(maxsize=8)
def _sinc_kernels(old: int, new: int) -> tuple[NDArray[np.float32], int]:
    """One kernel for each of ``new`` phases, ``(taps, new)``, and samples needed on the left."""
    cutoff = min(old, new) * _ROLL_OFF
    margin = math.ceil(_WIDTH * old / cutoff)
    positions = np.arange(-margin, margin + old, dtype=np.float64)[:, None] / old
    # torchaudio divides integers here, which gives single precision: part of its kernel.
    phases = (np.arange(0, -new, -1).astype(np.float32) / np.float32(new)).astype(np.float64)
    crossings = np.clip((positions + phases) * cutoff, -_WIDTH, _WIDTH)
    taper = np.cos(crossings * np.pi / _WIDTH / 2) ** 2
    kernels = np.sinc(crossings) * taper * (cutoff / old)
    return kernels.astype(np.float32), margin
