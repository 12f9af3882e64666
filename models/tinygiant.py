"""TinyGiantALM in PyTorch: three frozen encoders, the projector, the decoder.

The reference that every exported graph is compared with, and the module that is trained. Encoders
and decoder are transformers' own modules; features, chunks and prompts come from
``tinygiant.runtime``, which is the only place that defines them.

Shapes: ``B`` batch, ``F`` temporal feature frames, ``N`` audio tokens, ``D`` decoder hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen3ForCausalLM
from transformers.models.clap.modeling_clap import ClapAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tinygiant.runtime.chunks import Chunk, event_rows, join_streams, mean_anchor

from .config import TinyGiantConfig
from .projector import Projector

__all__ = ["COMPONENTS", "TinyGiantALM", "build", "build_component"]


class TinyGiantALM(nn.Module):
    """The whole model; parts are attributes named as in :data:`COMPONENTS`.

    ``clap`` is None when the event tower also gives the anchor.
    """

    def __init__(self, config: TinyGiantConfig) -> None:
        super().__init__()
        self.config = config
        self.whisper = _whisper(config)
        self.htsat = _htsat(config)
        self.clap = _clap(config)
        self.projector = _projector(config)
        self.decoder = _decoder(config)

    def encode_temporal(self, input_features: Tensor) -> Tensor:
        """Whisper log-mel ``(B, n_mels, F)`` -> audio-token rows ``(B, N, hidden)``."""
        runtime = self.config.runtime
        steps_per_token = runtime.frames_per_token // runtime.temporal.frames_per_step
        return encode_temporal(self.whisper, input_features, steps_per_token)

    def encode_event(self, input_features: Tensor) -> tuple[Tensor, Tensor]:
        """CLAP log-mel ``(B, 1, n_frames, n_mels)`` -> events ``(B, steps, hidden)``, anchor."""
        return encode_event(self.htsat, input_features)

    def encode_anchor(self, input_features: Tensor) -> Tensor:
        """CLAP log-mel ``(B, 1, n_frames, n_mels)`` -> anchor ``(B, anchor_size)``."""
        return encode_event(self.clap or self.htsat, input_features)[1]

    def encode_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """One chunk of audio -> streams ``(1, N, stream_size)`` and anchor ``(1, anchor_size)``."""
        return self.encode_chunks([chunk])[0]

    @torch.no_grad()
    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[tuple[Tensor, Tensor]]:
        """Chunks with the same number of temporal frames, in one batch; as :meth:`encode_chunk`."""
        device = next(self.whisper.parameters()).device

        def batch(features: Sequence[NDArray[np.float32]]) -> Tensor:
            return torch.from_numpy(np.stack(features)).to(device)

        temporal = self.encode_temporal(batch([chunk.temporal_features for chunk in chunks]))
        windows = batch([window for chunk in chunks for window in chunk.event_features])
        events, anchors = self.encode_event(windows[:, None])
        anchor_windows = [chunk.anchor_features or chunk.event_features for chunk in chunks]
        if self.clap is not None:
            features = batch([window for windows in anchor_windows for window in windows])
            anchors = self.encode_anchor(features[:, None])
        rows, event_steps, pooled = (x.cpu().numpy() for x in (temporal, events, anchors))
        encoded = []
        event_start = anchor_start = 0
        for chunk, of_chunk, of_anchor in zip(chunks, rows, anchor_windows, strict=True):
            event_stop = event_start + len(chunk.event_features)
            anchor_stop = anchor_start + len(of_anchor)
            steps = event_rows(
                list(event_steps[event_start:event_stop]), chunk.n_tokens, self.config.runtime
            )
            anchor = mean_anchor(list(pooled[anchor_start:anchor_stop]))
            streams = join_streams(of_chunk, steps)
            encoded.append(
                (torch.from_numpy(streams).to(device), torch.from_numpy(anchor)[None].to(device))
            )
            event_start, anchor_start = event_stop, anchor_stop
        return encoded

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids ``(B, T)`` -> embeddings ``(B, T, D)``."""
        out: Tensor = self.decoder.get_input_embeddings()(ids)
        return out


def encode_temporal(
    whisper: WhisperEncoder, input_features: Tensor, steps_per_token: int
) -> Tensor:
    """Whisper's encoder on any number of frames, average-pooled to audio tokens.

    ``WhisperEncoder.forward`` insists on whole 30 s windows; a shorter input is the same
    computation with fewer positions.
    ``(B, n_mels, F)`` -> ``(B, F / 2 / steps_per_token, hidden)``.
    """
    hidden = F.gelu(whisper.conv1(input_features))
    hidden = F.gelu(whisper.conv2(hidden)).transpose(1, 2)
    hidden = hidden + whisper.embed_positions.weight[: hidden.shape[1]]
    for layer in whisper.layers:
        hidden = _whisper_layer(layer, hidden)
    hidden = whisper.layer_norm(hidden)
    pooled: Tensor = hidden.unflatten(1, (-1, steps_per_token)).mean(2)
    return pooled


def _whisper_layer(layer: Any, hidden: Tensor) -> Tensor:
    """A ``WhisperEncoderLayer``, ``(B, T, D)`` -> the same; its ``forward`` differs by version."""

    def dropped(x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p, training=layer.training)

    attended = layer.self_attn(layer.self_attn_layer_norm(hidden))[0]
    hidden = hidden + dropped(attended, layer.dropout)
    inner = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden)))
    return hidden + dropped(layer.fc2(dropped(inner, layer.activation_dropout)), layer.dropout)


def encode_event(tower: ClapAudioEncoder, input_features: Tensor) -> tuple[Tensor, Tensor]:
    """An HTS-AT tower: events over time, and their pooled vector.

    ``(B, 1, n_frames, n_mels)`` -> ``(B, steps, hidden)`` and ``(B, hidden)``.
    The tower's output is ``(B, hidden, frequency, steps)``; events are its mean over frequency.
    """
    output = tower(input_features)
    return output.last_hidden_state.mean(2).transpose(1, 2), output.pooler_output


def _whisper(config: TinyGiantConfig) -> WhisperEncoder:
    return WhisperEncoder(config.whisper_config)


def _htsat(config: TinyGiantConfig) -> ClapAudioEncoder:
    return ClapAudioEncoder(config.htsat_config)


def _clap(config: TinyGiantConfig) -> ClapAudioEncoder | None:
    return None if config.clap_config is None else ClapAudioEncoder(config.clap_config)


def _projector(config: TinyGiantConfig) -> Projector:
    runtime = config.runtime
    return Projector(runtime.projector, runtime.stream_size, runtime.event.anchor_size)


def _decoder(config: TinyGiantConfig) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(config.decoder_config)


COMPONENTS: dict[str, Callable[[TinyGiantConfig], nn.Module | None]] = {
    "whisper": _whisper,
    "htsat": _htsat,
    "clap": _clap,
    "projector": _projector,
    "decoder": _decoder,
}


def build_component(config: TinyGiantConfig, name: str, seed: int) -> nn.Module | None:
    """One randomly initialised part, the same whether or not the others are built beside it.

    Args:
        config: the model.
        name: a key of :data:`COMPONENTS`.
        seed: of the whole model; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * len(COMPONENTS) + list(COMPONENTS).index(name))
        module = COMPONENTS[name](config)
    return None if module is None else module.eval()


def build(config: TinyGiantConfig, seed: int) -> TinyGiantALM:
    """A randomly initialised model in evaluation mode."""
    with torch.device("meta"):
        model = TinyGiantALM(config)
    for name in COMPONENTS:
        setattr(model, name, build_component(config, name, seed))
    return model.eval()
