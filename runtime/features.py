"""Log-mel features of the frozen encoders, in numpy, as the encoders were trained on them.

Two pure functions, one an encoder family: :func:`whisper_log_mel` gives what transformers'
``WhisperFeatureExtractor`` gives (within 1e-4), :func:`clap_log_mel` what ``ClapFeatureExtractor``
gives with ``truncation="rand_trunc", padding="repeatpad"`` (within 1e-3 dB). Samples come in at the
encoder's own rate, mono; resampling, windows and chunks are decided elsewhere.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .config import ClapFeatures, WhisperFeatures
from .errors import AudioError, UsageError

__all__ = [
    "MelNorm",
    "MelScale",
    "clap_log_mel",
    "mel_filter_bank",
    "periodic_hann",
    "whisper_log_mel",
]

MelScale = Literal["slaney", "htk"]
MelNorm = Literal["slaney", "none"]

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
    mel_edges = np.linspace(to_mel(f_min_hz), to_mel(f_max_hz), n_mels + 2)
    edges_hz = to_hz(mel_edges)
    bins_hz = np.linspace(0.0, sampling_rate_hz // 2, n_fft // 2 + 1)[:, None]
    lower, centre, upper = edges_hz[:-2], edges_hz[1:-1], edges_hz[2:]
    rising = (bins_hz - lower) / (centre - lower)
    falling = (upper - bins_hz) / (upper - centre)
    filters: NDArray[np.float64] = np.maximum(0.0, np.minimum(rising, falling))
    if norm == "slaney":
        filters *= 2.0 / (upper - lower)
    filters.flags.writeable = False
    return filters


def whisper_log_mel(
    samples: NDArray[np.float32],
    n_frames: int | None = None,
    config: WhisperFeatures = WhisperFeatures(),  # noqa: B008 - frozen
) -> NDArray[np.float32]:
    """Log-mel spectrogram of a Whisper encoder.

    The audio is zero-padded or cut to ``n_frames`` hops; at the whole window (the default) the
    result is transformers' ``WhisperFeatureExtractor``, at fewer frames the same algorithm on the
    shorter signal.

    Args:
        samples: ``(n_samples,)`` mono at ``config.sampling_rate_hz``.
        n_frames: frames of the result; the whole window if None.
        config: constants of the encoder's features.

    Returns:
        ``(n_mels, n_frames) float32``.

    Raises:
        UsageError: too few frames to mirror the edges of the signal.
    """
    n_frames = config.n_frames if n_frames is None else n_frames
    n_samples, margin = n_frames * config.hop_length, config.n_fft // 2
    if n_samples <= margin:
        raise UsageError(
            f"{n_frames} feature frames are too few: expected at least "
            f"{margin // config.hop_length + 1}, ask for more frames"
        )
    window = np.zeros(n_samples, dtype=np.float64)
    held = min(samples.size, n_samples)
    window[:held] = samples[:held]
    # Frames that see only padding hold no power: their transform is not worth computing. The
    # mirrored right edge is seen by the last frames alone, and those see its original too.
    n_live = min(n_frames, -(-(held + margin) // config.hop_length))
    power = np.full((n_frames, config.n_mels), _POWER_FLOOR, dtype=np.float32)
    power[:n_live] = _mel_power(window, n_live, config)
    log_mel = np.log10(power)
    np.maximum(log_mel, log_mel.max() - 8.0, out=log_mel)
    log_mel += 4.0
    log_mel /= 4.0
    return np.ascontiguousarray(log_mel.T)


def clap_log_mel(
    samples: NDArray[np.float32],
    config: ClapFeatures = ClapFeatures(),  # noqa: B008 - frozen
) -> NDArray[np.float32]:
    """Log-mel spectrogram, in dB, of an HTS-AT or CLAP audio tower.

    A clip shorter than the window is repeated as often as it fits whole, then zero-padded.

    Args:
        samples: ``(n_samples,)`` mono at ``config.sampling_rate_hz``, at most a window.
        config: constants of the tower's features.

    Returns:
        ``(n_frames, n_mels) float32``: ``(1001, 64)`` at the default configuration.

    Raises:
        AudioError: no samples.
        UsageError: more samples than a window holds; cut them first.
    """
    if samples.size == 0:
        raise AudioError("the event window holds no samples: expected at least 1, give some audio")
    if samples.size > config.n_samples:
        raise UsageError(
            f"{samples.size} samples are more than the event window's {config.n_samples}: "
            "cut the audio into windows first"
        )
    repeats = config.n_samples // samples.size
    window = np.zeros(config.n_samples, dtype=np.float64)
    window[: repeats * samples.size] = np.tile(samples, repeats)
    log_mel = np.log10(_mel_power(window, config.n_frames, config))
    log_mel *= 10.0
    return log_mel


def _mel_power(
    samples: NDArray[np.float64], n_frames: int, config: WhisperFeatures | ClapFeatures
) -> NDArray[np.float32]:
    """Mel power of the first ``n_frames`` centred frames: ``(n_frames, n_mels)``, floored.

    The transform runs in double precision: in single precision its rounding, relative to the
    loudest component of a frame, drowns the quiet bands beside a pure tone.
    """
    n_fft, hop = config.n_fft, config.hop_length
    filters = _filters32(
        n_fft, config.n_mels, config.f_min_hz, config.f_max_hz, config.sampling_rate_hz
    )
    padded = np.pad(samples, n_fft // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][:n_frames]
    taper = periodic_hann(n_fft)
    n_blocks = -(-n_frames // _FRAMES_PER_BLOCK)
    mel = np.empty((n_blocks * _FRAMES_PER_BLOCK, config.n_mels), dtype=np.float32)
    power = np.zeros((_FRAMES_PER_BLOCK, n_fft // 2 + 1), dtype=np.float32)
    for start in range(0, n_frames, _FRAMES_PER_BLOCK):
        spectrum = np.fft.rfft(frames[start : start + _FRAMES_PER_BLOCK] * taper)
        power[: len(spectrum)] = spectrum.real**2 + spectrum.imag**2
        np.matmul(
            power.reshape(-1, _FRAMES_PER_PRODUCT, power.shape[1]),
            filters,
            out=mel[start : start + _FRAMES_PER_BLOCK].reshape(
                -1, _FRAMES_PER_PRODUCT, config.n_mels
            ),
        )
    return np.maximum(mel[:n_frames], _POWER_FLOOR)


@lru_cache(maxsize=8)
def _filters32(
    n_fft: int, n_mels: int, f_min_hz: float, f_max_hz: float, sampling_rate_hz: int
) -> NDArray[np.float32]:
    return mel_filter_bank(n_fft, n_mels, f_min_hz, f_max_hz, sampling_rate_hz).astype(np.float32)


@lru_cache(maxsize=8)
def periodic_hann(n_fft: int) -> NDArray[np.float64]:
    """The window of ``n_fft`` samples that repeats without a doubled zero."""
    return np.hanning(n_fft + 1)[:-1]


# The slaney scale: linear below 1 kHz (200 / 3 Hz a mel), logarithmic above (27 mels for 6.4 x).
_KNEE_HZ, _KNEE_MEL, _MEL_PER_LOG = 1_000.0, 15.0, 27.0 / np.log(6.4)


def _hz_to_mel(hz: float) -> float:
    if hz < _KNEE_HZ:
        return 3.0 * hz / 200.0
    return float(_KNEE_MEL + _MEL_PER_LOG * np.log(hz / _KNEE_HZ))


def _mel_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    above_knee = _KNEE_HZ * np.exp((mel - _KNEE_MEL) / _MEL_PER_LOG)
    return np.where(mel < _KNEE_MEL, 200.0 * mel / 3.0, above_knee)


# The HTK scale: 2595 mels a decade above 700 Hz.
def _hz_to_htk(hz: float) -> float:
    return 2_595.0 * math.log10(1.0 + hz / 700.0)


def _htk_to_hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(700.0 * (10.0 ** (mel / 2_595.0) - 1.0))


_SCALES = {"slaney": (_hz_to_mel, _mel_to_hz), "htk": (_hz_to_htk, _htk_to_hz)}
