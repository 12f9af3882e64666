"""Who answers: the boundary between the benchmark and a model, and the runtime behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.predictions import file_sha256
from tinygiant.runtime import AskOptions, Query, load
from tinygiant.runtime.bundle import MANIFEST_NAME

__all__ = ["Answerer", "Question", "Reply", "RuntimeAnswerer", "thought_of"]


@dataclass(frozen=True)
class Question:
    """One question about one file."""

    audio: Path
    question: str
    choices: tuple[str, ...]
    open: bool = False  # the choices are for the match: the model does not see them


@dataclass(frozen=True)
class Reply:
    """An answer, and the thought as it was written, without think tags.

    ``answer`` is exactly one of the choices, unless the question was open. ``confidence`` is the
    model's own probability of it where the choices were scored.
    """

    answer: str
    thought: str
    confidence: float | None = None


class Answerer(Protocol):
    """A model. ``about`` goes into the results, ``identity`` tells one model from another."""

    batch_size: int
    identity: str
    about: dict[str, Any]

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Answer at most ``batch_size`` questions."""


class RuntimeAnswerer:
    """A bundle in ``tinygiant.runtime``.

    Several questions at a time are given out by the dozen, for the longest of them is waited for.
    """

    def __init__(
        self,
        bundle: Path | None,
        *,
        max_new_tokens: int,
        threads: int | None,
        think: bool = True,
        raw: bool = False,
        parallel: int = 1,
    ) -> None:
        """Load ``bundle``; the one installed with the runtime if None. ``raw``: no form is kept."""
        self.batch_size = 1 if parallel == 1 else 12 * parallel
        self._parallel = parallel
        self._model = load(bundle, threads=threads, many=parallel > 1)
        self._think = think
        self._raw = raw
        self._max_new_tokens = max_new_tokens
        self._has_thoughts = self._model.config.answer.thought is not None
        opened = self._model.bundle
        manifest = opened.manifest
        self.identity = file_sha256(opened.root / MANIFEST_NAME)
        self.about: dict[str, Any] = {
            "kind": "bundle",
            "name": manifest.model.name,
            "recipe": manifest.recipe.name,
            "checkpoint_sha256": manifest.source.sha256,
            "weights": manifest.source.weights,
            "intent_query": manifest.model.projector.reads_question,
            "semantic_gate": "gate" in manifest.model.projector.outputs,
            "size_bytes": sum(entry.size_bytes for entry in manifest.files),
        }

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Answer the questions; the first one that cannot be answered raises its error."""
        options = AskOptions(think=self._think, max_new_tokens=self._max_new_tokens, raw=self._raw)
        queries = [
            Query(one.audio, one.question, None if one.open else one.choices, options)
            for one in questions
        ]
        replies = []
        for answer in self._model.ask_many(queries, parallel=self._parallel):
            if isinstance(answer, Exception):
                raise answer
            sure = answer.choice_probabilities
            confidence = None if sure is None else max(sure)
            thought = thought_of(answer.raw_text) if self._has_thoughts else ""
            replies.append(Reply(answer.text, thought, confidence))
        return replies


def thought_of(raw_text: str) -> str:
    """What a model wrote before it closed its thought, without the think tags."""
    return raw_text.partition("</think>")[0].strip().removeprefix("<think>").strip()
