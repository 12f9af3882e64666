"""Keys and values of the tokens a decoder has read: pre-allocated once, written in place.

Layout: for every layer one key and one value buffer ``(1, n_kv_heads, capacity, head_dim)``, of
float32 or int8 as the bundle says; the scales of int8 are the graph's. The decoder graph gets each
buffer as past and as present, so a step copies nothing: it writes its own positions behind
``length`` and reads those before. :class:`~tinygiant.runtime.decoder.Decoder` alone advances the
length; going back is :meth:`KvCache.truncate`, which costs nothing because positions behind
``length`` are never read.

Memory: ``n_bytes = capacity * kv_token_bytes``: at full size 224 KiB a token, 56 KiB in int8. The
system hands out zeroed pages when they are first written, so a long capacity costs only what is
used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import DecoderConfig, KvType
from .errors import UsageError

__all__ = ["KvCache", "KvSnapshot"]

_DTYPES: Mapping[KvType, np.dtype[Any]] = MappingProxyType(
    {"fp32": np.dtype(np.float32), "int8": np.dtype(np.int8)}
)

KvSnapshot = tuple[tuple[NDArray[Any], NDArray[Any]], ...]
"""Keys and values of some positions, ``(1, n_kv_heads, length, head_dim)`` each, by layer."""


class KvCache:
    """The key/value buffers of one sequence of at most ``capacity`` positions."""

    def __init__(self, config: DecoderConfig, capacity: int, kv_type: KvType = "fp32") -> None:
        """Allocate the buffers, of the type that the decoder graph reads and writes.

        Raises:
            UsageError: a capacity below 1 or beyond the decoder's positions.
        """
        if not 1 <= capacity <= config.max_positions:
            raise UsageError(
                f"{capacity} tokens of prompt and answer do not fit the decoder's "
                f"{config.max_positions} positions; shorten the audio, the question or the answer"
            )
        shape = (1, config.n_kv_heads, capacity, config.head_dim)
        dtype = _DTYPES[kv_type]
        self._buffers: KvSnapshot = tuple(
            (np.zeros(shape, dtype), np.zeros(shape, dtype)) for _ in range(config.n_layers)
        )
        self.capacity = capacity
        self.length = 0  # positions that hold a token

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(key.nbytes + value.nbytes for key, value in self._buffers)

    def buffers(self) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
        """Layer, key buffer, value buffer, in order."""
        for layer, (key, value) in enumerate(self._buffers):
            yield layer, key, value

    def advance(self, n_tokens: int) -> None:
        """Count ``n_tokens`` positions behind the length as written.

        Raises:
            UsageError: they do not fit.
        """
        self.require(n_tokens)
        self.length += n_tokens

    def require(self, n_tokens: int) -> None:
        """Check that ``n_tokens`` more positions fit.

        Raises:
            UsageError: they do not.
        """
        if self.length + n_tokens > self.capacity:
            raise UsageError(
                f"the KV cache holds {self.length} of {self.capacity} tokens, {n_tokens} more do "
                "not fit; ask for a larger capacity"
            )

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on.

        Raises:
            UsageError: a length below 0 or beyond what is held.
        """
        if not 0 <= length <= self.length:
            raise UsageError(f"cannot cut a KV cache of {self.length} tokens to {length}")
        self.length = length

    def snapshot(self) -> KvSnapshot:
        """A copy of every position that holds a token."""
        return tuple(
            (key[:, :, : self.length].copy(), value[:, :, : self.length].copy())
            for key, value in self._buffers
        )

    def restore(self, snapshot: KvSnapshot) -> None:
        """Begin with the positions of another cache of the same decoder.

        Raises:
            UsageError: they do not fit.
        """
        n_tokens = snapshot[0][0].shape[2]
        self.length = 0
        self.advance(n_tokens)
        for (key, value), (known_key, known_value) in zip(self._buffers, snapshot, strict=True):
            key[:, :, :n_tokens] = known_key
            value[:, :, :n_tokens] = known_value
