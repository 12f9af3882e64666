"""The queue between ears and the model: bounded, with a stated policy, and nothing lost silently.

A sound that finds no room goes unanswered, and the maker of the queue learns which one that was.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from .ear import Sound
from .settings import QueueSettings

__all__ = ["Waiting", "WaitingQueue"]


@dataclass(frozen=True)
class Waiting:
    """A sound and since when it waits, on the monotonic clock."""

    sound: Sound
    since: float


class WaitingQueue:
    """Sounds in the order in which they ended."""

    def __init__(self, settings: QueueSettings, unanswered: Callable[[Sound, str], None]) -> None:
        """``unanswered`` is called with each sound that found no room, and why."""
        self.settings = settings
        self._unanswered = unanswered
        self._items: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    def put(self, sound: Sound, *, can_wait: bool, sign: Callable[[], None]) -> None:
        """Add a sound; ``sign`` is called now and then while there is no room and it may wait."""
        given_up: Sound | None = None
        with self._changed:
            patient = can_wait or self.settings.when_full == "wait"
            while patient and len(self._items) >= self.settings.size and not self._closed:
                sign()
                self._changed.wait(1.0)
            if self._closed:
                given_up, reason = sound, "stopped"
            elif len(self._items) < self.settings.size:
                self._items.append(Waiting(sound, time.monotonic()))
            else:
                reason = "queue_full"
                given_up = sound
                if self.settings.when_full == "oldest":
                    given_up = self._items.popleft().sound
                    self._items.append(Waiting(sound, time.monotonic()))
            self._changed.notify_all()
        if given_up is not None:
            self._unanswered(given_up, reason)

    def get(self, timeout_s: float) -> Waiting | None:
        """The sound that waits longest; None if none came in time."""
        with self._changed:
            if not self._items:
                self._changed.wait(timeout_s)
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """Take no more; what still waits goes unanswered."""
        with self._changed:
            self._closed = True
            left = [item.sound for item in self._items]
            self._items.clear()
            self._changed.notify_all()
        for sound in left:
            self._unanswered(sound, "stopped")
