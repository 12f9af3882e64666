"""The synthetic world as training samples for the second stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tinygiant.runtime.config import PromptConfig
from tinygiant.runtime.prompt import build_prompt
from tinygiant.runtime.tokenizer import Tokenizer

from ..config import ChatPrompt
from ..world.dataset import WorldDataset
from ..world.questions import QUESTION_TYPES, ask
from ..world.thought import format_response
from .reasoning import Sample
from .streams import CachedStreams

__all__ = ["END_OF_TURN", "WorldDrillSet", "WorldReasoningSet", "training_texts"]

END_OF_TURN = "<|im_end|>"


class WorldReasoningSet:
    """Every question of every clip of a split; the choices' order varies from epoch to epoch."""

    def __init__(
        self,
        dataset: WorldDataset,
        streams: CachedStreams,
        tokenizer: Tokenizer,
        prompt: PromptConfig,
    ) -> None:
        self._dataset = dataset
        self._streams = streams
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._records: list[tuple[int, dict[str, Any]]] = [
            (clip, record) for clip in range(len(dataset)) for record in dataset.records(clip)
        ]

    def __len__(self) -> int:
        return len(self._records)

    def lengths(self) -> Sequence[int]:
        """Audio rows plus a quarter of the response's characters: tokens, roughly."""
        return [
            self._streams.n_tokens(clip) + len(format_response(record)) // 4
            for clip, record in self._records
        ]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Question ``index`` with its choices in an order drawn from ``rng``."""
        return self._sample(*self._records[index], rng)

    def _sample(self, clip: int, record: dict[str, Any], rng: np.random.Generator) -> Sample:
        choices = [str(choice) for choice in rng.permutation(record["choices"])]
        prompt = build_prompt(record["question"], choices, self._tokenizer, self._prompt)
        response = self._tokenizer.encode_markup(format_response(record) + END_OF_TURN)
        return Sample(
            streams=self._streams.streams(clip),
            anchor=self._streams.anchor(clip),
            prefix_ids=prompt.prefix_ids,
            suffix_ids=prompt.suffix_ids,
            instruction_ids=prompt.instruction_ids,
            response_ids=response,
        )


class WorldDrillSet(WorldReasoningSet):
    """New questions about the clips of a split, above all those that want reasoning.

    Of the stored questions, four a clip, most are answered by one word of the caption; counting and
    comparing are rare. Here the type is drawn anew each time, by ``DRILL_WEIGHTS``.
    """

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """A question about the clip of stored question ``index``, drawn from ``rng``."""
        clip, stored = self._records[index]
        scene = self._dataset.scene(clip)
        kinds = list(DRILL_WEIGHTS)
        weights = np.array(list(DRILL_WEIGHTS.values()))
        for kind in rng.choice(kinds, size=len(kinds), replace=False, p=weights / weights.sum()):
            record = ask(scene, str(kind), rng)
            if record is not None:
                return self._sample(clip, record, rng)
        return self._sample(clip, stored, rng)


# Of the types that a scene allows, how often each is drawn, relative to one another.
DRILL_WEIGHTS: dict[str, float] = dict.fromkeys(QUESTION_TYPES, 0.5) | {
    "sound count": 6.0,
    "sound missing": 2.0,
    "distance": 2.0,
    "after": 4.0,
    "before": 4.0,
    "relation": 4.0,
    "nearer": 4.0,
    "more often": 1.0,
}


def training_texts(dataset: WorldDataset, prompt: ChatPrompt) -> list[str]:
    """All text a tokenizer should write well: questions, choices and responses of a split."""
    texts = [f"system\n{prompt.system}", "user\n", "assistant\n"] * 100
    for clip in range(len(dataset)):
        for record in dataset.records(clip):
            lines = [record["question"], prompt.choices_header]
            lines += [prompt.choice_prefix + choice for choice in record["choices"]]
            texts += ["\n".join(lines), format_response(record)]
    return texts
