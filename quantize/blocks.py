"""Blocks of weights that share a scale: which scale, and how many steps of it each weight is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["pack_steps", "search_scales", "to_steps"]

# Scales that are tried, as parts of the one that maps a block's largest weight to the lowest
# step. Smaller ones clip that weight and are finer for all others.
_SHRINK = np.arange(0.65, 1.06, 0.05, dtype=np.float32)


def search_scales(blocks: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.float32]:
    """Of each block ``(..., block_size)`` the scale of the least squared error, ``(..., 1)``."""
    largest = np.abs(blocks).argmax(axis=-1, keepdims=True)
    widest = np.take_along_axis(blocks, largest, axis=-1) / np.float32(-(1 << (bits - 1)))
    widest[widest == 0] = 1.0  # a block of zeros
    least = np.full_like(widest, np.inf)
    best = widest
    for shrink in _SHRINK:
        scale = widest * shrink
        error = np.square(to_steps(blocks, scale, bits) * scale - blocks).sum(-1, keepdims=True)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def to_steps(
    values: npt.NDArray[np.float32], scale: npt.NDArray[np.float32], bits: int
) -> npt.NDArray[np.float32]:
    """How many steps of ``scale`` each value is: whole numbers that ``bits`` bits can hold."""
    limit = 1 << (bits - 1)
    steps: npt.NDArray[np.float32] = np.clip(np.rint(values / scale), -limit, limit - 1)
    return steps


def pack_steps(steps: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.uint8]:
    """Bytes along the last axis; of two numbers in a byte, the first is the low half."""
    unsigned: npt.NDArray[np.uint8] = (steps + (1 << (bits - 1))).astype(np.uint8)
    if bits == 8:
        return unsigned
    return (unsigned[..., 0::2] | unsigned[..., 1::2] << 4).astype(np.uint8, copy=False)
