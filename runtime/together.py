"""Answers that are made together: each goes as far as it can, then the decoder steps for all.

An answer is an iterator over events in which a None says that it waits: once when its clip was
heard and its question is ready for the decoder, then for each token that a step of the batch is to
read. :class:`Together` knows no more of it. What comes before the first wait can be done by
workers, threads of their own, while others are being written. One thread calls it; nothing is
hidden behind a lock, so what is written depends on nothing but the questions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from .batch import Batch
from .events import Event

__all__ = ["Start", "Together"]

_K = TypeVar("_K")

Start = Callable[[], Iterator[Event | None]]
"""What begins an answer."""


class Together(Generic[_K]):
    """Answers by keys: some are written, some are heard ahead. A ``with`` block ends all."""

    def __init__(self, batch: Batch | None, n_workers: int = 0) -> None:
        """Write in steps of ``batch``, one at a time if None; ``n_workers`` threads hear ahead."""
        self._batch = batch
        self._n_ahead = n_workers
        self._workers = ThreadPoolExecutor(n_workers, "hear") if n_workers else None
        self._heard: deque[_Running[_K]] = deque()
        self._written: list[_Running[_K]] = []

    @property
    def has_room(self) -> bool:
        """Whether one more answer would be begun."""
        return len(self._heard) + len(self._written) < self._width + self._n_ahead

    @property
    def is_idle(self) -> bool:
        """Whether there is no answer."""
        return not self._heard and not self._written

    def __enter__(self) -> Together[_K]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, key: _K, start: Start) -> None:
        """Begin an answer."""
        self._heard.append(_Running(key, start, self._workers))

    def turn(self) -> Iterator[tuple[_K, Event | Exception | None]]:
        """One step: what comes of each answer until it waits again.

        An answer ends by an error or by a None, after its last event. If the step fails, all do.
        """
        while self._heard and len(self._written) < self._width:
            if self._written and not self._heard[0].is_heard:
                break
            self._written.append(self._heard.popleft())
        for running in self._written:
            for event in running.advance():
                yield running.key, event
                if running.is_closed:
                    break
        self._written = [running for running in self._written if not running.has_ended]
        if self._batch is None:
            return
        try:
            self._batch.step()
        except Exception as error:
            failed, self._written = self._written, []
            for running in failed:
                running.close()
                yield running.key, error

    def drop(self, key: _K) -> None:
        """End the answer of that key, if there is one; also within a turn."""
        for running in (*self._written, *self._heard):
            if running.key == key:
                running.close()
        self._heard = deque(running for running in self._heard if not running.is_closed)

    def close(self) -> None:
        """End all answers."""
        for running in (*self._heard, *self._written):
            running.close()
        self._heard.clear()
        self._written.clear()
        if self._workers is not None:
            self._workers.shutdown()

    @property
    def _width(self) -> int:
        return 1 if self._batch is None else self._batch.width


class _Running(Generic[_K]):
    """One answer in the making.

    Attributes:
        key: the caller's.
        has_ended: nothing will come any more.
        is_closed: it was ended before its time.
    """

    def __init__(self, key: _K, start: Start, workers: ThreadPoolExecutor | None) -> None:
        self.key = key
        self.has_ended = self.is_closed = False
        self._events = _begun(start)
        self._hearing = None if workers is None else workers.submit(lambda: [*self._until_wait()])

    @property
    def is_heard(self) -> bool:
        """Whether it would go on at once."""
        return self._hearing is None or self._hearing.done()

    def advance(self) -> Iterator[Event | Exception | None]:
        """What comes until it waits; at the end an error or None."""
        if self.is_closed:
            return
        if self._hearing is not None:
            hearing, self._hearing = self._hearing, None
            yield from hearing.result()
        if not self.has_ended:
            yield from self._until_wait()

    def close(self) -> None:
        """End it. What a worker is at, it finishes, and nobody sees it."""
        self.has_ended = self.is_closed = True
        if self._hearing is None or self._hearing.cancel() or self._hearing.done():
            self._events.close()

    def _until_wait(self) -> Iterator[Event | Exception | None]:
        end: Exception | None = None
        try:
            for event in self._events:
                if event is None:
                    return
                yield event
        except Exception as error:
            end = error
        self.has_ended = True
        yield end


def _begun(start: Start) -> Generator[Event | None, None, None]:
    """The events, of which the first one begins the work."""
    yield from start()
