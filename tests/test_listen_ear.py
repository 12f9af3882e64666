"""An ear: what rises above the room is cut out once and whole, and the room is followed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.listen_stub import RATE_HZ, add, pcm, room
from tinygiant.runtime.listen.ear import Ear, Ring, Sound
from tinygiant.runtime.listen.settings import GateSettings

GATE = GateSettings(voice="off")


def hear(
    samples: Any, gate: GateSettings = GATE, *, size: int = 512, voice: Any = None
) -> list[Sound]:
    ear = Ear("hall", RATE_HZ, gate, voice)
    data = pcm(samples)
    found = [ear.take(data[start : start + size]) for start in range(0, data.size, size)]
    return [sound for sound in (*found, ear.finish()) if sound is not None]


def test_each_sound_is_found_once_with_its_onset_and_its_samples() -> None:
    onsets = [3.0, 7.37, 12.011, 20.5]
    samples = room(30.0)
    for at in onsets:
        add(samples, at, 0.7)
    found = hear(samples)
    assert [sound.start_s for sound in found] == pytest.approx(onsets, abs=0.033)
    assert [sound.duration_s for sound in found] == pytest.approx([0.7] * 4, abs=0.07)
    assert [sound.number for sound in found] == [1, 2, 3, 4]
    for sound in found:
        start = round((sound.start_s - 0.5) * RATE_HZ)
        assert np.array_equal(sound.samples, pcm(samples)[start : start + sound.samples.size])
        assert sound.samples.size / RATE_HZ == pytest.approx(0.7 + 2 * 0.5, abs=0.1)
        assert sound.floor_db == pytest.approx(-62.0, abs=2.0)
        assert sound.peak_db == pytest.approx(-20.0, abs=1.0)


def test_the_room_is_followed_up_and_down() -> None:
    """A day is louder than a night: 24 dB in some minutes are no sound, a bark in both is one."""
    t = np.arange(RATE_HZ * 600) / RATE_HZ
    level = -50.0 - 12.0 * np.cos(2 * np.pi * t / 600.0)
    samples = np.random.default_rng(5).standard_normal(t.size) * 10.0 ** (level / 20.0)
    add(samples, 20.0, 0.5, db=-40.0)
    add(samples, 300.0, 0.5, db=-15.0)
    add(samples, 580.0, 0.5, db=-40.0)
    assert [sound.start_s for sound in hear(samples)] == pytest.approx(
        [20.0, 300.0, 580.0], abs=0.04
    )


def test_a_machine_that_goes_on_is_one_sound_and_then_the_room() -> None:
    samples = room(120.0)
    add(samples, 10.0, 80.0, db=-40.0)
    add(samples, 60.0, 0.5, db=-20.0)  # a bark beside the machine
    add(samples, 110.0, 0.5, db=-45.0)  # one that the machine would have drowned
    machine, bark, last = hear(samples)
    assert machine.start_s == pytest.approx(10.0, abs=0.04)
    assert machine.cut and machine.duration_s == pytest.approx(GATE.longest_s, abs=0.1)
    assert bark.start_s == pytest.approx(60.0, abs=0.04)
    assert last.start_s == pytest.approx(110.0, abs=0.04)
    assert not bark.cut and not last.cut


@pytest.mark.parametrize("fade_s", [0.0, 3.0])
def test_how_a_machine_begins_does_not_make_it_two(fade_s: float) -> None:
    """Of 104 machines in a day 11 were two sounds: the first block, half of it still the room, was
    taken for the quietest moment, so what went on was louder than the room by enough.
    """
    samples = room(60.0)
    start, length = 10 * RATE_HZ + 20, 40 * RATE_HZ
    machine = room(40.0, -30.0, seed=4)
    machine *= np.minimum(1.0, np.arange(length) / max(1.0, fade_s * RATE_HZ))
    samples[start : start + length] += machine
    [sound] = hear(samples)
    assert sound.cut


def test_speech_without_end_goes_on_as_sounds_that_continue() -> None:
    """With pauses at the room's level: nothing between the first and the last word is missing."""
    samples = room(45.0)
    for at in np.arange(5.0, 37.0, 0.8):
        add(samples, at, 0.5, db=-25.0, seed=round(at * 10))
    found = hear(samples)
    assert [sound.cut for sound in found] == [True, True, True, False]
    assert [sound.continues for sound in found] == [False, True, True, True]
    for before, after in itertools.pairwise(found):
        assert after.start_s - (before.start_s + before.duration_s) < 0.9


def test_a_click_is_none_and_knocks_are() -> None:
    samples = room(12.0)
    add(samples, 3.0, 0.02)
    for knock in range(3):
        add(samples, 8.0 + 0.15 * knock, 0.02)
    [sound] = hear(samples)
    assert sound.start_s == pytest.approx(8.0, abs=0.04)


def test_a_pause_shorter_than_the_hang_over_ends_nothing() -> None:
    samples = room(12.0)
    add(samples, 3.0, 0.5)
    add(samples, 4.3, 0.5)
    [sound] = hear(samples)
    assert sound.duration_s == pytest.approx(1.8, abs=0.07)


def test_a_muted_microphone_is_not_the_room() -> None:
    """Zeros for a while (a suspended device), then the same room as before: no sound."""
    samples = room(60.0, -50.0)
    samples[10 * RATE_HZ : 20 * RATE_HZ] = 0.0
    assert hear(samples) == []


def test_loud_from_the_start_is_a_sound_and_then_the_room() -> None:
    samples = room(80.0, -30.0)
    add(samples, 60.0, 0.5, db=-10.0)
    first, second = hear(samples)
    assert first.start_s < 0.1 and first.cut
    assert second.start_s == pytest.approx(60.0, abs=0.04)


def test_what_sounds_at_the_end_is_not_lost() -> None:
    samples = room(5.0)
    add(samples, 4.5, 0.5)
    [sound] = hear(samples)
    assert sound.start_s == pytest.approx(4.5, abs=0.04)


def test_a_voice_opens_what_is_hardly_louder_than_the_room() -> None:
    samples = room(10.0)
    n_blocks = 0

    def voice(block: bytes) -> float:
        nonlocal n_blocks
        n_blocks += 1
        assert len(block) == 1_024
        return 0.9 if 100 <= n_blocks <= 150 else 0.01

    assert hear(samples) == []
    [sound] = hear(samples, voice=voice)
    assert sound.start_s == pytest.approx(99 * 0.032, abs=0.04)
    assert sound.duration_s == pytest.approx(51 * 0.032, abs=0.04)


def test_a_clock_that_jumps_changes_only_what_the_clock_says() -> None:
    samples = room(20.0)
    add(samples, 5.0, 0.5)
    add(samples, 15.0, 0.5)
    times = iter([1_000_000.0, 5_000.0])  # asked once a sound
    ear = Ear("hall", RATE_HZ, GATE, clock=lambda: next(times))
    data = pcm(samples)
    found = [ear.take(data[at : at + 512]) for at in range(0, data.size, 512)]
    first, second = [sound for sound in found if sound is not None]
    assert (first.start_s, second.start_s) == pytest.approx((5.0, 15.0), abs=0.04)
    assert second.duration_s == pytest.approx(0.5, abs=0.07)
    assert first.time == pytest.approx(1_000_000.0, abs=0.2)
    assert second.time == pytest.approx(5_000.0, abs=0.2)


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
def test_every_rate_is_heard(rate_hz: int) -> None:
    samples = room(10.0, rate_hz=rate_hz)
    start = round(4.0 * rate_hz)
    samples[start : start + rate_hz] += room(1.0, -20.0, rate_hz=rate_hz, seed=3)
    ear = Ear("hall", rate_hz, GATE)
    data, size = pcm(samples), ear.block_size
    found = [ear.take(data[at : at + size]) for at in range(0, data.size, size)]
    [sound] = [sound for sound in found if sound is not None]
    assert sound.start_s == pytest.approx(4.0, abs=0.04)
    assert sound.rate_hz == rate_hz


def test_the_longest_sound_with_all_around_it_fits_the_ring() -> None:
    gate = GateSettings(voice="off", longest_s=3.0, pre_roll_s=2.0, hang_over_s=2.0, least_s=1.0)
    samples = room(20.0)
    add(samples, 8.0, 2.9)
    [sound] = hear(samples, gate)
    start = round((sound.start_s - 2.0) * RATE_HZ)
    assert sound.samples.size / RATE_HZ >= 2.0 + 2.9
    assert np.array_equal(sound.samples, pcm(samples)[start : start + sound.samples.size])


@given(
    st.integers(1, 50),
    st.lists(st.integers(0, 70), max_size=20),
    st.integers(0, 400),
    st.integers(0, 400),
)
def test_the_ring_is_the_end_of_the_stream(
    size: int, blocks: list[int], start: int, end: int
) -> None:
    ring, stream = Ring(size), np.zeros(0, np.int16)
    for n in blocks:
        block = np.arange(stream.size, stream.size + n, dtype=np.int16)
        stream = np.concatenate([stream, block])
        ring.put(block)
    held = stream[max(0, stream.size - size) :]
    low = stream.size - held.size
    assert (ring.start, ring.end) == (low, stream.size)
    wanted = stream[max(start, low) : max(end, low)] if end > start else stream[:0]
    assert np.array_equal(ring.cut(start, end), wanted)
