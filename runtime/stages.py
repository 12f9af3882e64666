"""Timing of the stages of a question, and generators whose result is kept."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

__all__ = ["Clock", "Returning", "without_waits"]

_T = TypeVar("_T")


class Clock:
    """Seconds spent in each named stage, however often it is entered."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time of a ``with`` block for stage ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self.seconds(name) + time.perf_counter() - start

    def timed(self, name: str, items: Iterable[_T]) -> Iterator[_T]:
        """The items; the time each takes to come, but not to be handled, counts for a stage."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self, name: str) -> float:
        """Seconds of one stage so far."""
        return self._seconds.get(name, 0.0)

    def total(self) -> float:
        """Seconds of all stages so far."""
        return sum(self._seconds.values())


class Returning(Generic[_T]):
    """Iterates over a generator of tokens and keeps the ``value`` that it returns at its end."""

    value: _T

    def __init__(self, tokens: Generator[int | None, None, _T]) -> None:
        self._tokens = tokens

    def __iter__(self) -> Iterator[int | None]:
        self.value = yield from self._tokens


def without_waits(items: Iterable[_T | None]) -> Iterator[_T]:
    """The items but None, for answers that wait for nobody."""
    for item in items:
        if item is not None:
            yield item
