"""Token embeddings, memory-mapped by row: a prompt touches only the rows of its own tokens.

The file is ``(vocab_size, D)`` in NumPy's format: float32, float16, or int8 with one float32 scale
a row in a second file, so that ``row = int8_row * scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import Bundle
from .errors import BundleError
from .text import one_line, printable

__all__ = ["TokenEmbeddings"]

_DTYPES: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


class TokenEmbeddings:
    """Rows of the embedding matrix as float32, whatever they are stored as."""

    def __init__(self, table: NDArray[Any], scales: NDArray[np.float32] | None = None) -> None:
        """Wrap ``table (vocab_size, D)`` and, if it is int8, ``scales (vocab_size,)``."""
        self._table = table
        self._scales = scales

    @classmethod
    def open(cls, bundle: Bundle) -> TokenEmbeddings:
        """Map the bundle's embeddings into memory.

        Raises:
            BundleError: not a NumPy file, or another shape or type than the manifest says.
        """
        entry = bundle.manifest.embeddings
        decoder = bundle.config.decoder
        table = _map(
            bundle.file(entry.file), (decoder.vocab_size, decoder.hidden_size), _DTYPES[entry.dtype]
        )
        if entry.scale_file is None:
            return cls(table)
        return cls(table, _map(bundle.file(entry.scale_file), (decoder.vocab_size,), np.float32))

    def lookup(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Embeddings of ``n`` tokens: ``(n, D) float32``. Ids are those of the tokenizer."""
        ids = np.asarray(token_ids, dtype=np.int64)
        rows = self._table[ids].astype(np.float32)
        if self._scales is not None:
            rows *= self._scales[ids, None]
        return rows


def _map(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
    try:
        # Not np.load, which also opens archives and pickles.
        table = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # of many kinds: NumPy's header is a Python literal
        raise BundleError(f"{printable(path)}: cannot be mapped: {one_line(error)}") from error
    if table.shape != shape or table.dtype != dtype:
        raise BundleError(
            f"{printable(path)}: holds {table.dtype} {table.shape}, the manifest says "
            f"{np.dtype(dtype)} {shape}; export the bundle again"
        )
    return table
