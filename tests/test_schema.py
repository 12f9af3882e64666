"""The published JSON Schema against what is really written."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jsonschema
import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.runtime import TinyGiant
from tinygiant.runtime.cli.records import error_record, event_record, json_line
from tinygiant.runtime.errors import AudioError
from tinygiant.runtime.events import SCHEMA

Tone = Callable[[float, int], NDArray[np.float32]]
CHOICES = ["a dog", "a siren"]


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    file = resources.files("tinygiant.runtime") / "schema" / "answer.schema.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def check(record: Any, schema: dict[str, Any], part: str = "") -> None:
    """Validate what was written against the schema or one of its definitions."""
    whole = schema if not part else {"$defs": schema["$defs"], **schema["$defs"][part]}
    if part:  # "#" there means the answer, which is the root of the file
        answer = {key: value for key, value in schema.items() if key[0] != "$"}
        text = json.dumps(whole).replace('"$ref": "#"', '"$ref": "#/$defs/answer"')
        whole = json.loads(text)
        whole["$defs"]["answer"] = answer
    jsonschema.validate(record, whole, jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    ("choices", "think"), [(None, True), (CHOICES, True), (None, False), (CHOICES, False)]
)
def test_answers_and_events_are_as_published(
    tiny: TinyGiant,
    tone: Tone,
    schema: dict[str, Any],
    choices: list[str] | None,
    think: bool,
) -> None:
    audio = (tone(1.0, 16_000), 16_000)
    events = list(tiny.stream(audio, "What?", choices, think=think, max_new_tokens=4))
    records = [json.loads(json_line(event_record(event))) for event in events]
    for record in records:
        check(record, schema, "event")
    answer = records[-1]["answer"]
    check(answer, schema)
    # Fields may be added to the schema without a new version, but never forgotten in it.
    assert set(answer) == set(schema["properties"]) == set(schema["required"])
    for name in ("timings", "audio", "tokens"):
        assert set(answer[name]) == set(schema["$defs"][name]["properties"])


def test_the_version_is_the_published_one(schema: dict[str, Any]) -> None:
    assert schema["properties"]["schema"]["const"] == SCHEMA
    name, version = SCHEMA.split("/")
    assert schema["$id"] == f"urn:{name.replace('.', ':')}:{version}"


def test_what_is_not_as_published_is_refused(tiny: TinyGiant, tone: Tone, schema: Any) -> None:
    answer = tiny.ask((tone(1.0, 16_000), 16_000), "What?", max_new_tokens=2).to_dict()
    for wrong in (
        {"schema": "tinygiant.answer/2"},
        {"finish_reason": "tired"},
        {"timings": {}},
        {"choice_probabilities": [1.5]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            check(answer | wrong, schema)


def test_errors_are_records_too(schema: dict[str, Any]) -> None:
    record = error_record(AudioError("no\nsound"))
    assert record == {"kind": "AudioError", "exit_code": 3, "message": "no sound"}
    check(record, schema, "error")
    assert error_record(RuntimeError())["exit_code"] == 1


def test_lines_are_ascii_where_that_is_asked() -> None:
    record = {"text": "caf\u00e9 \U0001f3b5"}
    assert json_line(record) == '{"text": "caf\u00e9 \U0001f3b5"}\n'
    assert json_line(record, encoding="ascii").isascii()
    assert json.loads(json_line(record, encoding=None)) == record
    torn = {"text": "\udc80"}  # a file name that is not UTF-8
    assert json.loads(json_line(torn).encode("utf-8", "backslashreplace")) == torn
