"""Several sequences in one step of the decoder graph.

A step of one token reads all weights for one row; a step of four reads them once for four. Each
sequence is a :class:`BatchedDecoder`: it reads its prompt by itself, in a slot of the common keys
and values, and where it needs the logits after a single token it waits: a None among its tokens.
:meth:`Batch.step` then reads the tokens of all that wait. Sequences come and go between steps.

The tokens are those of a sequence by itself, and a machine checks it: the first steps of each
number of sequences are computed one by one too, and if a bit differs, sequences are from then on
stepped one by one. Whether it does depends on the kernels that onnxruntime has for a processor and
a recipe: with AVX-512 and VNNI, float32 weights and those in blocks of 32 do not differ; in blocks
of 128 they do, because a single row is summed in another order, and so do products that quantize
all rows with one scale.

Memory: ``n * capacity * kv_token_bytes`` for ``n`` sequences, of which the system hands out what is
used; ``capacity`` is that of the longest sequence, in steps of 256.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from .config import DecoderConfig, KvType
from .decoder import FIRST, BindableGraph, Binding, EmbeddingRows, bind_kv, run_graph
from .kv_cache import KvCache, KvSlots, KvSnapshot
from .rereading import RereadingDecoder
from .speculation import Speculation

__all__ = ["Batch", "BatchedDecoder", "Trials"]

_TRIALS = 2  # steps of each number of sequences that are computed one by one too
_CAPACITY_STEP = 256
# So many tokens that are known beforehand take a sequence less time at once, by itself, than as
# many rows of common steps.
_TOGETHER = 4


class Trials:
    """Whether steps of several sequences give the bits of single steps, as far as was tried.

    It is true of a graph on a machine, so it lives as long as the model.
    """

    def __init__(self) -> None:
        self.differs = False
        self._n_same: dict[int, int] = {}

    def is_known(self, n: int) -> bool:
        """Whether steps of ``n`` were tried often enough."""
        return self._n_same.get(n, 0) >= _TRIALS

    def learn(self, n: int, *, same: bool) -> None:
        """Take in one trial of a step of ``n``."""
        self.differs = self.differs or not same
        self._n_same[n] = self._n_same.get(n, 0) + 1


class Batch:
    """At most ``size`` sequences that are stepped together."""

    def __init__(
        self,
        graph: BindableGraph,
        embeddings: EmbeddingRows,
        config: DecoderConfig,
        size: int,
        *,
        kv_type: KvType = "fp32",
        prompts: BindableGraph | None = None,
        trials: Trials | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        """Begin without any sequence; the arguments are those of :class:`Decoder`.

        ``graph`` takes several sequences, and ``trials`` are those made with it so far. With
        ``speculation``, a sequence reads tokens that are known beforehand at once, by itself.
        """
        self.size = size
        self.trials = trials or Trials()
        self._graph, self._prompts = graph, prompts
        self._embeddings = embeddings
        self._config = config
        self._kv_type: KvType = kv_type
        self._speculation = speculation
        self._members: list[BatchedDecoder] = []  # in the order of their slots
        self._slots: KvSlots | None = None
        self._bindings: dict[int, Binding] = {}  # of the first n slots

    @property
    def width(self) -> int:
        """How many sequences to have at a time: one where steps of several would differ."""
        return 1 if self.trials.differs else self.size

    def join(self, capacity: int) -> BatchedDecoder:
        """An empty sequence of at most ``capacity`` tokens; there is room for it.

        Raises:
            UsageError: more positions than the decoder has.
        """
        slot = self._room(capacity).slot(len(self._members))
        cache = KvCache(self._config, capacity, self._kv_type, slot)
        decoder = BatchedDecoder(
            self._graph,
            self._embeddings,
            self._config,
            capacity,
            self._speculation,
            cache=cache,
            prompts=self._prompts,
        )
        self._members.append(decoder)
        return decoder

    def leave(self, decoder: BatchedDecoder) -> None:
        """Take out a sequence; the last one gets its slot."""
        slots, index, last = self._slots, self._members.index(decoder), self._members.pop()
        assert slots is not None
        if last is not decoder:
            self._members[index] = last
            last.move(slots.slot(index))
        if not self._members:
            self._slots = None
            self._bindings.clear()

    def step(self) -> None:
        """Read the next token of every sequence that waits."""
        waiting = [member for member in self._members if member.unread is not None]
        n = len(waiting)
        if n < 2 or n < len(self._members) or self.trials.differs:
            for member in waiting:
                member.step_alone()
            return
        logits = self._step(waiting)
        if not self.trials.is_known(n):
            written = [member.cache.row(member.cache.length) for member in waiting]
            alone = [member.step_alone() for member in waiting]
            again = [member.cache.row(member.cache.length - 1) for member in waiting]
            same = np.array_equal(logits, alone) and np.array_equal(written, again)
            self.trials.learn(n, same=same)
            return
        for member, row in zip(waiting, logits, strict=True):
            member.take(row)

    def _step(self, members: Sequence[BatchedDecoder]) -> NDArray[np.float32]:
        """The logits ``(n, V)`` after the next token of each of ``members``, which are all."""
        n, slots = len(members), self._slots
        assert slots is not None
        if n not in self._bindings:
            layers = enumerate(slots.first(n))
            self._bindings[n] = bind_kv(self._graph, ((i, *both) for i, both in layers))
        embeds = np.concatenate([member.unread for member in members if member.unread is not None])
        lengths = [member.cache.length + 1 for member in members]
        logits = run_graph(self._bindings[n], embeds, lengths, FIRST, self._config)
        rows: NDArray[np.float32] = logits[:, 0]
        return rows

    def _room(self, capacity: int) -> KvSlots:
        """Slots of at least ``capacity``, which all members have moved to."""
        if self._slots is None or self._slots.capacity < capacity:
            capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
            self._slots = KvSlots(self._config, self.size, capacity, self._kv_type)
            self._bindings.clear()
            for index, member in enumerate(self._members):
                member.move(self._slots.slot(index))
        return self._slots


class BatchedDecoder(RereadingDecoder):
    """One sequence of a batch; see the module.

    Attributes:
        unread: what the next step reads, ``(1, 1, D)``; None while the sequence does not wait.
    """

    unread: NDArray[np.float32] | None = None
    _logits = np.zeros(0, np.float32)

    def step_alone(self) -> NDArray[np.float32]:
        """Read what is unread without the others; returns the logits after it, ``(V,)``."""
        assert self.unread is not None
        self._took(self._run(self.unread, FIRST)[0])
        return self._logits

    def take(self, logits: NDArray[np.float32]) -> None:
        """What is unread was read by a step of all, with these ``logits (V,)`` after it."""
        self.cache.advance(1)
        self._took(logits)

    def _took(self, logits: NDArray[np.float32]) -> None:
        assert self.unread is not None
        self._write_down(self.unread)
        self._logits, self.unread = logits, None

    def move(self, buffers: KvSnapshot) -> None:
        """Go on in another slot."""
        self.cache.move(buffers)
        self._bind()

    def _advance(self, token_ids: Sequence[int]) -> Generator[None, None, NDArray[np.float32]]:
        """See :meth:`Decoder._advance`; yields None for each token, which a step then reads."""
        self.cache.require(len(token_ids))
        if self._speculation is not None and len(token_ids) >= _TOGETHER:
            last: NDArray[np.float32]
            [last] = self._read_together(self._rows(token_ids), len(token_ids) - 1)
            return last
        for token in token_ids:
            self.unread = self._rows([token])
            yield None
        return self._logits
