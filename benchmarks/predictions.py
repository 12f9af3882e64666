"""MMAR's files: questions in, submission lines out, and going on where a run was cut off.

Questions are MMAR's JSON lines (``id, audio_path, question, choices, answer, modality, category,
sub-category``). A submission has one line an item, ``{"id", "thinking_prediction",
"answer_prediction"}``. Next to ``predictions.jsonl`` lies ``predictions.run.jsonl``: its first line
says what the run was made with, the others how long each item took and how it failed, if it did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.scoring import Item
from tinygiant.runtime.errors import StorageError, UsageError

__all__ = ["RunLog", "file_sha256", "meta_file", "read_items", "read_predictions"]


def read_items(path: Path) -> list[Item]:
    """The questions of a ``MMAR-meta.jsonl``, or of a folder with a ``meta.jsonl``.

    Raises:
        UsageError: the file is missing, a line is not such a question, or an id comes twice.
    """
    items: dict[str, Item] = {}
    for number, record in enumerate(_read_lines(meta_file(path)), start=1):
        try:
            item = _item(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"{path}, record {number}: not a question of MMAR ({error})"
            ) from error
        if item.id in items:
            raise UsageError(f"{path}, record {number}: id {item.id} comes twice")
        items[item.id] = item
    if not items:
        raise UsageError(f"{path}: holds no question")
    return list(items.values())


def read_predictions(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Answers and thoughts by id. Lines without ``answer_prediction`` are left out, as upstream.

    Raises:
        UsageError: the file is missing, a line is damaged, or an id comes twice.
    """
    answers: dict[str, str] = {}
    thoughts: dict[str, str] = {}
    for number, line in enumerate(_read_lines(path), start=1):
        if not isinstance(line, dict) or not isinstance(line.get("id"), str):
            raise UsageError(f"{path}, line {number}: no submission line, it has no id")
        if line.get("answer_prediction") is None:
            continue
        if line["id"] in answers:
            raise UsageError(f"{path}, line {number}: id {line['id']} comes twice")
        answers[line["id"]] = str(line["answer_prediction"])
        thoughts[line["id"]] = str(line.get("thinking_prediction") or "")
    return answers, thoughts


class RunLog:
    """The output of one run, opened to be gone on with: answers so far, times and errors.

    ``answers``, ``thoughts`` and ``details`` (``{"seconds": ..., "error": ...}``) are by id.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]) -> None:
        """Open or start ``path``; a half-written last line is cut off.

        Raises:
            UsageError: the file was made with another model, other questions or other settings, or
                not by this program.
            StorageError: it cannot be written.
        """
        self.path, self.details_path = path, path.with_suffix(".run.jsonl")
        made_with = dict(made_with)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for file in (path, self.details_path):
                _cut_unfinished_line(file)
            header, *details = _read_lines(self.details_path, missing_ok=True) or [None]
            if header is None:
                if path.exists() and path.stat().st_size:
                    raise UsageError(
                        f"{path} exists and has no {self.details_path.name} next to it: "
                        "choose another output"
                    )
                _append(self.details_path, made_with)
            elif header != made_with:
                differing = sorted(k for k in made_with if header.get(k) != made_with[k])
                raise UsageError(
                    f"{path} was made with another {', '.join(differing) or 'format'}: "
                    "choose another output, or remove it"
                )
            path.touch()
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
        self.answers, self.thoughts = read_predictions(path)
        self.details: dict[str, dict[str, Any]] = {
            line["id"]: line for line in details if line["id"] in self.answers
        }

    def add(
        self,
        item_id: str,
        answer: str,
        thought: str,
        *,
        seconds: float,
        error: str | None,
        confidence: float | None = None,
    ) -> None:
        """Write one item's lines; they are in the system's hands when this returns."""
        details = {"id": item_id, "seconds": round(seconds, 4), "error": error}
        if confidence is not None:
            details["confidence"] = round(confidence, 4)
        line = {"id": item_id, "thinking_prediction": thought, "answer_prediction": answer}
        try:
            # The submission line last: an item counts as done once it is there.
            _append(self.details_path, details)
            _append(self.path, line)
        except OSError as failure:
            raise StorageError(f"{self.path}: cannot be written ({failure.strerror})") from failure
        self.answers[item_id], self.thoughts[item_id] = answer, thought
        self.details[item_id] = details


def meta_file(path: Path) -> Path:
    """The file of questions: ``path``, or ``meta.jsonl`` in it if it is a folder."""
    return path / "meta.jsonl" if path.is_dir() else path


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _item(record: Mapping[str, Any]) -> Item:
    choices = tuple(record["choices"])
    if not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices must be texts")
    thinking = record.get("thinking")
    return Item(
        id=str(record["id"]),
        audio_path=str(record["audio_path"]),
        question=str(record["question"]),
        choices=choices,
        answer=str(record["answer"]),
        modality=str(record["modality"]),
        category=str(record["category"]),
        sub_category=str(record["sub-category"]),
        # MMAR's own `thinking` is one text; the synthetic world's has parts.
        caption=thinking.get("caption") if isinstance(thinking, dict) else None,
        open=bool(record.get("open", False)),
    )


def _read_lines(path: Path, *, missing_ok: bool = False) -> list[Any]:
    if missing_ok and not path.exists():
        return []
    try:
        # Not splitlines: JSON texts may hold U+2028 and its like.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    parsed = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parsed.append(json.loads(line))
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not JSON ({error})") from error
    return parsed


def _cut_unfinished_line(path: Path) -> None:
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
