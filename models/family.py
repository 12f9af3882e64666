"""The interface of a model family, and the list of families.

A family is one module of this package: its configuration as data, the modules that are new in it,
and :meth:`Family.open`, which makes a :class:`Model` of a checkpoint. The exporter walks the graphs
of ``model.config`` and asks for one part after another; it knows no family by name.
docs/adding-a-model.md goes through an example.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn

from tinygiant.runtime.bundle import SourceEntry
from tinygiant.runtime.config import ModelConfig
from tinygiant.runtime.errors import UsageError

__all__ = ["FAMILIES", "Family", "Model", "Part", "family"]


@dataclass(frozen=True, eq=False)
class Part:
    """A module that becomes one graph by tracing.

    Attributes:
        module: in evaluation mode; its forward takes ``inputs`` by name and returns a tensor, or a
            tuple of them.
        inputs: an example of every input, by the parameter's name, which the graph gets too. Sizes
            that vary are at least 2 in it.
        outputs: names of what it returns, in order.
        dynamic: by input, the axes that vary: ``{axis: torch.export.Dim(...)}``.
        exporter: what makes the graph: ``torch``, this project's own way, or ``optimum`` for a
            :class:`~tinygiant.models.transformers_encoder.TransformersEncoder`.
    """

    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, Any]] = field(default_factory=dict)
    exporter: Literal["torch", "optimum"] = "torch"


class Model(Protocol):
    """A model that can be exported. Large parts are read in the call that asks for them."""

    @property
    def config(self) -> ModelConfig:
        """The contract with the runtime."""
        ...

    def part(self, graph: str) -> Part:
        """The part behind one encoder's or the projector's graph.

        Raises:
            CheckpointError: tensors that do not fit, all named.
        """
        ...

    def decoder(self) -> nn.Module:
        """The language model, a causal one of transformers; the graph's builder knows Qwen3 and
        Llama."""
        ...

    def tokenizer(self) -> str:
        """The content of ``tokenizer.json``."""
        ...

    def entry(self) -> SourceEntry:
        """The source, for the manifest."""
        ...

    def notes(self) -> str:
        """Remarks of its makers, Markdown for the bundle's card; may be empty."""
        ...


@dataclass(frozen=True)
class Family:
    """One family: where its code is, and the form of its checkpoints.

    ``module`` is imported when the family is used; it has ``open_checkpoint(path) -> Model``, which
    may take options of its own.
    """

    name: str
    module: str
    checkpoint: str

    def open(self, path: Path, **options: Any) -> Model:
        """The model in ``path``; ``options`` are those of the family's ``open_checkpoint``.

        Raises:
            CheckpointError: it is no checkpoint of this family.
        """
        return cast(Model, importlib.import_module(self.module).open_checkpoint(path, **options))


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        found.name: found
        for found in (
            Family(
                "tinygiant",
                "tinygiant.models.sources",
                "a folder of this project: config.json, model.safetensors, tokenizer.json",
            ),
            Family(
                "mizar",
                "tinygiant.models.mizar",
                "the .ckpt of KaiyangLi/Mizar-159M, and SmolLM2-135M's tokenizer.json",
            ),
            Family(
                "mellow",
                "tinygiant.models.mellow",
                "v0.ckpt or v0_s.ckpt of soham97/mellow, and SmolLM2-135M's tokenizer.json",
            ),
            Family(
                "ultravox",
                "tinygiant.models.ultravox",
                "the .safetensors of fixie-ai/ultravox-v0_5-llama-3_2-1b, and the folder of "
                "Llama-3.2-1B-Instruct",
            ),
        )
    }
)
"""All families by name."""


def family(name: str) -> Family:
    """The family called ``name``.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in FAMILIES:
        raise UsageError(f"family {name!r} is unknown: choose one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
