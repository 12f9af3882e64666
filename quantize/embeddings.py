"""Token embeddings in 8 bits: one float32 scale a row, since a prompt reads whole rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["quantize_rows"]


def quantize_rows(
    table: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """``(vocab_size, D)`` -> int8 rows of the same shape, and scales ``(vocab_size,)``.

    A row is its int8 row times its scale, to half a step of ``max|row| / 127``.
    """
    scales = np.abs(table).max(axis=1) / np.float32(127.0)
    divisors = np.where(scales == 0.0, np.float32(1.0), scales)[:, None]
    rows = np.rint(table / divisors).clip(-127, 127).astype(np.int8)
    return rows, scales.astype(np.float32)
