"""Ultravox once more, from its definition: PyTorch functions on a checkpoint's tensors.

Shares no code with this project. Features are transformers' ``WhisperFeatureExtractor``, called as
Ultravox's processor calls it; the language model is transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf
from transformers import LlamaConfig, LlamaForCausalLM, WhisperFeatureExtractor

State = Mapping[str, Tensor]
HOP = 160


def log_mel(samples: np.ndarray, n_mels: int) -> Tensor:
    """``(n_mels, frames)`` of a clip at 16 kHz, filled up to two hops and to a whole hop."""
    if len(samples) < 2 * HOP:
        samples = np.pad(samples, (0, 2 * HOP - len(samples)))
    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    found = extractor(
        [samples], sampling_rate=16_000, padding="longest", pad_to_multiple_of=HOP,
        truncation=False, return_attention_mask=True, return_tensors="pt",
    )  # fmt: skip
    assert int(found.attention_mask.sum()) == found.input_features.shape[2]
    return found.input_features[0]


def rows(state: State, features: Tensor, n_heads: int) -> Tensor:
    """``(n_mels, frames)`` -> ``(ceil(frames / 16), D)``, in double precision, head by head."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def layer(x: Tensor, name: str) -> Tensor:
        bias = w.get(f"{name}.bias")
        return x @ w[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return nnf.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)

    def rms(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def convolved(x: Tensor, name: str, stride: int) -> Tensor:
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return nnf.gelu(nnf.conv1d(x, weight, bias, stride=stride, padding=1))

    tower, projector = "audio_tower", "multi_modal_projector"
    x = convolved(features.double()[None], f"{tower}.conv1", 1)
    h = convolved(x, f"{tower}.conv2", 2)[0].T
    h = h + w[f"{tower}.embed_positions.weight"][: len(h)]
    n_layers = sum(name.endswith("fc1.weight") for name in w)
    for index in range(n_layers):
        name = f"{tower}.layers.{index}"
        inner = norm(h, f"{name}.self_attn_layer_norm")
        q, k, v = (layer(inner, f"{name}.self_attn.{part}_proj") for part in "qkv")
        size = q.shape[1] // n_heads
        heads = []
        for head in range(n_heads):
            at = slice(head * size, (head + 1) * size)
            heads.append((q[:, at] @ k[:, at].T / size**0.5).softmax(-1) @ v[:, at])
        h = h + layer(torch.cat(heads, -1), f"{name}.self_attn.out_proj")
        inner = layer(norm(h, f"{name}.final_layer_norm"), f"{name}.fc1")
        h = h + layer(nnf.gelu(inner), f"{name}.fc2")
    h = norm(h, f"{tower}.layer_norm")
    stacked = torch.zeros(math.ceil(len(h) / 8), 8, h.shape[1], dtype=h.dtype)
    for step, vector in enumerate(h):
        stacked[step // 8, step % 8] = vector
    values, gates = layer(
        rms(stacked.flatten(1), f"{projector}.ln_pre"), f"{projector}.linear_1"
    ).chunk(2, -1)
    return layer(
        rms(values * gates / (1 + torch.exp(-gates)), f"{projector}.ln_mid"),
        f"{projector}.linear_2",
    )


@torch.no_grad()
def answer(
    state: State,
    config: LlamaConfig,
    parts: Sequence[Tensor | Sequence[int]],
    n_tokens: int,
    stop_ids: Sequence[int],
) -> list[int]:
    """Greedy tokens after ``parts``: rows ``(N, D)`` or token ids. No cache: the definition."""
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(state, strict=False)
    llama.tie_weights()
    embed = llama.get_input_embeddings()
    prompt = torch.cat(
        [part.float() if isinstance(part, Tensor) else embed(torch.tensor(part)) for part in parts]
    )[None]
    written: list[int] = []
    while len(written) < n_tokens:
        step = torch.cat([prompt, embed(torch.tensor([written], dtype=torch.long))], dim=1)
        token = int(llama(inputs_embeds=step, use_cache=False).logits[0, -1].argmax())
        if token in stop_ids:
            break
        written.append(token)
    return written
