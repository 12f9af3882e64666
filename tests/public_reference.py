"""Mizar and Mellow once more, from their definitions: PyTorch functions on a checkpoint's tensors.

Shares no code with this project. Features come from ``torch.stft`` and transformers' filter banks,
resampling is torchaudio's algorithm as a convolution, the language model is transformers' own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tokenizers
import torch
from torch import Tensor
from torch.nn import functional as nnf
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.audio_utils import mel_filter_bank
from transformers.models.clap.modeling_clap import ClapAudioEncoder

State = dict[str, Tensor]


def resampling_kernel(from_hz: int, to_hz: int) -> tuple[Tensor, int]:
    """Taps of all phases ``(to, taps)``, and how many samples before the first they begin."""
    divisor = math.gcd(from_hz, to_hz)
    old, new = from_hz // divisor, to_hz // divisor
    cutoff = 0.99 * min(old, new)
    width = math.ceil(6 * old / cutoff)
    grid = torch.arange(-width, width + old, dtype=torch.float64)[None] / old
    # Dividing integers gives float32 in PyTorch: these phases are rounded, as torchaudio's are.
    t = (torch.arange(0, -new, -1)[:, None] / new + grid) * cutoff
    t = t.clamp(-6, 6) * math.pi
    taps = torch.where(t == 0, 1.0, torch.sin(t) / t) * torch.cos(t / 12) ** 2 * (cutoff / old)
    return taps.float(), width


def resample(samples: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """``(n,) -> (ceil(n * to / from),)``."""
    if from_hz == to_hz:
        return samples
    kernel, width = resampling_kernel(from_hz, to_hz)
    old = from_hz // math.gcd(from_hz, to_hz)
    padded = nnf.pad(samples, (width, width + old))
    phases = nnf.conv1d(padded[None, None], kernel[:, None], stride=old)
    return phases[0].T.reshape(-1)[: math.ceil(len(samples) * to_hz / from_hz)]


def mizar_log_mel(samples: Tensor, rate_hz: int) -> Tensor:
    """``(2001, 64)`` decibels of the first 20 s."""
    heard = resample(samples, rate_hz, 32_000)[:640_000]
    heard = resample(nnf.pad(heard, (0, 640_000 - len(heard))), 32_000, 16_000)
    bank = mel_filter_bank(257, 64, 0.0, 8_000.0, 16_000, norm=None, mel_scale="htk")
    db = _decibels(heard, 512, 160, bank)
    return torch.maximum(db, db.max() - 120.0)


def mellow_log_mel(samples: Tensor, rate_hz: int) -> Tensor:
    """``(1001, 64)`` decibels of the first 10 s, a shorter clip over and over again."""
    heard = resample(samples, rate_hz, 32_000)
    heard = heard.repeat(math.ceil(320_000 / len(heard)))[:320_000]
    bank = mel_filter_bank(513, 64, 50.0, 14_000.0, 32_000, norm="slaney", mel_scale="slaney")
    return _decibels(heard, 1_024, 320, bank)


def _decibels(samples: Tensor, n_fft: int, hop: int, bank: np.ndarray) -> Tensor:
    spectrum = torch.stft(
        samples.double(), n_fft, hop, window=torch.hann_window(n_fft, dtype=torch.float64),
        center=True, pad_mode="reflect", return_complex=True,
    )  # fmt: skip
    power = (spectrum.abs() ** 2).T @ torch.from_numpy(bank)
    return 10 * torch.log10(power.clamp(min=1e-10))


def ced(state: State, log_mel: Tensor, n_heads: int) -> Tensor:
    """CED in double precision: ``(frames, 64)`` -> ``(steps, 4, C)``, patch by patch."""
    w = _below(state, "audio_encoder.base.ced.")

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = log_mel.double() - w["init_bn.running_mean"]
    x = x / torch.sqrt(w["init_bn.running_var"] + 1e-5)
    x = x * w["init_bn.weight"] + w["init_bn.bias"]
    grids = []
    for start in range(0, len(x), 1_012):
        piece = torch.zeros(1_012, 64, dtype=torch.float64)
        held = x[start : start + 1_012]
        piece[: len(held)] = held
        tokens = []
        for f in range(4):
            for t in range(63):
                patch = piece[16 * t : 16 * t + 16, 16 * f : 16 * f + 16].T
                token = torch.einsum("cij,ij->c", w["patch_embed.proj.weight"][:, 0], patch)
                token = token + w["patch_embed.proj.bias"]
                token = token + w["time_pos_embed"][0, :, 0, t]
                tokens.append(token + w["freq_pos_embed"][0, :, f, 0])
        h = torch.stack(tokens)
        for layer in range(sum(name.endswith("attn.proj.weight") for name in w)):
            b = f"blocks.{layer}"
            q, k, v = linear(norm(h, f"{b}.norm1"), f"{b}.attn.qkv").chunk(3, -1)
            size = q.shape[1] // n_heads
            heads = []
            for head in range(n_heads):
                at = slice(head * size, (head + 1) * size)
                scores = q[:, at] @ k[:, at].T / size**0.5
                heads.append(scores.softmax(-1) @ v[:, at])
            h = h + linear(torch.cat(heads, -1), f"{b}.attn.proj")
            inner = linear(norm(h, f"{b}.norm2"), f"{b}.mlp.fc1")
            inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
            h = h + linear(inner, f"{b}.mlp.fc2")
        h = norm(h, "norm")
        grids += [torch.stack([h[f * 63 + t] for f in range(4)]) for t in range(63)]
    return torch.stack(grids)


def mizar_rows(state: State, grid: Tensor) -> Tensor:
    """``(126, 4, C)`` -> ``(126, D)``."""
    w = _below(state, "audio_encoder.base.mapper.")

    def layer(x: Tensor, name: str) -> Tensor:
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        if weight.dim() == 1:
            return nnf.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)
        return x @ weight.T + bias

    grid, net = grid.double(), "freq_merger.net"
    h = layer(layer(grid.flatten(1), f"{net}.0"), f"{net}.1")
    h = layer(layer(nnf.gelu(h), f"{net}.4"), f"{net}.5")
    whole = grid.mean(dim=(0, 1))
    h = h + layer(layer(layer(whole, "global_proj.0"), "global_proj.1"), "global_proj.2")
    h = h + w["pos_in"][0, : len(h)] + w["pos_out"][0, : len(h)] + w["audio_type"][0, 0]
    return h + layer(nnf.gelu(layer(layer(h, "refine_ln"), "refine_mlp.0")), "refine_mlp.3")


def mellow_rows(state: State, tower: ClapAudioEncoder, log_mel: Tensor) -> Tensor:
    """``(1001, 64)`` -> ``(129, D)`` by the long way: 1024 frames, averaged 8 at a time.

    ``tower`` is transformers' HTS-AT with the checkpoint's weights.
    """
    base, projection = "audio_encoder.base.", "audio_encoder.projection."
    hidden = tower(log_mel.float()[None, None]).last_hidden_state  # (1, C, frequency, time)
    scores = nnf.conv2d(
        hidden,
        state[f"{base}htsat.tscam_conv.weight"],
        state[f"{base}htsat.tscam_conv.bias"],
        padding=(0, 1),
    )
    frames = torch.sigmoid(scores[:, :, 0]).transpose(1, 2).repeat_interleave(32, dim=1)
    course = frames @ state[f"{base}c2l.weight"].T + state[f"{base}c2l.bias"]
    x = torch.cat((hidden.mean(dim=(2, 3))[:, None], course), dim=1)  # (1, 1025, C)
    first = x @ state[f"{projection}linear1.weight"].T
    second = nnf.gelu(first) @ state[f"{projection}linear2.weight"].T
    weight, bias = (state[f"{projection}layer_norm.{name}"] for name in ("weight", "bias"))
    mapped = nnf.layer_norm(first + second, first.shape[-1:], weight, bias, eps=1e-5)
    pooled = nnf.avg_pool1d(mapped[:, 1:].transpose(1, 2), 8).transpose(1, 2)
    return torch.cat((mapped[:, :1], pooled), dim=1)[0]


def text_ids(tokenizer_file: str, text: str, length: int) -> list[int]:
    """A question as the originals read it: ``!`` is the padding token and fills it up."""
    tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)
    tokenizer.add_special_tokens(["!"])
    ids = list(tokenizer.encode(text).ids)[:length]
    return ids + [17] * (length - len(ids))


@torch.no_grad()
def answer(
    state: State, config: LlamaConfig, clips: Sequence[Tensor], ids: Sequence[int], n_tokens: int
) -> list[int]:
    """Greedy tokens after ``clip, token 0`` for each of ``clips (N, D)``, then the text."""
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(_below(state, "caption_decoder.lm.", torch.float32))
    embed = llama.get_input_embeddings()
    end = embed(torch.tensor([0]))
    rows = [part for clip in clips for part in (clip.float(), end)]
    prompt = torch.cat([*rows, embed(torch.tensor(ids))])[None]
    written: list[int] = []
    while len(written) < n_tokens:  # no cache: the definition itself
        step = torch.cat([prompt, embed(torch.tensor([written], dtype=torch.long))], dim=1)
        written.append(int(llama(inputs_embeds=step, use_cache=False).logits[0, -1].argmax()))
        if written[-1] == 0:
            break
    return written


def _below(state: State, prefix: str, dtype: torch.dtype = torch.float64) -> State:
    return {
        name.removeprefix(prefix): tensor.to(dtype)
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


@torch.no_grad()
def log_likelihood(
    state: State,
    config: LlamaConfig,
    clips: Sequence[Tensor],
    ids: Sequence[int],
    written: Sequence[int],
) -> float:
    """Logarithm of the probability that ``written`` follows."""
    llama = LlamaForCausalLM(config).eval()
    llama.load_state_dict(_below(state, "caption_decoder.lm.", torch.float32))
    embed = llama.get_input_embeddings()
    end = embed(torch.tensor([0]))
    rows = [part for clip in clips for part in (clip.float(), end)]
    prompt = torch.cat([*rows, embed(torch.tensor([*ids, *written]))])[None]
    logits = llama(inputs_embeds=prompt, use_cache=False).logits[0, -len(written) - 1 : -1]
    scores = logits.double().log_softmax(-1)
    return float(scores[range(len(written)), list(written)].sum())
