"""Where a model comes from: a checkpoint, public parts on disk, or seeded random weights.

The contract: a :class:`ModelSource` hands out one component at a time, so that no more than one
has to be in memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import Qwen3ForCausalLM

from tinygiant.models.checkpoint import (
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    load_component,
    load_config,
)
from tinygiant.models.config import TinyGiantConfig, preset
from tinygiant.models.parts import Parts, load_part, parts_config
from tinygiant.models.tinygiant import build_component
from tinygiant.runtime.bundle import SourceEntry
from tinygiant.runtime.config import AudioContext, config_to_dict
from tinygiant.runtime.errors import CheckpointError

__all__ = ["CheckpointSource", "ModelSource", "PartsSource", "RandomSource", "byte_tokenizer"]

# In a checkpoint's folder, optional: what the model was trained on, what it hears and what not.
NOTES_FILE = "notes.md"
_BLOCK_BYTES = 1 << 20


class ModelSource(Protocol):
    """A model that can be exported."""

    @property
    def config(self) -> TinyGiantConfig:
        """The model's configuration."""
        ...

    def component(self, name: str) -> nn.Module | None:
        """One component in evaluation mode; None if the model has none of that name."""
        ...

    def tokenizer(self) -> str:
        """The content of ``tokenizer.json``."""
        ...

    def entry(self) -> SourceEntry:
        """What the manifest says of the source."""
        ...

    def notes(self) -> str:
        """What its makers say of it, Markdown for the bundle's card; empty if nothing."""
        ...


class CheckpointSource:
    """A checkpoint folder of this project."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if ``path`` is not a checkpoint."""
        self._path = path
        self.config = load_config(path)

    def component(self, name: str) -> nn.Module | None:
        """See :class:`ModelSource`; raises CheckpointError for tensors that do not fit."""
        return load_component(self._path, name)

    def tokenizer(self) -> str:
        """See :class:`ModelSource`."""
        return _read_text(self._path / TOKENIZER_FILE)

    def entry(self) -> SourceEntry:
        """See :class:`ModelSource`; reads the whole weights file."""
        digest = _sha256([self._path / WEIGHTS_FILE])
        return SourceEntry(self._path.resolve().name, digest, "trained", None)

    def notes(self) -> str:
        """See :class:`ModelSource`: the checkpoint's ``NOTES_FILE``."""
        path = self._path / NOTES_FILE
        return _read_text(path) if path.is_file() else ""


class PartsSource:
    """Public checkpoints on disk, with a projector file or a seeded random projector."""

    def __init__(self, parts: Parts, seed: int) -> None:
        """Raises CheckpointError if the parts are not what they should be."""
        self._parts = parts
        self._seed = seed
        self.config = parts_config(parts)

    def component(self, name: str) -> nn.Module | None:
        """See :class:`ModelSource`; raises CheckpointError for tensors that do not fit."""
        return load_part(self._parts, self.config, name, seed=self._seed)

    def tokenizer(self) -> str:
        """See :class:`ModelSource`."""
        return _read_text(self._parts.qwen3 / TOKENIZER_FILE)

    def entry(self) -> SourceEntry:
        """See :class:`ModelSource`; reads every weights file."""
        parts = self._parts
        paths = (parts.whisper, parts.htsat, parts.clap, parts.qwen3, parts.projector)
        digest = _sha256([file for path in paths if path for file in _weight_files(path)])
        if parts.projector is None:
            return SourceEntry(self.config.name, digest, "seeded-random", self._seed)
        return SourceEntry(self.config.name, digest, "trained", None)

    def notes(self) -> str:
        """See :class:`ModelSource`."""
        return ""


@dataclass(frozen=True)
class RandomSource:
    """A preset with seeded random weights: for measuring, not for answers.

    Decoder weights are made so that greedy decoding does not hang on rounding; see :func:`_settle`.
    Without a tokenizer file the tokenizer is :func:`byte_tokenizer`.
    """

    preset_name: str
    seed: int
    tokenizer_file: Path | None = None
    audio_context: AudioContext | None = None

    @property
    def config(self) -> TinyGiantConfig:
        """The preset, with another audio context if one is named."""
        config = preset(self.preset_name)
        if self.audio_context is None:
            return config
        return dataclasses.replace(config, audio_context=self.audio_context)

    def component(self, name: str) -> nn.Module | None:
        """See :class:`ModelSource`."""
        module = build_component(self.config, name, self.seed)
        if isinstance(module, Qwen3ForCausalLM):
            _settle(module)
        return module

    def tokenizer(self) -> str:
        """See :class:`ModelSource`."""
        if self.tokenizer_file is not None:
            return _read_text(self.tokenizer_file)
        return byte_tokenizer(self.config)

    def entry(self) -> SourceEntry:
        """See :class:`ModelSource`; the hash is that of configuration and seed."""
        made_from = json.dumps([config_to_dict(self.config), self.seed], sort_keys=True)
        digest = hashlib.sha256(made_from.encode("utf-8")).hexdigest()
        return SourceEntry(self.config.name, digest, "seeded-random", self.seed)

    def notes(self) -> str:
        """See :class:`ModelSource`."""
        return ""


@torch.no_grad()
def _settle(decoder: Qwen3ForCausalLM) -> None:
    """Give random weights the proportions of trained ones.

    transformers draws everything with a deviation of 0.02: each layer then drowns what came before,
    errors grow from layer to layer (at full size, 4-bit weights change the logits by 36 %), and the
    two best logits nearly tie. Embeddings of deviation 1 (PyTorch's default) and residual
    projections divided by the root of their number (GPT-2's initialisation) keep the embedding in
    the sum, and rounding from deciding.
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


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.ckpt")
    return sorted(file for kind in kinds for file in path.glob(kind))


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
