r"""Answers that are exactly one of the given choices: decoded greedily along a trie, or scored.

Each choice is encoded as the model writes it as an answer (:class:`~tinygiant.runtime.config.
AnswerForm`; ``\n<RESPONSE>\n{choice}</RESPONSE>``, say), so that tokens that join a choice with its
surroundings are those the model was trained on. At each fork the most likely
*allowed* token wins; where only one is allowed, nothing is computed. It fails closed: choices whose
tokens cannot be told apart, or do not decode to the choice again, are refused before anything runs.

Without a thought, choices can be scored instead: the probability of each is that of writing it as a
whole, its end included: the closing tag, or the stop token of a model that has none. Lengths are
not normalised away: the texts exclude one another, so their probabilities, divided by their sum,
are the model's own given that it writes one of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .config import AnswerForm
from .decoder import Decoder, greedy
from .errors import BundleError, QuestionError
from .prompt import check_choices, format_choice
from .tokenizer import Tokenizer

__all__ = ["ChoiceNode", "ChoiceTrie", "probabilities"]


@dataclass
class ChoiceNode:
    """Where some choices have gone the same way: what may come next, or the one that has ended."""

    children: dict[int, ChoiceNode] = field(default_factory=dict)
    choice_index: int | None = None  # set in a leaf


class ChoiceTrie:
    """The allowed token sequences of one question's answer."""

    def __init__(
        self, sequences: Sequence[Sequence[int]], texts: Sequence[str] | None = None
    ) -> None:
        """Build the trie of ``sequences``, one a choice, none of them a prefix of another.

        ``texts`` are the choices as they are shown, which need not be as the model writes them.

        Raises:
            QuestionError: two choices have the same tokens, or one begins with another's.
        """
        self.root = ChoiceNode()
        for index, sequence in enumerate(sequences):
            node = self.root
            for token in sequence:
                if node.choice_index is not None:
                    raise _alike(node.choice_index, index)
                node = node.children.setdefault(token, ChoiceNode())
            if node.choice_index is not None or node.children:
                raise _alike(_first_leaf(node), index)
            node.choice_index = index
        self.sequences = tuple(map(tuple, sequences))
        self.texts = None if texts is None else tuple(texts)
        self.max_tokens = max(map(len, sequences), default=0)

    @classmethod
    def of_choices(
        cls, choices: Sequence[str], tokenizer: Tokenizer, form: AnswerForm, stop_id: int
    ) -> ChoiceTrie:
        """The trie of the answers that ``choices`` allow, in the model's ``form``.

        ``stop_id`` ends an answer that has no closing tag.

        Raises:
            QuestionError: choices that cannot be asked or told apart, or that the tokenizer cannot
                spell.
        """
        sequences = []
        end = [] if form.response_close else [stop_id]
        for index, choice in enumerate(check_choices(choices)):
            written = format_choice(form.choice_format, index, choice)
            written = written.lower() if form.lower_case else written
            text = f"{form.response_open}{written}{form.response_close}"
            ids = tokenizer.encode(text)
            if tokenizer.decode(ids) != text:
                raise QuestionError(
                    f"choice {index + 1} cannot be spelled by this model's tokenizer; reword it"
                )
            sequences.append([*ids, *end])
        return cls(sequences, check_choices(choices))

    def decode(
        self,
        read: Callable[[Sequence[int]], NDArray[np.float32]],
        unread: Sequence[int],
        choose: Callable[[NDArray[np.float32], Sequence[int]], int] | None = None,
    ) -> Generator[int, None, int]:
        """Yield the tokens of the most likely way to a leaf; returns the index of its choice.

        Args:
            read: feeds tokens to the decoder and returns the logits ``(V,)`` after the last; called
                at forks only, with every token yielded since its last call.
            unread: tokens before the answer that the decoder has not read yet, at least one.
            choose: takes what ``read`` returned and the allowed tokens in rising order, returns the
                most likely; the lowest id at a tie if None.

        Raises:
            BundleError: not a number among the logits of the allowed tokens.
        """
        choose = choose or _best_allowed
        node, pending = self.root, list(unread)
        while node.choice_index is None:
            if len(node.children) == 1:
                [token] = node.children
            else:
                token = choose(read(pending), sorted(node.children))
                pending = []
            yield token
            node = node.children[token]
            pending.append(token)
        return node.choice_index

    def log_likelihoods(self, decoder: Decoder, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logarithm of the probability of each choice after what ``decoder`` has read, ``(n,)``.

        What all choices begin with is read once; each then continues from there, and is forgotten
        again, so that the decoder ends where it was.

        Args:
            decoder: has read the prompt, and has room for the longest choice.
            logits: ``(V,)``, after the last token read.

        Raises:
            BundleError: not a number among the logits.
        """
        start = decoder.cache.length
        n_shared = _n_shared(self.sequences)
        shared = self.sequences[0][:n_shared]
        shared_score, logits = _continue(decoder, logits, shared, read_last=True)
        scores = []
        for sequence in self.sequences:
            score, _ = _continue(decoder, logits, sequence[n_shared:], read_last=False)
            decoder.truncate(start + n_shared)
            scores.append(shared_score + score)
        decoder.truncate(start)
        if np.isnan(scores).any():
            raise BundleError("a logit is NaN: the bundle's weights are damaged; export it again")
        return np.array(scores)


def probabilities(
    log_likelihoods: NDArray[np.float64], temperature: float = 1.0
) -> NDArray[np.float64]:
    """The likelihoods, to the power of 1 / temperature, divided by their sum: ``(n,) -> (n,)``."""
    likelihoods: NDArray[np.float64] = np.exp(
        (log_likelihoods - log_likelihoods.max()) / temperature
    )
    shares: NDArray[np.float64] = likelihoods / likelihoods.sum()
    return shares


def _n_shared(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda tokens: len({*tokens}) == 1, columns))


def _continue(
    decoder: Decoder, logits: NDArray[np.float32], tokens: Sequence[int], *, read_last: bool
) -> tuple[float, NDArray[np.float32]]:
    """Log-probability of ``tokens`` after ``logits (V,)``, and the logits after those read."""
    unread = tokens if read_last else tokens[:-1]
    rows = np.concatenate([logits[None], decoder.step(unread)]) if unread else logits[None]
    scores = rows[: len(tokens)].astype(np.float64)
    peaks = scores.max(axis=1)
    log_sums = np.log(np.exp(scores - peaks[:, None]).sum(axis=1)) + peaks
    score = float((scores[np.arange(len(tokens)), list(tokens)] - log_sums).sum())
    return score, rows[-1]


def _best_allowed(logits: NDArray[np.float32], allowed: Sequence[int]) -> int:
    """The most likely token of ``allowed``, the lowest id at a tie."""
    return allowed[greedy(logits[list(allowed)])]


def _first_leaf(node: ChoiceNode) -> int:
    while node.choice_index is None:
        node = next(iter(node.children.values()))
    return node.choice_index


def _alike(first: int, second: int) -> QuestionError:
    return QuestionError(
        f"choices {first + 1} and {second + 1} cannot be told apart by their tokens; reword one"
    )
