"""Faults that the samples show are noted, and mended where that is safe; others are not seen."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinygiant.runtime.audio import Audio, read_audio
from tinygiant.runtime.signal import Mixdown, silent_choice, why_unheard

RATE_HZ = 16_000
RNG = np.random.default_rng(3)
NOISE = (0.1 * RNG.standard_normal(2 * RATE_HZ)).astype(np.float32)
NOISE -= NOISE.mean()


def sine(hz: float, level: float = 1.0, seconds: float = 1.0) -> NDArray[np.float32]:
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return (level * np.sin(2 * np.pi * hz * t + 0.3)).astype(np.float32)


def through(samples: NDArray[Any], subtype: str) -> Audio:
    """The samples as a WAV file of ``subtype`` gives them."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE_HZ, subtype=subtype, format="WAV")
    return read_audio(file.getvalue())


def unheard(audio: Audio) -> str | None:
    return why_unheard(audio.samples, audio.sampling_rate_hz)


# --- silence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_U8", "PCM_24", "ULAW", "ALAW", "FLOAT"])
def test_zeros_are_silent_however_they_are_stored(subtype: str) -> None:
    """A-law has no zero: its files of silence hold 8 of 32768."""
    audio = through(np.zeros(RATE_HZ), subtype)
    assert unheard(audio) == "silent"
    assert audio.notes == ("silent: no sample is above -70 dBFS",)


def test_dither_and_an_offset_are_silent() -> None:
    dither = RNG.integers(-1, 2, RATE_HZ).astype(np.int16)
    assert unheard(read_audio((dither, RATE_HZ))) == "silent"
    offset = read_audio((np.full(RATE_HZ, 0.05, np.float32), RATE_HZ))
    assert unheard(offset) == "silent"
    assert offset.notes == (
        "an offset of 5 % of full scale was removed",
        "silent: no sample is above -70 dBFS",
    )


def test_what_is_sixty_decibels_down_is_heard_with_a_note() -> None:
    audio = through(0.001 * sine(440), "PCM_16")
    assert unheard(audio) is None
    [note] = audio.notes
    assert note.startswith("very quiet: it peaks at -60 dBFS, ")
    assert through(0.01 * sine(440), "PCM_16").notes == ()


@pytest.mark.parametrize(
    ("n_samples", "note"),
    [(1, "1 sample, 0.062 ms"), (2, "2 samples, 0.12 ms"), (159, "159 samples, 9.9 ms")],
)
def test_a_clip_of_one_sample_and_other_short_ones(n_samples: int, note: str) -> None:
    audio = read_audio((np.full(n_samples, 0.5, np.float32), RATE_HZ))
    assert audio.notes == (f"too short to hear anything: {note}",)
    assert unheard(audio) == "too short"
    assert unheard(read_audio((NOISE[:160], RATE_HZ))) is None


def test_a_choice_that_says_so() -> None:
    assert silent_choice(["a dog", "Nothing.", "a siren"]) == 1
    assert silent_choice(["silence", "a dog"]) == 0
    assert silent_choice(["no sound", "a dog"]) == 0
    assert silent_choice(["nothing else than a dog", "a silent dog"]) is None
    assert silent_choice(["silence", "nothing"]) is None
    assert silent_choice([]) is None


# --- channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gains", [(1, -1), (1, -0.8), (-0.7, 1), (1, -1, 0.1), (0, 1, -1)])
def test_channels_in_reverse_are_not_averaged_to_nothing(gains: tuple[float, ...]) -> None:
    """Noise of its own in each channel, 25 dB below the sound: a cable, not arithmetic."""
    own = 0.005 * RNG.standard_normal((NOISE.size, len(gains)))
    frames = (np.outer(NOISE, gains) + own).astype(np.float32)
    used = int(np.abs(frames).max(axis=0).argmax())
    for audio in (read_audio((frames, RATE_HZ)), through(frames, "FLOAT")):
        [note] = audio.notes
        assert note.startswith("the channels cancel each other")
        number = int(note.partition(": channel ")[2].split()[0])
        assert abs(gains[number - 1]) >= abs(gains[used]) - 0.31
        np.testing.assert_array_equal(audio.samples, frames[:, number - 1])


@pytest.mark.parametrize("gains", [(1, 1), (1, 0), (0, 1), (1, -0.2), (1, 1, 1, 1, 1, 0)])
def test_other_channels_are_averaged(gains: tuple[float, ...]) -> None:
    frames = np.outer(NOISE, gains).astype(np.float32)
    audio = read_audio((frames, RATE_HZ))
    assert audio.notes == ()
    np.testing.assert_allclose(audio.samples, frames.mean(axis=1), atol=1e-7)


def test_channels_without_relation_are_averaged() -> None:
    for n_channels in (2, 3, 6, 16):
        frames = (0.1 * RNG.standard_normal((RATE_HZ, n_channels))).astype(np.float32)
        assert read_audio((frames, RATE_HZ)).notes == ()


def test_silence_in_stereo_is_silence_not_reverse() -> None:
    dither = RNG.integers(-1, 2, (RATE_HZ, 1)).astype(np.int16)
    audio = read_audio((np.hstack([dither, -dither]), RATE_HZ))
    assert audio.notes == ("silent: no sample is above -70 dBFS",)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 4), st.lists(st.integers(1, 500), min_size=1, max_size=6), st.integers(0, 2**32)
)
def test_blocks_do_not_matter(n_channels: int, sizes: list[int], seed: int) -> None:
    """Whatever blocks a clip comes in, all its frames are in the result, in order."""
    rng = np.random.default_rng(seed)
    gains = rng.choice([-1.0, 1.0], n_channels)
    frames = (rng.standard_normal((sum(sizes), 1)) * gains).astype(np.float32)
    whole, parts = Mixdown(), Mixdown()
    whole.add(frames)
    for block in np.split(frames, np.cumsum(sizes)[:-1]):
        parts.add(block)
    assert whole.n_frames == parts.n_frames == sum(sizes)
    found, notes = parts.finish()
    np.testing.assert_array_equal(found, whole.finish()[0])
    assert bool(notes) == (gains.sum() == 0)


# --- offset -------------------------------------------------------------------------------------


def test_an_offset_is_removed_and_the_sound_left() -> None:
    audio = read_audio((NOISE + np.float32(0.05), RATE_HZ))
    assert audio.notes == ("an offset of 5 % of full scale was removed",)
    np.testing.assert_allclose(audio.samples, NOISE - NOISE.mean(), atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.0005, -0.005])
def test_an_offset_that_does_not_matter_is_left_to_the_bit(offset: float) -> None:
    samples = NOISE + np.float32(offset)
    audio = read_audio((samples, RATE_HZ))
    assert audio.notes == ()
    np.testing.assert_array_equal(audio.samples, samples)


# --- clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", ["PCM_U8", "ULAW", "ALAW", "PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("hz", [40, 100, 441.3, 1_000, 1_200, 2_777])
def test_a_sine_of_full_scale_is_not_clipped_and_a_cut_one_is(subtype: str, hz: float) -> None:
    """Coarse steps make every peak flat: that alone is no clipping."""
    for level in (0.96, 0.999, 1.0):
        assert through(sine(hz, level), subtype).notes == ()
    if hz <= 1_200:
        [note] = through(np.clip(sine(hz, 1.4), -1, 1), subtype).notes
        assert note.startswith("clipped: ")
        share = float(note.split()[1])
        assert share == pytest.approx(100 * 2 * np.arccos(1 / 1.4) / np.pi, rel=0.25)


def test_loud_noise_and_pulses_are_not_clipped() -> None:
    for peak in (0.96, 1.0):
        loud = NOISE / np.abs(NOISE).max() * peak
        assert read_audio((loud.astype(np.float32), RATE_HZ)).notes == ()
    pulses = np.zeros(RATE_HZ, np.float32)
    pulses[::100], pulses[50::100] = 1.0, -1.0
    assert read_audio((pulses, RATE_HZ)).notes == ()


def test_noise_that_is_cut_is_clipped() -> None:
    """Noise of speech's width, 12 dB too loud, cut on one side and on both."""
    smooth = np.convolve(NOISE, np.hanning(16), mode="same")
    loud = smooth / np.abs(smooth).max() * 4
    for low in (-1.0, -4.0):
        cut = np.clip(loud, low, 1.0) / max(1.0, -low / 2)
        notes = read_audio((np.clip(cut, -1, 1).astype(np.float32), RATE_HZ)).notes
        assert any(note.startswith("clipped: ") for note in notes)
