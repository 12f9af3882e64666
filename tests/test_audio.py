"""Audio that can be read is read whole and accounted for; anything else is one clear line."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygiant.runtime import audio as audio_module
from tinygiant.runtime.audio import Audio, AudioSource, read_audio, read_pcm, resample
from tinygiant.runtime.errors import AudioError, AudioTooLongError, UsageError

RATE_HZ = 16_000
STEREO = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE_HZ, 2)).astype(np.float32)


def encode(frames: np.ndarray, container: str, rate_hz: int = RATE_HZ, **options: object) -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(
        file,
        "w",
        rate_hz,
        frames.ndim if frames.ndim == 1 else frames.shape[1],
        format=container,
        **options,
    ) as sound:
        sound.write(frames)
    return file.getvalue()


def wav_header(
    rate_hz: int = RATE_HZ, n_channels: int = 1, announced_bytes: int = 2 * RATE_HZ
) -> bytes:
    """A 16-bit PCM header that may announce anything."""
    frame_bytes = 2 * n_channels % 2**16
    byte_rate = rate_hz * frame_bytes % 2**32
    return (
        struct.pack("<4sI4s", b"RIFF", min(36 + announced_bytes, 2**32 - 1), b"WAVE")
        + struct.pack("<4sIHHII", b"fmt ", 16, 1, n_channels, rate_hz, byte_rate)
        + struct.pack("<HH4sI", frame_bytes, 16, b"data", announced_bytes)
    )


def assert_refused(source: AudioSource, *words: str, **options: float) -> AudioError:
    """The source ends in an AudioError of one printable line that holds the words."""
    with pytest.raises(AudioError) as caught:
        read_audio(source, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 400
    for word in words:
        assert word in message
    return caught.value


def assert_sound(audio: Audio) -> None:
    assert audio.samples.dtype == np.float32
    assert audio.samples.ndim == 1
    assert audio.used_s == audio.samples.size / audio.sampling_rate_hz
    assert audio.received_s - audio.used_s == audio.dropped_s >= 0


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 1e-7),
        ("WAV", "PCM_U8", 1e-2),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", None),
        ("OGG", "OPUS", None),
        ("MP3", "MPEG_LAYER_III", None),
    ],
)
def test_every_container_is_read_whole(
    container: str, subtype: str, tolerance: float | None, tmp_path: Path
) -> None:
    path = tmp_path / "clip"
    t = np.arange(RATE_HZ) / RATE_HZ
    frames = 0.5 * np.stack([np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 550 * t)], axis=1)
    path.write_bytes(encode(frames, container, subtype=subtype))
    audio = read_audio(path)
    assert_sound(audio)
    assert (audio.sampling_rate_hz, audio.channels, audio.notes) == (RATE_HZ, 2, ())
    assert (audio.received_s, audio.used_s, audio.dropped_s) == (1.0, 1.0, 0.0)
    expected = frames.mean(axis=1)
    if tolerance is not None:
        np.testing.assert_allclose(audio.samples, expected, atol=tolerance)
    else:
        assert np.corrcoef(audio.samples, expected)[0, 1] > 0.99


def test_path_bytes_and_stream_give_the_same_audio(tmp_path: Path) -> None:
    encoded = encode(STEREO, "FLAC")
    path = tmp_path / "clip.flac"
    path.write_bytes(encoded)
    expected = read_audio(path)
    assert expected.source == str(path)
    with path.open("rb") as file:
        sources = [str(path), encoded, bytearray(encoded), io.BytesIO(encoded), file]
        for source in sources:
            np.testing.assert_array_equal(read_audio(source).samples, expected.samples)


def test_a_pipe_is_read_as_a_stream_and_as_a_path(tmp_path: Path) -> None:
    encoded = encode(STEREO[:4_000], "WAV")
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as sink:
        sink.write(encoded)
    with open(read_end, "rb") as stream:
        assert read_audio(stream).used_s == 0.25
    read_end, write_end = os.pipe()
    with open(write_end, "wb") as sink:
        sink.write(encoded)
    try:
        assert read_audio(f"/dev/fd/{read_end}").used_s == 0.25
    finally:
        os.close(read_end)


def test_silence_is_audio() -> None:
    audio = read_audio((np.zeros(RATE_HZ, dtype=np.int16), RATE_HZ))
    assert not audio.samples.any()
    assert audio.notes == ("silent: no sample is above -70 dBFS",)


def test_a_name_that_looks_raw_or_like_nothing_does_not_matter(tmp_path: Path) -> None:
    for name in ("clip.raw", "clip", "clip\nwith newline.mp3", "ünï.wav"):
        path = tmp_path / name
        path.write_bytes(encode(STEREO, "WAV"))
        audio = read_audio(path)
        assert audio.used_s == 1.0
        assert audio.source.isprintable()


def test_mp3_without_a_length_header_is_read_whole() -> None:
    # Loud, then quiet, at a variable bit rate: the length guessed from the first frames is short.
    rng = np.random.default_rng(1)
    frames = np.concatenate([0.3 * rng.normal(size=5 * RATE_HZ), np.zeros(10 * RATE_HZ)])
    encoded = encode(frames, "MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    second_frame = encoded.index(encoded[:2], 4)
    without_length = encoded[second_frame:]
    guessed_s = soundfile.info(io.BytesIO(without_length)).duration
    assert guessed_s < 10  # libsndfile alone would stop there
    assert read_audio(without_length).used_s == pytest.approx(15.0, abs=0.1)
    # The other way round the guess is too long; nothing is missing, so nothing is noted.
    encoded = encode(frames[::-1].copy(), "MP3", bitrate_mode="VARIABLE", compression_level=0.2)
    audio = read_audio(encoded[encoded.index(encoded[:2], 4) :], max_audio_s=20)
    assert audio.used_s == audio.received_s == pytest.approx(15.0, abs=0.1)
    assert audio.notes == ()


def test_flac_of_unknown_length_is_read_whole() -> None:
    encoded = bytearray(encode(STEREO, "FLAC"))
    encoded[21] &= 0xF0  # STREAMINFO: 36 bits of total samples, 0 is "unknown"
    encoded[22:26] = bytes(4)
    audio = read_audio(bytes(encoded))
    np.testing.assert_array_equal(audio.samples, read_audio(encode(STEREO, "FLAC")).samples)
    assert audio.received_s == audio.used_s == 1.0


# --- arrays and raw PCM -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "values", "expected"),
    [
        (np.int16, [-32_768, 0, 16_384], [-1, 0, 0.5]),
        (np.int32, [-(2**31), 0, 2**30], [-1, 0, 0.5]),
        (np.int8, [-128, 0, 64], [-1, 0, 0.5]),
        (np.uint8, [0, 128, 192], [-1, 0, 0.5]),
        (np.float64, [-1, 0, 0.5], [-1, 0, 0.5]),
        (np.float16, [-1, 0, 0.5], [-1, 0, 0.5]),
        (np.dtype(">i2"), [-32_768, 0, 16_384], [-1, 0, 0.5]),
    ],
)
def test_arrays_are_scaled_to_full_scale(dtype: type, values: list, expected: list) -> None:
    audio = read_audio((np.array(values, dtype=dtype), RATE_HZ))
    assert_sound(audio)
    np.testing.assert_array_equal(audio.samples, np.array(expected, dtype=np.float32))


def test_channels_are_averaged() -> None:
    frames = np.array([[1.0, 0.0, -0.25], [0.5, 0.5, 0.5]] * 4, dtype=np.float32)
    audio = read_audio((frames, RATE_HZ))
    np.testing.assert_allclose(audio.samples, [0.25, 0.5] * 4, atol=1e-7)
    assert audio.channels == 3
    assert read_audio((frames[:, :1], np.float64(44_100.0))).sampling_rate_hz == 44_100


def test_the_callers_array_is_neither_kept_nor_changed() -> None:
    array = np.full(100, 0.25, dtype=np.float32)
    audio = read_audio((array, RATE_HZ))
    array[:] = 0.0
    assert (audio.samples == 0.25).all()


@pytest.mark.parametrize(
    "shape", [(), (2, RATE_HZ), (1, 16), (3, 4, 5), (1, RATE_HZ, 1), (100, 0), (200, 65)]
)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    assert_refused((np.zeros(shape, dtype=np.float32), RATE_HZ), "expected")


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.complex64, np.bool_, object, "U1"])
def test_other_number_types_are_refused(dtype: type) -> None:
    assert_refused((np.zeros(10, dtype=dtype), RATE_HZ), "numbers of type", "int16")


@pytest.mark.parametrize("source", [None, 3, ["clip.wav"], (), (1, 2, 3), ([0.0], RATE_HZ)])
def test_other_sources_are_refused(source: object) -> None:
    assert_refused(source, "expected")  # type: ignore[arg-type]


class _OneByteAtATime(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        return super().read(1)


def test_raw_pcm() -> None:
    pcm = np.array([-32_768, 0, 16_384], dtype="<i2").tobytes()
    for stream in (io.BytesIO(pcm), _OneByteAtATime(pcm)):
        audio = read_pcm(stream, RATE_HZ)
        assert_sound(audio)
        np.testing.assert_array_equal(audio.samples, np.array([-1, 0, 0.5], dtype=np.float32))
        assert audio.notes == ("too short to hear anything: 3 samples, 0.19 ms",)
    audio = read_pcm(io.BytesIO(pcm + b"\0"), RATE_HZ)
    assert audio.samples.size == 3
    assert "half a 16-bit sample" in audio.notes[0]


def test_raw_pcm_is_bounded() -> None:
    class Endless(io.RawIOBase):
        served = 0

        def read(self, size: int = -1) -> bytes:
            self.served += size
            return bytes(size)

    endless = Endless()
    with pytest.raises(AudioTooLongError, match="--max-audio"):
        read_pcm(endless, RATE_HZ, max_audio_s=10)
    assert endless.served < 2 * 10 * RATE_HZ + 200_000
    with pytest.raises(AudioError, match="holds no samples"):
        read_pcm(io.BytesIO(b"\0"), RATE_HZ)
    with pytest.raises(AudioError, match="sampling rate 0 Hz"):
        read_pcm(io.BytesIO(b"\0\0"), 0)


# --- hostile input ------------------------------------------------------------------------------


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert_refused(tmp_path / "no.wav", "no.wav: no such file")
    assert_refused(tmp_path, "is a folder")
    (tmp_path / "empty.wav").touch()
    assert_refused(tmp_path / "empty.wav", "empty.wav: is empty (0 bytes)")
    assert_refused(b"", "is empty")
    assert_refused("bad\0name.wav", "cannot be opened")
    assert_refused("x" * 5_000, "cannot be opened")
    assert_refused(str(tmp_path / "no\nsuch\x1b[31m.wav"), "no?such?[31m.wav: no such file")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.wav"
    path.write_bytes(encode(STEREO, "WAV"))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: let the system call refuse instead

        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(io, "FileIO", refuse)
    assert_refused(path, "secret.wav: not readable", "permissions")


@pytest.mark.parametrize(
    "content",
    [
        b"hello, this is text\n" * 50,
        b"RIFF",
        b"RIFF\xff\xff\xff\xffWAVE",
        b"\0" * 5_000,
        b"\x89PNG\r\n\x1a\n" + b"\1" * 200,
        b"fLaC" + b"\xff" * 200,
        b"OggS" + b"\0" * 200,
        b"ID3\4\0\0\0\0\0\0",
        b"<html>not found</html>",
    ],
)
def test_not_audio(content: bytes) -> None:
    assert_refused(content, "audio bytes: ")


@settings(max_examples=60, deadline=None)
@given(
    container=st.sampled_from(["WAV", "FLAC", "OGG", "AIFF"]),
    position=st.integers(0, 400),
    damage=st.binary(min_size=1, max_size=16),
    keep=st.floats(0.0, 1.0),
)
def test_damaged_files_give_audio_or_one_line(
    container: str, position: int, damage: bytes, keep: float
) -> None:
    encoded = bytearray(encode(STEREO[:2_000], container))
    encoded[position : position + len(damage)] = damage
    try:
        audio = read_audio(bytes(encoded[: int(keep * len(encoded))]), max_audio_s=5)
    except AudioError as error:
        assert str(error).isprintable()
    else:
        assert_sound(audio)
        assert audio.used_s <= 5
        assert np.isfinite(audio.samples).all()


def test_a_header_that_points_before_the_file_prints_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    rng = np.random.default_rng(0)
    encoded = [encode(STEREO[:2_000], container) for container in ("WAV", "AIFF", "W64", "RF64")]
    for index in range(400):
        damaged = bytearray(encoded[index % len(encoded)])
        position, length = rng.integers(0, 120), rng.integers(1, 17)
        damaged[position : position + length] = rng.bytes(length)
        with contextlib.suppress(AudioError):
            read_audio(bytes(damaged))
    assert unraisable == []


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "clip.wav"
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "utf-8"
    )
    assert_refused(path, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("container", ["WAV", "AIFF", "FLAC", "MP3"])
def test_truncated_files_say_what_was_received_and_used(container: str) -> None:
    frames = np.random.default_rng(2).uniform(-0.5, 0.5, 4 * RATE_HZ).astype(np.float32)
    encoded = encode(frames, container)
    audio = read_audio(encoded[: len(encoded) // 2])
    assert_sound(audio)
    assert audio.received_s == pytest.approx(4.0, abs=0.01)
    assert audio.used_s == pytest.approx(2.0, abs=0.3)
    assert any("truncated: its header announces 4.00 s" in note for note in audio.notes)
    if container != "MP3":
        whole = read_audio(encoded).samples
        np.testing.assert_array_equal(audio.samples, whole[: audio.samples.size])


def test_truncated_ogg_is_noted() -> None:
    frames = np.random.default_rng(2).uniform(-0.5, 0.5, 4 * RATE_HZ).astype(np.float32)
    encoded = encode(frames, "OGG")
    audio = read_audio(encoded[: len(encoded) // 2])
    assert 0 < audio.used_s < 4
    assert any("without its end mark" in note for note in audio.notes)


def test_header_with_nothing_behind_it() -> None:
    assert_refused(wav_header(), "holds no samples")
    assert_refused(wav_header(announced_bytes=0), "holds no samples")
    assert_refused((np.zeros(0, dtype=np.float32), RATE_HZ), "holds no samples")
    assert_refused((np.zeros((0, 2), dtype=np.float32), RATE_HZ), "holds no samples")


def test_a_recorder_that_left_the_size_open_is_not_truncated() -> None:
    for announced_bytes in (0x7FFF_FFFF, 0xFFFF_FFFE, 0xFFFF_FFFF):
        encoded = wav_header(announced_bytes=announced_bytes) + b"\0\x10\0\xf0" * (RATE_HZ // 2)
        audio = read_audio(encoded)
        assert (audio.received_s, audio.used_s, audio.notes) == (1.0, 1.0, ())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(bad: float, tmp_path: Path) -> None:
    samples = np.zeros(RATE_HZ, dtype=np.float32)
    samples[8_000:8_003] = bad
    words = ("3 of 16000 samples are NaN or infinite", "0.500 s")
    assert_refused((samples, RATE_HZ), *words)
    assert_refused(encode(samples, "WAV", subtype="FLOAT"), *words)
    assert_refused((np.full(10, 1e300), RATE_HZ), "infinite")


def test_opposite_infinities_do_not_cancel() -> None:
    frames = np.tile(np.array([[np.inf, -np.inf]], dtype=np.float32), (10, 1))
    assert_refused((frames, RATE_HZ), "NaN or infinite")


def test_levels_beyond_full_scale() -> None:
    loud = np.array([0.0, 20_000.0, -30_000.0], dtype=np.float32)
    assert_refused((loud, RATE_HZ), "samples reach 3e+04", "expected -1..1")
    assert "2.5 times full scale" in read_audio((np.array([0.0, -2.5]), RATE_HZ)).notes[0]
    assert read_audio((np.array([1.0, -1.0] * 80), RATE_HZ)).notes == ()


@pytest.mark.parametrize(
    "rate_hz",
    [0, -1, 1, 999, 768_001, 10**12, 44_100.5, float("nan"), float("inf"), "16000", None, True],
)
def test_absurd_rates_of_arrays(rate_hz: object) -> None:
    assert_refused((np.zeros(10, dtype=np.float32), rate_hz), "sampling rate")  # type: ignore[arg-type]


@pytest.mark.parametrize("rate_hz", [0, 1, 999, 768_001, 4_000_000_000])
def test_absurd_rates_of_files(rate_hz: int) -> None:
    encoded = wav_header(rate_hz, announced_bytes=2_000) + bytes(2_000)
    assert_refused(encoded, "sampling rate", "1000..768000 Hz")


@pytest.mark.parametrize("n_channels", [0, 65, 1_024, 65_535])
def test_absurd_channel_counts(n_channels: int) -> None:
    encoded = wav_header(n_channels=n_channels, announced_bytes=262_140) + bytes(262_140)
    assert_refused(encoded, "hannel")
    assert read_audio((np.zeros((100, 64), dtype=np.float32), RATE_HZ)).channels == 64


def test_ten_hours_are_refused_from_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "long.wav"
    n_bytes = 2 * 36_000 * RATE_HZ
    with path.open("wb") as file:
        file.write(wav_header(announced_bytes=n_bytes))
        file.truncate(44 + n_bytes)  # a hole: no disk is used
    monkeypatch.setattr(soundfile.SoundFile, "read", None)  # nothing may be decoded
    error = assert_refused(path, "holds 36000 s", "limit is 300 s", "--max-audio")
    assert isinstance(error, AudioTooLongError)


def test_forged_flac_length() -> None:
    encoded = bytearray(encode(STEREO, "FLAC"))
    encoded[21] |= 0x0F
    encoded[22:26] = b"\xff" * 4
    assert isinstance(assert_refused(bytes(encoded), "--max-audio"), AudioTooLongError)


def test_length_is_enforced_where_the_header_does_not_tell() -> None:
    encoded = bytearray(encode(np.zeros(10 * RATE_HZ, dtype=np.float32), "FLAC"))
    encoded[21] &= 0xF0
    encoded[22:26] = bytes(4)
    error = assert_refused(bytes(encoded), "holds more", "--max-audio", max_audio_s=5)
    assert isinstance(error, AudioTooLongError)


def test_the_limit_itself_is_allowed() -> None:
    samples = np.zeros(5 * 44_100 + 1, dtype=np.float32)
    assert read_audio((samples[:-1], 44_100), max_audio_s=5).used_s == 5
    assert read_audio(encode(samples[:-1], "WAV", 44_100), max_audio_s=5).used_s == 5
    for source in ((samples, 44_100), encode(samples, "WAV", 44_100)):
        assert isinstance(assert_refused(source, "limit is 5 s", max_audio_s=5), AudioTooLongError)


@pytest.mark.parametrize("max_audio_s", [0, -1, float("nan"), float("inf")])
def test_the_limit_must_make_sense(max_audio_s: float) -> None:
    with pytest.raises(UsageError, match="--max-audio"):
        read_audio((np.zeros(10, dtype=np.float32), RATE_HZ), max_audio_s=max_audio_s)


def test_streams_are_bounded_and_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(io.StringIO("text"), "stream of str", "binary mode")  # type: ignore[arg-type]
    closed = io.BytesIO(b"x")
    closed.close()
    assert_refused(closed, "reading failed")
    monkeypatch.setattr(audio_module, "MAX_STREAM_BYTES", 1 << 20)
    with open("/dev/zero", "rb") as endless:
        assert_refused(endless, "/dev/zero: more than 1 MiB")
    assert_refused("/dev/zero", "/dev/zero: more than 1 MiB")


# --- resampling ---------------------------------------------------------------------------------


def test_resampling_keeps_a_tone() -> None:
    t_48k, t_16k = np.arange(48_000) / 48_000, np.arange(16_000) / 16_000
    tone = np.sin(2 * np.pi * 1_000 * t_48k).astype(np.float32)
    resampled = resample(tone, 48_000, 16_000)
    assert resampled.dtype == np.float32
    assert resampled.shape == (16_000,)
    expected = np.sin(2 * np.pi * 1_000 * t_16k)
    np.testing.assert_allclose(resampled[200:-200], expected[200:-200], atol=1e-4)
    assert resample(tone, 48_000, 48_000) is tone


def test_resampling_removes_what_would_alias() -> None:
    t = np.arange(48_000) / 48_000
    resampled = resample(np.sin(2 * np.pi * 10_000 * t).astype(np.float32), 48_000, 16_000)
    assert np.abs(resampled[200:-200]).max() < 1e-4
