r"""Answers that are exactly one of the given choices: a trie of token sequences, decoded greedily.

Each choice is encoded in its context, ``\n<RESPONSE>\n{choice}</RESPONSE>``, so that tokens that
join a choice with its surroundings are those the model was trained on. At each fork the most likely
*allowed* token wins; where only one is allowed, nothing is computed. It fails closed: choices whose
tokens cannot be told apart, or do not decode to the choice again, are refused before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tinygiant.runtime.decoder import greedy
from tinygiant.runtime.errors import QuestionError
from tinygiant.runtime.prompt import check_choices
from tinygiant.runtime.tokenizer import Tokenizer

__all__ = ["RESPONSE_CLOSE", "RESPONSE_OPEN", "ChoiceTrie"]

RESPONSE_OPEN = "\n<RESPONSE>\n"
RESPONSE_CLOSE = "</RESPONSE>"


@dataclass
class _Node:
    children: dict[int, _Node] = field(default_factory=dict)
    choice_index: int | None = None  # set in a leaf


class ChoiceTrie:
    """The allowed token sequences of one question's answer."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        """Build the trie of ``sequences``, one a choice, none of them a prefix of another.

        Raises:
            QuestionError: two choices have the same tokens, or one begins with another's.
        """
        self._root = _Node()
        for index, sequence in enumerate(sequences):
            node = self._root
            for token in sequence:
                if node.choice_index is not None:
                    raise _alike(node.choice_index, index)
                node = node.children.setdefault(token, _Node())
            if node.choice_index is not None or node.children:
                raise _alike(_first_leaf(node), index)
            node.choice_index = index
        self.max_tokens = max(map(len, sequences), default=0)

    @classmethod
    def of_choices(cls, choices: Sequence[str], tokenizer: Tokenizer) -> ChoiceTrie:
        """The trie of the answers that ``choices`` allow.

        Raises:
            QuestionError: choices that cannot be asked or told apart, or that the tokenizer cannot
                spell.
        """
        sequences = []
        for number, choice in enumerate(check_choices(choices), start=1):
            text = f"{RESPONSE_OPEN}{choice}{RESPONSE_CLOSE}"
            ids = tokenizer.encode(text)
            if tokenizer.decode(ids) != text:
                raise QuestionError(f"choice {number} cannot be spelled by this model's tokenizer")
            sequences.append(ids)
        return cls(sequences)

    def decode(
        self, read: Callable[[Sequence[int]], NDArray[np.float32]], unread: Sequence[int]
    ) -> Generator[int, None, int]:
        """Yield the tokens of the most likely way to a leaf; returns the index of its choice.

        Args:
            read: feeds tokens to the decoder and returns the logits ``(V,)`` after the last; called
                at forks only, with every token yielded since its last call.
            unread: tokens before the answer that the decoder has not read yet, at least one.

        Raises:
            BundleError: not a number among the logits of the allowed tokens.
        """
        node, pending = self._root, list(unread)
        while node.choice_index is None:
            if len(node.children) == 1:
                [token] = node.children
            else:
                token = _best_allowed(read(pending), sorted(node.children))
                pending = []
            yield token
            node = node.children[token]
            pending.append(token)
        return node.choice_index


def _best_allowed(logits: NDArray[np.float32], allowed: list[int]) -> int:
    """The most likely token of ``allowed``, the lowest id at a tie."""
    return allowed[greedy(logits[allowed])]


def _first_leaf(node: _Node) -> int:
    while node.choice_index is None:
        node = next(iter(node.children.values()))
    return node.choice_index


def _alike(first: int, second: int) -> QuestionError:
    return QuestionError(
        f"choices {first + 1} and {second + 1} cannot be told apart by their tokens; reword one"
    )
