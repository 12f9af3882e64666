"""Public audio-language models: a PyTorch state dict becomes a module, all of it accounted for.

The contract of :func:`load_public`: the file is read without running anything that it contains;
every tensor in it has a place in the module or is named as unknown, and every place is filled or
named as missing, all at once; and the constants that the file carries (filter bank, window,
resampling kernel) are those that the runtime computes, or the file is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_utils import no_init_weights

from tinygiant.runtime.errors import CheckpointError

from .tensors import PrefixedTensors, load_into, open_tensors

__all__ = ["Names", "PublicModel", "load_public"]

# Constants are compared with what other software computed, some of it in single precision.
_CONSTANT_TOLERANCE = 2e-5


class PublicModel(nn.Module):
    """A model of this kind in PyTorch: encoder, projector and decoder under the file's names."""

    @property
    @abstractmethod
    def decoder(self) -> LlamaForCausalLM:
        """The decoder."""

    @abstractmethod
    def encode(self, log_mel: Tensor) -> dict[str, Tensor]:
        """One window's features ``(1, n_frames, n_mels)`` -> the encoder's outputs by name."""

    @abstractmethod
    def project(self, **outputs: Tensor) -> Tensor:
        """The encoder's outputs -> rows ``(1, N, D)`` that enter the decoder."""

    @abstractmethod
    def constants(self) -> dict[str, tuple[Tensor, NDArray[Any]]]:
        """By name in the file: what it holds, and what this project computes in its place."""

    @staticmethod
    def renamed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The file's tensors under the module's names; here they are the same."""
        return tensors


class Names(nn.Module):
    """A module that only gives its children and buffers a place in the naming."""

    def __init__(self, **children: nn.Module | Tensor) -> None:
        super().__init__()
        for name, child in children.items():
            if isinstance(child, nn.Module):
                self.add_module(name, child)
            else:
                self.register_buffer(name, child)


def load_public(build: Callable[[], PublicModel], path: Path, mark: str) -> PublicModel:
    """Build a model and fill it from a checkpoint file, in evaluation mode, as float32.

    Args:
        build: makes the empty module.
        path: the checkpoint; the ``module.`` that data-parallel training puts before every name
            may be there or not.
        mark: what some name begins with if it is this model at all.

    Raises:
        CheckpointError: unreadable, another model, tensors that do not fit (all named), or
            features other than the runtime's.
    """
    tensors = open_tensors(path)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = PrefixedTensors(tensors, "module.")
    if not any(name.startswith(mark) for name in tensors):
        found = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path}: another model's checkpoint: expected tensors named {mark}*, found {found}"
        )
    with no_init_weights():
        model = build()
    load_into(model, model.renamed(tensors), where=str(path))
    for name, (held, ours) in model.constants().items():
        _check_constant(name, held.numpy(), ours, path)
    return model.eval()


def _check_constant(name: str, held: NDArray[Any], ours: NDArray[Any], path: Path) -> None:
    if held.shape == ours.shape:
        scale = float(np.abs(ours).max())
        error = float(np.abs(held.astype(np.float64) - ours).max()) / scale
        if error <= _CONSTANT_TOLERANCE:
            return
        found = f"it differs by {error:.1e} of its largest value"
    else:
        found = f"its shape is {held.shape}, expected {ours.shape}"
    raise CheckpointError(
        f"{path}: {name} is not what this model's features are made with here ({found}); "
        "a checkpoint of the published model is expected"
    )
