"""The last sounds of ``tg-listen``, from the file of lines that it appends to.

The file is read from its end, a bounded number of bytes; any line that is not a whole sound (a torn
one, a report, another program's) is skipped. Of a sound only the data of the page is returned: the
answers' texts, not the objects behind them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["last_sounds"]

N_SOUNDS = 20
_TAIL_BYTES = 512 << 10
_FIELDS = ("id", "time", "source", "duration_s", "unanswered")
_ANSWER_FIELDS = ("name", "question", "status", "reason", "text", "probability")


def last_sounds(path: Path) -> list[dict[str, Any]]:
    """The last sounds in the file ``path`` and the one before its rotation, the newest first."""
    found: list[dict[str, Any]] = []
    for file in (path, path.with_name(f"{path.name}.1")):
        for line in reversed(_tail(file).splitlines()):
            if len(found) < N_SOUNDS and (sound := _sound(line)) is not None:
                found.append(sound)
    return found


def _tail(path: Path) -> bytes:
    """The whole lines in the last bytes of a file; empty if there is none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
    except OSError:
        return b""
    return tail if size <= _TAIL_BYTES else tail.partition(b"\n")[2]


def _sound(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or event.get("event") != "sound":
        return None
    answers = event.get("answers")
    told = [
        {name: answer.get(name) for name in _ANSWER_FIELDS}
        for answer in (answers if isinstance(answers, list) else [])
        if isinstance(answer, dict)
    ]
    return {name: event.get(name) for name in _FIELDS} | {"answers": told}
