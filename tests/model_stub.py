"""Small models: a decoder of transformers, one in memory to export, graphs not traced again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinygiant.export.decoder import DecoderSpec
from tinygiant.models.config import TinyGiantConfig
from tinygiant.models.family import Part
from tinygiant.models.sources import TinyGiantSource
from tinygiant.models.tinygiant import TinyGiantALM
from tinygiant.quantize import load_graph
from tinygiant.runtime.bundle import SourceEntry


def small_qwen3(config: DecoderSpec, *, tied: bool = True) -> Qwen3ForCausalLM:
    """transformers' Qwen3 of a decoder's dimensions, with weights of torch's generator."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.ffn_size,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()


class MemorySource(TinyGiantSource):
    """A model that is in memory already."""

    def __init__(self, model: TinyGiantALM, tokenizer_file: Path) -> None:
        self._model, self._tokenizer = model, tokenizer_file

    @property
    def details(self) -> TinyGiantConfig:
        return self._model.config

    def component(self, name: str) -> nn.Module | None:
        module: nn.Module | None = getattr(self._model, name)
        return module

    def tokenizer(self) -> str:
        return self._tokenizer.read_text(encoding="utf-8")

    def entry(self) -> SourceEntry:
        return SourceEntry("tiny", "0" * 64, "seeded-random", 7)


def use_traced_graphs(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, modules: Iterable[object]
) -> None:
    """``modules`` take the graphs of encoders and projector from ``bundle``: no tracing again."""

    def traced(part: Part) -> ir.Model:
        name = next(name for name, outputs in _OUTPUTS.items() if outputs == part.outputs[0])
        return load_graph(bundle / "onnx" / f"{name}.onnx")

    for module in modules:
        monkeypatch.setattr(module, "trace", traced)


_OUTPUTS = {"whisper_encoder": "temporal", "htsat_encoder": "events", "projector": "audio_embeds"}


def disturb(module: nn.Module) -> None:
    """Add noise to all weights: those of norms would else be 1, which hides a norm left out."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.1))
