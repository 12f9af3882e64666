"""A bounded queue before a single worker thread, which answers what waits, several at a time.

How many, and in which steps, is the matter of a :class:`~tinygiant.runtime.batch.Batch`; without
one it is one at a time.
A request takes a :class:`Place` before its body is read and keeps it until the worker is done with
it, so that places bound both the waiting and the memory. Leaving a place cancels its work: at once
while it waits, else before the next event (a token, or the end of a stage: an encoder that runs is
not interrupted). Places and results belong to the event loop's thread, models to the worker's.

When the server shuts down, the running work has ``grace_s`` seconds to finish; what waits is
refused with 503.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

from ..batch import Batch
from ..events import Event
from ..together import Together
from .errors import ApiError, api_error

__all__ = ["Engine", "Job", "Place", "Start"]

Start = Callable[[Batch | None], Iterator[Event | None]]
"""What begins the answer to a request, as :meth:`TinyGiant.events` does."""


class Engine:
    """Runs jobs in the order of their places."""

    def __init__(self, n_queued: int, *, grace_s: float = 10.0, batch: Batch | None = None) -> None:
        """At most ``n_queued`` requests wait while one runs, or as many as ``batch`` takes."""
        self._n_parallel = 1 if batch is None else batch.size
        self._batch = batch
        self._pending: deque[Job] = deque()
        self._lock = threading.Lock()  # of what is pending
        self.n_places = self._n_parallel + n_queued
        self.n_taken = 0
        self.is_running = False
        self.deadline: float | None = None  # of shutdown, on the monotonic clock
        self._grace_s = grace_s
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._mean_s = 1.0

    @contextmanager
    def place(self) -> Iterator[Place]:
        """A place, for as long as the client stays.

        Raises:
            ApiError: 429, all places are taken; 503, the server is shutting down.
        """
        if self.deadline is not None:
            raise shutting_down()
        if self.n_taken >= self.n_places:
            wait_s = max(1, math.ceil(self._mean_s * self.n_taken / self._n_parallel))
            raise ApiError(
                429,
                f"{self.n_taken} requests are running or waiting, the most this server takes; try "
                f"again in about {wait_s} s",
                code="queue_full",
                headers={"Retry-After": str(wait_s)},
            )
        self.n_taken += 1
        place = Place(self)
        try:
            yield place
        finally:
            if not place.has_job:
                self._release()

    def begin_shutdown(self) -> None:
        """Take no more; only sets a number, so that a signal's handler may call it."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self._grace_s

    def stop(self, timeout_s: float) -> bool:
        """Wait for the worker to end; whether it did."""
        self.begin_shutdown()
        self._executor.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + timeout_s
        while self.is_running and time.monotonic() < end:
            time.sleep(0.01)
        return not self.is_running

    def must_stop(self) -> bool:
        """Whether the running work has spent its grace."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def took(self, seconds: float) -> None:
        """Learn how long a job takes, for ``Retry-After``."""
        self._mean_s += 0.2 * (seconds - self._mean_s)

    def _release(self) -> None:
        self.n_taken -= 1

    def _add(self, job: Job) -> None:
        """Let the worker take ``job`` in its turn."""
        with self._lock:
            self._pending.append(job)
        self._executor.submit(self._work)

    def _withdraw(self, job: Job) -> bool:
        """Take ``job`` out of the queue; False if the worker has it, or had it."""
        with self._lock:
            waits = job in self._pending
            if waits:
                self._pending.remove(job)
            return waits

    def _next(self) -> Job | None:
        with self._lock:
            return self._pending.popleft() if self._pending else None

    def _work(self) -> None:
        """In the worker's thread: answer what waits, and what comes meanwhile."""
        self.is_running = True
        try:
            with Together[Job](self._batch) as together:
                while True:
                    while together.has_room and (job := self._next()) is not None:
                        together.add(job, partial(job.begin, self._batch))
                    if together.is_idle:
                        return
                    for job, event in together.turn():
                        if not job.take(event):
                            together.drop(job)
        finally:
            self.is_running = False


class Place:
    """A place in the queue; see :meth:`Engine.place`."""

    def __init__(self, engine: Engine) -> None:
        self.has_job = False
        self._engine = engine

    @asynccontextmanager
    async def run(self, start: Start) -> AsyncIterator[Job]:
        """Let the worker iterate over ``start()``; leaving the block cancels what is left."""
        engine = self._engine
        job = Job(engine, start, engine._release)
        self.has_job = True
        engine._add(job)
        try:
            yield job
        finally:
            job.cancelled = True
            if engine._withdraw(job):
                engine._release()
                job.forget()


class Job:
    """Work in the queue: an asynchronous iterator over its events.

    Events are buffered, so that a client that reads slowly does not hold up the next request; their
    number is bounded by the tokens a request may ask for.
    """

    def __init__(self, engine: Engine, start: Start, release: Callable[[], None]) -> None:
        self.cancelled = False
        self.waited_s = 0.0
        self._engine = engine
        self._start: Start | None = start
        self._release = release
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Event | ApiError | None] = asyncio.Queue()
        self._created = self._begun = time.monotonic()

    def begin(self, batch: Batch | None) -> Iterator[Event | None]:
        """In the worker's thread: the events; raises what keeps it from being answered."""
        self._begun = time.monotonic()
        self.waited_s = self._begun - self._created
        start = self._start
        self.forget()
        if self._engine.deadline is not None:
            raise shutting_down()
        return iter(()) if start is None else start(batch)

    def take(self, event: Event | Exception | None) -> bool:
        """In the worker's thread: hand over what came, or say how it ended; whether it goes on."""
        if event is None or self.cancelled:
            end = None
        elif isinstance(event, Exception):
            # Only the message travels on: a traceback would keep the clip's arrays alive.
            end = api_error(event)
        elif self._engine.must_stop():
            end = shutting_down()
        else:
            self._call(self._items.put_nowait, event)
            return True
        self._call(self._finish, end, time.monotonic() - self._begun)
        return False

    def forget(self) -> None:
        """Drop what the work holds: the clip of a request that is not wanted any more."""
        self._start = None

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (item := await self._items.get()) is not None:
            if isinstance(item, ApiError):
                raise item
            yield item

    def _finish(self, end: ApiError | None, seconds: float) -> None:
        """In the loop's thread: the place is free before the client learns that it is."""
        self._release()
        if not self.cancelled:
            self._engine.took(seconds)
        self._items.put_nowait(end)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is gone, and with it everybody who could listen
            self._loop.call_soon_threadsafe(function, *arguments)


def shutting_down() -> ApiError:
    """The error of work that is refused or given up at the end."""
    return ApiError(503, "the server is shutting down; try again later", code="shutting_down")
