"""TinyGiantALM's encoders and projector as parts to export: one small wrapper a graph.

The arithmetic is the reference model's own (:mod:`~tinygiant.models.tinygiant`), pooling included;
names are those of :attr:`TinyGiantConfig.runtime`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.clap.modeling_clap import ClapAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .config import CLAP, EVENT, TEMPORAL, TinyGiantConfig
from .family import Part
from .projector import Projector
from .tinygiant import encode_event, encode_temporal

__all__ = ["graph_part", "projector_part", "temporal_part", "tower_part"]


def graph_part(config: TinyGiantConfig, graph: str, component: Callable[[str], nn.Module]) -> Part:
    """The part behind ``graph``; ``component`` loads a module by its name in the reference."""
    if graph == TEMPORAL:
        return temporal_part(cast(WhisperEncoder, component("whisper")), config)
    if graph in (EVENT, CLAP):
        tower = component("htsat" if graph == EVENT else "clap")
        return tower_part(cast(ClapAudioEncoder, tower), config, graph)
    return projector_part(cast(Projector, component("projector")), config)


def temporal_part(whisper: WhisperEncoder, config: TinyGiantConfig) -> Part:
    """Whisper's encoder; the number of frames may be any multiple of a row's."""
    frames_per_row = 2 * config.steps_per_row  # the second convolution's stride
    n_rows = torch.export.Dim("n_rows", min=2, max=config.tokens_per_chunk)
    n_mels = config.whisper_config.num_mel_bins
    return Part(
        _Temporal(whisper, config.steps_per_row).eval(),
        {"input_features": torch.zeros(1, n_mels, 3 * frames_per_row)},
        ("temporal",),
        {"input_features": {2: frames_per_row * n_rows}},
    )


def tower_part(tower: ClapAudioEncoder, config: TinyGiantConfig, graph: str) -> Part:
    """HTS-AT or CLAP, with the outputs that the configuration has of that graph."""
    encoder = next(e for e in config.runtime.encoders if e.graph == graph)
    outputs = tuple(output.name for output in encoder.outputs)
    n_mels = int(tower.config.num_mel_bins)
    example = torch.zeros(1, 1, encoder.n_frames, n_mels)
    name = graph.removesuffix("_encoder")
    return Part(_Tower(tower, name, outputs).eval(), {"input_features": example}, outputs)


def projector_part(projector: Projector, config: TinyGiantConfig) -> Part:
    """The projector for any number of audio rows and any instruction.

    Inputs and outputs that an ablated projector lacks, its graph lacks too.
    """
    sizes = config.projector
    # The exporter takes a length of 1 in an example for a constant.
    n_rows, n_instruction = 5, 7
    inputs = {"streams": torch.zeros(1, n_rows, config.stream_size)}
    dynamic = {"streams": {1: torch.export.Dim("n_rows", min=1, max=config.tokens_per_chunk)}}
    if sizes.semantic_gate:
        inputs["anchor"] = torch.zeros(1, config.anchor_size)
    if sizes.intent_query:
        length = torch.export.Dim("n_instruction", min=1, max=1 << 20)
        inputs["instruction_embeds"] = torch.zeros(1, n_instruction, sizes.hidden_size)
        inputs["instruction_mask"] = torch.ones(1, n_instruction, dtype=torch.int64)
        dynamic |= {"instruction_embeds": {1: length}, "instruction_mask": {1: length}}
    outputs = config.runtime.projector.outputs
    return Part(_Projector(projector).eval(), inputs, outputs, dynamic)


class _Temporal(nn.Module):
    def __init__(self, whisper: WhisperEncoder, steps_per_row: int) -> None:
        super().__init__()
        self.whisper = whisper
        self.steps_per_row = steps_per_row

    def forward(self, input_features: Tensor) -> Tensor:
        """``(1, n_mels, n_frames)`` -> ``(1, n_frames / 2 / steps_per_row, hidden_size)``."""
        return encode_temporal(self.whisper, input_features, self.steps_per_row)


class _Tower(nn.Module):
    """``name`` is the tower's, and begins the names of its weights in the graph."""

    def __init__(self, tower: ClapAudioEncoder, name: str, outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.add_module(name, tower)
        self.name, self.outputs = name, outputs

    def forward(self, input_features: Tensor) -> tuple[Tensor, ...]:
        """``(1, 1, n_frames, n_mels)`` -> events ``(1, steps, hidden)``, anchor ``(1, hidden)``."""
        tower = cast(ClapAudioEncoder, self.get_submodule(self.name))
        events, anchor = encode_event(tower, input_features)
        found = {"events": events, "anchor": anchor}
        return tuple(found[name] for name in self.outputs)


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
