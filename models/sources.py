"""Where a TinyGiantALM comes from: a checkpoint, public parts on disk, or seeded random weights.

Each source is a :class:`~tinygiant.models.family.Model`, and hands out one component at a time, so
that no more than one has to be in memory.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import Qwen3ForCausalLM

from tinygiant.runtime.bundle import SourceEntry
from tinygiant.runtime.config import AudioContext, ModelConfig, config_to_dict
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.files import sha256

from .checkpoint import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    load_component,
    load_config,
)
from .config import TinyGiantConfig, preset
from .family import Part
from .graphs import graph_part
from .parts import Parts, load_part, parts_config
from .tinygiant import build_component

__all__ = [
    "CheckpointSource",
    "PartsSource",
    "RandomSource",
    "TinyGiantSource",
    "byte_tokenizer",
    "open_checkpoint",
    "weight_files",
]

# In a checkpoint's folder, optional: the training data of the model, and its limits.
NOTES_FILE = "notes.md"


class TinyGiantSource(abc.ABC):
    """The sources' common part: components of a :class:`TinyGiantConfig` as parts to export."""

    @property
    @abc.abstractmethod
    def details(self) -> TinyGiantConfig:
        """The configuration in PyTorch's terms."""

    @abc.abstractmethod
    def component(self, name: str) -> nn.Module | None:
        """One component in evaluation mode; None if the model has none of that name.

        Raises:
            CheckpointError: tensors that do not fit.
        """

    @property
    def config(self) -> ModelConfig:
        """See :class:`~tinygiant.models.family.Model`."""
        return self.details.runtime

    def part(self, graph: str) -> Part:
        """See :class:`~tinygiant.models.family.Model`."""
        return graph_part(self.details, graph, self._needed)

    def decoder(self) -> nn.Module:
        """See :class:`~tinygiant.models.family.Model`."""
        return self._needed("decoder")

    def notes(self) -> str:
        """See :class:`~tinygiant.models.family.Model`."""
        return ""

    def _needed(self, name: str) -> nn.Module:
        module = self.component(name)
        if module is None:
            raise CheckpointError(f"the model has no {name}, which its configuration needs")
        return module


def open_checkpoint(path: Path) -> CheckpointSource:
    """The checkpoint folder ``path``; raises CheckpointError if it is none."""
    return CheckpointSource(path)


class CheckpointSource(TinyGiantSource):
    """A checkpoint folder of this project."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if ``path`` is not a checkpoint."""
        self._path = path
        self._details = load_config(path)

    @property
    def details(self) -> TinyGiantConfig:
        """See :class:`TinyGiantSource`."""
        return self._details

    def component(self, name: str) -> nn.Module | None:
        """See :class:`TinyGiantSource`; raises CheckpointError for tensors that do not fit."""
        return load_component(self._path, name)

    def tokenizer(self) -> str:
        """See :class:`TinyGiantSource`."""
        return _read_text(self._path / TOKENIZER_FILE)

    def entry(self) -> SourceEntry:
        """See :class:`TinyGiantSource`; reads the whole weights file."""
        digest = sha256([self._path / WEIGHTS_FILE])
        return SourceEntry(self._path.resolve().name, digest, "trained", None)

    def notes(self) -> str:
        """See :class:`TinyGiantSource`: the checkpoint's ``NOTES_FILE``."""
        path = self._path / NOTES_FILE
        return _read_text(path) if path.is_file() else ""


class PartsSource(TinyGiantSource):
    """Public checkpoints on disk, with a projector file or a seeded random projector."""

    def __init__(self, parts: Parts, seed: int) -> None:
        """Raises CheckpointError if the parts are not what they should be."""
        self._parts = parts
        self._seed = seed
        self._details = parts_config(parts)

    @property
    def details(self) -> TinyGiantConfig:
        """See :class:`TinyGiantSource`."""
        return self._details

    def component(self, name: str) -> nn.Module | None:
        """See :class:`TinyGiantSource`; raises CheckpointError for tensors that do not fit."""
        return load_part(self._parts, self._details, name, seed=self._seed)

    def tokenizer(self) -> str:
        """See :class:`TinyGiantSource`."""
        return _read_text(self._parts.qwen3 / TOKENIZER_FILE)

    def entry(self) -> SourceEntry:
        """See :class:`TinyGiantSource`; reads every weights file."""
        parts = self._parts
        paths = (parts.whisper, parts.htsat, parts.clap, parts.qwen3, parts.projector)
        digest = sha256([file for path in paths if path for file in weight_files(path)])
        if parts.projector is None:
            return SourceEntry(self.details.name, digest, "seeded-random", self._seed)
        return SourceEntry(self.details.name, digest, "trained", None)


@dataclass(frozen=True)
class RandomSource(TinyGiantSource):
    """A preset with seeded random weights: for measuring, not for answers.

    Decoder weights are made so that greedy decoding does not hang on rounding; see :func:`_settle`.
    Without a tokenizer file the tokenizer is :func:`byte_tokenizer`.
    """

    preset_name: str
    seed: int
    tokenizer_file: Path | None = None
    audio_context: AudioContext | None = None

    @property
    def details(self) -> TinyGiantConfig:
        """The preset, with another audio context if one is named."""
        config = preset(self.preset_name)
        if self.audio_context is None:
            return config
        return dataclasses.replace(config, audio_context=self.audio_context)

    def component(self, name: str) -> nn.Module | None:
        """See :class:`TinyGiantSource`."""
        module = build_component(self.details, name, self.seed)
        if isinstance(module, Qwen3ForCausalLM):
            _settle(module)
        return module

    def tokenizer(self) -> str:
        """See :class:`TinyGiantSource`."""
        if self.tokenizer_file is not None:
            return _read_text(self.tokenizer_file)
        return byte_tokenizer(self.details)

    def entry(self) -> SourceEntry:
        """See :class:`TinyGiantSource`; the hash is that of configuration and seed."""
        made_from = json.dumps([config_to_dict(self.details), self.seed], sort_keys=True)
        digest = hashlib.sha256(made_from.encode("utf-8")).hexdigest()
        return SourceEntry(self.details.name, digest, "seeded-random", self.seed)


@torch.no_grad()
def _settle(decoder: Qwen3ForCausalLM) -> None:
    """Give random weights the proportions of trained ones.

    transformers draws everything with a standard deviation of 0.02: each layer then drowns what
    came before, errors grow from layer to layer (at full size, 4-bit weights change the logits by
    36 %), and the two best logits nearly tie. Embeddings of standard deviation 1 (PyTorch's
    default) and residual projections divided by the root of their number (GPT-2's initialisation)
    keep the embedding in the sum, and rounding from deciding.
    """
    layers = decoder.model.layers
    decoder.model.embed_tokens.weight.div_(decoder.config.initializer_range)
    for layer in layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.div_((2 * len(layers)) ** 0.5)


def byte_tokenizer(config: TinyGiantConfig) -> str:
    """A ``tokenizer.json`` with one token a byte, and Qwen3's control tokens at the model's ids.

    Random weights know no language, and Qwen3's own tokenizer is not ours to ship.
    """
    im_end, end_of_text = config.eos_token_ids
    control = {
        "<|endoftext|>": end_of_text,
        "<|im_start|>": im_end - 1,
        "<|im_end|>": im_end,
        "<think>": config.think_end_token_id - 1,
        "</think>": config.think_end_token_id,
    }
    free_ids = (index for index in range(512) if index not in control.values())
    vocabulary = {byte: next(free_ids) for byte in sorted(ByteLevel.alphabet())}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": index, "content": token, "special": token.startswith("<|"), **flags}
                for token, index in sorted(control.items(), key=lambda item: item[1])
            ],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
            "post_processor": None,
            "decoder": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            },
            "model": {"type": "BPE", "vocab": vocabulary | control, "merges": []},
        },
        ensure_ascii=False,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error})") from error


def weight_files(path: Path) -> list[Path]:
    """The files with weights in a folder, sorted; a file is its own."""
    if path.is_file():
        return [path]
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.ckpt")
    return sorted(file for kind in kinds for file in path.glob(kind))
