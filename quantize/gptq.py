"""GPTQ: the weights that are not yet rounded compensate the rounding errors of the others.

After Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers* (2022): input channels are rounded one after another, and the effect of each error on
the product is subtracted from the remaining channels, weighted by the second moments of the inputs.
Scales are those of :mod:`tinygiant.quantize.blocks`, searched for each block in its turn.
NumPy only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .blocks import pack_steps, search_scales, to_steps

__all__ = ["gptq_blocks"]

_DAMPING = 0.01  # of the mean second moment: noise that no text has


def gptq_blocks(
    weight: npt.NDArray[np.float32], moments: npt.NDArray[np.float32], bits: int, block_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Quantize ``(K, N)`` symmetrically in blocks along K, as ``MatMulNBits`` reads it.

    Args:
        weight: the float32 weight.
        moments: the mean of ``x x^T`` over its inputs, ``(K, K)``.
        bits: of a weight, 4 or 8.
        block_size: input channels that share a scale.

    Returns:
        ``packed (N, K / block_size, block_size * bits / 8)`` and ``scales (N, K / block_size)``.
    """
    n_in, n_out = weight.shape
    left = weight.astype(np.float32, copy=True)
    spread = _inverse_factor(moments)
    n_blocks = -(-n_in // block_size)
    steps = np.zeros((n_blocks * block_size, n_out), np.float32)
    scales = np.empty((n_out, n_blocks), np.float32)
    for index, start in enumerate(range(0, n_in, block_size)):
        end = min(start + block_size, n_in)
        block = left[start:end]
        scale = search_scales(np.ascontiguousarray(block.T)[:, None], bits)[:, 0, 0]
        scales[:, index] = scale
        errors = np.empty_like(block)
        for row in range(end - start):
            channel = start + row
            steps[channel] = to_steps(block[row], scale, bits)
            errors[row] = (block[row] - steps[channel] * scale) / spread[channel, channel]
            block[row + 1 :] -= np.outer(spread[channel, channel + 1 : end], errors[row])
        left[end:] -= spread[start:end, end:].T @ errors
    blocks = steps.T.reshape(n_out, n_blocks, block_size)
    return pack_steps(blocks, bits), scales


def _inverse_factor(moments: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Upper triangular ``U`` with ``U^T U`` the inverse of the damped moments."""
    damped = moments.astype(np.float64)
    diagonal = np.einsum("ii->i", damped)  # a view
    mean = diagonal.mean() or 1.0
    diagonal[diagonal == 0.0] = mean  # a channel that is always zero
    diagonal += _DAMPING * mean
    factor: npt.NDArray[np.float32] = np.linalg.cholesky(np.linalg.inv(damped)).T
    return np.ascontiguousarray(factor, np.float32)
