"""Windows tile the audio; pooling is torch's; rows and anchors are what the arithmetic says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygiant.runtime.audio import Audio, read_audio
from tinygiant.runtime.chunks import (
    adaptive_average_pool,
    event_rows,
    join_streams,
    mean_anchor,
    split_chunks,
)
from tinygiant.runtime.config import ClapFeatures, EventStream, ModelConfig
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.features import clap_log_mel, whisper_log_mel

FULL = ModelConfig()
CLIP = ModelConfig(audio_context="clip")


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
    chunks = split_chunks(audio, FULL)
    assert [len(chunk.event_features) for chunk in chunks] == windows
    assert sum(chunk.duration_s for chunk in chunks) == pytest.approx(duration_s, abs=1e-9)
    assert all(chunk.n_tokens == 300 for chunk in chunks)
    assert all(chunk.temporal_features.shape == (128, 3_000) for chunk in chunks)
    assert all(chunk.anchor_features == () for chunk in chunks)


def test_one_sample_more_than_a_chunk_is_not_lost() -> None:
    for rate_hz in (8_000, 44_100, 96_000):
        chunks = split_chunks(noise(30 * rate_hz + 1, rate_hz), CLIP)
        assert [chunk.n_tokens for chunk in chunks] == [300, 1]
        assert [len(chunk.event_features) for chunk in chunks] == [3, 1]
        assert chunks[1].duration_s == pytest.approx(1 / rate_hz)


def test_temporal_windows_tile_the_samples() -> None:
    audio = noise(40 * 16_000, 16_000)
    first, second = split_chunks(audio, FULL)
    np.testing.assert_array_equal(first.temporal_features, whisper_log_mel(audio.samples[:480_000]))
    np.testing.assert_array_equal(
        second.temporal_features, whisper_log_mel(audio.samples[480_000:])
    )


def test_event_windows_tile_the_samples_across_chunks() -> None:
    audio = noise(33 * 48_000, 48_000)
    ours = [window for chunk in split_chunks(audio, FULL) for window in chunk.event_features]
    assert len(ours) == 4
    for index, features in enumerate(ours):
        window = audio.samples[480_000 * index : 480_000 * (index + 1)]
        np.testing.assert_array_equal(features, clap_log_mel(window))


@settings(max_examples=25, deadline=None)
@given(n_samples=st.integers(1, 70_000), rate_hz=st.sampled_from([1_000, 1_999, 8_000, 11_025]))
def test_chunks_cover_any_length_exactly(n_samples: int, rate_hz: int) -> None:
    audio = read_audio((np.zeros(n_samples, dtype=np.float32), rate_hz))
    chunks = split_chunks(audio, CLIP)
    assert len(chunks) == -(-n_samples // (30 * rate_hz))
    assert sum(chunk.duration_s for chunk in chunks) == pytest.approx(n_samples / rate_hz)
    assert all(0 < chunk.duration_s <= 30 for chunk in chunks)
    n_windows = sum(len(chunk.event_features) for chunk in chunks)
    assert n_windows == -(-n_samples // (10 * rate_hz))


def test_clip_context_cuts_tokens_and_frames() -> None:
    (chunk,) = split_chunks(noise(round(1.2 * 16_000), 16_000), CLIP)
    assert chunk.n_tokens == 12
    assert chunk.temporal_features.shape == (
        128,
        220,
    )  # 12 tokens and 1 s of margin, 10 frames each
    np.testing.assert_array_equal(
        chunk.temporal_features,
        whisper_log_mel(noise(round(1.2 * 16_000), 16_000).samples, n_frames=220),
    )


def test_anchor_features_come_apart_when_their_constants_differ() -> None:
    config = dataclasses.replace(
        FULL,
        event=EventStream(features=ClapFeatures(sampling_rate_hz=32_000, hop_length=320)),
    )
    audio = noise(12 * 48_000, 48_000)
    (chunk,) = split_chunks(audio, config)
    assert [features.shape for features in chunk.event_features] == [(1_001, 64)] * 2
    np.testing.assert_array_equal(chunk.anchor_features[0], clap_log_mel(audio.samples[:480_000]))
    np.testing.assert_array_equal(chunk.anchor_features[1], clap_log_mel(audio.samples[480_000:]))


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
    rows = event_rows(windows, 300, FULL)
    assert rows.shape == (300, 768)
    assert rows.dtype == np.float32
    for index in range(3):
        inside = rows[100 * index + 2 : 100 * (index + 1) - 2]
        np.testing.assert_allclose(inside, index + 1.0 if index < n_windows else 0.0)
    assert event_rows(windows, 17, FULL).shape == (17, 768)
    np.testing.assert_array_equal(event_rows(windows, 17, FULL), rows[:17])


def test_event_rows_equal_torch_over_the_concatenated_windows() -> None:
    rng = np.random.default_rng(5)
    windows = [rng.normal(size=(32, 768)).astype(np.float32) for _ in range(2)]
    steps = torch.from_numpy(np.concatenate([*windows, np.zeros((32, 768), dtype=np.float32)]))
    expected = torch.nn.functional.adaptive_avg_pool1d(steps.T, 300).T[:123]
    np.testing.assert_allclose(event_rows(windows, 123, FULL), expected.numpy(), atol=1e-6)


def test_anchor_is_the_mean_over_windows() -> None:
    anchors = [np.array([1.0, 2.0], np.float32), np.array([3.0, 6.0], np.float32)]
    np.testing.assert_array_equal(mean_anchor(anchors), np.array([2.0, 4.0], np.float32))
    np.testing.assert_array_equal(mean_anchor(anchors[:1]), anchors[0])


def test_streams_are_joined_without_the_margin() -> None:
    temporal = np.arange(8, dtype=np.float32).reshape(4, 2)
    events = -np.arange(6, dtype=np.float32).reshape(2, 3)
    joined = join_streams(temporal, events)
    np.testing.assert_array_equal(joined, [[[0, 1, 0, -1, -2], [2, 3, -3, -4, -5]]])
