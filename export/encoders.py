"""The audio encoders as graphs: Whisper, HTS-AT, CLAP.

One function a component, module in, graph out; inputs and outputs are those that
:class:`~tinygiant.runtime.config.TemporalStream` and
:class:`~tinygiant.runtime.config.EventStream` state. The arithmetic is the reference model's own
(``tinygiant.models``), pooling included.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers.models.clap.modeling_clap import ClapAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tinygiant.models.tinygiant import encode_event, encode_temporal
from tinygiant.runtime.config import ClapFeatures, ModelConfig

from .tracing import trace

__all__ = ["export_anchor_encoder", "export_event_encoder", "export_temporal_encoder"]


class _Temporal(nn.Module):
    def __init__(self, whisper: WhisperEncoder, steps_per_token: int) -> None:
        super().__init__()
        self.whisper = whisper
        self.steps_per_token = steps_per_token

    def forward(self, input_features: Tensor) -> Tensor:
        """``(1, n_mels, n_frames)`` -> ``(1, n_frames / frames_per_token, hidden_size)``."""
        return encode_temporal(self.whisper, input_features, self.steps_per_token)


class _EventAndAnchor(nn.Module):
    def __init__(self, htsat: ClapAudioEncoder) -> None:
        super().__init__()
        self.htsat = htsat

    def forward(self, input_features: Tensor) -> tuple[Tensor, Tensor]:
        """``(1, 1, n_frames, n_mels)`` -> ``(1, steps_per_window, hidden_size)``, anchor."""
        return encode_event(self.htsat, input_features)


class _Event(nn.Module):
    def __init__(self, htsat: ClapAudioEncoder) -> None:
        super().__init__()
        self.htsat = htsat

    def forward(self, input_features: Tensor) -> Tensor:
        """``(1, 1, n_frames, n_mels)`` -> ``(1, steps_per_window, hidden_size)``."""
        return encode_event(self.htsat, input_features)[0]


class _Anchor(nn.Module):
    def __init__(self, clap: ClapAudioEncoder) -> None:
        super().__init__()
        self.clap = clap

    def forward(self, input_features: Tensor) -> Tensor:
        """``(1, 1, n_frames, n_mels)`` -> ``(1, anchor_size)``."""
        return encode_event(self.clap, input_features)[1]


def export_temporal_encoder(whisper: WhisperEncoder, config: ModelConfig) -> ir.Model:
    """Graph ``whisper_encoder``; the number of frames may be any multiple of frames_per_token."""
    features, frames_per_token = config.temporal.features, config.frames_per_token
    steps_per_token = frames_per_token // config.temporal.frames_per_step
    n_tokens = torch.export.Dim("n_tokens", min=2, max=config.tokens_per_chunk)
    example = torch.zeros(1, features.n_mels, 3 * frames_per_token)
    return trace(
        _Temporal(whisper, steps_per_token).eval(),
        {"input_features": example},
        ["temporal"],
        {"input_features": {2: frames_per_token * n_tokens}},
    )


def export_event_encoder(htsat: ClapAudioEncoder, config: ModelConfig) -> ir.Model:
    """Graph ``htsat_encoder``; with a shared tower it gives the anchor too."""
    example = _window(config.event.features)
    if config.event.shared_tower:
        return trace(_EventAndAnchor(htsat).eval(), example, ["events", "anchor"])
    return trace(_Event(htsat).eval(), example, ["events"])


def export_anchor_encoder(clap: ClapAudioEncoder, config: ModelConfig) -> ir.Model:
    """Graph ``clap_encoder``."""
    return trace(_Anchor(clap).eval(), _window(config.event.anchor_features), ["anchor"])


def _window(features: ClapFeatures) -> dict[str, Tensor]:
    return {"input_features": torch.zeros(1, 1, features.n_frames, features.n_mels)}
