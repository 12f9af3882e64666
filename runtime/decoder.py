"""The engine: embeddings and token ids in, logits and token ids out. It knows nothing about text.

``generate`` over ``step`` over one graph run. A :class:`Decoder` is one sequence: it owns the KV
cache and is cheap to make; the graph and the embeddings behind it are shared. The LM head runs
only for the positions that are asked for: the last one in :meth:`Decoder.prefill` and
:meth:`Decoder.read`, all K in :meth:`Decoder.step`. Greedy is exact: the arg-max of the logits, the
lowest id at a tie. :meth:`Decoder.write` is held to a :class:`Guide`, whose :class:`Mask` tells at
each position which tokens may come; those that it knows beforehand are read together.

With a :class:`~tinygiant.runtime.speculation.Drafter`, tokens are drafted and checked several in a
step, and the answer is still the one that single steps give. Steps of many tokens round differently
and leave keys and values that differ in their last bits, so what they decide is believed only where
the best logit leads by more than a guard. Elsewhere everything since the last exact position is
read again one token at a time, as without drafts: such decisions are exact to the bit, the others
as long as the guard is wider than the difference.

Shapes: ``T`` tokens of a prompt, ``K`` tokens of a step, ``D`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .config import DecoderConfig, KvType
from .errors import BundleError, UsageError
from .kv_cache import KvCache
from .speculation import MAX_DRAFT_TOKENS, Drafter, Speculation, lead

__all__ = ["PREFILL_TOKENS", "Decoder", "Guide", "Mask", "greedy"]

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


class Mask:
    """Which tokens may come next: ``only`` those in ``ids``, or all but those."""

    def __init__(self, ids: NDArray[np.intp], *, only: bool) -> None:
        """Take ``ids``, without repetition and in rising order."""
        self.ids = ids
        self.only = only

    def best(self, logits: NDArray[np.float32]) -> int:
        """The most likely allowed token of ``logits (V,)``, the lowest id at a tie.

        Raises:
            BundleError: not a number among the logits.
        """
        if self.only:
            return int(self.ids[greedy(logits[self.ids])])
        with self._applied(logits):
            return greedy(logits)

    def lead(self, logits: NDArray[np.float32], token: int) -> float:
        """How far ``token`` leads before the next that is allowed, in deviations of the logits."""
        if self.only:
            return lead(logits, token, self.ids.tolist())
        with self._applied(logits):
            return lead(logits, token)

    @contextmanager
    def _applied(self, logits: NDArray[np.float32]) -> Iterator[None]:
        """What may not come has minus infinity; in place, for a copy takes longer."""
        kept = logits[self.ids]
        logits[self.ids] = -np.inf
        yield
        logits[self.ids] = kept


ALL = Mask(np.array([], np.intp), only=False)


class Guide(Protocol):
    """What holds a text to a form."""

    @property
    def done(self) -> bool:
        """Whether the text has ended, forced tokens apart."""

    def forced(self) -> Sequence[int]:
        """Tokens that come next whatever the model wants; they count as taken."""

    def mask(self) -> Mask:
        """Which tokens may come next; what would be forced is the only one."""

    def take(self, token: int) -> bool:
        """Go on with an allowed token; whether it is written."""


class Decoder:
    """One sequence being read and written by the decoder graph."""

    def __init__(
        self,
        graph: _Graph,
        embeddings: _Embeddings,
        config: DecoderConfig,
        capacity: int,
        drafter: Drafter | None = None,
        *,
        kv_type: KvType = "fp32",
        speculation: Speculation | None = None,
    ) -> None:
        """Start an empty sequence of at most ``capacity`` tokens, drafted by ``drafter`` if any.

        ``kv_type`` is how the graph keeps keys and values: the manifest's ``kv_cache``. With
        ``speculation`` (the drafter's own, if there is one) several tokens may be read in a step,
        and what follows is doubted; without, :meth:`write` reads one by one.

        Raises:
            UsageError: more positions than the decoder has.
        """
        self.cache = KvCache(config, capacity, kv_type)
        self._drafter = drafter
        self._speculation = speculation if drafter is None else drafter.speculation
        # What single steps would have read since the last exact position; empty while all is exact.
        self._inexact: list[NDArray[np.float32]] = []
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
        if self._inexact:
            self._inexact.append(embeds)
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
        embeds = np.ascontiguousarray(self._embeddings.lookup(token_ids)[None], np.float32)
        if self._inexact:
            self._inexact.append(embeds)
        return self._run(embeds, np.arange(len(token_ids), dtype=np.int64))

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on.

        Raises:
            UsageError: a length below 0 or beyond what is held.
        """
        n_forgotten = self.cache.length - length
        self.cache.truncate(length)
        while self._inexact and n_forgotten > 0:
            last = self._inexact.pop()
            if last.shape[1] > n_forgotten:
                self._inexact.append(last[:, :-n_forgotten])
            n_forgotten -= last.shape[1]

    def best(self, logits: NDArray[np.float32], mask: Mask = ALL) -> int:
        """The most likely next token that ``mask`` allows; the lowest id at a tie.

        ``logits (V,)`` are those after the last position that is held. Where a step of several
        tokens may have decided which is best, it is computed again one by one.

        Raises:
            BundleError: not a number among the logits.
        """
        token = mask.best(logits)
        if not self._inexact or self._speculation is None:
            return token
        found = mask.lead(logits, token)
        if found > self._speculation.guard:
            return token
        start_s = time.perf_counter()
        exact = self._settle()
        self._speculation.learn_reread(time.perf_counter() - start_s)
        best = mask.best(exact)
        self._speculation.learn_difference(found, mask.lead(exact, token))
        return best

    def generate(
        self, logits: NDArray[np.float32], *, max_new_tokens: int, stop_ids: Collection[int]
    ) -> Generator[int, None, int | None]:
        """Yield greedy tokens, starting from the ``logits (V,)`` after what was read so far.

        Ends before a token of ``stop_ids`` and returns it, or returns None after
        ``max_new_tokens``. A stop token, and the last token of a spent budget, have not been read
        by the decoder: ``cache.length`` tells how many have.
        """
        n_left = max_new_tokens
        tokens = [self.best(logits)] if n_left > 0 else []
        while tokens:
            for token in tokens:
                if token in stop_ids:
                    return token
                yield token
            n_left -= len(tokens)
            if n_left == 0:
                break
            draft: list[int] = []
            if self._drafter is not None:
                self._drafter.take(tokens)
                draft = self._drafter.draft(n_left - 1)
            tokens = self._go_on(tokens[-1], draft)
        return None

    def write(
        self, logits: NDArray[np.float32], guide: Guide, unread: Sequence[int] = ()
    ) -> Generator[int, None, None]:
        """Yield the greedy tokens of a text that ``guide`` allows.

        It goes on from the ``logits (V,)`` after what was read so far, or from ``unread`` tokens.
        At the end, the last tokens may not have been read.

        Raises:
            BundleError: not a number among the logits.
            UsageError: more tokens than the cache has room for.
        """
        unread = list(unread)
        new: list[int] = []  # since the last draft
        while True:
            forced = guide.forced()
            yield from forced
            unread += forced
            new += forced
            if guide.done:
                return
            right: list[int] = []
            if unread:
                draft: list[int] = []
                if self._drafter is not None:
                    self._drafter.take(new)
                    room = self.cache.capacity - self.cache.length - len(unread)
                    draft = self._drafter.draft(min(room, MAX_DRAFT_TOKENS))
                logits, right = self._read(unread, draft, guide)
                yield from right
                unread, new = [], right
                if guide.done:
                    continue
            token = self.best(logits, guide.mask())
            if guide.take(token):
                yield token
                unread, new = [token], [*new, token]

    def _go_on(self, token: int, draft: Sequence[int]) -> list[int]:
        """Read ``token`` and what is right of ``draft``; returns that and the token after it."""
        logits, right = self._read([token], draft, None)
        return [*right, self.best(logits)]

    def _read(
        self, tokens: Sequence[int], draft: Sequence[int], guide: Guide | None
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Read ``tokens`` and what is right of ``draft``.

        Returns the logits ``(V,)`` after the last token read, and the tokens that were right, which
        ``guide`` has taken.
        """
        start_s = time.perf_counter()
        self.cache.require(len(tokens) + len(draft))
        # Written down as single steps would have read them.
        rows = self._embeddings.lookup([*tokens, *draft])[None].astype(np.float32, copy=False)
        if self._speculation is None:
            for i in range(len(tokens) - 1):
                self._prefill(rows[:, i : i + 1], with_logits=False)
            rows, tokens = rows[:, len(tokens) - 1 :], tokens[-1:]
        n_new = rows.shape[1]
        last = len(tokens) - 1
        logits = self._run(np.ascontiguousarray(rows), np.arange(last, n_new, dtype=np.int64))
        if n_new > 1 or self._inexact:
            self._inexact += [rows[:, i : i + 1] for i in range(n_new)]
        if draft and self._speculation is not None:
            self._speculation.learn_reread(0.0)
        right: list[int] = []
        for row, guess in zip(logits, draft, strict=False):
            if guide is not None and guide.done:
                break
            mask = ALL if guide is None else guide.mask()
            found = mask.best(row)
            if found != guess or mask.lead(row, found) <= self._guard:
                break
            if guide is not None and not guide.take(found):
                break
            right.append(found)
        self.truncate(self.cache.length - len(draft) + len(right))
        self._learn_cost(n_new, start_s)
        return logits[len(right)], right

    @property
    def _guard(self) -> float:
        return np.inf if self._speculation is None else self._speculation.guard

    def _learn_cost(self, n_tokens: int, start_s: float) -> None:
        if self._speculation is not None:
            self._speculation.learn_cost(n_tokens, time.perf_counter() - start_s)

    def _settle(self) -> NDArray[np.float32]:
        """Read again, one step at a time, what was drafted; returns the last logits ``(V,)``."""
        again, self._inexact = self._inexact, []
        self.cache.truncate(self.cache.length - sum(embeds.shape[1] for embeds in again))
        for embeds in again[:-1]:
            self._prefill(embeds, with_logits=False)
        logits: NDArray[np.float32] = self._prefill(again[-1])[0]
        return logits

    def _prefill(
        self, embeds: NDArray[np.float32], *, with_logits: bool = True
    ) -> NDArray[np.float32]:
        """Read any number of positions: the logits of the last, ``(1, V)``, or none, ``(0, V)``."""
        n_tokens = embeds.shape[1]
        for start in range(0, n_tokens, PREFILL_TOKENS):
            part = np.ascontiguousarray(embeds[:, start : start + PREFILL_TOKENS], np.float32)
            end = start + part.shape[1]
            # Nobody wants logits before the end: the LM head runs over no rows.
            wanted = [part.shape[1] - 1] if with_logits and end == n_tokens else []
            logits = self._run(part, np.array(wanted, np.int64))
        return logits

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
