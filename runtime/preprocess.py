"""Sound to features: a clip of any length becomes the inputs of the encoders.

Chunks follow one another, each with its own audio rows; an encoder's windows follow one another
inside a chunk. Windows tile the sound: no sample is lost or seen twice, and a window that holds no
sound is not run. Shared by the PyTorch references and the runtime, so that both see the same
numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .audio import Audio, resample
from .config import Features, LogMel, ModelConfig
from .features import encoder_input
from .resampling import sinc_resample

__all__ = ["Chunk", "chunks_s", "n_chunks", "preprocess"]

Array = NDArray[np.float32]

# Longer than any resampler rings.
_RING_S = 0.1


@dataclass(frozen=True, eq=False)
class Chunk:
    """The encoders' inputs for at most ``chunk_s`` seconds.

    Attributes:
        duration_s: seconds of sound in the chunk.
        n_rows: audio rows that stand for it.
        windows: by encoder graph, the input of each run: ``(1, n_mels, n_frames)`` or
            ``(1, 1, n_frames, n_mels)``, one for each window that holds sound.
    """

    duration_s: float
    n_rows: int
    windows: Mapping[str, tuple[Array, ...]]


def preprocess(audio: Audio, config: ModelConfig) -> tuple[Chunk, ...]:
    """Cut a clip into chunks and compute every encoder's features of each.

    The clip as a whole is resampled, so a chunk's edge is not an edge of the sound. Encoders with
    the same features and windows share one computation.
    """
    clip_s = audio.samples.size / audio.sampling_rate_hz
    sounds: dict[tuple[str, int], Array] = {}
    of_clip: dict[Features, Array] = {}
    chunks = []
    for index, duration_s in enumerate(chunks_s(clip_s, config)):
        known: dict[tuple[Features, float, int], tuple[Array, ...]] = {}
        windows = {}
        for encoder in config.encoders:
            features, n_frames = encoder.features, config.frames(encoder, duration_s)
            rate_hz, *_ = _rates(features)
            if (features.resampler, rate_hz) not in sounds:
                sounds[features.resampler, rate_hz] = _whole(audio, features.resampler, rate_hz)
            key = features, encoder.window_s, n_frames
            if key not in known and isinstance(features, LogMel) and features.computed_of == "clip":
                if features not in of_clip:
                    sound = sounds[features.resampler, rate_hz]
                    n_whole = features.frames_that_hold(clip_s)
                    of_clip[features] = encoder_input(sound, features, n_whole)
                start = index * encoder.n_frames
                known[key] = (of_clip[features][..., start : start + n_frames],)
            if key not in known:
                chunk = _piece(sounds[features.resampler, rate_hz], index, config.chunk_s, rate_hz)
                known[key] = tuple(
                    _features(_piece(chunk, window, encoder.window_s, rate_hz), features, n_frames)
                    for window in range(-(-chunk.size // round(encoder.window_s * rate_hz)))
                )
            windows[encoder.graph] = known[key]
        chunks.append(Chunk(duration_s, config.audio_rows(duration_s), windows))
    return tuple(chunks)


def chunks_s(duration_s: float, config: ModelConfig) -> list[float]:
    """Seconds of sound in each chunk of a clip of ``duration_s`` seconds."""
    starts_s = (index * config.chunk_s for index in range(n_chunks(duration_s, config)))
    return [min(config.chunk_s, duration_s - start_s) for start_s in starts_s]


def n_chunks(duration_s: float, config: ModelConfig) -> int:
    """Chunks of a clip of ``duration_s`` seconds."""
    if config.beyond_chunk == "dropped":
        return 1
    # Rounded first, to less than a sample: two chunks of 10.08 s are two, whatever floats say.
    return max(1, math.ceil(round(duration_s / config.chunk_s, 9)))


def _rates(features: Features) -> tuple[int, ...]:
    return *features.through_hz, features.sampling_rate_hz


def _features(samples: Array, features: Features, n_frames: int) -> Array:
    """The input of one run of an encoder, from a window at the first rate."""
    before_hz, *others = _rates(features)
    if others and isinstance(features, LogMel) and features.padding == "zeros":
        # The silence behind a short clip goes the whole way too: there, the resampler rings out.
        # What comes later is silence at any rate.
        length = (n_frames - features.last_frame) * features.hop_length
        length = length * before_hz // features.sampling_rate_hz
        silence = min(length - samples.size, round(_RING_S * before_hz))
        samples = np.pad(samples, (0, max(0, silence)))
    for rate_hz in others:
        samples = _resampled(samples, features.resampler, before_hz, rate_hz)
        before_hz = rate_hz
    return encoder_input(samples, features, n_frames)


def _whole(audio: Audio, resampler: str, rate_hz: int) -> Array:
    """The clip at another rate, exactly as long as its duration (rounded up to a sample)."""
    n_samples = -(-audio.samples.size * rate_hz // audio.sampling_rate_hz)
    found = _resampled(audio.samples, resampler, audio.sampling_rate_hz, rate_hz)[:n_samples]
    return np.pad(found, (0, n_samples - found.size))


def _resampled(samples: Array, resampler: str, from_hz: int, to_hz: int) -> Array:
    return (sinc_resample if resampler == "sinc" else resample)(samples, from_hz, to_hz)


def _piece(samples: Array, index: int, length_s: float, rate_hz: int) -> Array:
    length = round(length_s * rate_hz)
    return samples[index * length : (index + 1) * length]
