"""What happens, as JSON-ready records; ``schema/listen.schema.json`` describes them.

Three kinds: a ``sound`` with its answers, or with the reason why it has none; a ``status`` (a
source lost, settings read again); a ``report`` of all counts. Times are local, with their offset.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ..text import printable
from .ear import Sound
from .questions import Reply

__all__ = ["SCHEMA", "Counts", "Record", "line", "report", "sound_record", "status", "text_line"]

SCHEMA = "tinygiant.listen/1"
"""Name and version of the records. Fields may be added within a version."""

Record = dict[str, Any]


class Counts:
    """Numbers by name and label, from any thread, for ``report`` and ``/metrics``."""

    def __init__(self) -> None:
        """Everything is 0."""
        self._lock = threading.Lock()
        self._numbers: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, label: str = "", number: float = 1) -> None:
        """Add to a number."""
        with self._lock:
            self._numbers[name, label] += number  # type: ignore[assignment]

    def all(self) -> dict[tuple[str, str], float]:
        """All numbers so far."""
        with self._lock:
            return dict(self._numbers)


def sound_record(
    sound: Sound,
    replies: Sequence[Reply] = (),
    *,
    waited_s: float = 0.0,
    unanswered: str | None = None,
) -> Record:
    """A sound and its answers, or why there are none."""
    return _record(
        "sound",
        sound.time,
        id=uuid.uuid4().hex,
        source=sound.source,
        number=sound.number,
        start_s=round(sound.start_s, 3),
        end_s=round(sound.start_s + sound.duration_s, 3),
        duration_s=round(sound.duration_s, 3),
        peak_db=round(sound.peak_db, 1),
        floor_db=round(sound.floor_db, 1),
        cut=sound.cut,
        continues=sound.continues,
        clip=None,
        waited_s=round(waited_s, 3),
        unanswered=unanswered,
        answers=[_answer(reply) for reply in replies],
    )


def status(what: str, source: str | None, message: str) -> Record:
    """Something that happened to the program itself."""
    return _record("status", time.time(), what=what, source=source, message=message)


def report(counts: dict[tuple[str, str], float]) -> Record:
    """All counts, each under its name, by label where it has one."""
    found: dict[str, Any] = {}
    for (name, label), number in sorted(counts.items()):
        if label:
            found.setdefault(name, {})[label] = round(number, 3)
        else:
            found[name] = round(number, 3)
    return _record("report", time.time(), counts=found)


def text_line(record: Record) -> str | None:
    """A record for people; None if they are informed in another way."""
    if record["event"] != "sound":
        return None
    told = [_told(answer) for answer in record["answers"]]
    if record["unanswered"]:
        told = [f"unanswered ({record['unanswered']})"]
    when = datetime.fromisoformat(record["time"]).strftime("%Y-%m-%d %H:%M:%S")
    length = f"{record['duration_s']:.1f} s{' and on' if record['cut'] else ''}"
    return f"{when} {record['source']}, {length}: {'; '.join(told) or 'no question'}"


def line(text: str) -> bytes:
    """A line for a file or standard output."""
    return (text + "\n").encode("utf-8", "backslashreplace")


def _answer(reply: Reply) -> Record:
    return {
        "name": reply.question.name,
        "question": reply.question.ask,
        "status": reply.status,
        "reason": reply.reason,
        "text": None if reply.answer is None else reply.answer.text,
        "probability": None if reply.probability is None else round(reply.probability, 4),
        "notify": reply.notify,
        "answer": None if reply.answer is None else reply.answer.to_dict(),
        "error": reply.error,
    }


def _told(answer: Record) -> str:
    if answer["status"] == "failed":
        return f"{answer['name']}: failed ({answer['error']['message']})"
    if answer["status"] == "not_asked":
        return f"{answer['name']}: not asked ({answer['reason']})"
    share = "" if answer["probability"] is None else f" ({100 * answer['probability']:.0f} %)"
    unsure = ", not sure" if answer["status"] == "unsure" else ""
    text = printable(" ".join(answer["text"].split()))
    return f"{answer['name']}: {text}{share}{unsure}"


def _record(event: str, when: float, **fields: Any) -> Record:
    local = datetime.fromtimestamp(when, UTC).astimezone()
    return {
        "schema": SCHEMA,
        "event": event,
        "time": local.isoformat(timespec="milliseconds"),
        **fields,
    }
