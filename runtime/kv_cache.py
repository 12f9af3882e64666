"""Keys and values of the tokens a decoder has read: pre-allocated once, written in place.

Layout: for every layer one key and one value buffer ``(1, n_kv_heads, capacity, head_dim)``, of
float32 or int8 as the bundle says; the scales of int8 are the graph's. Those of several sequences
lie behind one another in :class:`KvSlots`, so that one step reads them all. The decoder graph gets
each buffer as past and as present, so a step copies nothing: it writes its own positions behind
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

__all__ = ["KvCache", "KvSlots", "KvSnapshot"]

_DTYPES: Mapping[KvType, np.dtype[Any]] = MappingProxyType(
    {"fp32": np.dtype(np.float32), "int8": np.dtype(np.int8)}
)

KvSnapshot = tuple[tuple[NDArray[Any], NDArray[Any]], ...]
"""Keys and values of some positions, ``(1, n_kv_heads, length, head_dim)`` each, by layer."""


class KvCache:
    """The key/value buffers of one sequence of at most ``capacity`` positions."""

    def __init__(
        self,
        config: DecoderConfig,
        capacity: int,
        kv_type: KvType = "fp32",
        buffers: KvSnapshot | None = None,
    ) -> None:
        """Allocate the buffers, of the type that the decoder graph reads and writes.

        ``buffers`` are used instead if there are any: a slot with room for ``capacity`` or more.

        Raises:
            UsageError: a capacity below 1 or beyond the decoder's positions.
        """
        if not 1 <= capacity <= config.max_positions:
            raise UsageError(
                f"{capacity} tokens of prompt and answer do not fit the decoder's "
                f"{config.max_positions} positions; shorten the audio, the question or the answer"
            )
        self._buffers = buffers or _allocate(config, 1, capacity, kv_type)
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

    def row(self, position: int) -> NDArray[Any]:
        """A copy of the keys and values at one position, ``(2 * n_layers * n_kv_heads, ...)``."""
        return np.concatenate([b[0, :, position] for both in self._buffers for b in both])

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

    def move(self, buffers: KvSnapshot) -> None:
        """Go on in other ``buffers``, with room for ``capacity`` or more."""
        for (old_key, old_value), (key, value) in zip(self._buffers, buffers, strict=True):
            key[:, :, : self.length] = old_key[:, :, : self.length]
            value[:, :, : self.length] = old_value[:, :, : self.length]
        self._buffers = buffers


class KvSlots:
    """Room for the keys and values of several sequences: ``(n_slots, n_kv_heads, capacity, ...)``.

    The first ``n`` slots are one array, and so is each slot by itself.
    """

    def __init__(
        self, config: DecoderConfig, n_slots: int, capacity: int, kv_type: KvType = "fp32"
    ) -> None:
        """Allocate all slots, for sequences of at most ``capacity`` positions."""
        self._buffers = _allocate(config, n_slots, capacity, kv_type)
        self.capacity = capacity

    def first(self, n_slots: int) -> KvSnapshot:
        """The first slots, ``(n_slots, n_kv_heads, capacity, head_dim)`` each, by layer."""
        return self._part(slice(n_slots))

    def slot(self, index: int) -> KvSnapshot:
        """One slot, as a :class:`KvCache` takes it."""
        return self._part(slice(index, index + 1))

    def _part(self, part: slice) -> KvSnapshot:
        return tuple((key[part], value[part]) for key, value in self._buffers)


def _allocate(config: DecoderConfig, n_slots: int, capacity: int, kv_type: KvType) -> KvSnapshot:
    shape = (n_slots, config.n_kv_heads, capacity, config.head_dim)
    dtype = _DTYPES[kv_type]
    return tuple((np.zeros(shape, dtype), np.zeros(shape, dtype)) for _ in range(config.n_layers))
