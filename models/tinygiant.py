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

from tinygiant.runtime.encode import combine
from tinygiant.runtime.preprocess import Chunk

from .config import CLAP, EVENT, TEMPORAL, TinyGiantConfig
from .projector import Projector

__all__ = ["COMPONENTS", "TinyGiantALM", "build", "build_component", "whisper_steps"]


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
        return encode_temporal(self.whisper, input_features, self.config.steps_per_row)

    def encode_event(self, input_features: Tensor) -> tuple[Tensor, Tensor]:
        """CLAP log-mel ``(B, 1, n_frames, n_mels)`` -> events ``(B, steps, hidden)``, anchor."""
        return encode_event(self.htsat, input_features)

    def encode_anchor(self, input_features: Tensor) -> Tensor:
        """CLAP log-mel ``(B, 1, n_frames, n_mels)`` -> anchor ``(B, anchor_size)``."""
        return encode_event(self.clap or self.htsat, input_features)[1]

    def encode_chunk(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """One chunk of audio -> rows ``(1, N, stream_size)`` and anchor ``(1, anchor_size)``."""
        return self.encode_chunks([chunk])[0]

    @torch.no_grad()
    def encode_chunks(self, chunks: Sequence[Chunk]) -> list[tuple[Tensor, Tensor]]:
        """Chunks with the same number of temporal frames, in one batch; as :meth:`encode_chunk`."""
        device = next(self.whisper.parameters()).device
        runtime = self.config.runtime
        outputs: list[dict[str, list[NDArray[np.float32]]]] = [{} for _ in chunks]

        def run(graph: str, encoder: Callable[[Tensor], tuple[Tensor, ...]], *names: str) -> None:
            """Every window of every chunk at once; outputs go back to their chunks."""
            windows = [window for chunk in chunks for window in chunk.windows[graph]]
            found = encoder(torch.from_numpy(np.concatenate(windows)).to(device))
            for name, batch in zip(names, found, strict=True):
                rows = iter(batch.cpu().numpy())
                for chunk, of_chunk in zip(chunks, outputs, strict=True):
                    of_chunk[f"{graph}.{name}"] = [next(rows) for _ in chunk.windows[graph]]

        run(TEMPORAL, lambda x: (self.encode_temporal(x),), "temporal")
        run(EVENT, self.encode_event, "events", "anchor")
        if self.clap is not None and CLAP in runtime.graphs:
            run(CLAP, lambda x: (self.encode_anchor(x),), "anchor")
        encoded = []
        for chunk, of_chunk in zip(chunks, outputs, strict=True):
            inputs = combine(of_chunk, chunk.n_rows, runtime).inputs
            # Without a gate nothing reads an anchor.
            anchor = inputs.get("anchor", np.zeros((1, self.config.anchor_size), np.float32))
            encoded.append(
                (
                    torch.from_numpy(inputs["streams"]).to(device),
                    torch.from_numpy(anchor).to(device),
                )
            )
        return encoded

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token ids ``(B, T)`` -> embeddings ``(B, T, D)``."""
        out: Tensor = self.decoder.get_input_embeddings()(ids)
        return out


def encode_temporal(
    whisper: WhisperEncoder, input_features: Tensor, steps_per_token: int
) -> Tensor:
    """Whisper's encoder on any number of frames, average-pooled to audio tokens.

    ``(B, n_mels, F)`` -> ``(B, F / 2 / steps_per_token, hidden)``.
    """
    hidden = whisper_steps(whisper, input_features)
    pooled: Tensor = hidden.unflatten(1, (-1, steps_per_token)).mean(2)
    return pooled


def whisper_steps(whisper: WhisperEncoder, input_features: Tensor) -> Tensor:
    """Whisper's encoder on any number of frames: ``(B, n_mels, F)`` -> ``(B, ceil(F / 2), D)``.

    ``WhisperEncoder.forward`` insists on whole 30 s windows; a shorter input is the same
    computation with fewer positions.
    """
    hidden = F.gelu(whisper.conv1(input_features))
    hidden = F.gelu(whisper.conv2(hidden)).transpose(1, 2)
    hidden = hidden + whisper.embed_positions.weight[: hidden.shape[1]]
    for layer in whisper.layers:
        hidden = _whisper_layer(layer, hidden)
    out: Tensor = whisper.layer_norm(hidden)
    return out


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
    return Projector(config.projector, config.stream_size, config.anchor_size)


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
    """One randomly initialised part, the same whether or not the others are built too.

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
