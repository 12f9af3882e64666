"""The engine: embeddings and token ids in, logits and token ids out. It knows nothing about text.

``generate`` over ``step`` over one graph run. A :class:`Decoder` is one sequence: it owns the KV
cache and is cheap to make; the graph and the embeddings behind it are shared. The LM head runs
only for the positions that are asked for: the last one in :meth:`Decoder.prefill` and
:meth:`Decoder.read`, all K in :meth:`Decoder.step`. Greedy is exact: the arg-max of the logits, the
lowest id at a tie. :meth:`Decoder.write` is held to a :class:`~tinygiant.runtime.masks.Guide`,
which tells at each position which tokens may come.

Where a single token is to be read, :meth:`Decoder._advance` does it at once; a decoder of a
:class:`~tinygiant.runtime.batch.Batch` waits there for a step of all, and says so by a None among
its tokens. What reads several tokens in a step, drafts or tokens that are known beforehand, is a
:class:`~tinygiant.runtime.rereading.RereadingDecoder`.

Shapes: ``T`` tokens of a prompt, ``K`` tokens of a step, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .config import DecoderConfig, KvType
from .errors import UsageError
from .kv_cache import KvCache
from .masks import ALL, Guide, Mask, greedy

__all__ = [
    "FIRST",
    "LEAST_PROMPT",
    "PREFILL_TOKENS",
    "BindableGraph",
    "Binding",
    "Decoder",
    "EmbeddingRows",
    "bind_kv",
    "greedy",
    "run_graph",
]

# Positions of one prefill run: bounds the activations (full size: about 40 KB a position and
# layer width) while the matrix products stay large enough to be efficient.
PREFILL_TOKENS = 512

LEAST_PROMPT = 32
"""So many positions, or more, are read by the graph for prompts, where there is one."""

FIRST = np.zeros(1, np.int64)
"""The only position of a step of one token."""


class EmbeddingRows(Protocol):
    """Token embeddings: ``n`` ids -> ``(n, D)``."""

    def lookup(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The rows of these tokens."""


class Binding(Protocol):
    """Arrays bound to a graph."""

    def input(self, name: str, array: NDArray[Any]) -> None:
        """Let an input read ``array``."""

    def output(self, name: str, array: NDArray[Any]) -> None:
        """Let an output be written into ``array``."""

    def shared(self, input_name: str, output_name: str, array: NDArray[Any]) -> None:
        """Let one array be read as an input and written as an output."""

    def run(self) -> None:
        """Run the graph."""


class BindableGraph(Protocol):
    """A graph whose inputs and outputs are bound to arrays."""

    def bind(self) -> Binding:
        """A fresh binding."""


class Decoder:
    """One sequence being read and written by the decoder graph."""

    def __init__(
        self,
        graph: BindableGraph,
        embeddings: EmbeddingRows,
        config: DecoderConfig,
        capacity: int,
        *,
        kv_type: KvType = "fp32",
        cache: KvCache | None = None,
        prompts: BindableGraph | None = None,
    ) -> None:
        """Start an empty sequence of at most ``capacity`` tokens.

        ``kv_type`` is how the graph keeps keys and values: the manifest's ``kv_cache``. An empty
        ``cache`` that there is already is used instead of a new one. ``prompts`` is a second graph,
        for prompts: all but the last position of at least :data:`LEAST_PROMPT` are read by it.

        Raises:
            UsageError: more positions than the decoder has.
        """
        self.cache = KvCache(config, capacity, kv_type) if cache is None else cache
        self._embeddings = embeddings
        self._config = config
        self._graph, self._prompts = graph, prompts
        self._bind()

    def _bind(self) -> None:
        """Let the graphs read and write the cache's buffers."""
        self._binding = bind_kv(self._graph, self.cache.buffers())
        if self._prompts is not None:
            self._prompt_binding = bind_kv(self._prompts, self.cache.buffers())

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
        logits: NDArray[np.float32] = self._prefill(embeds)[0]
        return logits

    def feed(self, embeds: NDArray[np.float32]) -> None:
        """Read ``embeds (1, T, D)`` of which nobody wants logits: the LM head does not run.

        Raises:
            UsageError: more positions than the cache has room for.
        """
        self.cache.require(embeds.shape[1])
        self._prefill(embeds, with_logits=False)

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
        return self._run(self._rows(token_ids), np.arange(len(token_ids), dtype=np.int64))

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on.

        Raises:
            UsageError: a length below 0 or beyond what is held.
        """
        self.cache.truncate(length)

    def best(self, logits: NDArray[np.float32], mask: Mask = ALL) -> int:
        """The most likely next token that ``mask`` allows; the lowest id at a tie.

        Raises:
            BundleError: not a number among the ``logits (V,)``.
        """
        return mask.best(logits)

    def generate(
        self, logits: NDArray[np.float32], *, max_new_tokens: int, stop_ids: Collection[int]
    ) -> Generator[int | None, None, int | None]:
        """Yield greedy tokens, starting from the ``logits (V,)`` after what was read so far.

        Ends before a token of ``stop_ids`` and returns it, or returns None after
        ``max_new_tokens``. A stop token, and the last token of a spent budget, have not been read
        by the decoder: ``cache.length`` tells how many have.
        """
        for n_left in range(max_new_tokens, 0, -1):
            token = self.best(logits)
            if token in stop_ids:
                return token
            yield token
            if n_left > 1:
                logits = yield from self._advance([token])
        return None

    def write(
        self, logits: NDArray[np.float32], guide: Guide, unread: Sequence[int] = ()
    ) -> Generator[int | None, None, None]:
        """Yield the greedy tokens of a text that ``guide`` allows.

        It goes on from the ``logits (V,)`` after what was read so far, or from ``unread`` tokens.
        At the end, the last tokens may not have been read.

        Raises:
            BundleError: not a number among the logits.
            UsageError: more tokens than the cache has room for.
        """
        unread = list(unread)
        while True:
            forced = guide.forced()
            yield from forced
            unread += forced
            if guide.done:
                return
            if unread:
                logits = yield from self._advance(unread)
            token = self.best(logits, guide.mask())
            unread = [token] if guide.take(token) else []
            yield from unread

    def _advance(self, token_ids: Sequence[int]) -> Generator[None, None, NDArray[np.float32]]:
        """Read tokens one by one; returns the logits after the last, ``(V,)``. Yields nothing."""
        self.cache.require(len(token_ids))
        for token in token_ids[:-1]:
            self._prefill(self._rows([token]), with_logits=False)
        logits: NDArray[np.float32] = self._run(self._rows(token_ids[-1:]), FIRST)[0]
        return logits
        yield

    def _rows(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Embeddings of tokens as the graph takes them, ``(1, K, D)``."""
        return np.ascontiguousarray(self._embeddings.lookup(token_ids)[None], np.float32)

    def _prefill(
        self, embeds: NDArray[np.float32], *, with_logits: bool = True
    ) -> NDArray[np.float32]:
        """Read any number of positions: the logits of the last, ``(1, V)``, or none, ``(0, V)``."""
        n_read = self._read_prompt(embeds, embeds.shape[1] - 1 if with_logits else embeds.shape[1])
        embeds = embeds[:, n_read:]
        n_tokens = embeds.shape[1]
        logits = np.empty((0, self._config.vocab_size), np.float32)
        for start in range(0, n_tokens, PREFILL_TOKENS):
            part = np.ascontiguousarray(embeds[:, start : start + PREFILL_TOKENS], np.float32)
            end = start + part.shape[1]
            # Nobody wants logits before the end: the LM head runs over no rows.
            wanted = [part.shape[1] - 1] if with_logits and end == n_tokens else []
            logits = self._run(part, np.array(wanted, np.int64))
        return logits

    def _read_prompt(self, embeds: NDArray[np.float32], n_tokens: int) -> int:
        """Let the graph for prompts read the first ``n_tokens``; returns how many it has read."""
        if self._prompts is None or n_tokens < LEAST_PROMPT:
            return 0
        # In parts of about the same size: none is too short.
        n_parts = -(-n_tokens // PREFILL_TOKENS)
        for part in np.array_split(embeds[:, :n_tokens], n_parts, axis=1):
            length = self.cache.length + part.shape[1]
            part = np.ascontiguousarray(part, np.float32)
            run_reader(self._prompt_binding, part, [length])
            self.cache.advance(part.shape[1])
        return n_tokens

    def _run(
        self, embeds: NDArray[np.float32], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Run the graph on ``embeds (1, T, D)``: logits ``(K, V)`` at ``positions (K,)``."""
        length = self.cache.length + embeds.shape[1]
        logits = run_graph(self._binding, embeds, [length], positions, self._config)
        self.cache.advance(embeds.shape[1])
        rows: NDArray[np.float32] = logits[0]
        return rows


def bind_kv(
    graph: BindableGraph, buffers: Iterable[tuple[int, NDArray[Any], NDArray[Any]]]
) -> Binding:
    """A binding of ``graph`` that reads and writes these keys and values, by layer."""
    binding = graph.bind()
    for layer, key, value in buffers:
        for kind, buffer in (("key", key), ("value", value)):
            past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
            binding.shared(past, present, buffer)
    return binding


def run_graph(
    binding: Binding,
    embeds: NDArray[np.float32],
    lengths: Sequence[int],
    positions: NDArray[np.int64],
    config: DecoderConfig,
) -> NDArray[np.float32]:
    """Read ``embeds (B, T, D)``, after which the sequences have these ``lengths (B,)``.

    Returns the logits ``(B, K, V)`` at ``positions (K,)`` of what was read.
    """
    # A fresh buffer each time: the caller may keep the logits.
    logits = np.empty((len(lengths), positions.size, config.vocab_size), np.float32)
    binding.input("logits_positions", positions)
    binding.output("logits", logits)
    run_reader(binding, embeds, lengths)
    return logits


def run_reader(binding: Binding, embeds: NDArray[np.float32], lengths: Sequence[int]) -> None:
    """Read ``embeds (B, T, D)``, after which the sequences have these ``lengths (B,)``."""
    binding.input("inputs_embeds", embeds)
    binding.input("seqlens_k", np.array(lengths, np.int32) - np.int32(1))
    binding.input("total_sequence_length", np.array(max(lengths), np.int32))
    binding.run()
