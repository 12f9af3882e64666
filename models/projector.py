"""Query-guided E-Branchformer projector with a semantic gate (TinyGiantALM, section 2).

It turns the pooled encoder outputs of one chunk of audio into rows of the decoder's input, in the
place of ``<audio>`` in the prompt. Shapes: ``B`` batch, ``N`` audio tokens, ``L``
instruction tokens, ``D`` hidden size.

Batches may hold chunks of different length: ``token_mask`` marks the rows that hold audio, and
masked rows influence nothing. A chunk alone, as the runtime runs it, needs no mask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EBranchformerConfig

__all__ = ["Projector", "ProjectorOutput"]


class ProjectorOutput(NamedTuple):
    """The outputs of a :class:`Projector`.

    ``audio_embeds (B, N, D)``; ``intent_attention (B, N)``, how much of the instruction's attention
    each row got (mean over heads, sums to 1), None without the intent query; ``gate (B, D)`` in
    0..1, None without the gate.
    """

    audio_embeds: Tensor
    intent_attention: Tensor | None
    gate: Tensor | None


class SelfAttention(nn.Module):
    """Multi-head self-attention over the audio tokens, without a causal mask."""

    def __init__(self, size: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)

    def forward(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """``x (B, N, D)``, ``token_mask (B, N) bool`` -> ``(B, N, D)``."""
        q, k, v = (
            proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if token_mask is None else token_mask[:, None, None, :]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class ConvolutionalGatingMLP(nn.Module):
    """cgMLP: an MLP whose hidden half is gated by a depth-wise convolution of the other half."""

    def __init__(self, size: int, hidden_size: int, kernel_size: int) -> None:
        super().__init__()
        half = hidden_size // 2
        self.channel_proj1 = nn.Linear(size, hidden_size)
        self.norm = nn.LayerNorm(half)
        self.conv = nn.Conv1d(half, half, kernel_size, padding=kernel_size // 2, groups=half)
        self.channel_proj2 = nn.Linear(half, size)
        # The gate starts as a pass-through (reference E-Branchformer).
        nn.init.normal_(self.conv.weight, std=1e-6)
        nn.init.ones_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """``x (B, N, D)`` -> ``(B, N, D)``."""
        residual, gate = F.gelu(self.channel_proj1(x)).chunk(2, dim=-1)
        gate = _convolve(self.conv, self.norm(gate), token_mask)
        out: Tensor = self.channel_proj2(residual * gate)
        return out


class EBranchformerBlock(nn.Module):
    """Self-attention and cgMLP side by side, merged with a depth-wise convolution.

    Source: E-Branchformer (Kim et al., SLT 2022), without the macaron feed-forward pair.
    """

    def __init__(self, config: EBranchformerConfig) -> None:
        super().__init__()
        size, kernel = config.hidden_size, config.kernel_size
        self.norm_attention = nn.LayerNorm(size)
        self.attention = SelfAttention(size, config.n_heads)
        self.norm_cgmlp = nn.LayerNorm(size)
        self.cgmlp = ConvolutionalGatingMLP(size, config.cgmlp_size, kernel)
        self.merge_conv = nn.Conv1d(
            2 * size, 2 * size, kernel, padding=kernel // 2, groups=2 * size
        )
        self.merge_proj = nn.Linear(2 * size, size)
        self.norm_out = nn.LayerNorm(size)

    def forward(self, x: Tensor, token_mask: Tensor | None) -> Tensor:
        """``x (B, N, D)`` -> ``(B, N, D)``."""
        attended = self.attention(self.norm_attention(x), token_mask)
        gated = self.cgmlp(self.norm_cgmlp(x), token_mask)
        branches = torch.cat((attended, gated), dim=-1)
        merged = branches + _convolve(self.merge_conv, branches, token_mask)
        out: Tensor = self.norm_out(x + self.merge_proj(merged))
        return out


class IntentQuery(nn.Module):
    """Cross-attention whose one query is the mean of the instruction's token embeddings.

    The paper leaves open how the attended vector returns to the N rows; here it is added to each.
    """

    def __init__(self, size: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size)

    def forward(
        self,
        x: Tensor,
        instruction_embeds: Tensor,
        instruction_mask: Tensor,
        token_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``x (B, N, D)``, instruction ``(B, L, D)``, mask ``(B, L)`` -> rows, attention (B, N)."""
        weights = instruction_mask.to(x.dtype).unsqueeze(-1)
        query = (instruction_embeds * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        q = self.q_proj(query).unflatten(-1, (self.n_heads, -1)).unsqueeze(2)  # (B, h, 1, d)
        k = self.k_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, h, N, d)
        v = self.v_proj(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, h, 1, N)
        if token_mask is not None:
            scores = scores.masked_fill(~token_mask[:, None, None, :], float("-inf"))
        attention = scores.softmax(-1)
        attended = self.out_proj((attention @ v).transpose(1, 2).flatten(2))  # (B, 1, D)
        return self.norm(x + attended), attention.mean(1).squeeze(1)


class SemanticGate(nn.Module):
    """Scales every feature by 0.5..1, decided by the clip's CLAP embedding."""

    def __init__(self, anchor_size: int, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(anchor_size, size)

    def forward(self, x: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """``x (B, N, D)``, ``anchor (B, A)`` -> rows, gate ``(B, D)``."""
        gate = torch.sigmoid(self.proj(anchor))
        return x * (0.5 * gate + 0.5).unsqueeze(1), gate


class Projector(nn.Module):
    """Encoder outputs of one chunk -> rows of the decoder's input.

    ``config.intent_query`` and ``config.semantic_gate`` switch the ablations of the paper's table;
    with neither it is the "vanilla" projector.
    """

    def __init__(self, config: EBranchformerConfig, stream_size: int, anchor_size: int) -> None:
        super().__init__()
        self.input_proj = nn.Linear(stream_size, config.hidden_size)
        self.blocks = nn.ModuleList(EBranchformerBlock(config) for _ in range(config.n_layers))
        self.intent = (
            IntentQuery(config.hidden_size, config.n_heads) if config.intent_query else None
        )
        self.gate = SemanticGate(anchor_size, config.hidden_size) if config.semantic_gate else None

    def forward(
        self,
        streams: Tensor,
        anchor: Tensor,
        instruction_embeds: Tensor,
        instruction_mask: Tensor,
        token_mask: Tensor | None = None,
    ) -> ProjectorOutput:
        """Project one batch of chunks.

        Args:
            streams: pooled outputs of Whisper and HTS-AT ``(B, N, stream_size)``.
            anchor: CLAP embedding ``(B, anchor_size)``.
            instruction_embeds: token embeddings of the user's text ``(B, L, D)``.
            instruction_mask: 1 where ``instruction_embeds`` holds a token ``(B, L)``.
            token_mask: True where ``streams`` holds audio ``(B, N) bool``; None: everywhere.
        """
        x = self.input_proj(streams)
        x = x + sinusoidal_positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        for block in self.blocks:
            x = block(x, token_mask)
        attention = gate = None
        if self.intent is not None:
            x, attention = self.intent(x, instruction_embeds, instruction_mask, token_mask)
        if self.gate is not None:
            x, gate = self.gate(x, anchor)
        return ProjectorOutput(x, attention, gate)


def sinusoidal_positions(n: int, size: int, device: torch.device | None = None) -> Tensor:
    """Sinusoidal positions ``(n, size)``: sines in the first half, cosines in the second."""
    half = size // 2
    frequencies = torch.exp(torch.arange(half, device=device) * (-math.log(10_000.0) / half))
    angles = torch.arange(n, device=device).unsqueeze(1) * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _convolve(conv: nn.Module, x: Tensor, token_mask: Tensor | None) -> Tensor:
    """A convolution over the N axis of ``x (B, N, C)`` that sees zeros where there is no audio."""
    if token_mask is not None:
        x = x * token_mask.unsqueeze(-1).to(x.dtype)
    out: Tensor = conv(x.transpose(1, 2)).transpose(1, 2)
    return out
