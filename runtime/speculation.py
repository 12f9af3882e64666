"""Drafts for the decoder: guesses at the next tokens, how many to check, and when to recompute.

Prompt lookup: if the last few tokens occurred before, in the prompt, in the answer so far or in
earlier answers of the same model, the tokens that followed them there are the draft. Checking ``d``
drafted tokens in one step costs less than ``d`` steps of one, so a text that repeats itself is
written faster. Only the time changes, never the tokens (:mod:`~tinygiant.runtime.drafting` sees to
that).

:class:`Speculation` lives as long as the model: it holds earlier answers, how often drafts were
right, what steps cost on this machine, and the logit margin from which a token of a draft is
accepted. A :class:`Drafter` lives as long as one answer. Prompt lookup is after A. Saxena (2023),
transformers' ``prompt_lookup_num_tokens``; the choice of a length after Leviathan et al. (2023),
section 3.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_DRAFT_TOKENS", "Drafter", "NgramIndex", "Speculation", "logit_margin"]

MAX_DRAFT_TOKENS = 15
_LONGEST_NGRAM, _SHORTEST_NGRAM = 4, 1
_MEMORY_TOKENS = 8_192  # some 5 MB
_BREAK = -1  # between texts that do not follow one another

# Logits of a step of many tokens differ from those of single steps: sums are rounded in another
# order, and where activations are quantized to 8 bits such a difference may move a value by a step.
# How far they differ is seen whenever a near tie is computed again; until enough was seen, the
# least margin is one that is wide for every recipe measured so far (docs/decisions.md).
_MIN_MARGIN = 0.15  # in standard deviations of the logits
_LEAST_MARGIN = 0.01
_MARGIN_FACTOR = 8.0
_ENOUGH_SEEN = 16

_ACCEPTANCE = 0.7  # before anything is known
_ACCEPTANCE_RATE = 0.1  # weight of one drafted token
_STEP_COST = 0.4  # of each token beyond the first, in steps of one; before anything is known
_COST_RATE = 0.05  # weight of one step
_MIN_GAIN = 1.05  # a draft must promise as much, for the promise is an estimate
_TRY_AGAIN = 16  # answers after which the slower way is tried again


class NgramIndex:
    """Tokens, and where each sequence of 1 to 4 of them occurred last."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it begins

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Add tokens that follow those before."""
        for token in tokens:
            end = len(self._tokens)
            for n in range(_SHORTEST_NGRAM, _LONGEST_NGRAM + 1):
                ngram = tuple(self._tokens[max(end - n, 0) : end])
                if len(ngram) < n or ngram[0] == _BREAK:
                    break
                self._after[ngram] = end
            self._tokens.append(token)

    def close(self) -> None:
        """End a text: what is added next does not follow it."""
        self._tokens.append(_BREAK)

    def match(self, context: Sequence[int]) -> tuple[int, int]:
        """Length of the longest known ending of ``context``, 0 if none, and where to go on."""
        for n in range(min(_LONGEST_NGRAM, len(context)), _SHORTEST_NGRAM - 1, -1):
            position = self._after.get(tuple(context[-n:]))
            if position is not None:
                return n, position
        return 0, 0

    def copy(self, position: int, limit: int) -> list[int]:
        """At most ``limit`` tokens from ``position`` on; a text that ends goes round again."""
        found: list[int] = []
        while len(found) < limit:
            rest = self._tokens[position : position + limit - len(found)]
            known = list(takewhile(lambda token: token != _BREAK, rest))
            found += known
            if len(known) < len(rest):
                break
        return found


class Speculation:
    """Statistics about drafts, learned while a model answers."""

    def __init__(self, min_margin: float = _MIN_MARGIN) -> None:
        """Start without any knowledge; ``min_margin`` is in standard deviations of the logits."""
        self.min_margin = min_margin
        self._n_differences, self._largest_difference = 0, 0.0
        self.memory = NgramIndex()
        self._acceptance = [_ACCEPTANCE] * (_LONGEST_NGRAM + 1)  # by length of the match
        self._single_s = 0.0
        self._token_cost = _STEP_COST
        self._reread_s = 0.0  # for each draft
        self._n_answers = 0
        self._token_s: dict[bool, float] = {}  # of answers with drafts, and of those without

    def start(self, texts: Iterable[Sequence[int]], stop_ids: Collection[int]) -> Drafter:
        """A drafter for one answer after ``texts``, which holds no token of ``stop_ids``."""
        return Drafter(self, texts, stop_ids)

    def is_worth_it(self) -> bool:
        """Whether the next answer is to be drafted.

        The first is, the second is not; then whichever was faster, and at times the other again.
        """
        if len(self._token_s) < 2:
            return not self._token_s
        drafts_are_faster = self._token_s[True] < self._token_s[False]
        return drafts_are_faster != (self._n_answers % _TRY_AGAIN == 0)

    def remember(self, answer: Sequence[int], seconds: float, *, drafted: bool) -> None:
        """Keep an answer for the drafts of later ones, and how long it took to write."""
        self._n_answers += 1
        if answer:
            token_s = seconds / len(answer)
            known = self._token_s.get(drafted, token_s)
            self._token_s[drafted] = known + 0.3 * (token_s - known)
        if len(self.memory) + len(answer) > _MEMORY_TOKENS:
            self.memory = NgramIndex()
        self.memory.extend(answer)
        self.memory.close()

    def length(self, match: int, limit: int) -> int:
        """How many of ``limit`` tokens to draft after a match of ``match``; 0 if it does not pay.

        The one with the most tokens for the time: each is right with the probability seen so far,
        given that those before it are.
        """
        acceptance = self._acceptance[match]
        best, best_gain, tokens, chance = 0, _MIN_GAIN, 1.0, 1.0
        fixed = 1.0 + (self._reread_s / self._single_s if self._single_s else 0.0)
        for n_drafted in range(1, min(limit, MAX_DRAFT_TOKENS) + 1):
            chance *= acceptance
            tokens += chance
            gain = tokens / (fixed + self._token_cost * n_drafted)
            if gain > best_gain:
                best, best_gain = n_drafted, gain
        return best

    def learn_acceptance(self, match: int, n_right: int, *, missed: bool) -> None:
        """Take in that ``n_right`` tokens after such a match were right, and the next one not."""
        for right in [1.0] * n_right + [0.0] * missed:
            self._acceptance[match] += _ACCEPTANCE_RATE * (right - self._acceptance[match])

    def learn_cost(self, n_tokens: int, seconds: float) -> None:
        """Take in how long a step took."""
        if n_tokens == 1:
            # Sooner down than up: the first steps after loading, and disturbed ones, take longer.
            rate = _COST_RATE if seconds > self._single_s else 0.5
            self._single_s += (seconds - self._single_s) * (rate if self._single_s else 1.0)
            self._reread_s *= 1.0 - _COST_RATE / 10  # forgotten slowly, so that drafts come back
        elif self._single_s:
            cost = (seconds / self._single_s - 1.0) / (n_tokens - 1)
            self._token_cost += _COST_RATE * (min(max(cost, 0.0), 1.0) - self._token_cost)

    def learn_reread(self, seconds: float) -> None:
        """Take in how long it took to read again what was drafted; 0 after a draft without that."""
        self._reread_s += _COST_RATE * (seconds - self._reread_s)

    def learn_difference(self, found: float, exact: float) -> None:
        """Fit the least margin to the same margin after both kinds of step."""
        self._n_differences += 1
        self._largest_difference = max(self._largest_difference, abs(found - exact))
        wide = _MARGIN_FACTOR * self._largest_difference
        if self._n_differences >= _ENOUGH_SEEN:
            self.min_margin = max(wide, _LEAST_MARGIN)
        else:
            self.min_margin = max(wide, self.min_margin)


class Drafter:
    """Drafts for one answer.

    Attributes:
        n_drafted: tokens that were drafted.
        n_accepted: of those, how many were right.
    """

    def __init__(
        self, speculation: Speculation, texts: Iterable[Sequence[int]], stop_ids: Collection[int]
    ) -> None:
        """See :meth:`Speculation.start`."""
        self.speculation = speculation
        self.n_drafted = 0
        self.n_accepted = 0
        self._stop_ids = stop_ids
        self._own = NgramIndex()
        for text in texts:
            self._own.extend(text)
            self._own.close()
        self._context: list[int] = []
        self._match = 0
        self._guess: list[int] = []
        self._n_checked = 0

    def draft(self, limit: int) -> list[int]:
        """At most ``limit`` tokens that may come next; none where checking them does not pay."""
        candidates = [(*index.match(self._context), index) for index in self._indexes()]
        self._match, position, index = max(candidates, key=lambda found: found[0])
        self._guess, self._n_checked = [], 0
        if self._match and limit > 0:
            copied = index.copy(position, min(limit, MAX_DRAFT_TOKENS))
            self._guess = list(takewhile(lambda token: token not in self._stop_ids, copied))
            self._n_checked = self.speculation.length(self._match, len(self._guess))
        return self._guess[: self._n_checked]

    def take(self, tokens: Sequence[int]) -> None:
        """Go on with the ``tokens`` that were written since the last draft.

        A guess that was not checked is compared too, so that drafts begin again once they pay.
        """
        pairs = zip(self._guess, tokens, strict=False)
        n_right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._match and self._guess:
            limit = max(self._n_checked, 1)
            right = min(n_right, limit)
            missed = right < min(limit, len(tokens))
            self.speculation.learn_acceptance(self._match, right, missed=missed)
        self.n_drafted += self._n_checked
        self.n_accepted += min(n_right, self._n_checked)
        self._guess, self._n_checked, self._match = [], 0, 0
        self._own.extend(tokens)
        self._context = [*self._context, *tokens][-_LONGEST_NGRAM:]

    def _indexes(self) -> tuple[NgramIndex, NgramIndex]:
        return self._own, self.speculation.memory


def logit_margin(
    logits: NDArray[np.float32], best: int, among: Sequence[int] | None = None
) -> float:
    """How far the logit ``best`` of ``(V,)`` lies above the next, in standard deviations of all.

    ``among`` limits the comparison to some ids.
    """
    if among is not None:
        others = [float(logits[token]) for token in among if token != best]
        runner_up = max(others, default=-np.inf)
    else:
        sides = (logits[:best], logits[best + 1 :])
        runner_up = max((float(side.max()) for side in sides if side.size), default=-np.inf)
    return (float(logits[best]) - runner_up) / _deviation(logits)


def _deviation(logits: NDArray[np.float32]) -> float:
    """The standard deviation of some 4,096 logits: all would take as long as the arg-max."""
    sample = logits[:: max(1, logits.size // 4_096)]
    sample = sample[np.isfinite(sample)]  # a mask leaves minus infinity
    return float(sample.std() if sample.size else 0.0) or 1.0
