"""The projector as a graph: streams, anchor and instruction in, rows of the decoder's input out.

Inputs and outputs are those of :class:`~tinygiant.runtime.config.ProjectorConfig`; what an ablated
projector does not read or give, its graph has not.
"""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
import torch
from torch import Tensor, nn

from tinygiant.models.projector import Projector
from tinygiant.runtime.config import ModelConfig

from .tracing import trace

__all__ = ["export_projector"]


class _Projector(nn.Module):
    def __init__(self, projector: Projector) -> None:
        super().__init__()
        self.projector = projector

    def forward(
        self,
        streams: Tensor,
        anchor: Tensor | None = None,
        instruction_embeds: Tensor | None = None,
        instruction_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """One chunk: ``(1, N, stream_size)``, ``(1, anchor_size)``, ``(1, L, D)``, ``(1, L)``."""
        # An ablated part ignores its inputs, which are then None.
        outputs = self.projector(
            streams,
            cast(Tensor, anchor),
            cast(Tensor, instruction_embeds),
            cast(Tensor, instruction_mask),
        )
        return tuple(output for output in outputs if output is not None)


def export_projector(projector: Projector, config: ModelConfig) -> ir.Model:
    """Graph ``projector`` for chunks of any number of audio tokens and any instruction."""
    sizes = config.projector
    # The exporter takes a length of 1 in an example for a constant.
    n_tokens, n_instruction = 5, 7
    inputs = {"streams": torch.zeros(1, n_tokens, config.stream_size)}
    outputs = ["audio_embeds"]
    tokens = torch.export.Dim("n_tokens", min=1, max=config.tokens_per_chunk)
    dynamic = {"streams": {1: tokens}}
    if sizes.semantic_gate:
        inputs["anchor"] = torch.zeros(1, config.event.anchor_size)
    if sizes.intent_query:
        length = torch.export.Dim("n_instruction", min=1, max=1 << 20)
        inputs["instruction_embeds"] = torch.zeros(1, n_instruction, sizes.hidden_size)
        inputs["instruction_mask"] = torch.ones(1, n_instruction, dtype=torch.int64)
        dynamic |= {"instruction_embeds": {1: length}, "instruction_mask": {1: length}}
        outputs.append("intent_attention")
    if sizes.semantic_gate:
        outputs.append("gate")
    return trace(_Projector(projector).eval(), inputs, outputs, dynamic)
