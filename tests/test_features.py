"""Features against the extractors the encoders were trained with, and against librosa."""

from __future__ import annotations

import dataclasses
import itertools
import os
from functools import cache

import librosa
import numpy as np
import pytest
import soxr
import transformers.audio_utils
from transformers import ClapFeatureExtractor, WhisperFeatureExtractor

from tinygiant.models.config import preset
from tinygiant.models.features import WHISPER, ClapFeatures
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.config import LogMel
from tinygiant.runtime.errors import AudioError, UsageError
from tinygiant.runtime.features import log_mel, mel_filter_bank
from tinygiant.runtime.preprocess import preprocess

FULL = preset("full").runtime
WHISPER_TOLERANCE = 1e-4
CLAP_TOLERANCE_DB = 1e-3

DURATIONS_S = (0.1, 9.9, 10.0, 10.1, 29.9, 30.0, 31.0, 61.0)
RATES_HZ = (8_000, 16_000, 22_050, 44_100, 48_000, 96_000)
LEVELS = ("silence", "full scale")
WHISPER_BANK = (400, 128, 0.0, 8_000.0, 16_000)
CLAP_BANK = (1_024, 64, 50.0, 14_000.0, 48_000)


def whisper_log_mel(samples: np.ndarray, n_frames: int = 3_000) -> np.ndarray:
    return log_mel(samples, WHISPER, n_frames)


def clap_log_mel(samples: np.ndarray, config: ClapFeatures = ClapFeatures()) -> np.ndarray:  # noqa: B008
    return log_mel(samples, config.log_mel, 1_001)


@cache
def whisper_extractor(window_s: int = 30) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(feature_size=128, chunk_length=window_s)


@cache
def clap_extractor(rate_hz: int = 48_000, hop_length: int = 480) -> ClapFeatureExtractor:
    return ClapFeatureExtractor(
        sampling_rate=rate_hz,
        hop_length=hop_length,
        truncation="rand_trunc",
        padding="repeatpad",
        frequency_min=50,
        frequency_max=14_000,
    )


def whisper_reference(samples: np.ndarray, window_s: int = 30) -> np.ndarray:
    """The extractor's numpy path, in double precision.

    Its torch path, which it prefers, is in single precision: beside a pure sweep its rounding alone
    reaches 1e-4. See ``test_whisper_features_equal_the_torch_path_too``.
    """
    extractor = whisper_extractor(window_s)
    window = np.zeros((1, extractor.n_samples), dtype=np.float32)
    held = samples[: extractor.n_samples]
    window[0, : held.size] = held
    return extractor._np_extract_fbank_features(window, "cpu")[0]


def clap_reference(samples: np.ndarray) -> np.ndarray:
    extractor = clap_extractor()
    return extractor(samples, sampling_rate=48_000, return_tensors="np")["input_features"][0, 0]


def clip(duration_s: float, rate_hz: int, n_channels: int, level: str) -> np.ndarray:
    """Silence, or a full-scale sweep (left) and a clipped noise (right)."""
    n_samples = round(duration_s * rate_hz)
    if level == "silence":
        return np.zeros((n_samples, n_channels), dtype=np.float32)
    t = np.arange(n_samples) / rate_hz
    highest_hz = 0.45 * rate_hz
    sweep = np.sin(np.pi * highest_hz * t**2 / max(duration_s, 1e-3))
    noise = np.random.default_rng(7).normal(scale=0.7, size=n_samples)
    return np.stack([sweep, noise.clip(-1, 1)], axis=1)[:, :n_channels].astype(np.float32)


def independent_resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    if from_hz == to_hz:
        return samples
    return soxr.resample(samples, from_hz, to_hz)


def worst_errors(
    duration_s: float, rate_hz: int, n_channels: int, level: str
) -> tuple[float, float]:
    """Largest differences from transformers over all chunks and windows: Whisper, CLAP (dB)."""
    frames = clip(duration_s, rate_hz, n_channels, level)
    chunks = preprocess(read_audio((frames, rate_hz)), FULL)
    mono = frames.mean(axis=1)
    at_16k = independent_resample(mono, rate_hz, 16_000)
    at_48k = independent_resample(mono, rate_hz, 48_000)
    whisper_windows = [at_16k[i : i + 480_000] for i in range(0, at_16k.size, 480_000)]
    clap_windows = [at_48k[i : i + 480_000] for i in range(0, at_48k.size, 480_000)]

    whisper_ours = [chunk.windows["whisper_encoder"][0][0] for chunk in chunks]
    clap_ours = [window[0, 0] for chunk in chunks for window in chunk.windows["clap_encoder"]]
    assert len(whisper_ours) == len(whisper_windows)
    assert len(clap_ours) == len(clap_windows)
    return (
        max(
            float(np.abs(ours - whisper_reference(window)).max())
            for ours, window in zip(whisper_ours, whisper_windows, strict=True)
        ),
        max(
            float(np.abs(ours - clap_reference(window)).max())
            for ours, window in zip(clap_ours, clap_windows, strict=True)
        ),
    )


def covering_cases() -> list[tuple[float, int, int, str]]:
    """Each duration and each rate with each channel count and level: 32 of the 192 combinations."""
    return [
        (duration_s, RATES_HZ[(index + 2 * kind) % len(RATES_HZ)], n_channels, level)
        for index, duration_s in enumerate(DURATIONS_S)
        for kind, (n_channels, level) in enumerate(itertools.product((1, 2), LEVELS))
    ]


# TINYGIANT_ALL_CLIPS=1 tries the whole product of 192 clips instead of a covering choice of 32.
ALL_CASES = list(itertools.product(DURATIONS_S, RATES_HZ, (1, 2), LEVELS))
CASES = ALL_CASES if os.environ.get("TINYGIANT_ALL_CLIPS") == "1" else covering_cases()


@pytest.mark.parametrize(("duration_s", "rate_hz", "n_channels", "level"), CASES)
def test_clips_give_the_extractors_features(
    duration_s: float, rate_hz: int, n_channels: int, level: str
) -> None:
    whisper_error, clap_error_db = worst_errors(duration_s, rate_hz, n_channels, level)
    assert whisper_error <= WHISPER_TOLERANCE
    assert clap_error_db <= CLAP_TOLERANCE_DB


def test_the_cases_cover_every_duration_rate_channel_count_and_level() -> None:
    cases = covering_cases()
    kinds = set(itertools.product((1, 2), LEVELS))
    assert {(case[0], case[2:]) for case in cases} == set(itertools.product(DURATIONS_S, kinds))
    assert {(case[1], case[2:]) for case in cases} == set(itertools.product(RATES_HZ, kinds))


@pytest.mark.parametrize("duration_s", [0.1, 9.9, 30.0])
@pytest.mark.parametrize("n_channels", [1, 2])
def test_whisper_features_equal_the_torch_path_too(duration_s: float, n_channels: int) -> None:
    samples = clip(duration_s, 16_000, n_channels, "full scale").mean(axis=1)
    extracted = whisper_extractor()(samples, sampling_rate=16_000, return_tensors="np")
    assert np.abs(whisper_log_mel(samples) - extracted["input_features"][0]).max() <= 1e-4


@pytest.mark.parametrize(
    "signal",
    [
        pytest.param(np.eye(1, 48_000, 20_000)[0], id="one sample"),
        pytest.param(np.ones(48_000), id="constant"),
        pytest.param(np.tile([1.0, -1.0], 24_000), id="nyquist"),
        pytest.param(1e-6 * np.random.default_rng(1).normal(size=48_000), id="near silence"),
        pytest.param(np.sin(2 * np.pi * 997 / 16_000 * np.arange(48_000)), id="pure tone"),
        pytest.param(np.ones(1), id="a single sample"),
        pytest.param(np.r_[np.zeros(479_999), 1.0], id="only the last sample of the window"),
    ],
)
def test_extreme_signals(signal: np.ndarray) -> None:
    samples = signal.astype(np.float32)
    assert np.abs(whisper_log_mel(samples) - whisper_reference(samples)).max() <= 1e-4
    assert np.abs(clap_log_mel(samples) - clap_reference(samples)).max() <= 1e-3


@pytest.mark.parametrize(("window_s", "clip_s"), [(1, 0.4), (5, 5.0), (11, 9.9), (12, 20.0)])
def test_fewer_whisper_frames_are_the_algorithm_on_a_shorter_window(
    window_s: int, clip_s: float
) -> None:
    samples = clip(clip_s, 16_000, 1, "full scale")[:, 0]
    ours = whisper_log_mel(samples, n_frames=100 * window_s)
    assert ours.shape == (128, 100 * window_s)
    assert np.abs(ours - whisper_reference(samples, window_s)).max() <= 1e-4


def test_original_htsat_geometry_at_32_khz() -> None:
    config = ClapFeatures(sampling_rate_hz=32_000, hop_length=320)
    samples = clip(3.3, 32_000, 1, "full scale")[:, 0]
    reference = clap_extractor(32_000, 320)(samples, sampling_rate=32_000, return_tensors="np")
    ours = clap_log_mel(samples, config)
    assert ours.shape == (1_001, 64)
    assert np.abs(ours - reference["input_features"][0, 0]).max() <= 1e-3


def test_librosa_agrees_on_whisper_features() -> None:
    samples = np.random.default_rng(3).uniform(-1, 1, 160_000).astype(np.float32)
    padded = np.pad(samples, (0, 320_000)).astype(np.float64)
    power = librosa.feature.melspectrogram(
        y=padded, sr=16_000, n_fft=400, hop_length=160, n_mels=128, pad_mode="reflect"
    )[:, :-1]
    decades = np.log10(np.maximum(power, 1e-10))
    expected = (np.maximum(decades, decades.max() - 8) + 4) / 4
    assert np.abs(whisper_log_mel(samples) - expected).max() <= 1e-4


def test_librosa_agrees_on_clap_features() -> None:
    samples = np.random.default_rng(4).uniform(-1, 1, 150_000).astype(np.float32)
    repeated = np.concatenate([samples] * 3 + [np.zeros(30_000)])
    power = librosa.feature.melspectrogram(
        y=repeated,
        sr=48_000,
        n_fft=1_024,
        hop_length=480,
        n_mels=64,
        fmin=50,
        fmax=14_000,
        pad_mode="reflect",
    )
    expected = librosa.power_to_db(power, amin=1e-10, top_db=None).T
    assert np.abs(clap_log_mel(samples) - expected).max() <= 1e-3


@pytest.mark.parametrize("bank", [WHISPER_BANK, CLAP_BANK], ids=["whisper", "clap"])
def test_filter_bank_equals_transformers_and_librosa(
    bank: tuple[int, int, float, float, int],
) -> None:
    n_fft, n_mels, f_min_hz, f_max_hz, rate_hz = bank
    ours = mel_filter_bank(*bank)
    assert ours.shape == (n_fft // 2 + 1, n_mels)
    upstream = transformers.audio_utils.mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=n_mels,
        min_frequency=f_min_hz,
        max_frequency=f_max_hz,
        sampling_rate=rate_hz,
        norm="slaney",
        mel_scale="slaney",
    )
    np.testing.assert_allclose(ours, upstream, atol=1e-12)
    witness = librosa.filters.mel(
        sr=rate_hz, n_fft=n_fft, n_mels=n_mels, fmin=f_min_hz, fmax=f_max_hz, dtype=np.float64
    )
    np.testing.assert_allclose(ours, witness.T, atol=1e-12)


def test_filter_bank_is_computed_once_and_cannot_be_spoilt() -> None:
    bank = mel_filter_bank(*WHISPER_BANK)
    assert mel_filter_bank(*WHISPER_BANK) is bank
    with pytest.raises(ValueError, match="read-only"):
        bank[0, 0] = 1.0


def test_features_are_contiguous_float32_and_leave_the_samples_alone() -> None:
    samples = clip(1.0, 16_000, 1, "full scale")[:, 0].copy()
    before = samples.copy()
    for features in (whisper_log_mel(samples), clap_log_mel(samples)):
        assert features.dtype == np.float32
        assert features.flags.c_contiguous
    np.testing.assert_array_equal(samples, before)


def test_silence_is_finite() -> None:
    silence = np.zeros(16_000, dtype=np.float32)
    np.testing.assert_allclose(whisper_log_mel(silence), -1.5, rtol=1e-6)
    np.testing.assert_allclose(clap_log_mel(silence), -100.0)


def test_misuse_is_refused_in_one_line() -> None:
    with pytest.raises(AudioError, match="no samples"):
        clap_log_mel(np.zeros(0, dtype=np.float32))
    with pytest.raises(UsageError, match="1 feature frames are too few"):
        whisper_log_mel(np.zeros(100, dtype=np.float32), n_frames=1)


def test_windows_are_those_of_the_extractors() -> None:
    clap = ClapFeatures()
    assert WHISPER.n_frames(30.0) == whisper_extractor().nb_max_frames == 3_000
    assert whisper_extractor().n_samples == 30 * WHISPER.sampling_rate_hz
    assert clap.log_mel.n_frames(clap.window_s) == 1_001
    assert clap_extractor().nb_max_samples == round(clap.window_s * clap.sampling_rate_hz)


@pytest.mark.parametrize("norm", [None, "slaney"])
@pytest.mark.parametrize(
    ("n_fft", "n_mels", "low", "high", "rate"),
    [(512, 64, 0.0, 8_000.0, 16_000), (1_024, 64, 50.0, 14_000.0, 32_000)],
)
def test_htk_filter_bank_equals_transformers_and_librosa(
    n_fft: int, n_mels: int, low: float, high: float, rate: int, norm: str | None
) -> None:
    """The scale of torchaudio's defaults, on which Mizar's encoder was trained."""
    found = mel_filter_bank(
        n_fft, n_mels, low, high, rate, "htk", "none" if norm is None else "slaney"
    )
    by_transformers = transformers.audio_utils.mel_filter_bank(
        n_fft // 2 + 1, n_mels, low, high, rate, norm=norm, mel_scale="htk"
    )
    by_librosa = librosa.filters.mel(
        sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=low, fmax=high, htk=True, norm=norm
    ).T
    np.testing.assert_allclose(found, by_transformers, atol=1e-12)
    np.testing.assert_allclose(found, by_librosa, atol=1e-6 if norm is None else 1e-8)


def test_a_loudness_range_is_torchaudios_top_db() -> None:
    """HTK bands of peak 1 in dB, at most 120 dB below the loudest: Mizar's features, by librosa."""
    features = LogMel(
        n_fft=512,
        hop_length=160,
        n_mels=64,
        mel_scale="htk",
        mel_norm="none",
        log="db",
        dynamic_range=120.0,
        last_frame=True,
        layout="mels_frames",
    )
    samples = np.zeros(32_000, dtype=np.float32)
    samples[:8_000] = 900 * clip(0.5, 16_000, 1, "full scale")[:, 0]
    power = librosa.feature.melspectrogram(
        y=samples.astype(np.float64), sr=16_000, n_fft=512, hop_length=160, n_mels=64, htk=True,
        norm=None, pad_mode="reflect",
    )  # fmt: skip
    expected = librosa.power_to_db(power, amin=1e-10, top_db=120.0)
    found = log_mel(samples[:8_000], features, 201)
    assert found.shape == expected.shape == (64, 201)
    assert np.abs(found - expected).max() <= 1e-2
    assert found.min() == pytest.approx(found.max() - 120.0)
    unlimited = log_mel(samples[:8_000], dataclasses.replace(features, dynamic_range=None), 201)
    assert unlimited.min() == pytest.approx(-100.0)


def test_a_short_clip_fills_its_window_by_the_features_rule() -> None:
    """Zeros, whole repeats and then zeros, or the clip again and again to the last sample."""
    samples = np.random.default_rng(9).uniform(-1, 1, 7_000).astype(np.float32)
    features = ClapFeatures(sampling_rate_hz=16_000, hop_length=160).log_mel
    once = np.pad(samples, (0, 9_000))
    twice = np.pad(np.tile(samples, 2), (0, 2_000))
    tiled = np.concatenate([samples, samples, samples[:2_000]])
    for padding, whole in (("zeros", once), ("repeat", twice), ("tile", tiled)):
        changed = dataclasses.replace(features, padding=padding)
        np.testing.assert_array_equal(
            log_mel(samples, changed, 101), log_mel(whole, features, 101), err_msg=padding
        )
