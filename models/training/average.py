"""The mean of several checkpoints' weights.

Runs that went on from one another differ in what they overfitted, and agree on the rest: the mean
of their weights answers held-out questions better than any one of them (model soups, Wortsman et
al., ICML 2022). Encoders are not averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tinygiant.runtime.errors import UsageError

from ..checkpoint import TOKENIZER_FILE, load, load_config, save

__all__ = ["average"]

_PARTS = ("projector", "decoder")


def average(checkpoints: Sequence[Path], target: Path) -> None:
    """Write a checkpoint whose projector and decoder are the mean of those of ``checkpoints``.

    Encoders, tokenizer and configuration are the first one's.

    Raises:
        UsageError: fewer than two checkpoints, or one of another model than the first.
        CheckpointError: a folder is no checkpoint.
        StorageError: ``target`` cannot be written.
    """
    if len(checkpoints) < 2:
        raise UsageError("name at least two checkpoints to average")
    first, *others = checkpoints
    config, tokenizer = load_config(first), (first / TOKENIZER_FILE).read_bytes()
    for other in others:
        if load_config(other) != config:
            raise UsageError(f"{other}: of another configuration than {first}; average runs of one")
        if (other / TOKENIZER_FILE).read_bytes() != tokenizer:
            raise UsageError(f"{other}: of another tokenizer than {first}; average runs of one")
    model = load(first)
    for number, other in enumerate(others, start=2):
        theirs = load(other)
        for part in _PARTS:
            added = _tensors(getattr(theirs, part))
            for name, mean in _tensors(getattr(model, part)).items():
                if torch.is_floating_point(mean):
                    mean.data.lerp_(added[name].data.to(mean.dtype), 1.0 / number)
    save(model, target, tokenizer=first / TOKENIZER_FILE)


def _tensors(part: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers, those that are tied once."""
    return dict(part.named_parameters()) | dict(part.named_buffers())
