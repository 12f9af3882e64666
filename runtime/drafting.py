"""A decoder that reads several tokens in a step, and still writes what single steps write.

Drafted tokens are checked together, and tokens that are known beforehand are read together. Steps
of many tokens round differently and leave keys and values that differ in their last bits, so their
decisions count only if the logit margin is above a threshold. Otherwise everything since the last
exact position is read again one token at a time, as the plain decoder does. Such decisions are
exact to the bit; the others are right as long as the threshold is larger than the difference.
:mod:`~tinygiant.runtime.speculation` chooses the drafts and learns the threshold.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from .asking import Asked
from .config import DecoderConfig, KvType, ModelConfig
from .decoder import BindableGraph, Decoder, EmbeddingRows
from .generate import end_ids
from .masks import ALL, Guide, Mask
from .speculation import MAX_DRAFT_TOKENS, Drafter, Speculation

__all__ = ["DraftingDecoder", "make_decoder", "remember", "start_drafts"]


def make_decoder(
    graph: BindableGraph,
    embeddings: EmbeddingRows,
    config: DecoderConfig,
    capacity: int,
    drafter: Drafter | None = None,
    *,
    kv_type: KvType = "fp32",
    prompts: BindableGraph | None = None,
    speculation: Speculation | None = None,
) -> Decoder:
    """A plain decoder; one that reads several tokens in a step if there is ``speculation``.

    ``drafter`` guesses the next tokens, and brings its own speculation; the other arguments are
    those of :class:`Decoder`.
    """
    if drafter is not None:
        speculation = drafter.speculation
    if speculation is None:
        return Decoder(graph, embeddings, config, capacity, kv_type=kv_type, prompts=prompts)
    return DraftingDecoder(
        graph,
        embeddings,
        config,
        capacity,
        speculation,
        drafter,
        kv_type=kv_type,
        prompts=prompts,
    )


def start_drafts(
    speculation: Speculation | None, asked: Asked, config: ModelConfig
) -> Drafter | None:
    """What guesses the next tokens of an answer; None if nothing is to be guessed."""
    if speculation is None or not asked.is_drafted or not speculation.is_worth_it():
        return None
    return speculation.start([asked.prompt.instruction_ids], end_ids(asked, config))


def remember(
    speculation: Speculation | None,
    asked: Asked,
    token_ids: Sequence[int],
    decode_s: float,
    drafter: Drafter | None,
) -> None:
    """Keep an answer, written with ``drafter`` if there was one, for the drafts of later ones."""
    if speculation is not None and asked.is_drafted:
        speculation.remember(token_ids, decode_s, drafted=drafter is not None)


class DraftingDecoder(Decoder):
    """One sequence that may be read several tokens at a time; see the module."""

    def __init__(
        self,
        graph: BindableGraph,
        embeddings: EmbeddingRows,
        config: DecoderConfig,
        capacity: int,
        speculation: Speculation,
        drafter: Drafter | None = None,
        *,
        kv_type: KvType = "fp32",
        prompts: BindableGraph | None = None,
    ) -> None:
        """See :func:`make_decoder`."""
        super().__init__(graph, embeddings, config, capacity, kv_type=kv_type, prompts=prompts)
        self._speculation = speculation
        self._drafter = drafter
        # What single steps would have read since the last exact position; empty while all is exact.
        self._inexact: list[NDArray[np.float32]] = []

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :meth:`Decoder.prefill`."""
        logits = super().prefill(embeds)
        if self._inexact:
            self._inexact.append(embeds)
        return logits

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`Decoder.step`."""
        logits = super().step(token_ids)
        if self._inexact:
            self._inexact.append(self._rows(token_ids))
        return logits

    def truncate(self, length: int) -> None:
        """See :meth:`Decoder.truncate`."""
        n_forgotten = self.cache.length - length
        super().truncate(length)
        while self._inexact and n_forgotten > 0:
            last = self._inexact.pop()
            if last.shape[1] > n_forgotten:
                self._inexact.append(last[:, :-n_forgotten])
            n_forgotten -= last.shape[1]

    def best(self, logits: NDArray[np.float32], mask: Mask = ALL) -> int:
        """See :meth:`Decoder.best`; ``logits`` are those after the last position that is held.

        Where a step of several tokens may have decided, it is computed again one by one.
        """
        token = mask.best(logits)
        if not self._inexact:
            return token
        found = mask.logit_margin(logits, token)
        if found > self._speculation.min_margin:
            return token
        start_s = time.perf_counter()
        exact = self._settle()
        self._speculation.learn_reread(time.perf_counter() - start_s)
        best = mask.best(exact)
        self._speculation.learn_difference(found, mask.logit_margin(exact, token))
        return best

    def generate(
        self, logits: NDArray[np.float32], *, max_new_tokens: int, stop_ids: Collection[int]
    ) -> Generator[int, None, int | None]:
        """See :meth:`Decoder.generate`: the same tokens, several at a time where that pays."""
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
            logits, right = self._read(tokens[-1:], self._draft(tokens, n_left - 1), None)
            tokens = [*right, self.best(logits)]
        return None

    def write(
        self, logits: NDArray[np.float32], guide: Guide, unread: Sequence[int] = ()
    ) -> Generator[int, None, None]:
        """See :meth:`Decoder.write`: the same tokens, several at a time where that pays."""
        unread = list(unread)
        new: list[int] = []  # since the last draft
        while True:
            forced = guide.forced()
            yield from forced
            unread += forced
            new += forced
            if guide.done:
                return
            if unread:
                room = self.cache.capacity - self.cache.length - len(unread)
                draft = self._draft(new, min(room, MAX_DRAFT_TOKENS))
                logits, right = self._read(unread, draft, guide)
                yield from right
                unread, new = [], right
                if guide.done:
                    continue
            token = self.best(logits, guide.mask())
            if guide.take(token):
                yield token
                unread, new = [token], [*new, token]

    def _draft(self, new: Sequence[int], limit: int) -> list[int]:
        """At most ``limit`` tokens that may follow, after ``new`` ones since the last draft."""
        if self._drafter is None:
            return []
        self._drafter.take(new)
        return self._drafter.draft(limit)

    def _read(
        self, tokens: Sequence[int], draft: Sequence[int], guide: Guide | None
    ) -> tuple[NDArray[np.float32], list[int]]:
        """Read ``tokens`` and what is right of ``draft``.

        Returns the logits ``(V,)`` after the last token read, and the tokens that were right, which
        ``guide`` has taken.
        """
        start_s = time.perf_counter()
        self.cache.require(len(tokens) + len(draft))
        rows = self._rows([*tokens, *draft])
        n_new, last = rows.shape[1], len(tokens) - 1
        logits = self._run(rows, np.arange(last, n_new, dtype=np.int64))
        if n_new > 1 or self._inexact:
            # Written down as single steps would have read them.
            self._inexact += [rows[:, i : i + 1] for i in range(n_new)]
        if draft:
            self._speculation.learn_reread(0.0)
        right: list[int] = []
        for row, guess in zip(logits, draft, strict=False):
            if guide is not None and guide.done:
                break
            mask = ALL if guide is None else guide.mask()
            found = mask.best(row)
            if found != guess or mask.logit_margin(row, found) <= self._speculation.min_margin:
                break
            if guide is not None and not guide.take(found):
                break
            right.append(found)
        self.truncate(self.cache.length - len(draft) + len(right))
        self._speculation.learn_cost(n_new, time.perf_counter() - start_s)
        return logits[len(right)], right

    def _settle(self) -> NDArray[np.float32]:
        """Read again, one step at a time, what was read together; the last logits ``(V,)``."""
        again, self._inexact = self._inexact, []
        self.cache.truncate(self.cache.length - sum(embeds.shape[1] for embeds in again))
        for embeds in again[:-1]:
            self._prefill(embeds, with_logits=False)
        logits: NDArray[np.float32] = self._prefill(again[-1])[0]
        return logits
