"""Windows and pooling: how audio of any length becomes audio tokens.

Chunks of 30 s follow one another, each with its own tokens; a chunk's event windows of 10 s follow
one another inside it. Windows tile the audio: no sample is lost or seen twice, and a window that
holds no audio is not run. Shared by the PyTorch reference and the runtime, so that both see the
same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .audio import Audio, resample
from .config import ClapFeatures, ModelConfig
from .errors import UsageError
from .features import clap_log_mel, whisper_log_mel

__all__ = [
    "Chunk",
    "adaptive_average_pool",
    "event_rows",
    "join_streams",
    "mean_anchor",
    "split_chunks",
]

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Chunk:
    """What the encoders see of at most ``chunk_s`` seconds.

    Attributes:
        duration_s: seconds of audio in the chunk.
        n_tokens: audio tokens that stand for it.
        temporal_features: ``(n_mels, n_frames)`` of the temporal encoder.
        event_features: ``(1001, 64)`` for each event window that holds audio.
        anchor_features: the same for the anchor's tower; empty where it reads the event features.
    """

    duration_s: float
    n_tokens: int
    temporal_features: Array
    event_features: tuple[Array, ...]
    anchor_features: tuple[Array, ...] = ()


def split_chunks(audio: Audio, config: ModelConfig) -> list[Chunk]:
    """Cut audio into chunks and compute the features of each.

    Each rate is resampled to once, over the whole clip: a chunk's edge is not an edge of the sound.
    """
    temporal, event = config.temporal.features, config.event
    at_rate = {
        rate_hz: _resampled(audio, rate_hz)
        for rate_hz in {
            temporal.sampling_rate_hz,
            event.features.sampling_rate_hz,
            event.anchor_features.sampling_rate_hz,
        }
    }
    clip_s = audio.samples.size / audio.sampling_rate_hz
    chunks = []
    n_chunks = -(-at_rate[temporal.sampling_rate_hz].size // temporal.n_samples)
    for index in range(n_chunks):
        piece = {
            rate_hz: _piece(samples, index, round(config.chunk_s * rate_hz))
            for rate_hz, samples in at_rate.items()
        }
        duration_s = min(config.chunk_s, clip_s - index * config.chunk_s)
        n_frames = config.temporal_frames(duration_s)
        event_features = _event_windows(piece[event.features.sampling_rate_hz], event.features)
        anchor_features: tuple[Array, ...] = ()
        if event.anchor_features != event.features:
            samples = piece[event.anchor_features.sampling_rate_hz]
            anchor_features = _event_windows(samples, event.anchor_features)
        chunks.append(
            Chunk(
                duration_s=duration_s,
                n_tokens=config.audio_tokens(duration_s),
                temporal_features=whisper_log_mel(
                    piece[temporal.sampling_rate_hz], n_frames, temporal
                ),
                event_features=event_features,
                anchor_features=anchor_features,
            )
        )
    return chunks


def adaptive_average_pool(x: Array, n_out: int) -> Array:
    """Average ``n_out`` spans of the first axis: ``(n_in, d) -> (n_out, d)``.

    Span ``i`` is ``floor(i * n_in / n_out) .. ceil((i + 1) * n_in / n_out)``, as in
    ``torch.nn.functional.adaptive_avg_pool1d``; with more spans than rows, rows repeat.
    """
    n_in = x.shape[0]
    if n_in == 0 or n_out < 1:
        raise UsageError(f"cannot pool {n_in} rows to {n_out}: expected at least one of each")
    if n_in % n_out == 0:
        even: Array = x.reshape(n_out, n_in // n_out, -1).mean(axis=1, dtype=x.dtype)
        return even
    positions = np.arange(n_out)
    starts = positions * n_in // n_out
    ends = -(-(positions + 1) * n_in // n_out)
    # reduceat sums between consecutive indices; every other sum is a span's. The extra row only
    # makes the last end a valid index.
    padded = np.concatenate([x, np.zeros_like(x[:1])])
    sums = np.add.reduceat(padded, np.stack([starts, ends], axis=1).ravel(), axis=0)[::2]
    pooled: Array = sums / (ends - starts)[:, None].astype(x.dtype)
    return pooled


def event_rows(window_events: Sequence[Array], n_tokens: int, config: ModelConfig) -> Array:
    """Event steps of a chunk's windows, one row an audio token.

    Windows without audio count as zeros, so that a row means the same time in every chunk.

    Args:
        window_events: ``(steps_per_window, hidden_size)`` for each window that holds audio, in
            time order.
        n_tokens: audio tokens of the chunk.
        config: constants of the model.

    Returns:
        ``(n_tokens, hidden_size) float32``.
    """
    event, n_windows = config.event, config.event_windows_per_chunk
    steps = np.zeros((n_windows, event.steps_per_window, event.hidden_size), dtype=np.float32)
    for index, window in enumerate(window_events):
        steps[index] = window
    pooled = adaptive_average_pool(steps.reshape(-1, event.hidden_size), config.tokens_per_chunk)
    return pooled[:n_tokens]


def mean_anchor(anchors: Sequence[Array]) -> Array:
    """Mean of the anchors of the windows that hold audio: each ``(anchor_size,)``, and so it is."""
    mean: Array = np.mean(np.stack(anchors), axis=0, dtype=np.float32)
    return mean


def join_streams(temporal: Array, events: Array) -> Array:
    """Concatenate the streams' features: the projector's input.

    Args:
        temporal: ``(n_rows, hidden_size)``; rows beyond the events' (the silent margin) are
            dropped.
        events: ``(n_tokens, hidden_size)``.

    Returns:
        ``(1, n_tokens, stream_size) float32``.
    """
    return np.concatenate([temporal[: events.shape[0]], events], axis=1)[None]


def _resampled(audio: Audio, rate_hz: int) -> Array:
    """The clip at another rate, exactly as long as its duration (rounded up to a sample)."""
    n_samples = -(-audio.samples.size * rate_hz // audio.sampling_rate_hz)
    resampled = resample(audio.samples, audio.sampling_rate_hz, rate_hz)[:n_samples]
    return np.pad(resampled, (0, n_samples - resampled.size))


def _piece(samples: Array, index: int, length: int) -> Array:
    return samples[index * length : (index + 1) * length]


def _event_windows(samples: Array, features: ClapFeatures) -> tuple[Array, ...]:
    length = features.n_samples
    return tuple(
        clap_log_mel(_piece(samples, index, length), features)
        for index in range(-(-samples.size // length))
    )
