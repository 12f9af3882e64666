"""A small decoder of transformers, and graphs that need not be traced again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM

from tinygiant.quantize import load_graph
from tinygiant.runtime.config import DecoderConfig


def small_qwen3(config: DecoderConfig, *, tied: bool = True) -> Qwen3ForCausalLM:
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


def use_traced_graphs(
    monkeypatch: pytest.MonkeyPatch, bundle: Path, modules: Iterable[object]
) -> None:
    """``modules`` take the graphs of encoders and projector from ``bundle``: no tracing again."""
    graphs = {
        "export_temporal_encoder": "whisper_encoder",
        "export_event_encoder": "htsat_encoder",
        "export_projector": "projector",
    }
    for function, name in graphs.items():
        path = bundle / "onnx" / f"{name}.onnx"
        for module in modules:
            replacement = lambda *_, path=path: load_graph(path)  # noqa: E731
            monkeypatch.setattr(module, function, replacement, raising=False)
