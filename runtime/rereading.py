"""A decoder that reads several tokens in a step, and still decides what single steps decide.

Steps of many tokens round differently and leave keys and values that differ in their last bits, so
their decisions count only if the logit margin is above a threshold. Otherwise everything since the
last exact position is read again one token at a time, as the plain decoder does. Such decisions are
exact to the bit; the others are right as long as the threshold is larger than the difference.
:mod:`~tinygiant.runtime.speculation` learns the threshold.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .config import DecoderConfig, KvType
from .decoder import BindableGraph, Decoder, EmbeddingRows
from .kv_cache import KvCache
from .masks import ALL, Mask
from .speculation import Speculation

__all__ = ["RereadingDecoder"]


class RereadingDecoder(Decoder):
    """One sequence that may be read several tokens at a time; see the module."""

    def __init__(
        self,
        graph: BindableGraph,
        embeddings: EmbeddingRows,
        config: DecoderConfig,
        capacity: int,
        speculation: Speculation | None,
        *,
        kv_type: KvType = "fp32",
        cache: KvCache | None = None,
        prompts: BindableGraph | None = None,
    ) -> None:
        """See :class:`Decoder`; without ``speculation``, tokens are read one at a time."""
        super().__init__(
            graph, embeddings, config, capacity, kv_type=kv_type, cache=cache, prompts=prompts
        )
        self._speculation = speculation
        # What single steps would have read since the last exact position; empty while all is exact.
        self._inexact: list[NDArray[np.float32]] = []

    def prefill(self, embeds: NDArray[np.float32]) -> NDArray[np.float32]:
        """See :meth:`Decoder.prefill`."""
        logits = super().prefill(embeds)
        self._write_down(embeds)
        return logits

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """See :meth:`Decoder.step`."""
        logits = super().step(token_ids)
        if self._inexact:
            self._inexact.append(self._rows(token_ids))
        return logits

    def _write_down(self, rows: NDArray[np.float32]) -> None:
        """Keep what single steps would have read, if something before it is not exact."""
        if self._inexact:
            self._inexact.append(rows)

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
        assert self._speculation is not None  # nothing is inexact without it
        found = mask.logit_margin(logits, token)
        if found > self._speculation.min_margin:
            return token
        start_s = time.perf_counter()
        exact = self._settle()
        self._speculation.learn_reread(time.perf_counter() - start_s)
        best = mask.best(exact)
        self._speculation.learn_difference(found, mask.logit_margin(exact, token))
        return best

    def _read_together(self, rows: NDArray[np.float32], first: int) -> NDArray[np.float32]:
        """Read ``rows (1, K, D)`` in one step; logits from position ``first`` on, ``(n, V)``."""
        n_new = rows.shape[1]
        logits = self._run(rows, np.arange(first, n_new, dtype=np.int64))
        if n_new > 1 or self._inexact:
            # Written down as single steps would have read them.
            self._inexact += [rows[:, i : i + 1] for i in range(n_new)]
        return logits

    def _settle(self) -> NDArray[np.float32]:
        """Read again, one step at a time, what was read together; the last logits ``(V,)``."""
        again, self._inexact = self._inexact, []
        self.cache.truncate(self.cache.length - sum(embeds.shape[1] for embeds in again))
        for embeds in again[:-1]:
            self._prefill(embeds, with_logits=False)
        logits: NDArray[np.float32] = self._prefill(again[-1])[0]
        return logits
