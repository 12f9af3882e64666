"""Several answers at a time: how many fit, and their order; the steps are those of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from .asking import Query
from .batch import Batch, Trials
from .bundle import Bundle
from .decoder import EmbeddingRows
from .errors import BundleError, UsageError
from .events import Answer, Event, Finished
from .ort.memory import how_many
from .ort.pool import GraphPool
from .speculation import Speculation
from .together import Together

__all__ = ["PARALLEL", "answers", "make_batch"]

PARALLEL = 4
"""Answers that are written at a time: beyond, a step takes nearly as long as two."""


def make_batch(
    size: int | None,
    bundle: Bundle,
    pool: GraphPool,
    embeddings: EmbeddingRows,
    trials: Trials,
    speculation: Speculation | None,
) -> Batch | None:
    """See :meth:`TinyGiant.batch`; ``trials`` and ``speculation`` are what the model has learnt.

    Raises:
        UsageError: a ``size`` below 1.
    """
    config, kv_type = bundle.config.decoder, bundle.manifest.kv_cache
    if size is None:
        size = how_many(PARALLEL, config.kv_token_bytes(kv_type))
    if size < 1:
        raise UsageError(f"{size} answers at a time, expected at least 1")
    if size < 2 or not pool.keep or not pool.is_on_cpu(config.graph):
        return None
    with pool.use(config.graph) as graph, pool.prompts() as prompts:
        if not graph.is_batched:
            return None
        return Batch(
            graph,
            embeddings,
            config,
            size,
            kv_type=kv_type,
            prompts=prompts,
            trials=trials,
            speculation=speculation,
        )


def answers(
    queries: Iterable[Query],
    events: Callable[[Query, Batch | None], Iterator[Event | None]],
    batch: Batch | None,
    workers: int,
) -> Iterator[Answer | Exception]:
    """The answers in the order of ``queries``; ``events`` begins one.

    Raises:
        BundleError: the bundle's graphs fail.
    """
    coming = enumerate(queries)
    ended: dict[int, Answer | Exception] = {}
    n_given = 0
    with Together[int](batch, workers) as together:
        while True:
            while together.has_room and (following := next(coming, None)) is not None:
                index, query = following
                together.add(index, partial(events, query, batch))
            if together.is_idle:
                return
            for index, event in together.turn():
                if isinstance(event, BundleError):
                    raise event
                if isinstance(event, Finished):
                    ended[index] = event.answer
                elif isinstance(event, Exception):
                    ended[index] = event
            while n_given in ended:
                yield ended.pop(n_given)
                n_given += 1
