"""CED, the audio vision transformer of Mizar, as a PyTorch module of this project.

Written from published facts (shapes, constants, tensor names), not from the original code. Names
of parameters are those of public checkpoints, so that they load without renaming.

Shapes: ``B`` clips, ``F`` patches along frequency, ``P`` patches along time in one piece, ``C``
channels. A clip longer than a piece (``target_frames``) is cut into pieces that the transformer
sees as if they were separate clips; the patches of all pieces are joined along time again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

__all__ = ["Ced", "CedConfig"]


@dataclass(frozen=True)
class CedConfig:
    """Sizes of the transformer; the defaults are CED-Small's."""

    hidden_size: int = 384
    n_layers: int = 12
    n_heads: int = 6
    ffn_size: int = 1_536
    n_mels: int = 64
    patch: int = 16
    target_frames: int = 1_012
    norm_eps: float = 1e-6

    @property
    def bands(self) -> int:
        """Patches along frequency: 4."""
        return self.n_mels // self.patch

    @property
    def steps_per_piece(self) -> int:
        """Patches along time in one piece: 63."""
        return self.target_frames // self.patch

    def steps(self, n_frames: int) -> int:
        """Patches along time of a clip of ``n_frames``, padding of the last piece included."""
        return -(-n_frames // self.target_frames) * self.steps_per_piece


class Ced(nn.Module):
    """Log-mel spectrogram in decibels to a grid of patches."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.init_bn = nn.BatchNorm2d(config.n_mels)
        self.patch_embed = _PatchEmbed(config)
        self.time_pos_embed = nn.Parameter(torch.zeros(1, size, 1, config.steps_per_piece))
        self.freq_pos_embed = nn.Parameter(torch.zeros(1, size, config.bands, 1))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(size, eps=config.norm_eps)

    def forward(self, input_features: Tensor) -> Tensor:
        """``(1, 1, n_frames, n_mels)`` in dB -> ``(1, steps, bands * C)``, frequency outermost.

        The last piece is filled with zeros *after* the batch norm, as the model was trained.
        """
        config = self.config
        spectrum = self.init_bn(input_features.permute(0, 3, 1, 2))[:, :, 0]  # (1, n_mels, frames)
        n_pieces = -(-spectrum.shape[2] // config.target_frames)
        missing = n_pieces * config.target_frames - spectrum.shape[2]
        pieces = nnf.pad(spectrum, (0, missing)).reshape(
            config.n_mels, n_pieces, config.target_frames
        )
        x = self.patch_embed(pieces.transpose(0, 1)[:, None])  # (pieces, C, F, P)
        x = x + self.time_pos_embed + self.freq_pos_embed
        x = x.flatten(2).transpose(1, 2)  # (pieces, F * P, C), frequency major
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        grid = x.reshape(n_pieces, config.bands, config.steps_per_piece, config.hidden_size)
        rows: Tensor = grid.transpose(1, 2).reshape(1, -1, config.bands * config.hidden_size)
        return rows


class _PatchEmbed(nn.Module):
    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, config.hidden_size, config.patch, stride=config.patch)

    def forward(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.proj(image))


class _Block(nn.Module):
    """Attention and feed-forward, each normed before and added to the residual."""

    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = _Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = _FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class _Attention(nn.Module):
    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.head_dim = config.hidden_size // config.n_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, S, C) -> (B, S, C)``; the fused product holds all queries, then keys, values."""
        heads = [
            part.unflatten(2, (self.n_heads, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=2)
        ]
        attended = nnf.scaled_dot_product_attention(*heads)
        return cast(Tensor, self.proj(attended.transpose(1, 2).flatten(2)))


class _FeedForward(nn.Module):
    def __init__(self, config: CedConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.ffn_size)
        self.fc2 = nn.Linear(config.ffn_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(nnf.gelu(self.fc1(x))))
