"""The parts of an answer, and the events through which it arrives.

:meth:`~tinygiant.runtime.pipeline.TinyGiant.stream` yields, in this order: one :class:`AudioRead`,
one :class:`StreamsReady`, one :class:`PromptRead`, any number of :class:`TextPiece`, one
:class:`Finished`. Where there is nothing to hear the model is not asked: times and counts are 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .answer import TextPiece

__all__ = [
    "SCHEMA",
    "Answer",
    "AudioAccount",
    "AudioRead",
    "ChoiceScoring",
    "Event",
    "FinishReason",
    "Finished",
    "PromptRead",
    "StreamsReady",
    "TextPiece",
    "Timings",
    "TokenCounts",
]

SCHEMA = "tinygiant.answer/1"
"""Name and version of the JSON form, published as ``schema/answer.schema.json``. Fields may be
added within a version; removing or redefining one makes a new version."""

FinishReason = Literal["stop", "length", "loop"]
"""``stop``: the model ended its text itself. ``length``: ``max_new_tokens`` were spent; the thought
was then closed, and there still is an answer. ``loop``: the same few tokens came again and again,
and the part that they were in was closed."""

ChoiceScoring = Literal["sum_of_log_probabilities"]
"""How choices were compared where the model did not think: by the logarithm of the probability of
writing the whole choice, its end included, not divided by its length."""


@dataclass(frozen=True)
class AudioAccount:
    """The account of the audio, in seconds; see :class:`~tinygiant.runtime.audio.Audio`."""

    source: str
    received_s: float
    used_s: float
    dropped_s: float
    sampling_rate_hz: int
    channels: int
    n_chunks: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Timings:
    """Seconds spent in each stage of one question.

    Time that passes while the caller handles an event is not counted. ``encode_s`` covers features
    and encoders; with ``encode_cached`` neither had to run. ``first_token_s`` and ``total_s`` count
    from the start of the question.
    """

    audio_s: float
    encode_s: float
    project_s: float
    prefill_s: float
    decode_s: float
    first_token_s: float
    total_s: float
    encode_cached: bool
    tokens_per_s: float


@dataclass(frozen=True)
class TokenCounts:
    """Tokens the decoder read (``audio`` of them stand for sound) and wrote.

    ``drafted`` were guessed ahead, ``accepted`` of these were right.
    """

    prompt: int
    audio: int
    generated: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: the answer; with choices exactly one of them, as it was given.
        plan: the thought's four parts, empty where the model wrote none.
        audio_analysis: see ``plan``.
        logic: see ``plan``.
        summary: see ``plan``.
        unparsed: text of the model that is in none of the other fields.
        raw_text: everything that was written, markup included.
        choice_index: index of ``text`` among the choices; None without choices.
        finish_reason: why the text ended.
        model: name of the model that answered.
        timings: seconds by stage.
        audio: the account of the audio.
        tokens: how much was read and written.
        choice_probabilities: probability of each choice; they sum to 1. Only without a thought,
            else None.
        choice_scoring: the rule behind the probabilities; None without them.
        providers: for each graph, the providers that ran it; the one asked for is the first.
        more_audio: the accounts of the other clips of a question about several.
    """

    text: str
    plan: str
    audio_analysis: str
    logic: str
    summary: str
    unparsed: str
    raw_text: str
    choice_index: int | None
    finish_reason: FinishReason
    model: str
    timings: Timings
    audio: AudioAccount
    tokens: TokenCounts
    choice_probabilities: tuple[float, ...] | None = None
    choice_scoring: ChoiceScoring | None = None
    providers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    more_audio: tuple[AudioAccount, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON-ready nested dictionaries, with the name of their schema."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class AudioRead:
    """The audio is in memory."""

    audio: AudioAccount


@dataclass(frozen=True)
class StreamsReady:
    """The encoders are done, after ``encode_s`` seconds; ``cached`` if they did not have to run."""

    cached: bool
    encode_s: float


@dataclass(frozen=True, eq=False)
class PromptRead:
    """The decoder has read the prompt and is about to write.

    Attributes:
        n_tokens: how many tokens it read, ``n_audio`` of which stand for sound.
        intent_attention: ``(n_audio,)``, the weight of each audio row under the question; None if
            the model has no intent query.
        gate: ``(n_chunks, D)``, the semantic gate; None if the model has none.
    """

    n_tokens: int
    intent_attention: NDArray[np.float32] | None
    gate: NDArray[np.float32] | None


@dataclass(frozen=True)
class Finished:
    """The answer is complete."""

    answer: Answer


Event: TypeAlias = AudioRead | StreamsReady | PromptRead | TextPiece | Finished
