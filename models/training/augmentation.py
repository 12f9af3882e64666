"""Features that encoders learn from change a little each time: none is learnt by heart."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Augmentation", "augment"]


@dataclass(frozen=True)
class Augmentation:
    """How far a clip's features may be changed.

    Attributes:
        n_masks: stripes of time and of mel bands each that are masked (SpecAugment, Park et al.,
            2019), at most ``mask_frames`` and ``mask_mels`` wide.
        warp: how far a voice is moved along the mel axis at most (vocal tract length perturbation,
            Jaitly and Hinton, 2013), as a share; features ``(B, mels, frames)`` only.
        band_gain: how much louder or quieter a band is made at most (FilterAugment, Nam et al.,
            2022), in units of the features.
    """

    n_masks: int = 2
    mask_frames: int = 12
    mask_mels: int = 4
    warp: float = 0.0
    band_gain: float = 0.0


def augment(
    features: Tensor,
    how: Augmentation,
    rng: np.random.Generator,
    mel_axis: int,
    melodies: Collection[int] = (),
) -> None:
    """Change the clips of a batch in place.

    Args:
        features: ``(B, mels, frames)`` or ``(B, 1, frames, mels)``.
        how: how far.
        rng: decides.
        mel_axis: 1 or 3.
        melodies: the clips that are not moved: a melody that is moved is another one.
    """
    if how.warp:
        _warp_voices(features, melodies, rng, how.warp)
    if how.band_gain:
        _shift_bands(features, rng, how.band_gain, mel_axis)
    _mask_stripes(features, how, rng, mel_axis)


def _warp_voices(
    features: Tensor, melodies: Collection[int], rng: np.random.Generator, most: float
) -> None:
    """Move every second clip that is none of ``melodies`` along the mel axis, in place.

    Speakers differ first in the length of the vocal tract, which scales all formants: a clip moved
    is a voice that no clip has.
    """
    n_mels = features.shape[1]
    for b, clip in enumerate(features):
        factor = 1 + rng.uniform(-most, most)
        if rng.random() < 0.5 or b in melodies:
            continue
        position = (torch.arange(n_mels) * factor).clamp(max=n_mels - 1)
        below = position.floor().long()
        above = (below + 1).clamp(max=n_mels - 1)
        share = (position - below).unsqueeze(1)
        clip.copy_(clip[below] * (1 - share) + clip[above] * share)


def _shift_bands(features: Tensor, rng: np.random.Generator, most: float, mel_axis: int) -> None:
    """Add a gain to every clip that changes linearly between a few mel bands, in place.

    Nothing falls below the clip's floor, which stands for silence.
    """
    n_mels = features.shape[mel_axis]
    for clip in features:
        knots = np.sort(rng.uniform(0, n_mels, size=int(rng.integers(2, 5))))
        gains = np.interp(np.arange(n_mels), knots, rng.uniform(-most, most, size=len(knots)))
        floor = float(clip.min())
        shape = [-1 if axis == mel_axis - 1 else 1 for axis in range(clip.ndim)]
        clip.add_(torch.from_numpy(gains.astype(np.float32)).reshape(shape)).clamp_(min=floor)


def _mask_stripes(
    features: Tensor, how: Augmentation, rng: np.random.Generator, mel_axis: int
) -> None:
    """Overwrite a few stripes of each clip with the clip's mean, in place."""
    frame_axis = 2
    for clip in features:
        mean = float(clip.mean())
        for axis, widest in ((frame_axis, how.mask_frames), (mel_axis, how.mask_mels)):
            for _ in range(how.n_masks):
                width = int(rng.integers(0, widest + 1))
                start = int(rng.integers(0, clip.shape[axis - 1] - width + 1))
                clip.narrow(axis - 1, start, width).fill_(mean)
