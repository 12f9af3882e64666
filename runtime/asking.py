"""A question on its way to the decoder: the caller's options, and what it becomes once checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from .audio import MAX_AUDIO_S, Audio, AudioSource
from .choices import ChoiceTrie
from .config import ModelConfig
from .encode import Projection
from .errors import QuestionError, UsageError
from .prompt import Prompt, build_prompt
from .tokenizer import Tokenizer

__all__ = [
    "MAX_NEW_TOKENS",
    "AskKeywords",
    "AskOptions",
    "Asked",
    "Clips",
    "Prepared",
    "Query",
    "check",
    "clips_of",
]

MAX_NEW_TOKENS = 512

Clips = AudioSource | Audio | list[AudioSource | Audio]
"""One clip, or a list of as many as the model hears at once."""


@dataclass(frozen=True)
class AskOptions:
    """How a question is to be answered.

    Attributes:
        think: whether the model thinks first. If not, an empty thought ends the prompt, and either
            the answer is written at once or, with choices, each choice is scored and the likeliest
            taken, with their probabilities in the answer. A model without a thought always answers
            in this way.
        max_new_tokens: how much the model may write freely. Tags and choices come on top; of a free
            answer's tokens a quarter, at most 64, is kept from the thought.
        max_audio_s: longest clip to read; an :class:`~tinygiant.runtime.audio.Audio` has been read
            already.
        fit: where the decoder has too few positions for ``max_new_tokens`` behind the clip, let the
            model write as many as there are, with a note; else that is refused.
        raw: let the model write whatever it wants, for those who study that. Its text is then not
            held to the form of an answer, and a silent clip is asked about like any other.
    """

    think: bool = True
    max_new_tokens: int = MAX_NEW_TOKENS
    max_audio_s: float = MAX_AUDIO_S
    fit: bool = False
    raw: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")


class AskKeywords(TypedDict, total=False):
    """:class:`AskOptions` as keyword arguments."""

    think: bool
    max_new_tokens: int
    max_audio_s: float
    fit: bool
    raw: bool


@dataclass(frozen=True)
class Query:
    """A question about a clip as a caller puts it; see :meth:`TinyGiant.stream`."""

    audio: Clips
    question: str
    choices: Sequence[str] | None = None
    options: AskOptions = AskOptions()


@dataclass(frozen=True)
class Asked:
    """One question, checked and ready for the decoder.

    Attributes:
        question: as it was given.
        prompt: the filled template, ended by an empty thought where the model is not to think.
        choices: as they were given, or None.
        trie: the answers that ``choices`` allow.
        thinks: whether a thought comes first.
        prefilled: the beginning of the model's text that the prompt ends in.
        options: what the caller chose.
    """

    question: str
    prompt: Prompt
    choices: Sequence[str] | None
    trie: ChoiceTrie | None
    thinks: bool
    prefilled: str
    options: AskOptions

    @property
    def is_scored(self) -> bool:
        """Whether choices are scored instead of written."""
        return self.trie is not None and not self.thinks

    @property
    def is_drafted(self) -> bool:
        """Whether its text is long enough that guessing at it may pay."""
        return self.options.think and not self.is_scored

    @property
    def max_written(self) -> int:
        """Tokens that may follow the prompt where ``raw``: the thought's end and choice on top."""
        free = self.options.max_new_tokens
        if self.trie is None:
            return free
        return self.trie.max_tokens + (free + 1 if self.thinks else 0)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A question about a clip as the decoder reads it.

    Attributes:
        embeds: ``(1, T, D)``.
        asked: the question.
        projections: what the projector gave, one a chunk.
        encode_cached: whether the encoders did not have to run.
    """

    embeds: NDArray[np.float32]
    asked: Asked
    projections: tuple[Projection, ...]
    encode_cached: bool


def check(
    question: str,
    choices: Sequence[str] | None,
    options: AskOptions,
    tokenizer: Tokenizer,
    config: ModelConfig,
) -> Asked:
    """Check a question and put it in the model's words.

    Raises:
        QuestionError: the question or the choices cannot be asked.
    """
    form = config.answer
    prompt = build_prompt(question, choices, tokenizer, config.prompt)
    trie = None
    if choices is not None:
        stop_id = config.decoder.stop_token_ids[0]
        trie = ChoiceTrie.of_choices(choices, tokenizer, form, stop_id)
    prefilled = ""
    if form.thought is not None and not options.think:
        prefilled = form.thought.empty
        text = prefilled + (form.thought.empty_end if trie is None else "")
        prompt = prompt.followed_by(tokenizer.encode_markup(text))
    thinks = form.thought is not None and options.think
    return Asked(question, prompt, choices, trie, thinks, prefilled, options)


def clips_of(audio: Clips, config: ModelConfig) -> list[AudioSource | Audio]:
    """The clips of a question.

    Raises:
        QuestionError: the model does not hear so many.
    """
    clips = audio if isinstance(audio, list) else [audio]
    n_heard = config.n_clips
    if len(clips) not in (1, n_heard):
        heard = "one" if n_heard == 1 else f"one or {n_heard}"
        raise QuestionError(
            f"{len(clips)} clips given, {config.name} hears {heard} at a time; give {heard}"
        )
    return clips
