"""The synthetic world as training samples for the second stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinygiant.runtime.asking import AskOptions, check
from tinygiant.runtime.config import ModelConfig
from tinygiant.runtime.tokenizer import Tokenizer

from ..config import ChatPrompt
from ..world.dataset import WorldDataset
from ..world.questions import QUESTION_TYPES, ask, question_records
from ..world.scene import timeline
from ..world.thought import format_answer, format_response
from .reasoning import Sample
from .streams import CachedStreams

__all__ = [
    "END_OF_TURN",
    "WorldDrillSet",
    "WorldFormsSet",
    "WorldReasoningSet",
    "training_texts",
]

END_OF_TURN = "<|im_end|>"


class WorldReasoningSet:
    """Every question of every clip of a split; the choices' order varies from epoch to epoch."""

    def __init__(
        self,
        dataset: WorldDataset,
        streams: CachedStreams,
        tokenizer: Tokenizer,
        config: ModelConfig,
    ) -> None:
        self._dataset = dataset
        self._streams = streams
        self._tokenizer = tokenizer
        self._config = config
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

    def _sample(
        self,
        clip: int,
        record: dict[str, Any],
        rng: np.random.Generator,
        think: bool = True,
        given: bool = False,
    ) -> Sample:
        """A record as the runtime asks it: a question that is not to be thought about is answered
        after an empty thought, and one that is open has no choices. The caption of a thought may be
        given."""
        plain = record.get("open", False)
        choices = None if plain else [str(choice) for choice in rng.permutation(record["choices"])]
        options = AskOptions(think=think)
        prompt = check(record["question"], choices, options, self._tokenizer, self._config).prompt
        if think:
            response = format_response(record)
        else:
            response = format_answer(record) if plain else f"\n{format_answer(record)}"
        return Sample(
            streams=self._streams.streams(clip),
            anchor=self._streams.anchor(clip),
            prefix_ids=prompt.prefix_ids,
            suffix_ids=prompt.suffix_ids,
            instruction_ids=prompt.instruction_ids,
            response_ids=self._tokenizer.encode_markup(response + END_OF_TURN),
            given=self._caption(response) if given else (0, 0),
        )

    def _caption(self, response: str) -> tuple[int, int]:
        """Where a response's caption stands in its ids: from its text to its closing tag."""
        before, text, _ = re.split(r"(?<=<CAPTION>\n)(.*</CAPTION>)", response, flags=re.DOTALL)
        encode = self._tokenizer.encode_markup
        return len(encode(before)), len(encode(before + text))


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


@dataclass(frozen=True)
class _Form:
    choices: bool
    think: bool


# Of ten samples of a clip, how many are asked in which form.
_FORMS = (
    *(_Form(choices=True, think=True),) * 3,
    *(_Form(choices=False, think=True),) * 3,
    *(_Form(choices=True, think=False),) * 2,
    *(_Form(choices=False, think=False),) * 2,
)
# Of the open questions that can be, how many ask about what is not there.
_ABSENT = 0.15


class WorldFormsSet(WorldReasoningSet):
    """New questions in every form: with choices and without, thought about or answered directly.

    A sample is a clip and a form; its type, wording and choices are drawn anew each time. Clips
    before ``first_clip`` are left out: what encoders give of clips that they learnt from is clearer
    than of any other.

    A model that hears while it reasons answers from what it hears once more, not from what it wrote
    down, and the two differ. So in the share ``given`` of the thoughts the caption is another
    clip's: it is read, not learnt, and what follows from it is. A clip is taken for this the more
    often the more is heard in it, since short captions leave little to read.
    """

    def __init__(
        self,
        dataset: WorldDataset,
        streams: CachedStreams,
        tokenizer: Tokenizer,
        config: ModelConfig,
        first_clip: int = 0,
        given: float = 0.0,
    ) -> None:
        super().__init__(dataset, streams, tokenizer, config)
        self._first = first_clip
        self._given = given
        self._scenes = [dataset.scene(clip) for clip in range(first_clip, len(dataset))]
        self._events = np.array([len(timeline(scene)) for scene in self._scenes])
        self._taken = np.cumsum(1 + self._events**2)

    def __len__(self) -> int:
        return len(self._scenes) * len(_FORMS)

    def lengths(self) -> Sequence[int]:
        """Audio rows, a prompt, and a thought where there is one."""
        thoughts = (8 * self._events + 90).tolist()
        return [
            self._streams.n_tokens(self._first + n) + 50 + (thought if form.think else 0)
            for n, thought in enumerate(thoughts)
            for form in _FORMS
        ]

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """A question about the set's clip ``index // 10`` in form ``index % 10``."""
        number, which = divmod(index, len(_FORMS))
        form, scene = _FORMS[which], self._scenes[number]
        given = form.think and bool(rng.random() < self._given)
        if given:
            drawn = rng.integers(self._taken[-1])
            scene = self._scenes[int(np.searchsorted(self._taken, drawn, side="right"))]
        kinds = list(FORMS_WEIGHTS)
        weights = np.array(list(FORMS_WEIGHTS.values()))
        for kind in rng.choice(kinds, size=len(kinds), replace=False, p=weights / weights.sum()):
            absent = not form.choices and bool(rng.random() < _ABSENT)
            record = ask(scene, str(kind), rng, choices=form.choices, absent=absent)
            if record is None and not form.choices and not timeline(scene):
                record = ask(scene, str(kind), rng, choices=False, absent=True)
            if record is not None:
                return self._sample(self._first + number, record, rng, form.think, given)
        raise AssertionError("whether a sound is present can be asked of every clip")


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
    **dict.fromkeys(("presence", "anybody", "any music"), 0.1),
}

FORMS_WEIGHTS: dict[str, float] = dict.fromkeys(QUESTION_TYPES, 1.0) | {
    "description": 2.5,
    "sound heard": 2.0,
    "word heard": 1.5,
    "word named": 1.5,
    "word order": 1.5,
    "speaker": 1.5,
    "presence": 2.0,
    "anybody": 0.5,
    "any music": 0.5,
    "sound count": 2.5,
    "distance": 1.5,
    "first": 1.5,
    "last": 1.5,
    "after": 3.0,
    "before": 3.0,
    "relation": 3.0,
    "nearer": 2.0,
    "mode": 0.6,
    "meter": 0.6,
    "tempo": 0.7,
    "background": 0.8,
}


def training_texts(dataset: WorldDataset, prompt: ChatPrompt) -> list[str]:
    """All text a tokenizer should write well: questions, choices and responses of a split."""
    texts = [f"system\n{prompt.system}", "user\n", "assistant\n"] * 100
    for clip in range(len(dataset)):
        for record in dataset.records(clip):
            lines = [record["question"], prompt.choices_header]
            lines += [prompt.choice_prefix + choice for choice in record["choices"]]
            texts += ["\n".join(lines), format_response(record)]
        for record in question_records(dataset.scene(clip), choices=False):
            texts += [record["question"], format_response(record)]
    return texts
