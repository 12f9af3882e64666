"""Answers, events and failures as JSON-ready records, each with the name of its schema.

``schema/answer.schema.json`` in this package describes all of them: an answer at its root, a line
of ``--jsonl`` in ``$defs/event``, a line of a batch's output in ``$defs/batch``.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import TinyGiantError
from ..events import (
    SCHEMA,
    AudioRead,
    Event,
    Finished,
    PromptRead,
    StreamsReady,
)
from ..text import one_line

__all__ = ["error_record", "event_record", "json_line"]

_DIGITS = 6


def event_record(event: Event) -> dict[str, Any]:
    """One event: ``schema``, ``event`` and its data; the last one holds the answer."""
    if isinstance(event, Finished):
        return _record("answer", answer=event.answer.to_dict())
    if isinstance(event, AudioRead):
        return _record("audio_read", audio=vars(event.audio))
    if isinstance(event, StreamsReady):
        return _record("streams_ready", cached=event.cached, encode_s=event.encode_s)
    if isinstance(event, PromptRead):
        return _record(
            "prompt_read",
            n_tokens=event.n_tokens,
            intent_attention=_numbers(event.intent_attention),
            gate=_numbers(event.gate),
        )
    return _record("text", text=event.text, section=event.section, markup=event.markup)


def error_record(error: BaseException) -> dict[str, Any]:
    """A failure: the error's class, its exit code and its message on one line."""
    return {
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, TinyGiantError) else 1,
        "message": one_line(error),
    }


def json_line(record: dict[str, Any], *, encoding: str | None = "utf-8") -> str:
    """The record on one line, for a file or terminal of ``encoding``: ASCII unless that is UTF-8.

    Halves of surrogate pairs (from file names) are left to the error handler of the stream:
    ``backslashreplace`` spells them as JSON does.
    """
    is_utf8 = (encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(record, ensure_ascii=not is_utf8, allow_nan=False) + "\n"


def _record(event: str, **fields: Any) -> dict[str, Any]:
    return {"schema": SCHEMA, "event": event, **fields}


def _numbers(array: NDArray[np.float32] | None) -> list[Any] | None:
    if array is None:
        return None
    rounded: list[Any] = np.round(array.astype(np.float64), _DIGITS).tolist()
    return rounded
