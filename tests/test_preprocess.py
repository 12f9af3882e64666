"""Windows tile the audio; pooling is torch's; rows and anchors are what the arithmetic says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinygiant.models.config import preset
from tinygiant.models.features import WHISPER, ClapFeatures
from tinygiant.runtime.audio import Audio, read_audio
from tinygiant.runtime.encode import adaptive_average_pool, combine
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.features import log_mel
from tinygiant.runtime.preprocess import Chunk, preprocess
from tinygiant.runtime.resampling import sinc_resample

Array = NDArray[np.float32]
FULL = preset("full").runtime
CLIP = dataclasses.replace(FULL, audio_context="clip")
WHISPER_GRAPH, HTSAT_GRAPH, CLAP_GRAPH = "whisper_encoder", "htsat_encoder", "clap_encoder"
CLAP = ClapFeatures().log_mel


def temporal(chunk: Chunk) -> Array:
    """What Whisper's encoder sees, ``(n_mels, n_frames)``."""
    [window] = chunk.windows[WHISPER_GRAPH]
    return window[0]


def pooled(windows: list[Array], n_rows: int) -> Array:
    """The event features of an audio row, behind zeros of the temporal stream."""
    nothing = [np.zeros((300, 1280), np.float32)]
    anchors = [np.zeros(1024, np.float32)]
    outputs = {"whisper_encoder.temporal": nothing, "htsat_encoder.events": windows}
    found = combine(outputs | {"clap_encoder.anchor": anchors}, n_rows, FULL)
    return found.inputs["streams"][0, :, 1280:]


def noise(n_samples: int, rate_hz: int) -> Audio:
    samples = np.random.default_rng(n_samples).uniform(-1, 1, n_samples).astype(np.float32)
    return read_audio((samples, rate_hz))


@pytest.mark.parametrize("rate_hz", [8_000, 22_050, 96_000])
@pytest.mark.parametrize(
    ("duration_s", "windows"),
    [
        (0.1, [1]),
        (9.9, [1]),
        (10.0, [1]),
        (10.1, [2]),
        (29.9, [3]),
        (30.0, [3]),
        (31.0, [3, 1]),
        (61.0, [3, 3, 1]),
    ],
)
def test_a_clip_has_the_chunks_and_windows_its_length_asks_for(
    duration_s: float, windows: list[int], rate_hz: int
) -> None:
    audio = read_audio((np.zeros(round(duration_s * rate_hz), dtype=np.float32), rate_hz))
    chunks = preprocess(audio, FULL)
    assert [len(chunk.windows[HTSAT_GRAPH]) for chunk in chunks] == windows
    assert sum(chunk.duration_s for chunk in chunks) == pytest.approx(duration_s, abs=1e-9)
    assert all(chunk.n_rows == 300 for chunk in chunks)
    assert all(temporal(chunk).shape == (128, 3_000) for chunk in chunks)
    assert all(  # computed once for both towers
        chunk.windows[CLAP_GRAPH] is chunk.windows[HTSAT_GRAPH] for chunk in chunks
    )


def test_one_sample_more_than_a_chunk_is_not_lost() -> None:
    for rate_hz in (8_000, 44_100, 96_000):
        chunks = preprocess(noise(30 * rate_hz + 1, rate_hz), CLIP)
        assert [chunk.n_rows for chunk in chunks] == [300, 1]
        assert [len(chunk.windows[HTSAT_GRAPH]) for chunk in chunks] == [3, 1]
        assert chunks[1].duration_s == pytest.approx(1 / rate_hz)


def test_temporal_windows_tile_the_samples() -> None:
    audio = noise(40 * 16_000, 16_000)
    first, second = preprocess(audio, FULL)
    for chunk, samples in ((first, audio.samples[:480_000]), (second, audio.samples[480_000:])):
        np.testing.assert_array_equal(temporal(chunk), log_mel(samples, WHISPER, 3_000))


def test_event_windows_tile_the_samples_across_chunks() -> None:
    audio = noise(33 * 48_000, 48_000)
    ours = [x for chunk in preprocess(audio, FULL) for x in chunk.windows[HTSAT_GRAPH]]
    assert len(ours) == 4
    for index, features in enumerate(ours):
        window = audio.samples[480_000 * index : 480_000 * (index + 1)]
        np.testing.assert_array_equal(features[0, 0], log_mel(window, CLAP, 1_001))


@settings(max_examples=25, deadline=None)
@given(n_samples=st.integers(1, 70_000), rate_hz=st.sampled_from([1_000, 1_999, 8_000, 11_025]))
def test_chunks_cover_any_length_exactly(n_samples: int, rate_hz: int) -> None:
    audio = read_audio((np.zeros(n_samples, dtype=np.float32), rate_hz))
    chunks = preprocess(audio, CLIP)
    assert len(chunks) == -(-n_samples // (30 * rate_hz))
    assert sum(chunk.duration_s for chunk in chunks) == pytest.approx(n_samples / rate_hz)
    assert all(0 < chunk.duration_s <= 30 for chunk in chunks)
    n_windows = sum(len(chunk.windows[HTSAT_GRAPH]) for chunk in chunks)
    assert n_windows == -(-n_samples // (10 * rate_hz))


def test_clip_context_cuts_tokens_and_frames() -> None:
    (chunk,) = preprocess(noise(round(1.2 * 16_000), 16_000), CLIP)
    assert chunk.n_rows == 12
    assert temporal(chunk).shape == (
        128,
        220,
    )  # 12 tokens and 1 s of margin, 10 frames each
    samples = noise(round(1.2 * 16_000), 16_000).samples
    np.testing.assert_array_equal(temporal(chunk), log_mel(samples, WHISPER, 220))


def test_towers_may_have_features_of_their_own() -> None:
    original = ClapFeatures(sampling_rate_hz=32_000, hop_length=320)
    config = dataclasses.replace(preset("full"), event_features=original).runtime
    audio = noise(12 * 48_000, 48_000)
    (chunk,) = preprocess(audio, config)
    assert [window.shape for window in chunk.windows[HTSAT_GRAPH]] == [(1, 1, 1_001, 64)] * 2
    for window, samples in zip(
        chunk.windows[CLAP_GRAPH], (audio.samples[:480_000], audio.samples[480_000:]), strict=True
    ):
        np.testing.assert_array_equal(window[0, 0], log_mel(samples, CLAP, 1_001))


def test_resampling_goes_through_the_models_rates() -> None:
    """The clip to the first rate as a whole, each window from there: as an encoder does inside."""
    whisper = FULL.encoders[0]
    features = dataclasses.replace(whisper.features, resampler="sinc", through_hz=(32_000,))
    config = dataclasses.replace(
        FULL, encoders=(dataclasses.replace(whisper, features=features), *FULL.encoders[1:])
    )
    audio = noise(31 * 44_100, 44_100)
    first, second = preprocess(audio, config)
    at_32k = sinc_resample(audio.samples, 44_100, 32_000)
    for chunk, window in ((first, at_32k[:960_000]), (second, at_32k[960_000:])):
        window = np.pad(window, (0, 960_000 - window.size))  # the silence goes the whole way too
        expected = log_mel(sinc_resample(window, 32_000, 16_000), WHISPER, 3_000)
        np.testing.assert_array_equal(temporal(chunk), expected)


def test_a_model_of_one_chunk_hears_its_first_seconds() -> None:
    config = dataclasses.replace(FULL, beyond_chunk="dropped")
    [chunk] = preprocess(noise(70 * 8_000, 8_000), config)
    assert chunk.duration_s == 30.0
    np.testing.assert_array_equal(
        temporal(chunk), temporal(preprocess(noise(70 * 8_000, 8_000), FULL)[0])
    )


def test_pooling_by_hand() -> None:
    x = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=np.float32)
    np.testing.assert_allclose(adaptive_average_pool(x, 1)[:, 0], [3.0])
    np.testing.assert_allclose(adaptive_average_pool(x, 2)[:, 0], [2.0, 4.0])  # 1 2 3 | 3 4 5
    np.testing.assert_allclose(adaptive_average_pool(x, 3)[:, 0], [1.5, 3.0, 4.5])
    np.testing.assert_allclose(adaptive_average_pool(x[:2], 4)[:, 0], [1, 1, 2, 2])
    np.testing.assert_allclose(adaptive_average_pool(x[:2], 3)[:, 0], [1, 1.5, 2])


@settings(max_examples=150, deadline=None)
@given(n_in=st.integers(1, 130), n_out=st.integers(1, 330))
def test_pooling_equals_torch(n_in: int, n_out: int) -> None:
    x = np.random.default_rng(n_in * 1_000 + n_out).normal(size=(n_in, 3)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x.T.copy()), n_out)
    ours = adaptive_average_pool(x, n_out)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected.numpy().T, atol=2e-6)


def test_whisper_steps_pool_to_means_of_five() -> None:
    x = np.random.default_rng(0).normal(size=(1_500, 4)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x.T.copy()), 300)
    np.testing.assert_allclose(adaptive_average_pool(x, 300), expected.numpy().T, atol=1e-6)


def test_pooling_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot pool 0 rows to 3"):
        adaptive_average_pool(np.zeros((0, 2), dtype=np.float32), 3)
    with pytest.raises(UsageError, match="cannot pool 2 rows to 0"):
        adaptive_average_pool(np.zeros((2, 2), dtype=np.float32), 0)


@pytest.mark.parametrize("n_windows", [1, 2, 3])
def test_event_rows_keep_their_place_in_time(n_windows: int) -> None:
    windows = [np.full((32, 768), index + 1.0, dtype=np.float32) for index in range(n_windows)]
    rows = pooled(windows, 300)
    assert rows.shape == (300, 768)
    assert rows.dtype == np.float32
    for index in range(3):
        inside = rows[100 * index + 2 : 100 * (index + 1) - 2]
        np.testing.assert_allclose(inside, index + 1.0 if index < n_windows else 0.0)
    assert pooled(windows, 17).shape == (17, 768)
    np.testing.assert_array_equal(pooled(windows, 17), rows[:17])


def test_event_rows_equal_torch_over_the_concatenated_windows() -> None:
    rng = np.random.default_rng(5)
    windows = [rng.normal(size=(32, 768)).astype(np.float32) for _ in range(2)]
    steps = torch.from_numpy(np.concatenate([*windows, np.zeros((32, 768), dtype=np.float32)]))
    expected = torch.nn.functional.adaptive_avg_pool1d(steps.T, 300).T[:123]
    np.testing.assert_allclose(pooled(windows, 123), expected.numpy(), atol=1e-6)


def test_vectors_are_averaged_over_windows_and_rows_joined_without_the_margin() -> None:
    temporal = np.random.default_rng(6).normal(size=(20, 1280)).astype(np.float32)
    events = [np.zeros((32, 768), np.float32)]
    anchors = [np.full(1024, value, np.float32) for value in (1.0, 2.0, 6.0)]
    outputs = {
        "whisper_encoder.temporal": [temporal],
        "htsat_encoder.events": events,
        "clap_encoder.anchor": anchors,
    }
    found = combine(outputs, 12, FULL).inputs
    np.testing.assert_array_equal(found["anchor"], np.full((1, 1024), 3.0, np.float32))
    assert found["streams"].shape == (1, 12, 2048)
    np.testing.assert_array_equal(found["streams"][0, :, :1280], temporal[:12])
