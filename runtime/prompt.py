r"""The prompt: ChatML around the audio, the question and the choices. Training uses it too.

What the decoder reads, with the audio embeddings between ``prefix_ids`` and ``suffix_ids``::

    <|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n        prefix_ids (constant)
    <audio>                                                              N rows a chunk
    \n{question}[\n{choices_header}\n{choice_prefix}{choice} ...]     instruction_ids, after \n
    <|im_end|>\n<|im_start|>assistant\n                                end of suffix_ids

The user's text is the instruction, whose token embeddings are the projector's intent query (M_user
in the paper). It is encoded by itself as plain text: control tokens in it stay text, and the ids
the projector sees are exactly those the decoder sees.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from .config import PromptConfig
from .errors import QuestionError
from .text import counted
from .tokenizer import Tokenizer

__all__ = [
    "IM_END",
    "IM_START",
    "MAX_CHOICES",
    "MAX_QUESTION_CHARS",
    "MAX_QUESTION_TOKENS",
    "THINK_END",
    "Prompt",
    "build_prompt",
    "check_choices",
    "check_question",
    "user_text",
]

MAX_QUESTION_TOKENS = 2_048  # question and choices together; the paper's limit of text tokens
MAX_QUESTION_CHARS = 16_384  # checked first, so that an enormous question costs nothing
MAX_CHOICES = 26

IM_START, IM_END, THINK_END = "<|im_start|>", "<|im_end|>", "</think>"


@dataclass(frozen=True)
class Prompt:
    """Token ids before and after the audio, and those of the user's text within ``suffix_ids``."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    instruction_ids: tuple[int, ...]


def build_prompt(
    question: str, choices: Sequence[str] | None, tokenizer: Tokenizer, config: PromptConfig
) -> Prompt:
    """Token ids of the whole prompt of one question, ``choices`` listed if there are any.

    Raises:
        QuestionError: a question or choices that cannot be asked; see :func:`check_question`,
            :func:`check_choices`; or more than 2,048 tokens of text.
    """
    instruction_ids = tokenizer.encode(user_text(question, choices, config))
    if len(instruction_ids) > MAX_QUESTION_TOKENS:
        raise QuestionError(
            f"the question has {len(instruction_ids)} tokens, at most {MAX_QUESTION_TOKENS} fit; "
            "shorten it"
        )
    im_start, im_end = tokenizer.token_id(IM_START), tokenizer.token_id(IM_END)
    newline = tokenizer.encode("\n")
    system_ids: list[int] = []
    if config.system:
        system_ids = [im_start, *tokenizer.encode(f"system\n{config.system}"), im_end, *newline]
    return Prompt(
        prefix_ids=(*system_ids, im_start, *tokenizer.encode("user\n")),
        suffix_ids=(
            *newline,
            *instruction_ids,
            im_end,
            *newline,
            im_start,
            *tokenizer.encode("assistant\n"),
        ),
        instruction_ids=tuple(instruction_ids),
    )


def user_text(question: str, choices: Sequence[str] | None, config: PromptConfig) -> str:
    """The user's text after checking: the question and, on lines of their own, the choices.

    Raises:
        QuestionError: a question or choices that cannot be asked.
    """
    lines = [check_question(question)]
    if choices is not None:
        checked = check_choices(choices)
        lines += [config.choices_header, *(config.choice_prefix + choice for choice in checked)]
    return "\n".join(lines)


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
