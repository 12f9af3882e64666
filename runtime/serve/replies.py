"""Answers in OpenAI's shapes: one object, or the chunks of a stream.

The thought becomes ``reasoning_content``, each part under a heading; the answer becomes
``content``. Streamed texts joined are the texts of the single object. Data without a field in
OpenAI's API is in the extra object ``tinygiant``, which its clients pass on.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from starlette.responses import Response

from ..answer import Section
from ..config import ModelConfig
from ..events import (
    Answer,
    AudioRead,
    Event,
    Finished,
    FinishReason,
    PromptRead,
    StreamsReady,
    TextPiece,
)
from .http import json_response

__all__ = ["Delta", "ReplyForm", "ReplyWriter", "TextDeltas"]

HEADINGS: dict[Section, str] = {
    "plan": "Plan",
    "audio_analysis": "Audio Analysis",
    "logic": "Logic",
    "summary": "Summary",
    "other": "Thought",
}


@dataclass(frozen=True)
class Delta:
    """Text for one field of the message, and the part of the answer it belongs to."""

    field: Literal["content", "reasoning_content"]
    text: str
    section: Section


class TextDeltas:
    """Sorts text pieces into fields: headings before parts, no white space around them."""

    def __init__(self, *, answer: bool) -> None:
        """Without ``answer`` pieces of the answer are left out (with choices it is known whole)."""
        self._answer = answer
        self._section: Section | None = None
        self._space = ""  # white space that is passed on once text follows
        self._has_reasoning = False

    def take(self, piece: TextPiece) -> list[Delta]:
        """The deltas of one piece."""
        if piece.markup or (piece.section == "answer" and not self._answer):
            return []
        text, deltas = piece.text, []
        field: Literal["content", "reasoning_content"] = (
            "content" if piece.section == "answer" else "reasoning_content"
        )
        if piece.section != self._section:
            text = text.lstrip()
            if not text:
                return []
            self._section, self._space = piece.section, ""
            if field == "reasoning_content":
                gap = "\n\n" if self._has_reasoning else ""
                deltas.append(Delta(field, f"{gap}{HEADINGS[piece.section]}:\n", piece.section))
                self._has_reasoning = True
        body = text.rstrip()
        if body:
            deltas.append(Delta(field, self._space + body, piece.section))
            self._space = ""
        self._space += text[len(body) :]
        return deltas


@dataclass(frozen=True)
class ReplyForm:
    """How an answer is to be written.

    Attributes:
        chosen: there are choices, one of which is the answer.
        include_usage: end a stream with token counts.
        events: report the progress, with intent attention and gate.
        stop: texts before whose first occurrence the answer ends.
        n: how many times the answer is wanted.
        json_fields: if the answer is wanted as a JSON object, its fields: name in the object ->
            name in the answer.
        ignored: the ignored fields of the request, a line each: ``field: why``.
    """

    chosen: bool = False
    include_usage: bool = False
    events: bool = False
    stop: tuple[str, ...] = ()
    n: int = 1
    json_fields: dict[str, str] | None = None
    ignored: tuple[str, ...] = ()

    @property
    def is_written_at_once(self) -> bool:
        """Whether the content is known only when the answer is complete."""
        return self.chosen or bool(self.stop) or self.json_fields is not None

    def content(self, answer: Answer) -> tuple[str, FinishReason]:
        """The message's content, and why it ended."""
        at = min((i for stop in self.stop if (i := answer.text.find(stop)) >= 0), default=None)
        text = answer.text[:at]
        if self.json_fields is not None:
            fields = answer.to_dict() | {"answer": text}
            chosen = {name: fields[field] for name, field in self.json_fields.items()}
            text = json.dumps(chosen, ensure_ascii=False)
        if at is not None:
            return text, "stop"
        # The API has no word for a loop that was ended.
        return text, "length" if answer.finish_reason == "loop" else answer.finish_reason


class ReplyWriter:
    """Writes the reply to one request."""

    def __init__(self, config: ModelConfig, form: ReplyForm) -> None:
        """Write as ``form`` says."""
        self._config = config
        self._form = form
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def whole(self, events: AsyncIterable[Event]) -> Response:
        """The ``chat.completion`` object, once all events are there."""
        deltas = TextDeltas(answer=False)
        reasoning: list[str] = []
        seen: dict[str, Any] = {}
        answer: Answer | None = None
        async for event in events:
            if isinstance(event, TextPiece):
                reasoning += [delta.text for delta in deltas.take(event)]
            elif isinstance(event, PromptRead) and self._form.events:
                seen = self._listening(event)
            elif isinstance(event, Finished):
                answer = event.answer
        if answer is None:
            raise RuntimeError("the model's events ended without an answer")
        content, finish_reason = self._form.content(answer)
        message = {
            "role": "assistant",
            "content": content,
            "reasoning_content": "".join(reasoning) or None,
            "refusal": None,
        }
        choice = {"message": message, "finish_reason": finish_reason, "logprobs": None}
        reply = self._object("chat.completion", choice)
        return json_response(
            reply | {"usage": _usage(answer), "tinygiant": self._details(answer) | seen}
        )

    async def chunks(self, events: AsyncIterable[Event]) -> AsyncIterator[dict[str, Any]]:
        """The ``chat.completion.chunk`` objects of a stream."""
        form = self._form
        deltas = TextDeltas(answer=not form.is_written_at_once)
        last: dict[str, Any] = {"usage": None} if form.include_usage else {}
        opened = False
        async for event in events:
            extension = self._progress(event)
            # Without progress the stream begins with the prompt, when little can go wrong any more.
            if not opened and (extension is not None or isinstance(event, PromptRead)):
                opened = True
                yield self._chunk({"role": "assistant", "content": ""}) | last
            if extension is not None:
                yield self._chunk({}) | last | {"tinygiant": extension}
            if isinstance(event, TextPiece):
                for delta in deltas.take(event):
                    chunk = self._chunk({delta.field: delta.text}) | last
                    yield chunk | {"tinygiant": {"section": delta.section}}
            elif isinstance(event, Finished):
                answer = event.answer
                content, finish_reason = form.content(answer)
                if form.is_written_at_once:
                    section = {"tinygiant": {"section": "answer"}}
                    yield self._chunk({"content": content}) | last | section
                chunk = self._chunk({}, finish_reason) | last
                yield chunk | {"tinygiant": self._details(answer)}
                if form.include_usage:
                    empty = self._object("chat.completion.chunk", None)
                    yield empty | {"usage": _usage(answer)}

    def _progress(self, event: Event) -> dict[str, Any] | None:
        if not self._form.events:
            return None
        if isinstance(event, AudioRead):
            return {"event": "audio_read", "audio": asdict(event.audio)}
        if isinstance(event, StreamsReady):
            return {
                "event": "streams_ready",
                "cached": event.cached,
                "encode_s": event.encode_s,
            }
        if isinstance(event, PromptRead):
            return {"event": "prompt_read", "n_tokens": event.n_tokens} | self._listening(event)
        return None

    def _listening(self, event: PromptRead) -> dict[str, Any]:
        return {
            "intent_attention": _numbers(event.intent_attention),
            "gate": _numbers(event.gate),
            "token_s": self._config.row_s,
        }

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return self._object("chat.completion.chunk", choice)

    def _details(self, answer: Answer) -> dict[str, Any]:
        """What became of the audio and of the request, the parts of the thought, and the times."""
        kept = (
            "choice_index",
            "choice_probabilities",
            "plan",
            "audio_analysis",
            "logic",
            "summary",
            "unparsed",
        )
        fields = answer.to_dict()
        details = {name: fields[name] for name in (*kept, "audio", "more_audio", "timings")}
        return details | {"ignored": self._form.ignored}

    def _object(self, kind: str, choice: dict[str, Any] | None) -> dict[str, Any]:
        """An object of the API; the greedy answer is the same however often it is wanted."""
        choices = [] if choice is None else [{"index": i, **choice} for i in range(self._form.n)]
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._config.name,
            "choices": choices,
        }


def _usage(answer: Answer) -> dict[str, Any]:
    tokens = answer.tokens
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.generated,
        "total_tokens": tokens.prompt + tokens.generated,
        "prompt_tokens_details": {"audio_tokens": tokens.audio, "cached_tokens": 0},
    }


def _numbers(array: np.ndarray[Any, np.dtype[np.float32]] | None) -> list[Any] | None:
    if array is None:
        return None
    rounded: list[Any] = np.round(array.astype(np.float64), 6).tolist()
    return rounded
