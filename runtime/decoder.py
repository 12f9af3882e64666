"""The engine: embeddings and token ids in, logits and token ids out. It knows nothing about text.

``generate`` over ``step`` over one graph run. A :class:`Decoder` is one sequence: it owns the KV
cache and is cheap to make; the graph and the embeddings behind it are shared. The LM head runs
only for the positions that are asked for: the last one in :meth:`Decoder.prefill` and
:meth:`Decoder.read`, all K in :meth:`Decoder.step`. Greedy is exact: the arg-max of the logits, the
lowest id at a tie.

Shapes: ``T`` tokens of a prompt, ``K`` tokens of a step, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinygiant.runtime.config import DecoderConfig
from tinygiant.runtime.errors import BundleError, UsageError
from tinygiant.runtime.kv_cache import KvCache

__all__ = ["PREFILL_TOKENS", "Decoder", "greedy"]

# Positions of one prefill run: bounds the activations (full size: about 40 KB a position and
# layer width) while the matrix products stay large enough to be efficient.
PREFILL_TOKENS = 512


class _Embeddings(Protocol):
    def lookup(self, token_ids: Sequence[int]) -> NDArray[np.float32]: ...


class _Binding(Protocol):
    def input(self, name: str, array: NDArray[Any]) -> None: ...
    def output(self, name: str, array: NDArray[Any]) -> None: ...
    def shared(self, input_name: str, output_name: str, array: NDArray[Any]) -> None: ...
    def run(self) -> None: ...


class _Graph(Protocol):
    def bind(self) -> _Binding: ...


class Decoder:
    """One sequence being read and written by the decoder graph."""

    def __init__(
        self, graph: _Graph, embeddings: _Embeddings, config: DecoderConfig, capacity: int
    ) -> None:
        """Start an empty sequence of at most ``capacity`` tokens.

        Raises:
            UsageError: more positions than the decoder has.
        """
        self.cache = KvCache(config, capacity)
        self._embeddings = embeddings
        self._config = config
        self._binding = graph.bind()
        for layer, key, value in self.cache.buffers():
            for kind, buffer in (("key", key), ("value", value)):
                past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
                self._binding.shared(past, present, buffer)

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """Read ``embeds (1, T, D)``; returns the last position's logits ``(V,)``.

        Long prompts are read ``PREFILL_TOKENS`` at a time.

        Raises:
            UsageError: no positions, or more than the cache has room for.
        """
        n_tokens = embeds.shape[1]
        if n_tokens == 0:
            raise UsageError("nothing to read: prefill needs at least one position")
        self.cache.require(n_tokens)
        for start in range(0, n_tokens, PREFILL_TOKENS):
            part = np.ascontiguousarray(embeds[:, start : start + PREFILL_TOKENS], np.float32)
            logits = self._run(part, np.array([part.shape[1] - 1], np.int64))
        last: NDArray[np.float32] = logits[0]
        return last

    def read(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Read tokens; returns the logits after the last of them, ``(V,)``.

        Raises:
            UsageError: no tokens, or more than the cache has room for.
        """
        return self.prefill(self._embeddings.lookup(token_ids)[None])

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Read K tokens; returns the logits after each of them, ``(K, V)``.

        Raises:
            UsageError: no tokens, or more than the cache has room for.
        """
        if not token_ids:
            raise UsageError("nothing to read: a step needs at least one token")
        self.cache.require(len(token_ids))
        embeds = np.ascontiguousarray(self._embeddings.lookup(token_ids)[None], np.float32)
        return self._run(embeds, np.arange(len(token_ids), dtype=np.int64))

    def generate(
        self, logits: NDArray[np.float32], *, max_new_tokens: int, stop_ids: Collection[int]
    ) -> Generator[int, None, int | None]:
        """Yield greedy tokens, starting from the ``logits (V,)`` after what was read so far.

        Ends before a token of ``stop_ids`` and returns it, or returns None after
        ``max_new_tokens``. A stop token, and the last token of a spent budget, have not been read
        by the decoder: ``cache.length`` tells how many have.
        """
        for n_written in range(max_new_tokens):
            token = greedy(logits)
            if token in stop_ids:
                return token
            yield token
            if n_written + 1 < max_new_tokens:
                logits = self.step([token])[-1]
        return None

    def _run(
        self, embeds: NDArray[np.float32], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph on ``embeds (1, T, D)``: logits ``(K, V)`` at ``positions (K,)``."""
        length = self.cache.length + embeds.shape[1]
        # A fresh buffer each time: the caller may keep the logits.
        logits = np.empty((1, positions.size, self._config.vocab_size), np.float32)
        self._binding.input("inputs_embeds", embeds)
        self._binding.input("seqlens_k", np.array([length - 1], np.int32))
        self._binding.input("total_sequence_length", np.array(length, np.int32))
        self._binding.input("logits_positions", positions)
        self._binding.output("logits", logits)
        self._binding.run()
        self.cache.advance(embeds.shape[1])
        rows: NDArray[np.float32] = logits[0]
        return rows


def greedy(logits: NDArray[np.float32]) -> int:
    """The id of the largest of ``logits (V,)``, the lowest id at a tie.

    Raises:
        BundleError: not a number among the logits, so the weights or the audio rows are broken.
    """
    token = int(logits.argmax())
    if np.isnan(logits[token]):
        raise BundleError("the decoder gave no number (NaN); the bundle's weights are damaged")
    return token
