"""A decoder that drafts tokens and checks them together; it writes what single steps write.

Tokens that are known beforehand are read together with the drafted ones.
:mod:`~tinygiant.runtime.rereading` sees to it that nothing changes by that, and
:mod:`~tinygiant.runtime.speculation` chooses the drafts.
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
from .masks import ALL, Guide
from .rereading import RereadingDecoder
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


class DraftingDecoder(RereadingDecoder):
    """One sequence whose next tokens are guessed; see the module."""

    _speculation: Speculation

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
        super().__init__(
            graph, embeddings, config, capacity, speculation, kv_type=kv_type, prompts=prompts
        )
        self._drafter = drafter

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
        logits = self._read_together(rows, last)
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
