"""Public audio-language models: a PyTorch state dict becomes a module, all of it accounted for.

The contract of :func:`load_public`: the file is read without running anything that it contains;
every tensor in it has a place in the module or is named as unknown, and every place is filled or
named as missing, all at once; and the constants that the file carries (filter bank, window,
resampling kernel) are those that the runtime computes, or the file is refused.

:class:`PublicSource` hands such a model to the exporter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tinygiant.runtime.bundle import SourceEntry
from tinygiant.runtime.config import LogMel, ModelConfig
from tinygiant.runtime.errors import CheckpointError, UsageError

from .family import Part
from .hub import HubFile, locate, sha256_of
from .smollm2 import SMOLLM2_PROBE, TOKENIZER, Probe, read_tokenizer
from .tensors import PrefixedTensors, load_into, open_tensors

__all__ = ["Names", "PublicKind", "PublicModel", "PublicSource", "load_public", "open_public"]

# Constants are compared with what other software computed, some of it in single precision.
_CONSTANT_TOLERANCE = 2e-5


class PublicModel(nn.Module):
    """A model in PyTorch: encoder, mapper and decoder, under the names of its checkpoint."""

    @property
    @abstractmethod
    def composition(self) -> ModelConfig:
        """The model as the runtime knows it."""

    @property
    @abstractmethod
    def encoder(self) -> nn.Module:
        """``input_features (1, 1, n_frames, n_mels)`` -> the encoder's outputs, in their order."""

    @property
    @abstractmethod
    def mapper(self) -> nn.Module:
        """The projector's inputs, by name -> rows ``(1, N, D)`` that enter the decoder."""

    @property
    @abstractmethod
    def decoder(self) -> LlamaForCausalLM:
        """The language model."""

    @abstractmethod
    def constants(self) -> dict[str, tuple[Tensor, NDArray[Any]]]:
        """By name in the file: what it holds, and what this project computes in its place."""

    @staticmethod
    def renamed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The file's tensors under the module's names; here they are the same."""
        return tensors


@dataclass(frozen=True, eq=False)
class PublicKind:
    """One public model, without its weights.

    Attributes:
        build: makes the module, not filled yet.
        mark: beginning of a tensor's name that shows that a file holds this model.
        checkpoint: the published file.
        licence: of weights and code, in words.
        notes: for the bundle's card, Markdown: origin, published scores, warnings.
        probe: how the tokenizer is recognised; None if any of the decoder's size will do.
    """

    build: Callable[[], PublicModel]
    mark: str
    checkpoint: HubFile
    licence: str
    notes: str
    probe: Probe | None = SMOLLM2_PROBE


class PublicSource:
    """A :class:`~tinygiant.models.family.Model` from a published checkpoint and tokenizer.

    Weights are mapped from the file, so all parts together take no more memory than one.
    """

    def __init__(self, kind: PublicKind, checkpoint: Path, tokenizer: Path) -> None:
        """Raises CheckpointError if one of the two files is not what it should be."""
        self._kind, self._path = kind, checkpoint
        self._model = load_public(kind, checkpoint)
        self._tokenizer = read_tokenizer(tokenizer, self.config.decoder.vocab_size, kind.probe)

    @cached_property
    def config(self) -> ModelConfig:
        """See :class:`~tinygiant.models.family.Model`."""
        return self._model.composition

    def part(self, graph: str) -> Part:
        """See :class:`~tinygiant.models.family.Model`."""
        (encoder,) = self.config.encoders
        if graph == encoder.graph:
            assert isinstance(encoder.features, LogMel)
            example = torch.zeros(1, 1, encoder.n_frames, encoder.features.n_mels)
            outputs = tuple(output.name for output in encoder.outputs)
            return Part(self._model.encoder, {encoder.input: example}, outputs)
        inputs = {}
        for wanted in self.config.projector.inputs:
            size = sum(self.config.outputs[part][1].size for part in wanted.parts)
            rows = () if wanted.rows is None else (wanted.rows,)
            inputs[wanted.name] = torch.zeros(1, *rows, size)
        return Part(self._model.mapper.eval(), inputs, self.config.projector.outputs)

    def decoder(self) -> nn.Module:
        """See :class:`~tinygiant.models.family.Model`."""
        return self._model.decoder

    def tokenizer(self) -> str:
        """See :class:`~tinygiant.models.family.Model`."""
        return self._tokenizer

    def entry(self) -> SourceEntry:
        """See :class:`~tinygiant.models.family.Model`; reads the whole file."""
        return SourceEntry(
            self._path.name,
            sha256_of(self._path),
            "trained",
            None,
            origin=f"https://huggingface.co/{self._kind.checkpoint.repo}",
            licence=self._kind.licence,
        )

    def notes(self) -> str:
        """See :class:`~tinygiant.models.family.Model`."""
        return self._kind.notes


class Names(nn.Module):
    """A module that only gives its children and buffers a place in the naming."""

    def __init__(self, **children: nn.Module | Tensor) -> None:
        super().__init__()
        for name, child in children.items():
            if isinstance(child, nn.Module):
                self.add_module(name, child)
            else:
                self.register_buffer(name, child)


def open_public(
    kind: PublicKind,
    checkpoint: Path,
    tokenizer: Path | None = None,
    *,
    allow_download: bool = False,
) -> PublicSource:
    """A public model from files on this disk, or from the Hugging Face Hub.

    Args:
        kind: which model.
        checkpoint: the published file, or a name as :func:`~tinygiant.models.hub.locate` takes it.
        tokenizer: ``tokenizer.json`` or its folder; None for the published one.
        allow_download: whether missing files may be fetched.

    Raises:
        UsageError: no tokenizer, and none may be fetched.
        CheckpointError: a file is missing, or is not what it should be.
    """
    if tokenizer is None and not allow_download:
        raise UsageError(
            "the model's tokenizer is missing: name SmolLM2-135M's tokenizer.json with "
            "--tokenizer, or let it be fetched with --allow-download"
        )
    text = locate(str(tokenizer or TOKENIZER.repo), TOKENIZER, allow_download=allow_download)
    path = locate(str(checkpoint), kind.checkpoint, allow_download=allow_download)
    return PublicSource(kind, path, text)


def load_public(kind: PublicKind, path: Path) -> PublicModel:
    """Build a model and fill it from a checkpoint file, in evaluation mode, as float32.

    The ``module.`` that data-parallel training puts before every name may be there or not.

    Raises:
        CheckpointError: unreadable, another model, tensors that do not fit (all named), or
            features other than the runtime's.
    """
    tensors = open_tensors(path)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = PrefixedTensors(tensors, "module.")
    if not any(name.startswith(kind.mark) for name in tensors):
        found = ", ".join(sorted(tensors)[:3]) or "no tensors"
        raise CheckpointError(
            f"{path}: another model's checkpoint: expected tensors named {kind.mark}*, "
            f"found {found}"
        )
    model = kind.build()
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
        f"{path}: {name} differs from this project's ({found}); "
        "a checkpoint of the published model is expected"
    )
