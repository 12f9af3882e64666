"""Features of frozen encoders, in numpy, as the encoders were trained on them.

One pure function over a description in data: with Whisper's constants :func:`log_mel` gives what
transformers' ``WhisperFeatureExtractor`` gives (within 1e-4), with CLAP's what
``ClapFeatureExtractor`` gives with ``truncation="rand_trunc", padding="repeatpad"`` (within
1e-3 dB), with HTK bands what torchaudio's ``MelSpectrogram`` and ``AmplitudeToDB`` give. Samples
come in at the features' own rate, mono; resampling, windows and chunks are decided in
:mod:`~tinygiant.runtime.preprocess`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .config import Features, LogMel, MelNorm, MelScale, Waveform
from .errors import AudioError, UsageError

__all__ = [
    "encoder_input",
    "filter_bank",
    "log_mel",
    "mel_filter_bank",
    "periodic_hann",
    "waveform",
]

_POWER_FLOOR = 1e-10
# Frames transformed at a time: the spectra of one block stay in the processor's cache.
_FRAMES_PER_BLOCK = 128
# Frames of one matrix product: so few that OpenBLAS stays on this thread. Waking its pool for each
# small product costs more than it gains, and on a busy machine 50 times more.
_FRAMES_PER_PRODUCT = 4


@lru_cache(maxsize=8)
def mel_filter_bank(
    n_fft: int,
    n_mels: int,
    f_min_hz: float,
    f_max_hz: float,
    sampling_rate_hz: int,
    scale: MelScale = "slaney",
    norm: MelNorm = "slaney",
) -> NDArray[np.float64]:
    """Triangular filters on a mel scale, each with area 1 (slaney norm) or height 1.

    Same as ``transformers.audio_utils.mel_filter_bank`` with ``mel_scale=scale`` and
    ``norm="slaney"`` or None. The array is cached and read-only.

    Returns:
        ``(n_fft // 2 + 1, n_mels)`` weights from power spectrum bins to mel bands.
    """
    to_mel, to_hz = _SCALES[scale]
    edges_hz = to_hz(np.linspace(to_mel(f_min_hz), to_mel(f_max_hz), n_mels + 2))
    bins_hz = np.linspace(0.0, sampling_rate_hz // 2, n_fft // 2 + 1)[:, None]
    lower, centre, upper = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising = (bins_hz - lower) / (centre - lower)
    falling = (upper - bins_hz) / (upper - centre)
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    if norm == "slaney":
        filters *= 2.0 / (upper - lower)
    filters.flags.writeable = False
    return filters


def encoder_input(
    samples: NDArray[np.float32], features: Features, n_frames: int
) -> NDArray[np.float32]:
    """The input of an encoder's graph for one window: features of any kind, with their batch axes.

    ``(1, n_mels, n_frames)`` or ``(1, 1, n_frames, n_mels)`` of log-mel features, by their layout;
    ``(1, n_samples)`` of a waveform.
    """
    if isinstance(features, Waveform):
        return waveform(samples, features, n_frames)[None]
    found = log_mel(samples, features, n_frames)
    return found[None] if features.layout == "mels_frames" else found[None, None]


def waveform(
    samples: NDArray[np.float32], features: Waveform, n_samples: int
) -> NDArray[np.float32]:
    """The first ``n_samples`` samples, normalized where the features say so, zeros behind them.

    Same as transformers' ``Wav2Vec2FeatureExtractor`` with ``padding="max_length"``.

    Raises:
        AudioError: no samples.
    """
    if samples.size == 0:
        raise AudioError("the window holds no samples: expected at least 1, give some audio")
    held = samples[:n_samples].astype(np.float64)
    if features.normalize:
        held = (held - held.mean()) / np.sqrt(held.var() + 1e-7)
    return np.pad(held, (0, n_samples - held.size)).astype(np.float32)


def log_mel(samples: NDArray[np.float32], features: LogMel, n_frames: int) -> NDArray[np.float32]:
    """Log-mel spectrogram of a window of ``n_frames`` frames.

    Samples beyond the window are cut; a shorter clip is filled by the features' padding rule. Fewer
    frames are the same algorithm on a shorter window.

    Args:
        samples: ``(n_samples,)`` mono at ``features.sampling_rate_hz``, at least one.
        features: constants of the encoder's features.
        n_frames: frames of the result.

    Returns:
        ``(n_mels, n_frames) float32`` where the layout is ``mels_frames``, else
        ``(n_frames, n_mels)``.

    Raises:
        AudioError: no samples.
        UsageError: too few frames to mirror the edges of the signal.
    """
    n_samples = (n_frames - features.last_frame) * features.hop_length
    margin = features.n_fft // 2
    if n_samples <= margin:
        raise UsageError(
            f"{n_frames} feature frames are too few: expected at least "
            f"{margin // features.hop_length + 1}, ask for more frames"
        )
    if samples.size == 0:
        raise AudioError("the window holds no samples: expected at least 1, give some audio")
    window, held = _window(samples, n_samples, features.padding)
    # Frames that see only zeros hold no power: their transform is not worth computing. A mirrored
    # sample is seen by the last frame alone, which sees its original too, or its neighbour.
    n_live = min(n_frames, -(-(held + 1 + margin) // features.hop_length))
    power = np.full((n_frames, features.n_mels), _POWER_FLOOR, dtype=np.float32)
    power[:n_live] = _mel_power(window, n_live, features)
    found = np.log10(power)
    if features.log == "db":
        found *= 10.0
    if features.dynamic_range is not None:
        np.maximum(found, found.max() - np.float32(features.dynamic_range), out=found)
    if features.log == "whisper":
        found += 4.0
        found /= 4.0
    return np.ascontiguousarray(found.T) if features.layout == "mels_frames" else found


def _window(
    samples: NDArray[np.float32], n_samples: int, padding: str
) -> tuple[NDArray[np.float64], int]:
    """Exactly ``n_samples`` of sound, and how many of them are not the zeros at the end."""
    window = np.zeros(n_samples, dtype=np.float64)
    held = min(samples.size, n_samples)
    if padding == "tile":
        window[:] = np.resize(samples, n_samples)
        return window, n_samples
    repeats = n_samples // held if padding == "repeat" else 1
    window[: repeats * held] = np.tile(samples[:held], repeats)
    return window, repeats * held


def _mel_power(
    samples: NDArray[np.float64], n_frames: int, features: LogMel
) -> NDArray[np.float32]:
    """Mel power of the first ``n_frames`` centred frames: ``(n_frames, n_mels)``, floored.

    The transform runs in double precision: in single precision its rounding, relative to the
    loudest component of a frame, drowns the quiet bands next to a pure tone.
    """
    n_fft, hop, n_mels = features.n_fft, features.hop_length, features.n_mels
    filters = filter_bank(features)
    padded = np.pad(samples, n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][:n_frames]
    taper = periodic_hann(n_fft)
    n_blocks = -(-n_frames // _FRAMES_PER_BLOCK)
    mel = np.empty((n_blocks * _FRAMES_PER_BLOCK, n_mels), dtype=np.float32)
    power = np.zeros((_FRAMES_PER_BLOCK, n_fft // 2 + 1), dtype=np.float32)
    for start in range(0, n_frames, _FRAMES_PER_BLOCK):
        spectrum = np.fft.rfft(frames[start : start + _FRAMES_PER_BLOCK] * taper)
        power[: len(spectrum)] = spectrum.real**2 + spectrum.imag**2
        np.matmul(
            power.reshape(-1, _FRAMES_PER_PRODUCT, power.shape[1]),
            filters,
            out=mel[start : start + _FRAMES_PER_BLOCK].reshape(-1, _FRAMES_PER_PRODUCT, n_mels),
        )
    return np.maximum(mel[:n_frames], _POWER_FLOOR)


@lru_cache(maxsize=8)
def filter_bank(features: LogMel) -> NDArray[np.float32]:
    """The filters of ``features``, ``(n_fft // 2 + 1, n_mels)``; see :func:`mel_filter_bank`."""
    return mel_filter_bank(
        features.n_fft,
        features.n_mels,
        features.f_min_hz,
        features.f_max_hz,
        features.sampling_rate_hz,
        features.mel_scale,
        features.mel_norm,
    ).astype(np.float32)


@lru_cache(maxsize=8)
def periodic_hann(n_fft: int) -> NDArray[np.float64]:
    """The window of ``n_fft`` samples that repeats without a doubled zero."""
    return np.hanning(n_fft + 1)[:-1]


# The slaney scale: linear below 1 kHz (200 / 3 Hz a mel), logarithmic above (27 mels for 6.4 x).
_KNEE_HZ, _KNEE_MEL, _MEL_PER_LOG = 1_000.0, 15.0, 27.0 / np.log(6.4)


def _slaney_mel(hz: float) -> float:
    if hz < _KNEE_HZ:
        return 3.0 * hz / 200.0
    return float(_KNEE_MEL + _MEL_PER_LOG * np.log(hz / _KNEE_HZ))


def _slaney_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above_knee = _KNEE_HZ * np.exp((mel - _KNEE_MEL) / _MEL_PER_LOG)
    return np.where(mel < _KNEE_MEL, 200.0 * mel / 3.0, above_knee)


# The HTK scale: 2595 mels a decade above 700 Hz.
def _htk_mel(hz: float) -> float:
    return 2_595.0 * math.log10(1.0 + hz / 700.0)


def _htk_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(700.0 * (10.0 ** (mel / 2_595.0) - 1.0))


_SCALES = {"slaney": (_slaney_mel, _slaney_hz), "htk": (_htk_mel, _htk_hz)}
