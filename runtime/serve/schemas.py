"""``response_format``: which fields of the answer a client wants as a JSON object.

The model writes text, so a schema is honoured only if the answer's own fields always fulfil it. If
a property lists values (``enum``), these are the choices. If the only property has a name that the
answer lacks, it is the answer.
"""

from __future__ import annotations

from typing import Any, NoReturn

from .errors import ApiError

__all__ = ["ANSWER_FIELDS", "answer_fields"]

ANSWER_FIELDS = ("answer", "plan", "audio_analysis", "logic", "summary")
_ANNOTATIONS = {"default", "description", "examples", "title"}


def answer_fields(value: Any) -> tuple[dict[str, str] | None, tuple[str, ...] | None]:
    """The fields that ``response_format`` asks for.

    Returns:
        For an object its fields (name in the object -> one of :data:`ANSWER_FIELDS`), for text
        None; and the choices that the schema lists, or None.

    Raises:
        ApiError: 400, a format or a schema that the answer does not have.
    """
    if value is None:
        return None, None
    kind = value.get("type") if isinstance(value, dict) else value
    if kind == "text":
        return None, None
    if kind == "json_object":
        return {name: name for name in ANSWER_FIELDS}, None
    if kind != "json_schema":
        _refuse(f"is {str(kind)[:40]!r}, expected text, json_object or json_schema")
    described = value.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict):
        _refuse("must have a json_schema with a schema")
    return _fields(schema)


def _fields(schema: dict[str, Any]) -> tuple[dict[str, str], tuple[str, ...] | None]:
    properties = schema.get("properties")
    if schema.get("type") != "object" or not isinstance(properties, dict) or not properties:
        _refuse("must describe an object with properties")
    known = {"type", "properties", "required", "additionalProperties", "$defs", "$schema"}
    if unknown := sorted(set(schema) - known - _ANNOTATIONS):
        _refuse(f"has {unknown[0][:40]!r}, which cannot be enforced")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(name in properties for name in map(str, required)):
        _refuse("requires a field that is not among its properties")
    names = {name: name for name in properties}
    strangers = [name for name in names if name not in ANSWER_FIELDS]
    if len(strangers) == 1 and "answer" not in names:
        names[strangers[0]] = "answer"
    elif strangers:
        _refuse(f"has the field {strangers[0][:40]!r}; the answer's are {', '.join(ANSWER_FIELDS)}")
    choices: tuple[str, ...] | None = None
    for name, described in properties.items():
        listed = _text(name, described, schema.get("$defs"))
        if listed is not None and names[name] != "answer":
            _refuse(f"lists values of {name[:40]!r}; only the answer's values can be enforced")
        choices = listed or choices
    return names, choices


def _text(name: str, described: Any, definitions: Any) -> tuple[str, ...] | None:
    """Check that a property is text; the values it may have, or None."""
    if isinstance(described, dict) and isinstance(described.get("$ref"), str):
        inner = described["$ref"].removeprefix("#/$defs/")
        described = definitions.get(inner) if isinstance(definitions, dict) else None
    if not isinstance(described, dict):
        _refuse(f"does not describe the field {name[:40]!r}")
    if unknown := sorted(set(described) - {"type", "enum", "const"} - _ANNOTATIONS):
        _refuse(f"has {unknown[0][:40]!r} for {name[:40]!r}, which cannot be enforced for text")
    listed = described.get("enum")
    if "const" in described:
        listed = [described["const"]]
    kind = described.get("type", "string")
    if not (kind == "string" or (isinstance(kind, list) and "string" in kind)):
        _refuse(f"wants {name[:40]!r} as {str(kind)[:40]}, and the answer's fields are strings")
    if listed is None:
        return None
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        _refuse(f"lists values of {name[:40]!r} that are not strings")
    return tuple(listed)


def _refuse(problem: str) -> NoReturn:
    message = f"response_format {problem}; change it, or leave it out"
    raise ApiError(400, message, code="unsupported_value", param="response_format")
