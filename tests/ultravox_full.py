"""Ultravox at its published size, of seeded random weights: does it export, run and fit?

    python -m tests.ultravox_full FOLDER      # 3.9 GB: ultravox.safetensors and llama/
    tg-export --ultravox FOLDER/ultravox.safetensors --llama FOLDER/llama --recipe int8 -o BUNDLE
    python -m benchmarks.latency --bundle BUNDLE

The tokenizer has Llama 3's control tokens and bytes, and names for the rest of its 128,256 tokens:
answers are no words, but as long as a real one's. Not part of ``make test``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.ultravox_stub import LLAMA, small_tokenizer
from tinygiant.models.ultravox import UltravoxConfig, UltravoxProjector

SIZES = {
    "vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 131_072, "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8_192,
    },
}  # fmt: skip


def write(folder: Path) -> None:
    """Write both checkpoints below ``folder``."""
    llama = folder / "llama"
    llama.mkdir(parents=True)
    fields = LLAMA | SIZES
    sizes = UltravoxConfig()
    with torch.device("meta"):
        language_model = LlamaForCausalLM(LlamaConfig(**fields))
        parts: dict[str, nn.Module] = {
            "audio_tower.": WhisperEncoder(sizes.whisper),
            "multi_modal_projector.": UltravoxProjector(sizes, SIZES["hidden_size"]),
        }
    save_file(dict(_drawn({"": language_model})), llama / "model.safetensors")
    save_file(dict(_drawn(parts)), folder / "ultravox.safetensors")
    (llama / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    tokenizer = json.loads(small_tokenizer())
    vocabulary = tokenizer["model"]["vocab"]
    for index in range(len(vocabulary), SIZES["vocab_size"]):
        vocabulary[f"unused{index}"] = index
    (llama / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


def _drawn(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Weights as transformers draws them, in bfloat16, but the embeddings; a tied head is left out.

    With large embeddings a decoder says its last token again, and clearly. With small ones the best
    two of 128,256 logits lie so near that 8 bits change one token in eight, and the export refuses.
    """
    generator = torch.Generator().manual_seed(0)
    for prefix, module in parts.items():
        for name, like in module.state_dict().items():
            if name == "lm_head.weight":
                continue
            if like.dim() == 1:
                weight = torch.full(like.shape, float(name.endswith("weight")))
            else:
                size = 1.0 if "embed_tokens" in name else 0.02
                weight = size * torch.randn(like.shape, generator=generator)
            yield prefix + name, weight.bfloat16()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
