"""Ultravox in small: its two checkpoints as published, and a tokenizer of Llama 3's kind."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tinygiant.models.ultravox import UltravoxConfig, UltravoxProjector

CONTROL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip
EOT, END = 5, 1
VOCABULARY = 280
WIDTH = 64
N_HEADS = 3

LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16_384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    # Of the eight frequencies one is stretched, some are mixed, the others kept.
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": [1, 2, 5],
    "torch_dtype": "bfloat16",
}  # fmt: skip


def small_sizes() -> UltravoxConfig:
    whisper = WhisperConfig(
        d_model=48, encoder_layers=2, encoder_attention_heads=N_HEADS, encoder_ffn_dim=96,
        num_mel_bins=128, max_source_positions=1_500, attn_implementation="sdpa",
    )  # fmt: skip
    return UltravoxConfig(whisper, projector_size=160)


def llama_config() -> LlamaConfig:
    return LlamaConfig(**LLAMA, attn_implementation="sdpa")


def audio_state() -> dict[str, Tensor]:
    """Weights that show every mistake, in the precision of the published file."""
    sizes = small_sizes()
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            "audio_tower": WhisperEncoder(sizes.whisper),
            "multi_modal_projector": UltravoxProjector(sizes, WIDTH),
        }
    return {
        f"{part}.{name}": tensor.bfloat16()
        for seed, (part, module) in enumerate(modules.items())
        for name, tensor in drawn(module, seed).items()
    }


def llama_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        module = LlamaForCausalLM(llama_config())
    state = drawn(module, 2)
    del state["lm_head.weight"]  # tied: not in the published file
    return {name: tensor.bfloat16() for name, tensor in state.items()}


def drawn(module: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() == 1:
            state[name] = 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
        else:
            state[name] = 1.5 * noise / tensor[0].numel() ** 0.5
    return state


def write_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Ultravox's file and Llama's folder."""
    checkpoint, llama = folder / "ultravox.safetensors", folder / "llama"
    save_file(audio_state(), checkpoint)
    llama.mkdir()
    save_file(llama_state(), llama / "model.safetensors")
    (llama / "config.json").write_text(json.dumps(LLAMA))
    (llama / "tokenizer.json").write_text(small_tokenizer())
    return checkpoint, llama


def small_tokenizer() -> str:
    """Llama 3's control tokens, then bytes; it adds the first token unless told not to."""
    vocabulary = {
        token: index for index, token in enumerate([*CONTROL, *sorted(ByteLevel.alphabet())])
    }
    while len(vocabulary) < VOCABULARY:
        vocabulary[f"unused{len(vocabulary)}"] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{CONTROL[0]} $A", special_tokens=[(CONTROL[0], 0)]
    )
    tokenizer.add_special_tokens(list(CONTROL))
    return str(tokenizer.to_str())
