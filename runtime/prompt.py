r"""The prompt: the model's template filled with the question and the choices. Training uses it too.

The template is data (:class:`~tinygiant.runtime.config.PromptConfig`). TinyGiantALM's is ChatML::

    <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n        text
    <audio>                                                              audio: N rows a chunk
    \n                                                                  text
    {question}[\nChoices:\n- {choice} ...]                             question
    <|im_end|>\n<|im_start|>assistant\n                                text

The user's text is the instruction, whose token embeddings a projector may read. It is encoded by
itself as plain text: control tokens in it stay text, and the ids that a projector sees are exactly
those that the decoder sees.
"""

from __future__ import annotations

import dataclasses
import itertools
import string
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .config import PromptConfig
from .errors import QuestionError
from .text import counted
from .tokenizer import Tokenizer

__all__ = [
    "MAX_CHOICES",
    "MAX_QUESTION_CHARS",
    "Prompt",
    "build_prompt",
    "check_choices",
    "check_question",
    "compose",
    "format_choice",
    "user_text",
]

MAX_QUESTION_CHARS = 16_384  # checked first, so that an enormous question costs nothing
MAX_CHOICES = 26
_LETTERS_PER_TOKEN = 4  # of English, roughly


@dataclass(frozen=True)
class Prompt:
    """A filled template.

    Attributes:
        parts: token ids, or None where the audio rows stand.
        instruction_ids: those of the user's text within ``parts``, without padding.
        n_fixed: how many parts come before the user's text.
    """

    parts: tuple[tuple[int, ...] | None, ...]
    instruction_ids: tuple[int, ...]
    n_fixed: int

    @property
    def n_text(self) -> int:
        """Token ids in all, without audio rows."""
        return sum(len(ids) for ids in self.parts if ids is not None)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Token ids before the first audio rows."""
        before = self.parts[: self.parts.index(None)]
        return tuple(token for ids in before for token in ids or ())

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """Token ids after the first audio rows; for templates with one audio part."""
        after = self.parts[self.parts.index(None) + 1 :]
        return tuple(token for ids in after for token in ids or ())

    def followed_by(self, token_ids: Iterable[int]) -> Prompt:
        """The prompt with more tokens at its end."""
        return dataclasses.replace(self, parts=(*self.parts, tuple(token_ids)))


def build_prompt(
    question: str, choices: Sequence[str] | None, tokenizer: Tokenizer, config: PromptConfig
) -> Prompt:
    """The whole prompt of one question, ``choices`` listed if there are any.

    Raises:
        QuestionError: a question or choices that cannot be asked, see :func:`check_question` and
            :func:`check_choices`; or more tokens than the model takes, where it does not cut them.
    """
    ids = tokenizer.encode(user_text(question, choices, config))
    if len(ids) > config.max_tokens:
        if config.too_long == "refused":
            what = "the question has" if choices is None else "question and choices have"
            raise QuestionError(
                f"{what} {len(ids)} tokens, this model reads at most {config.max_tokens} (about "
                f"{_LETTERS_PER_TOKEN * config.max_tokens} letters); write less"
            )
        ids = ids[: config.max_tokens]
    padding = () if config.padding_id is None else (config.padding_id,)
    parts: list[tuple[int, ...] | None] = []
    for part in config.parts:
        if part.kind == "audio":
            parts.append(None)
        elif part.kind == "question":
            parts.append((*ids, *padding * (config.max_tokens - len(ids))))
        elif part.kind == "tokens":
            parts.append(part.token_ids)
        else:
            parts.append(tuple(tokenizer.encode_markup(part.text)))
    n_fixed = [part.kind for part in config.parts].index("question")
    return Prompt(tuple(parts), tuple(ids), n_fixed)


def compose(
    prompt: Prompt,
    clips: Sequence[Sequence[NDArray[np.float32]]],
    lookup: Callable[[Sequence[int]], NDArray[np.float32]],
) -> tuple[NDArray[np.float32], ...]:
    """The decoder's input, ``(1, n, D)`` for each part of the prompt.

    Args:
        prompt: the filled template.
        clips: for each clip the rows ``(1, N, D)`` of its chunks, in order; as many clips as the
            template has audio parts, or one, which then stands in all of them.
        lookup: token embeddings, ``n`` ids -> ``(n, D)``.
    """
    audio = itertools.cycle(clips)
    return tuple(
        np.concatenate(next(audio), axis=1) if ids is None else lookup(ids)[None]
        for ids in prompt.parts
    )


def user_text(question: str, choices: Sequence[str] | None, config: PromptConfig) -> str:
    """The user's text after checking: the question and the choices.

    Raises:
        QuestionError: a question or choices that cannot be asked.
    """
    text = check_question(question)
    if choices is not None:
        listed = enumerate(check_choices(choices))
        text += config.choices_header
        text += "".join(format_choice(config.choice_format, number, one) for number, one in listed)
    return text.lower() if config.lower_case else text


def format_choice(template: str, index: int, choice: str) -> str:
    """``{choice}`` and ``{letter}`` of a template filled in."""
    return template.replace("{letter}", string.ascii_lowercase[index]).replace("{choice}", choice)


def check_question(question: str) -> str:
    """The question in NFC without surrounding white space.

    Raises:
        QuestionError: blank, longer than 16,384 characters, with a control character (newline and
            tab are fine) or half of a surrogate pair.
    """
    if len(question) > MAX_QUESTION_CHARS:
        raise QuestionError(
            f"the question has {len(question)} characters, at most {MAX_QUESTION_CHARS} fit; "
            "shorten it"
        )
    if not question.strip():
        raise QuestionError("the question is empty; ask something about the audio")
    _refuse_controls(question, "the question", allowed="\n\t")
    return unicodedata.normalize("NFC", question).strip()


def check_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """The choices in NFC without surrounding white space, in order.

    Raises:
        QuestionError: fewer than 2 or more than 26; one that is blank, has a control character or
            a line break; two that are the same; more than 16,384 characters in all.
    """
    if isinstance(choices, str) or not 2 <= len(choices) <= MAX_CHOICES:
        count = 1 if isinstance(choices, str) else len(choices)
        raise QuestionError(f"{counted(count, 'choice')} given, expected 2 to {MAX_CHOICES}")
    if sum(map(len, choices)) > MAX_QUESTION_CHARS:
        raise QuestionError(f"the choices have more than {MAX_QUESTION_CHARS} characters in all")
    first_with: dict[str, int] = {}
    for number, choice in enumerate(choices, start=1):
        if not choice.strip():
            raise QuestionError(f"choice {number} is blank; give it a text")
        _refuse_controls(choice, f"choice {number}", allowed="")
        checked = unicodedata.normalize("NFC", choice).strip()
        if checked in first_with:
            raise QuestionError(
                f"choices {first_with[checked]} and {number} are the same; remove one"
            )
        first_with[checked] = number
    return tuple(first_with)


def _refuse_controls(text: str, what: str, *, allowed: str) -> None:
    for position, character in enumerate(text, start=1):
        category = unicodedata.category(character)
        # Cc: control characters; Cs: lone surrogates; Zl, Zp: line and paragraph separators.
        if category in ("Cc", "Cs", "Zl", "Zp") and character not in allowed:
            raise QuestionError(
                f"{what} has the control character U+{ord(character):04X} at position {position}; "
                "remove it"
            )
