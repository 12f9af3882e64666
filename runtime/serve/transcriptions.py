"""``POST /v1/audio/transcriptions``: programs that know how to transcribe get an answer.

The model writes no transcripts; the text is its answer to a question that the server was started
with ("What is said?"), or that the form's field ``question`` asks. ``/v1/models`` reports the
former. The form is held in memory: no clip is written to disk.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from ..events import Answer, Event, Finished, TextPiece
from .chat import ALIAS
from .errors import ApiError
from .http import json_response
from .ignored import Ignored
from .replies import TextDeltas

__all__ = ["FORMATS", "TranscriptionRequest", "TranscriptionWriter", "parse_transcription"]

FORMATS = ("json", "text", "verbose_json")
_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 64 << 10
_WHY = {
    "prompt": "the question is the server's, or that of the field question",
    "temperature": "the answer is always the likeliest text",
    "timestamp_granularities[]": "the model gives no times",
    "include[]": "token probabilities are not available",
}


@dataclass(frozen=True)
class TranscriptionRequest:
    """A checked request.

    Attributes:
        audio: the encoded clip.
        question: the question about it.
        response_format: one of :data:`FORMATS`.
        language: the language that the client expects, as it gave it; only returned.
        stream: answer in server-sent events.
        ignored: the ignored fields, a line each: ``field: why``.
    """

    audio: bytes
    question: str
    response_format: str
    language: str
    stream: bool
    ignored: tuple[str, ...]


class _InMemory(MultiPartParser):
    """Starlette's parser of forms, which never moves a file to the disk."""

    spool_max_size = 1 << 62


async def parse_transcription(
    headers: Mapping[str, str],
    body: bytes | bytearray,
    model: str,
    question: str,
    *,
    strict: bool = False,
) -> TranscriptionRequest:
    """Check a request.

    Args:
        headers: the request's, for the form's boundary.
        body: the form.
        model: the name of the model that is loaded.
        question: the question if the form has none.
        strict: refuse anything that would be ignored.

    Raises:
        ApiError: 400 with the field's name.
    """
    fields, audio = await _read_form(headers, body)
    ignored = Ignored(strict=strict)
    response_format = fields.pop("response_format", "json")
    if response_format not in FORMATS:
        message = f"response_format is {response_format[:40]!r}, expected {', '.join(FORMATS)}"
        raise ApiError(400, message, code="unsupported_value", param="response_format")
    stream = fields.pop("stream", "false").lower()
    if stream not in ("true", "false"):
        raise ApiError(400, "stream must be true or false", code="invalid_value", param="stream")
    asked = fields.pop("question", question)
    language = fields.pop("language", "und")[:40]
    named = fields.pop("model", model)
    if named not in (model, ALIAS):
        ignored.add("model", f"{model} is the only one here")
    for name, value in fields.items():
        if not (name == "temperature" and value in ("", "0", "0.0")):
            ignored.add(name, _WHY.get(name, "unknown here"))
    return TranscriptionRequest(
        audio, asked, response_format, language, stream == "true", ignored.lines()
    )


async def _read_form(
    headers: Mapping[str, str], body: bytes | bytearray
) -> tuple[dict[str, str], bytes]:
    """The form's texts, and its file."""

    async def blocks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1 << 20):
            yield bytes(body[start : start + (1 << 20)])

    parser = _InMemory(
        Headers(headers),
        blocks(),  # type: ignore[arg-type]
        max_files=1,
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, UnicodeError) as error:
        reason = getattr(error, "message", None) or error
        message = f"the body is not multipart/form-data ({str(reason)[:120]})"
        raise ApiError(400, message, code="invalid_form") from error
    try:
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(
                400,
                "expected a file in the field file, as curl's -F file=@clip.wav sends it",
                code="invalid_value",
                param="file",
            )
        return fields, await file.read()
    finally:
        await form.close()


class TranscriptionWriter:
    """Writes the answer in the shapes of a transcription."""

    def __init__(self, request: TranscriptionRequest) -> None:
        """Write as ``request`` wants."""
        self._response_format = request.response_format
        self._language = request.language

    async def whole(self, events: AsyncIterable[Event]) -> Response:
        """The transcription, once the answer is complete."""
        async for event in events:
            if isinstance(event, Finished):
                return self._response(event.answer)
        raise RuntimeError("the model's events ended without an answer")

    async def chunks(self, events: AsyncIterable[Event]) -> AsyncIterator[dict[str, Any]]:
        """The events of a streamed transcription; the thought is not among them."""
        deltas = TextDeltas(answer=True)
        async for event in events:
            if isinstance(event, TextPiece):
                for delta in deltas.take(event):
                    if delta.field == "content":
                        yield {"type": "transcript.text.delta", "delta": delta.text}
            elif isinstance(event, Finished):
                text = {"text": event.answer.text, "usage": _usage(event.answer)}
                yield {"type": "transcript.text.done", **text}

    def _response(self, answer: Answer) -> Response:
        if self._response_format == "text":
            return Response(f"{answer.text}\n", media_type="text/plain")
        reply: dict[str, Any] = {"text": answer.text, "usage": _usage(answer)}
        if self._response_format == "verbose_json":
            reply |= {
                "task": "transcribe",
                "language": self._language,
                "duration": answer.audio.used_s,
                "segments": [_segment(answer)],
            }
        return json_response(reply)


def _segment(answer: Answer) -> dict[str, Any]:
    """The whole clip as the one segment; measures that the model lacks are neutral."""
    return {
        "id": 0,
        "seek": 0,
        "start": 0.0,
        "end": answer.audio.used_s,
        "text": answer.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": 0.0,
        "compression_ratio": 1.0,
        "no_speech_prob": 0.0,
    }


def _usage(answer: Answer) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(answer.audio.used_s)}
