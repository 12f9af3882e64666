"""Where records go: each outlet has a thread and a bounded buffer of its own.

A carrier takes one record at a time. After a failure that may pass (a broker that is down, a full
disk) it tries again, at first after a second, then at longer and longer pauses, and later records
wait; beyond the bound the oldest are dropped and counted. So a slow or broken outlet never holds up
listening, and every loss has a line and a count.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from ..cli.records import json_line
from ..errors import StorageError, UsageError
from ..text import counted, one_line, printable
from .settings import EventsSettings, WebhookSettings
from .telling import Record, line, text_line

__all__ = [
    "Carrier",
    "EventsFile",
    "Outlet",
    "RefusedError",
    "StandardOutput",
    "Webhook",
    "read_secret",
]

_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0


class RefusedError(Exception):
    """This record will not be taken, however often it is tried."""


class Carrier(Protocol):
    """Takes records somewhere."""

    def begin(self) -> None:
        """Reach out: what was prepared is wanted now."""
        ...

    def carry(self, record: Record, stopping: threading.Event) -> None:
        """Deliver a record; called again with the same one after a failure that may pass.

        Raises:
            OSError: it may work later.
            RefusedError: it never will.
        """
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class Outlet:
    """A carrier with a thread and a buffer.

    Attributes:
        n_dropped: records given up so far.
        is_broken: the reader of a pipe has left.
    """

    def __init__(
        self,
        name: str,
        carrier: Carrier,
        *,
        buffer: int,
        tell: Callable[[str], None],
        wants: Callable[[Record], bool] = lambda record: True,
        patient: bool = False,
    ) -> None:
        """Carry what is wanted; ``tell`` gets a line when delivery fails and when it works again.

        With ``patient``, :meth:`put` waits for room in place of dropping.
        """
        self.name = name
        self.carrier = carrier
        self.n_dropped = 0
        self.is_broken = False
        self._buffer = buffer
        self._tell = tell
        self._wants = wants
        self._patient = patient
        self._records: deque[Record] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._closing = False
        self._carrying = False
        self._thread = threading.Thread(target=self._run, name=f"outlet-{name}", daemon=True)

    def begin(self) -> None:
        """Start to carry."""
        self.carrier.begin()
        self._thread.start()

    def __len__(self) -> int:
        return len(self._records) + self._carrying

    def put(self, record: Record) -> None:
        """Add a record to what is to be carried."""
        if not self._wants(record):
            return
        with self._changed:
            while self._patient and len(self._records) >= self._buffer and not self._closing:
                self._changed.wait(1.0)
            if len(self._records) >= self._buffer:
                self._records.popleft()
                self.n_dropped += 1
            self._records.append(record)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> int:
        """Carry what is left, for so long at most; returns how many were not."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(1.0)
        n_left = len(self)
        self.n_dropped += n_left
        self.carrier.close()
        return n_left

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._records and not self._closing:
                    self._changed.wait()
                if not self._records:
                    return
                record = self._records.popleft()
                self._carrying = True
                self._changed.notify_all()
            if not self._deliver(record):
                return
            self._carrying = False

    def _deliver(self, record: Record) -> bool:
        """Carry one record, however long it takes; False if stopped before."""
        retry_s, failed = _FIRST_RETRY_S, False
        while not self._stopping.is_set():
            try:
                self.carrier.carry(record, self._stopping)
            except BrokenPipeError:
                self.is_broken = True
                return False
            except OSError as error:
                if not failed:
                    self._tell(f"{self.name}: {_reason(error)}; kept and tried again")
                failed = True
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, _LONGEST_RETRY_S)
                continue
            except Exception as error:
                self.n_dropped += 1
                self._tell(f"{self.name}: {one_line(error)}; the record was dropped")
            else:
                if failed:
                    waiting = counted(len(self._records), "record")
                    self._tell(f"{self.name}: works again, {waiting} waiting")
            return True
        return False


class StandardOutput:
    """Lines on standard output: JSON, or text for people."""

    def __init__(self, descriptor: int, *, as_json: bool) -> None:
        """Write to an open file descriptor."""
        self._descriptor = descriptor
        self._as_json = as_json
        self._lines = _Lines()

    def begin(self) -> None:
        """Nothing is to be reached before the first record."""

    def carry(self, record: Record, stopping: threading.Event) -> None:
        """Write one line; after a failure, what of it is not written yet."""
        self._lines.write(
            self._descriptor,
            lambda: _json(record) if self._as_json else line(text_line(record) or ""),
        )

    def close(self) -> None:
        """Standard output stays open."""


class EventsFile:
    """A file of JSON lines, renamed to ``FILE.1`` when it has grown to its bound."""

    def __init__(self, settings: EventsSettings) -> None:
        """Open or create it.

        Raises:
            StorageError: it cannot be written.
        """
        assert settings.file is not None
        self._path = Path(settings.file)
        self._most_bytes = round(settings.max_mb * 1e6)
        self._lines = _Lines()
        try:
            self._descriptor = self._open()
        except OSError as error:
            raise StorageError(
                f"{printable(self._path)}: cannot be written ({error.strerror}); check [events] "
                "file and its folder"
            ) from error

    def begin(self) -> None:
        """Nothing is to be reached before the first record."""

    def carry(self, record: Record, stopping: threading.Event) -> None:
        """Append one line; after a failure, what of it is not written yet."""
        self._turn_over()
        self._lines.write(self._descriptor, lambda: _json(record))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_size:
            # What a crash left half-written must not swallow the next line.
            with open(self._path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    os.write(descriptor, b"\n")
        return descriptor

    def _turn_over(self) -> None:
        """Open a new file where this one is full, or is not at its path any more (logrotate)."""
        if self._lines.is_torn:
            return
        here = os.fstat(self._descriptor)
        try:
            there = os.stat(self._path)
            moved = (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)
        except FileNotFoundError:
            moved = True
        if not moved and here.st_size >= self._most_bytes:
            os.replace(self._path, f"{self._path}.1")
            moved = True
        if moved:
            fresh = self._open()
            os.close(self._descriptor)
            self._descriptor = fresh


class Webhook:
    """A POST of each record as JSON."""

    def __init__(self, settings: WebhookSettings) -> None:
        """Post to the address that ``settings`` name.

        Raises:
            UsageError: the token cannot be read.
        """
        assert settings.url is not None
        self._url = settings.url
        self._timeout_s = settings.timeout_s
        self._headers = {"Content-Type": "application/json", "User-Agent": "tg-listen"}
        if settings.token_file is not None:
            token = read_secret(settings.token_file, "[webhook] token_file")
            self._headers["Authorization"] = f"Bearer {token}"

    def begin(self) -> None:
        """Nothing is to be reached before the first record."""

    def carry(self, record: Record, stopping: threading.Event) -> None:
        """Post it; drop what the other side refuses for good (4xx but 408 and 429)."""
        request = urllib.request.Request(
            self._url, json.dumps(record).encode(), self._headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            if 400 <= error.code < 500 and error.code not in (408, 429):
                raise RefusedError(f"was refused with {error.code} {error.reason}") from error
            raise OSError(None, f"answered {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise OSError(None, f"not reached ({error.reason})") from error
        except HTTPException as error:
            raise OSError(None, f"no HTTP ({one_line(error)})") from error

    def close(self) -> None:
        """Nothing stays open between records."""


def read_secret(path: str, key: str) -> str:
    """The first line of a file that holds a password or token.

    Raises:
        UsageError: it cannot be read, or is empty.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise UsageError(f"{key}: {printable(path)} cannot be read ({reason})") from error
    if not lines or not lines[0].strip():
        raise UsageError(f"{key}: {printable(path)} is empty")
    return lines[0].strip()


class _Lines:
    """Lines on a file descriptor; one that was written in part is gone on with."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def is_torn(self) -> bool:
        """Whether a line is written in part."""
        return bool(self._rest)

    def write(self, descriptor: int, make: Callable[[], bytes]) -> None:
        """Write what ``make`` gives, or the rest of the line that failed before."""
        self._rest = self._rest or make()
        while self._rest:
            self._rest = self._rest[os.write(descriptor, self._rest) :]


def _json(record: Record) -> bytes:
    return json_line(record).encode("utf-8", "backslashreplace")


def _reason(error: OSError) -> str:
    return error.strerror or one_line(error)
