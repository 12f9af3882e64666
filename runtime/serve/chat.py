"""A chat request taken apart: the body of ``POST /v1/chat/completions`` to a :class:`ChatRequest`.

Clients send more fields than this model can use. Some are honoured. Those that cannot change a
greedy answer, or only widen the request, are left out and reported (``ignored``). Those without
which the answer would be a wrong one (a tool that must be called, a schema that the answer does not
have) are refused by name. ``strict`` refuses anything that would be left out or rearranged.

System and earlier messages are put before the question::

    {system}

    Earlier in this conversation:
    User: {text}
    Assistant: {text}

    {question}

Pure functions of bytes; what they allocate is bounded by the body.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import ApiError
from .ignored import Ignored
from .parts import decode_clip
from .replies import ReplyForm
from .schemas import answer_fields

__all__ = ["ALIAS", "ChatRequest", "check_model", "parse_chat"]

ALIAS = "tinygiant"  # a model name that every server answers to
MAX_N = 128
MAX_STOPS = 16

# Labels and keys that cannot change a greedy answer.
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "seed",
    "service_tier",
    "user",
}
# Fields of OpenAI's API and the values of them that ask for nothing.
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
_GREEDY = "the answer is always the likeliest text"
_WHY = {
    "audio": "the answer is text",
    "frequency_penalty": _GREEDY,
    "functions": "the model calls no functions",
    "logit_bias": _GREEDY,
    "logprobs": "token probabilities are not available",
    "modalities": "the answer is text",
    "presence_penalty": _GREEDY,
    "store": "nothing is stored",
    "temperature": _GREEDY,
    "tools": "the model calls no tools",
    "top_p": _GREEDY,
}
_HONOURED = {"n", "response_format", "stop"}
_KNOWN = {
    "choices_text",
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "reasoning_effort",
    "stream",
    "stream_options",
    "tinygiant",
}
_ROLES = {
    "assistant": "Assistant",
    "developer": "System",
    "function": "Tool",
    "system": "System",
    "tool": "Tool",
    "user": "User",
}
# Fields that messages have besides their content when a client sends back an earlier reply.
_MESSAGE_FIELDS = {"role", "content", "name"}
_ECHOED = {"annotations", "reasoning_content", "refusal"}
_ALONE = "the model takes one user message; put instructions and earlier turns into the question"


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        clips: the encoded clips that are asked about, as many as the model hears at most.
        question: the question, with system and earlier messages before it.
        choices: answers to choose from, or None.
        max_new_tokens: how much the model may write, or None for the default.
        think: whether the model thinks first.
        stream: answer in server-sent events.
        form: how the answer is to be written.
    """

    clips: tuple[bytes, ...]
    question: str
    choices: tuple[str, ...] | None
    max_new_tokens: int | None
    think: bool
    stream: bool
    form: ReplyForm


def parse_chat(
    body: bytes | bytearray,
    model: str,
    max_new_tokens: int,
    *,
    n_clips: int = 1,
    strict: bool = False,
) -> ChatRequest:
    """Check a request's body.

    Args:
        body: JSON in UTF-8.
        model: the name of the model that is loaded.
        max_new_tokens: the most a request may ask for.
        n_clips: how many clips the model hears at once.
        strict: refuse what would be left out or rearranged.

    Raises:
        ApiError: 400 with the field's name; 404 for another model.
    """
    data = _object(_parse_json(body, strict=strict), "the body", None)
    ignored = Ignored(strict=strict)
    for key in sorted(set(data) - _KNOWN - _WITHOUT_EFFECT):
        _check_extra(key, data[key], ignored)
    check_model(data.get("model"), model)
    options = _object(data.get("stream_options") or {}, "stream_options", "stream_options")
    extension = _object(data.get("tinygiant") or {}, "tinygiant", "tinygiant")
    stream = _flag(data, "stream")
    for key in sorted(set(options) - {"include_usage", "include_obfuscation"}):
        if strict:
            _refuse(f"stream_options has the unknown field {key[:60]!r}; remove it", key[:60])
        ignored.add(f"stream_options.{key}", "unknown here")
    if unknown := sorted(set(extension) - {"choices", "events"}):
        _refuse(f"tinygiant has the unknown field {unknown[0][:60]!r}; remove it", "tinygiant")
    if options and not stream:
        if strict:
            _refuse("stream_options is given without stream: true; remove it", "stream_options")
        ignored.add("stream_options", "the answer is not streamed")
    clips, question = _parse_messages(data.get("messages"), n_clips, ignored)
    json_fields, listed = answer_fields(data.get("response_format"))
    choices = _parse_choices(data.get("choices_text"), extension.get("choices")) or listed
    limit = _parse_limit(data, max_new_tokens, ignored)
    think = _parse_effort(data.get("reasoning_effort"), ignored)
    stop = _parse_stop(data.get("stop"), ignored, chosen=choices is not None)
    form = ReplyForm(
        chosen=choices is not None,
        include_usage=_flag(options, "include_usage"),
        events=_flag(extension, "events"),
        stop=stop,
        n=_parse_n(data.get("n")),
        json_fields=json_fields,
        ignored=ignored.lines(),
    )
    return ChatRequest(clips, question, choices, limit, think, stream, form)


def _parse_json(body: bytes | bytearray, *, strict: bool) -> Any:
    """JSON; unless ``strict``, strings may have line breaks, as shells put ``$(base64 clip)``."""
    try:
        return json.loads(
            body.decode("utf-8"),
            strict=strict,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
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
    raise ValueError(f"{name} is not a JSON number")


def _check_extra(key: str, value: Any, ignored: Ignored) -> None:
    """Leave out a field that is not this model's, unless the client relies on it."""
    # bool is an int: 0 == False, and n: true is no number
    asks_for_nothing = value is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in _NEUTRAL.get(key, ())
    )
    if asks_for_nothing:
        return
    if ignored.strict:
        if key not in _NEUTRAL:
            _refuse(f"unknown field {key[:60]!r}; remove it", key[:60], "unknown_parameter")
        expected = " or ".join(json.dumps(neutral) for neutral in _NEUTRAL[key])
        _refuse(
            f"{key} can only be {expected}: the answer is greedy text, one at a time",
            key,
            "unsupported_value",
        )
    if key in ("tool_choice", "function_call"):
        if value not in ("none", "auto"):
            _refuse(
                f"{key} demands a call, and the model calls no tools; remove it, or use auto",
                key,
                "unsupported_value",
            )
    elif key not in _HONOURED:
        ignored.add(key, _WHY.get(key, "unknown here"))


def check_model(value: Any, model: str) -> None:
    """Check that a request names the model that is loaded, or none.

    Raises:
        ApiError: 400, not a string; 404, another model.
    """
    if value is None:
        return
    if not isinstance(value, str):
        _refuse(f"model must be a string; this server has {model!r}", "model")
    if value not in (model, ALIAS):
        raise ApiError(
            404,
            f"model {value[:100]!r} does not exist; this server has {model!r}",
            code="model_not_found",
            param="model",
        )


@dataclass(frozen=True)
class _Message:
    """One message: its texts, and the clips in it."""

    role: str
    text: str
    clips: tuple[Any, ...]


def _parse_messages(value: Any, n_heard: int, ignored: Ignored) -> tuple[tuple[bytes, ...], str]:
    """The clips that are asked about, and the question with what was said before it."""
    if not isinstance(value, list) or not value:
        _refuse("messages must be a list whose last message is the user's question", "messages")
    messages = [_parse_message(number, item, ignored) for number, item in enumerate(value, 1)]
    if ignored.strict and len(messages) > 1:
        _refuse(f"{len(messages)} messages given; {_ALONE}", "messages")
    if messages[-1].role != "user":
        _refuse(
            f"the last message has the role {messages[-1].role!r}, expected the user's question",
            "messages",
        )
    n_asked = 0  # messages of the user at the end: a clip and its question may come apart
    while n_asked < len(messages) and messages[-1 - n_asked].role == "user":
        n_asked += 1
    earlier, asked = messages[:-n_asked], messages[-n_asked:]
    return _clips(earlier, asked, n_heard, ignored), _question(messages, earlier, asked)


def _clips(
    earlier: list[_Message], asked: list[_Message], n_heard: int, ignored: Ignored
) -> tuple[bytes, ...]:
    """The last clips of the question; if it has none, of the last message before it that has."""
    in_turn = [clip for message in asked for clip in message.clips]
    before = [message.clips for message in earlier]
    n_given = len(in_turn) + sum(map(len, before))
    expected = "exactly one clip" if n_heard == 1 else f"one to {n_heard} clips"
    if not n_given or (ignored.strict and n_given > n_heard):
        _refuse(
            f"{n_given or 'no'} input_audio parts given, expected {expected}; "
            "join clips to one, or send a request for each",
            "messages",
        )
    found = in_turn or next(clips for clips in reversed(before) if clips)
    taken = found[-n_heard:]
    if left := n_given - len(taken):
        which = "the clip before is" if left == 1 else f"the {left} clips before are"
        most = "one clip" if n_heard == 1 else f"at most {n_heard} clips"
        ignored.add(
            "messages",
            f"the model hears {most} at once, the last of the question; {which} left out",
        )
    return tuple(map(decode_clip, taken))


def _question(messages: list[_Message], earlier: list[_Message], asked: list[_Message]) -> str:
    """The question, after system and earlier messages; see the module."""
    system = [m.text for m in messages if _ROLES[m.role] == "System" and m.text.strip()]
    said = [
        f"{_ROLES[m.role]}: {m.text}"
        for m in earlier
        if _ROLES[m.role] != "System" and m.text.strip()
    ]
    if said:
        said.insert(0, "Earlier in this conversation:")
    question = [m.text for m in asked if m.text]
    if not question and not system:
        _refuse("no question given; add a text part next to input_audio", "messages")
    if question and not "".join(question).strip():
        system, said = [], []  # for the runtime to refuse
    parts = ["\n".join(system), "\n".join(said), "\n".join(question)]
    return "\n\n".join(part for part in parts if part)


def _parse_message(number: int, item: Any, ignored: Ignored) -> _Message:
    message = _object(item, f"message {number}", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        _refuse(f"message {number} has the unknown role {str(role)[:40]!r}", "messages")
    if ignored.strict and role != "user":
        _refuse(f"message {number} has the role {role!r}; {_ALONE}", "messages")
    for key in sorted(set(message) - _MESSAGE_FIELDS - _ECHOED):
        if ignored.strict:
            _refuse(f"the message has the unknown field {key[:60]!r}; remove it", "messages")
        if message[key] not in (None, []):
            ignored.add(f"messages[].{key}", _WHY.get(key, "unknown here"))
    parts = message.get("content")
    if parts is None and role != "user":
        parts = []  # an assistant's message that called a tool
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list):
        _refuse("a message's content must be a list of parts: input_audio and text", "messages")
    texts: list[str] = []
    clips: list[Any] = []
    for place, part in enumerate(parts, start=1):
        checked = _object(part, f"content part {place}", "messages")
        kind, content = _parse_part(place, checked, ignored)
        (texts if kind == "text" else clips).append(content)
    return _Message(role, "\n".join(texts), tuple(clips))


def _parse_part(place: int, part: dict[str, Any], ignored: Ignored) -> tuple[str, Any]:
    kind = part.get("type")
    if kind not in ("input_audio", "text", "audio_url", "refusal"):
        _refuse(
            f"content part {place} has the type {str(kind)[:40]!r}, expected input_audio or text; "
            "remove it",
            "messages",
        )
    extra = sorted(set(part) - {"type", kind})
    if kind not in part or (ignored.strict and extra):
        _refuse(f"content part {place} must have the fields type and {kind}", "messages")
    for key in extra:
        ignored.add(f"messages[].content[].{key}", "unknown here")
    content = part[kind]
    if kind in ("input_audio", "audio_url"):
        return "clip", {"type": kind, kind: content}
    if not isinstance(content, str):
        _refuse(f"the {kind} of content part {place} must be a string", "messages")
    return "text", content


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


def _parse_limit(data: dict[str, Any], most: int, ignored: Ignored) -> int | None:
    keys = [k for k in ("max_completion_tokens", "max_tokens") if data.get(k) is not None]
    for key in keys:
        value = data[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            _refuse(f"{key} is {str(value)[:40]}, expected a whole number from 1 to {most}", key)
        if value > most:
            if ignored.strict:
                _refuse(f"{key} is {value}, expected a whole number from 1 to {most}", key)
            ignored.add(key, f"this server writes at most {most} tokens")
    if len(keys) > 1 and data[keys[0]] != data[keys[1]]:
        if ignored.strict:
            _refuse("max_tokens and max_completion_tokens differ; send one", "max_tokens")
        ignored.add("max_tokens", "max_completion_tokens is given too")
    return min(data[keys[0]], most) if keys else None


def _parse_effort(value: Any, ignored: Ignored) -> bool:
    """Whether the model thinks first."""
    if value is not None and not isinstance(value, str):
        _refuse("reasoning_effort must be a string, such as none", "reasoning_effort")
    if value not in (None, "none"):
        ignored.add("reasoning_effort", "the model thinks as long as it needs, or with none not")
    return value != "none"


def _parse_stop(value: Any, ignored: Ignored, *, chosen: bool) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and stop for stop in stops)
    ):
        _refuse(f"stop must be a text or a list of up to {MAX_STOPS} texts", "stop")
    if stops and chosen:
        ignored.add("stop", "the answer is one of the choices, whole")
        return ()
    return tuple(stops)


def _parse_n(value: Any) -> int:
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_N:
        _refuse(f"n is {str(value)[:40]}, expected a whole number from 1 to {MAX_N}", "n")
    return value


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
