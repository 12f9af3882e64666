"""A chat request taken apart: the body of ``POST /v1/chat/completions`` to a :class:`ChatRequest`.

Strict: what the model cannot do (a system message, several clips, sampling, tools) is refused by
name, never left out silently. Pure functions of bytes; what they allocate is bounded by the body.
"""

from __future__ import annotations

import binascii
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import ApiError

__all__ = ["AUDIO_FORMATS", "ChatRequest", "parse_chat"]

AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")
ALIAS = "tinygiant"  # a model name that every server answers to

# Labels and keys that cannot change a greedy answer.
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "seed",
    "service_tier",
    "user",
}
# Fields of OpenAI's API that are accepted with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "store": (False,),
    "temperature": (0,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_p": (1,),
}
_KNOWN = {
    "choices_text",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "stream",
    "stream_options",
    "tinygiant",
}
_ALONE = "the model takes one user message; put instructions and earlier turns into the question"


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        audio: the encoded clip.
        question: the message's text parts, joined by line breaks.
        choices: answers to choose from, or None.
        max_new_tokens: how much the model may write, or None for the default.
        stream: answer in server-sent events.
        include_usage: end the stream with token counts.
        events: tell how the work goes on, with intent attention and gate.
    """

    audio: bytes
    question: str
    choices: tuple[str, ...] | None
    max_new_tokens: int | None
    stream: bool
    include_usage: bool
    events: bool


def parse_chat(body: bytes | bytearray, model: str, max_new_tokens: int) -> ChatRequest:
    """Check a request's body.

    Args:
        body: JSON in UTF-8.
        model: the name of the model that is loaded.
        max_new_tokens: the most a request may ask for.

    Raises:
        ApiError: 400 with the field's name; 404 for another model.
    """
    data = _object(_parse_json(body), "the body", None)
    for key in sorted(set(data) - _KNOWN - _WITHOUT_EFFECT):
        _check_neutral(key, data[key])
    _check_model(data.get("model"), model)
    options = _object(data.get("stream_options") or {}, "stream_options", "stream_options")
    extension = _object(data.get("tinygiant") or {}, "tinygiant", "tinygiant")
    for name, found, known in (
        ("stream_options", options, {"include_usage", "include_obfuscation"}),
        ("tinygiant", extension, {"choices", "events"}),
    ):
        if unknown := sorted(set(found) - known):
            _refuse(f"{name} has the unknown field {unknown[0][:60]!r}; remove it", name)
    stream = _flag(data, "stream")
    if options and not stream:
        _refuse("stream_options is given without stream: true; remove it", "stream_options")
    audio, question = _parse_messages(data.get("messages"))
    return ChatRequest(
        audio=audio,
        question=question,
        choices=_parse_choices(data.get("choices_text"), extension.get("choices")),
        max_new_tokens=_parse_limit(data, max_new_tokens),
        stream=stream,
        include_usage=_flag(options, "include_usage"),
        events=_flag(extension, "events"),
    )


def _parse_json(body: bytes | bytearray) -> Any:
    try:
        return json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        message = f"the body is not JSON in UTF-8 ({str(error)[:120]})"
        raise ApiError(400, message, code="invalid_json") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same key twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_neutral(key: str, value: Any) -> None:
    if value is None:
        return
    if key not in _NEUTRAL:
        _refuse(f"unknown field {key[:60]!r}; remove it", key[:60], "unknown_parameter")
    # bool is an int: 0 == False, and n: true is no number
    if not any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _NEUTRAL[key]
    ):
        expected = " or ".join(json.dumps(neutral) for neutral in _NEUTRAL[key])
        _refuse(
            f"{key} can only be {expected}: the answer is greedy text, one at a time",
            key,
            "unsupported_value",
        )


def _check_model(value: Any, model: str) -> None:
    if not isinstance(value, str):
        _refuse(f"model must be a string; this server has {model!r}", "model")
    if value not in (model, ALIAS):
        raise ApiError(
            404,
            f"model {value[:100]!r} does not exist; this server has {model!r}",
            code="model_not_found",
            param="model",
        )


def _parse_messages(value: Any) -> tuple[bytes, str]:
    """The clip and the question of the only message."""
    if not isinstance(value, list) or not value:
        _refuse("messages must be a list with one user message", "messages")
    for number, item in enumerate(value, start=1):
        role = _object(item, f"message {number}", "messages").get("role")
        if role != "user":
            _refuse(f"message {number} has the role {str(role)[:40]!r}; {_ALONE}", "messages")
    if len(value) > 1:
        _refuse(f"{len(value)} messages given; {_ALONE}", "messages")
    (message,) = value
    if unknown := sorted(set(message) - {"role", "content", "name"}):
        _refuse(f"the message has the unknown field {unknown[0][:60]!r}; remove it", "messages")
    parts = message.get("content")
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list):
        _refuse("the message's content must be a list of parts: input_audio and text", "messages")
    clips: list[Any] = []
    texts: list[Any] = []
    for number, item in enumerate(parts, start=1):
        part = _object(item, f"content part {number}", "messages")
        kind = part.get("type")
        if kind not in ("input_audio", "text"):
            _refuse(
                f"content part {number} has the type {str(kind)[:40]!r}, expected input_audio or "
                "text; remove it",
                "messages",
            )
        if set(part) != {"type", kind}:
            _refuse(f"content part {number} must have the fields type and {kind}", "messages")
        (clips if kind == "input_audio" else texts).append(part[kind])
    if len(clips) != 1:
        _refuse(
            f"{len(clips) or 'no'} input_audio parts given, expected exactly one clip; "
            "join clips to one, or send a request for each",
            "messages",
        )
    if not texts or not all(isinstance(text, str) for text in texts):
        _refuse("expected a text part with the question, beside input_audio", "messages")
    return _decode_clip(clips[0]), "\n".join(texts)


def _decode_clip(value: Any) -> bytes:
    clip = _object(value, "input_audio", "messages")
    if set(clip) != {"data", "format"} or not isinstance(clip["data"], str):
        _refuse("input_audio must have the fields data (base64) and format", "messages")
    if clip["format"] not in AUDIO_FORMATS:
        _refuse(
            f"audio format {str(clip['format'])[:40]!r} is not supported, expected one of "
            f"{', '.join(AUDIO_FORMATS)}; convert it",
            "messages",
            "unsupported_format",
        )
    try:
        return binascii.a2b_base64(clip["data"], strict_mode=True)
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        message = f"input_audio.data is not base64 ({str(error)[:80]}); send the file's bytes alone"
        raise ApiError(400, message, code="invalid_base64", param="messages") from error


def _parse_choices(*given: Any) -> tuple[str, ...] | None:
    found = [value for value in given if value is not None]
    if len(found) > 1:
        _refuse("choices_text and tinygiant.choices are both given; send one", "choices_text")
    if not found:
        return None
    (choices,) = found
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        _refuse("the choices must be a list of strings", "choices_text")
    return tuple(choices)


def _parse_limit(data: dict[str, Any], most: int) -> int | None:
    keys = [k for k in ("max_completion_tokens", "max_tokens") if data.get(k) is not None]
    if len(keys) > 1 and data[keys[0]] != data[keys[1]]:
        _refuse("max_tokens and max_completion_tokens differ; send one", "max_tokens")
    for key in keys:
        value = data[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            _refuse(f"{key} is {str(value)[:40]}, expected a whole number from 1 to {most}", key)
    return data[keys[0]] if keys else None


def _flag(data: dict[str, Any], key: str) -> bool:
    value = data.get(key)
    if value is not None and not isinstance(value, bool):
        _refuse(f"{key} must be true or false", key)
    return bool(value)


def _object(value: Any, what: str, param: str | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(f"{what} must be a JSON object", param)
    return value


def _refuse(message: str, param: str | None, code: str = "invalid_value") -> NoReturn:
    raise ApiError(400, message, code=code, param=param)
