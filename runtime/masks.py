"""Which tokens may come next, so that a text keeps its form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BundleError
from .speculation import logit_margin

__all__ = ["ALL", "Guide", "Mask", "greedy"]


class Mask:
    """Which tokens may come next: ``only`` those in ``ids``, or all but those."""

    def __init__(self, ids: NDArray[np.intp], *, only: bool) -> None:
        """Take ``ids``, without repetition and in rising order."""
        self.ids = ids
        self.only = only

    def best(self, logits: NDArray[np.float32]) -> int:
        """The most likely allowed token of ``logits (V,)``, the lowest id at a tie.

        Raises:
            BundleError: not a number among the logits.
        """
        if self.only:
            return int(self.ids[greedy(logits[self.ids])])
        with self._applied(logits):
            return greedy(logits)

    def logit_margin(self, logits: NDArray[np.float32], token: int) -> float:
        """How far ``token`` lies above the next that is allowed, in standard deviations."""
        if self.only:
            return logit_margin(logits, token, self.ids.tolist())
        with self._applied(logits):
            return logit_margin(logits, token)

    @contextmanager
    def _applied(self, logits: NDArray[np.float32]) -> Iterator[None]:
        """What may not come has minus infinity; in place, for a copy takes longer."""
        kept = logits[self.ids]
        logits[self.ids] = -np.inf
        yield
        logits[self.ids] = kept


ALL = Mask(np.array([], np.intp), only=False)


class Guide(Protocol):
    """Keeps a text to a form."""

    @property
    def done(self) -> bool:
        """Whether the text has ended, forced tokens apart."""

    def forced(self) -> Sequence[int]:
        """Tokens that come next whatever the model wants; they count as taken."""

    def mask(self) -> Mask:
        """Which tokens may come next; a forced token is the only one."""

    def take(self, token: int) -> bool:
        """Go on with an allowed token; whether it is written."""


def greedy(logits: NDArray[np.float32]) -> int:
    """The id of the largest of ``logits (V,)``, the lowest id at a tie.

    Raises:
        BundleError: not a number among the logits, so the weights or the audio rows are broken.
    """
    token = int(logits.argmax())
    if np.isnan(logits[token]):
        raise BundleError("a logit is NaN: the bundle's weights are damaged; export it again")
    return token
