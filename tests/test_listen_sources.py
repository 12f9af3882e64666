"""Sources: every form of samples as libsndfile reads it, files that grow, microphones that go."""

from __future__ import annotations

import io
import os
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from tests.listen_stub import RATE_HZ, pcm, room, wait_for
from tinygiant.runtime.errors import AudioError, UsageError
from tinygiant.runtime.listen import sources
from tinygiant.runtime.listen.decoding import StreamDecoder
from tinygiant.runtime.listen.settings import SourceSettings
from tinygiant.runtime.listen.sources import FileSource, Microphone, Pipe

WAV = SourceSettings(kind="stdin")


def wav(samples: Any, subtype: str = "PCM_16", form: str = "WAV", rate_hz: int = RATE_HZ) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate_hz, subtype=subtype, format=form)
    return file.getvalue()


def decode(data: bytes, settings: SourceSettings = WAV, sizes: tuple[int, ...] = ()) -> Any:
    decoder, found = StreamDecoder(settings, "pipe"), []
    for size in (*sizes, len(data)):
        found.append(decoder.feed(data[:size]))
        data = data[size:]
    decoder.require_header()
    return np.concatenate(found)


@given(
    st.sampled_from(["PCM_16", "PCM_24", "PCM_32", "FLOAT"]),
    st.sampled_from(["WAV", "WAVEX", "RF64"]),
    st.integers(1, 3),
    st.lists(st.integers(0, 60), max_size=12),
)
def test_wav_in_pieces_is_what_libsndfile_reads(
    subtype: str, form: str, channels: int, sizes: list[int]
) -> None:
    samples = np.stack([room(0.05, -20.0, seed=seed) for seed in range(channels)], axis=1)
    data = wav(samples, subtype, form)
    expected = soundfile.read(io.BytesIO(data), dtype="float64", always_2d=True)[0].mean(axis=1)
    found = decode(data, sizes=tuple(sizes))
    assert found.shape == expected.shape
    assert np.abs(found / 32_768.0 - expected).max() <= 0.51 / 32_768.0


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [("s16le", "<i2", 2**15), ("s32le", "<i4", 2**31), ("f32le", "<f4", 1)],
)
def test_raw_samples_in_pieces(name: Any, dtype: str, scale: int) -> None:
    samples = room(0.1, -20.0)
    data = (samples * scale).astype(dtype).tobytes()
    settings = SourceSettings(kind="stdin", rate_hz=RATE_HZ, format=name)
    found = decode(data, settings, sizes=(13, 1, 1, 1, 700))
    assert np.abs(found / 32_768.0 - samples).max() < 1.1 / 32_768.0


def test_channels_of_raw_samples_are_averaged() -> None:
    settings = SourceSettings(kind="stdin", rate_hz=RATE_HZ, channels=2)
    data = np.array([100, 300, -50, 51] * 8, "<i2").tobytes()
    assert decode(data, settings).tolist() == [200, 0] * 8


@pytest.mark.parametrize("size", [0, 0xFFFF_FFFF, 0x7FFF_F000 + 36])
def test_a_length_that_nobody_knew_yet_is_not_believed(size: int) -> None:
    """What arecord, ffmpeg and a recorder that was killed leave in the header."""
    samples = pcm(room(0.5))
    data = bytearray(wav(samples))
    data[40:44] = size.to_bytes(4, "little")
    assert np.array_equal(decode(bytes(data)), samples)


def test_what_follows_the_sound_in_a_wav_is_not_heard() -> None:
    samples = pcm(room(0.5))
    data = wav(samples) + b"LIST\x20\x00\x00\x00" + bytes(range(32))
    assert np.array_equal(decode(data), samples)


def test_numbers_that_are_none_become_silence_and_are_counted() -> None:
    samples = room(0.1, -20.0).astype("<f4")
    samples[[3, 40, 41]] = [np.nan, np.inf, -np.inf]
    settings = SourceSettings(kind="stdin", rate_hz=RATE_HZ, format="f32le")
    decoder = StreamDecoder(settings, "pipe")
    found = decoder.feed(samples.tobytes())
    assert found[[3, 40, 41]].tolist() == [0, 0, 0]
    assert decoder.n_bad == 3
    assert np.abs(found[50:] / 32_768.0 - samples[50:]).max() < 1e-4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "ended after 0 bytes"),
        (b"RIFF\0\0\0\0WAVE", "ended after 12 bytes"),
        (b"RIFF\0\0\0\0WAVEdata\x08\0\0\0" + bytes(8), "without its format"),
        (b"RIFF\0\0\0\0WAVELIST\xff\xff\xff\x0f", "without sound"),
        (wav(room(0.1), "ULAW"), "encoding 7 with 8 bits, expected 16"),
        (wav(room(0.1), "DOUBLE"), "encoding 3 with 64 bits"),
        (wav(room(0.1), rate_hz=999), "at 999 Hz in its header"),
    ],
)
def test_what_is_no_sound_is_said(data: bytes, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        decode(data)


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "AIFF", "CAF"])
def test_a_clip_that_is_no_stream_is_called_by_its_name(kind: str) -> None:
    """It was "raw samples" whose rate is not known; with a rate it would have been noise."""
    data = wav(room(0.1), "VORBIS" if kind == "OGG" else "PCM_16", kind)
    for settings in (WAV, SourceSettings(kind="stdin", rate_hz=RATE_HZ)):
        with pytest.raises(UsageError, match=rf"(?i)pipe: is {kind}, .* ffmpeg"):
            decode(data, settings)


def test_raw_samples_need_their_rate() -> None:
    with pytest.raises(UsageError, match="rate is not known; give it"):
        decode(bytes(64))


# --- a pipe ------------------------------------------------------------------------------------


def test_a_pipe_gives_blocks_a_sign_while_nothing_comes_and_the_rest_at_the_end() -> None:
    samples = pcm(room(0.5))
    reader, writer = os.pipe()
    blocks = Pipe(reader, SourceSettings(kind="stdin", rate_hz=RATE_HZ)).blocks()
    assert next(blocks) is None
    for start in range(0, samples.size, 37):
        os.write(writer, samples[start : start + 37].tobytes())
    os.close(writer)
    found = [block for block in blocks if block is not None]
    os.close(reader)
    assert [block.size for block in found] == [512] * 15 + [320]
    assert np.array_equal(np.concatenate(found), samples)


# --- a file ------------------------------------------------------------------------------------


class Followed:
    """A growing file read in a thread."""

    def __init__(self, path: Path) -> None:
        self.source = FileSource(SourceSettings(kind="file", path=str(path)))
        self.samples = np.zeros(0, np.int16)
        self.n_signs = 0
        self.stop = False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        for block in self.source.blocks():
            if block is None:
                self.n_signs += 1
            else:
                self.samples = np.concatenate([self.samples, block])
            if self.stop:
                return


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_WAIT_S", 0.01)


def test_a_file_is_followed_as_it_grows_and_when_another_takes_its_place(
    fast: None, tmp_path: Path
) -> None:
    path = tmp_path / "recording.wav"
    first, second = pcm(room(1.0, seed=1)), pcm(room(0.64, seed=2))
    data = wav(first)
    path.write_bytes(data[:1_000])
    followed = Followed(path)
    with open(path, "ab") as file:
        for start in range(1_000, len(data), 5_000):
            file.write(data[start : start + 5_000])
            file.flush()
            n_signs = followed.n_signs
            wait_for(lambda n=n_signs: followed.n_signs > n)
    whole = first[: first.size - first.size % 512]
    wait_for(lambda: followed.samples.size >= whole.size)
    assert np.array_equal(followed.samples, whole)
    (tmp_path / "next").write_bytes(wav(second))
    (tmp_path / "next").replace(path)
    wait_for(lambda: followed.samples.size >= whole.size + second.size)
    followed.stop = True
    assert np.array_equal(followed.samples[whole.size :], second)


def test_a_file_that_is_not_followed_ends(tmp_path: Path) -> None:
    samples = pcm(room(0.5))
    (tmp_path / "a.wav").write_bytes(wav(samples))
    settings = SourceSettings(kind="file", path=str(tmp_path / "a.wav"), follow=False)
    found = list(FileSource(settings).blocks())
    assert np.array_equal(np.concatenate([b for b in found if b is not None]), samples)


def test_a_file_that_is_missing_is_said(tmp_path: Path) -> None:
    source = FileSource(SourceSettings(kind="file", path=str(tmp_path / "a.wav")))
    with pytest.raises(AudioError, match=r"a\.wav: cannot be read \(No such file"):
        next(source.blocks())


# --- a microphone ------------------------------------------------------------------------------


class FakeLibrary(types.ModuleType):
    """sounddevice with one microphone that can be unplugged, or fall silent without a word."""

    class PortAudioError(Exception):
        pass

    def __init__(self, samples: Any) -> None:
        super().__init__("sounddevice")
        self.samples = samples
        self.at = 0
        self.state = "works"
        self.n_started = 0
        self.opened: dict[str, Any] = {}

    def query_devices(self, device: Any, kind: str) -> dict[str, Any]:
        if self.state == "gone" or device not in (None, "USB"):
            raise ValueError(f"No input device matching {device!r}")
        return {"name": "USB mic", "default_samplerate": 48_000.0}

    def _terminate(self) -> None:
        pass

    def _initialize(self) -> None:
        self.n_started += 1

    def RawInputStream(self, **options: Any) -> FakeLibrary:
        if options["samplerate"] not in (RATE_HZ, 48_000):
            raise self.PortAudioError("Error opening RawInputStream: Invalid sample rate")
        self.opened = options
        return self

    def __enter__(self) -> FakeLibrary:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def read_available(self) -> int:
        if self.state == "gone":
            raise self.PortAudioError("Device unavailable")
        return 0 if self.state == "mute" else 100_000

    def read(self, size: int) -> tuple[bytes, bool]:
        block = self.samples[self.at : self.at + size]
        self.at += size
        return np.pad(block, (0, size - block.size)).tobytes(), self.at == 3 * size


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeLibrary]:
    fake = FakeLibrary(pcm(room(1.0, -30.0)))
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    yield fake


def test_a_microphone_gives_what_it_hears(library: FakeLibrary) -> None:
    source = Microphone(SourceSettings(device="USB", rate_hz=RATE_HZ))
    blocks = source.blocks()
    found = np.concatenate([next(blocks) for _ in range(10)])  # type: ignore[misc]
    assert np.array_equal(found, library.samples[: 10 * 512])
    assert source.rate_hz == RATE_HZ
    assert source.n_overflows == 1
    assert library.opened["channels"] == 1


def test_a_microphone_is_opened_at_its_own_rate(library: FakeLibrary) -> None:
    source = Microphone(SourceSettings())
    assert next(source.blocks()) is not None
    assert source.rate_hz == library.opened["samplerate"] == 48_000


def test_a_microphone_unplugged_is_lost_and_found_again(library: FakeLibrary) -> None:
    source = Microphone(SourceSettings(device="USB"))
    blocks = source.blocks()
    next(blocks)
    library.state = "gone"
    with pytest.raises(AudioError, match=r"cannot be used \(Device unavailable\)"):
        next(blocks)
    with pytest.raises(AudioError, match="No input device matching 'USB'"):
        next(source.blocks())
    library.state = "works"
    assert next(source.blocks()) is not None
    assert library.n_started == 2  # PortAudio sees new devices only when it is started again


def test_a_microphone_that_falls_silent_without_a_word_is_lost(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A USB device that hangs: a blocking read would wait for ever."""
    monkeypatch.setattr(sources, "_SILENT_S", 0.1)
    blocks = Microphone(SourceSettings()).blocks()
    next(blocks)
    library.state = "mute"
    with pytest.raises(AudioError, match=r"USB mic: delivers nothing for 0\.1 s"):
        for _ in blocks:
            pass


def test_a_rate_that_the_device_does_not_have_is_said(library: FakeLibrary) -> None:
    with pytest.raises(AudioError, match="Invalid sample rate"):
        next(Microphone(SourceSettings(rate_hz=11_025)).blocks())


def test_one_microphone_that_is_lost_does_not_end_another(library: FakeLibrary) -> None:
    """Starting PortAudio again closes every stream of the process."""
    other, lost = Microphone(SourceSettings()), Microphone(SourceSettings())
    hearing, blocks = other.blocks(), lost.blocks()
    next(hearing)
    next(blocks)
    blocks.close()  # type: ignore[attr-defined]
    assert next(lost.blocks()) is not None
    assert library.n_started == 0
    assert next(hearing) is not None
    hearing.close()  # type: ignore[attr-defined]
