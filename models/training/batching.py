"""Which samples a step sees: a pure function of the seed and the batch's number.

Samples of like length share a batch, so that little is padding, yet the order is shuffled anew
each epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["LengthBatches"]

# Sorting within windows of this many batches keeps lengths alike and the epochs different.
_WINDOW_BATCHES = 40


class LengthBatches:
    """Endless batches of sample indices, of like length within a batch."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """``lengths`` of the samples in any unit; the last partial batch of an epoch is kept."""
        self._lengths = np.asarray(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._batches: list[list[int]] = []

    @property
    def batches_per_epoch(self) -> int:
        """Batches in which every sample is seen once."""
        return -(-len(self._lengths) // self._batch_size)

    def __getitem__(self, number: int) -> list[int]:
        """Sample indices of batch ``number``, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.batches_per_epoch)
        if epoch != self._epoch:
            self._batches = self._shuffled(epoch)
            self._epoch = epoch
        return self._batches[position]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self._seed, epoch))
        order = rng.permutation(len(self._lengths))
        window = self._batch_size * _WINDOW_BATCHES
        batches = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += [
                [int(i) for i in part[i : i + self._batch_size]]
                for i in range(0, len(part), self._batch_size)
            ]
        return [batches[i] for i in rng.permutation(len(batches))]
