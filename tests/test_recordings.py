"""Files that hold more than their first header says are read to the last sample.

Decoders stop at the first end they are told of. `cat a.mp3 b.mp3`, a recorder that was killed
before it could write the length, a stream that was saved twice into one file: of each of these,
half was heard and nothing was said.
"""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.errors import AudioError, AudioTooLongError

RATE_HZ = 16_000
PCM = [
    (container, subtype)
    for container in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF")
    for subtype in ("PCM_16", "PCM_24", "FLOAT", "ULAW")
]


def tone(hz: float, seconds: float = 1.0, rate_hz: int = RATE_HZ) -> np.ndarray:
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    return np.asarray(0.4 * np.sin(2 * np.pi * hz * t), dtype=np.float32)


def encode(samples: np.ndarray, container: str, rate_hz: int = RATE_HZ, **options: object) -> bytes:
    file = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(file, "w", rate_hz, channels, format=container, **options) as sound:
        sound.write(samples)
    return file.getvalue()


def decode(content: bytes) -> np.ndarray:
    """Libsndfile alone, on a file that is sound."""
    return soundfile.read(io.BytesIO(content), dtype="float32")[0]


def hz_by_second(samples: np.ndarray, rate_hz: int = RATE_HZ) -> list[int]:
    """The loudest frequency of the middle of each second."""
    found = []
    for start in range(0, len(samples) - rate_hz // 2, rate_hz):
        middle = samples[start + rate_hz // 4 : start + rate_hz * 3 // 4]
        spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
        found.append(round(float(spectrum.argmax()) * rate_hz / len(middle)))
    return found


# --- joined files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        *PCM,
        *(("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("NIST", "PCM_16")),
        *(("VOC", "PCM_16"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610")),
    ],
)
def test_joined_files_are_read_to_the_last_sample(container: str, subtype: str) -> None:
    parts = [encode(tone(hz), container, subtype=subtype) for hz in (440, 880, 660)]
    audio = read_audio(b"".join(parts))
    np.testing.assert_array_equal(audio.samples, np.concatenate([decode(part) for part in parts]))
    assert audio.received_s == audio.used_s == pytest.approx(3.0, abs=0.1)
    assert audio.dropped_s == 0
    assert "3 recordings in one file, all were read" in audio.notes[0]
    assert len(audio.notes) == 1


def without_length(mp3: bytes) -> bytes:
    """Without the first frame, which holds the length."""
    assert b"Xing" in mp3[:64] or b"Info" in mp3[:64]
    return mp3[mp3.index(mp3[:2], 4) :]


def id3(n_bytes: int) -> bytes:
    """A tag such as one with a cover, full of what looks like frames."""
    size = bytes(n_bytes >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\4\0\0" + size + (b"\xff\xfb\x90\x00" * n_bytes)[:n_bytes]


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_joined_mp3s_with_length_headers(mode: str, rate_hz: int) -> None:
    # The first length header ended the decoding: 3.78 of 7.56 s were heard, and 0 s "dropped".
    parts = [
        encode(tone(hz, 2.0, rate_hz), "MP3", rate_hz, bitrate_mode=mode, compression_level=0.4)
        for hz in (440, 880)
    ]
    for tags in ((b"", b"", b""), (id3(3_000), id3(70_000), b"TAG" + b"x" * 125)):
        audio = read_audio(tags[0] + parts[0] + tags[1] + parts[1] + tags[2])
        assert hz_by_second(audio.samples, rate_hz) == pytest.approx([440, 440, 880, 880], abs=2)
        assert audio.used_s == audio.received_s == 4.0
        assert "2.00 + 2.00 s" in audio.notes[0]


def test_joined_mp3s_without_length_headers() -> None:
    parts = [without_length(encode(tone(hz, 2.0), "MP3")) for hz in (440, 880)]
    for between in (b"", id3(5_000), b"TAG" + b"x" * 125):
        audio = read_audio(parts[0] + between + parts[1])
        assert audio.used_s == pytest.approx(4.0, abs=0.2)
        assert hz_by_second(audio.samples) == pytest.approx([440, 440, 880, 880], abs=2)


def test_joined_files_of_different_kinds() -> None:
    rates = (8_000, 44_100, 22_050)
    parts = [
        encode(tone(440, 1.0, rates[0]), "WAV", rates[0]),
        encode(np.stack([tone(880, 1.0, rates[1])] * 2, axis=1), "FLAC", rates[1]),
        encode(tone(660, 1.0, rates[2]), "MP3", rates[2]),
    ]
    audio = read_audio(b"".join(parts))
    assert audio.sampling_rate_hz == 8_000
    assert audio.channels == 2
    assert audio.used_s == pytest.approx(3.0, abs=0.01)
    assert hz_by_second(audio.samples, 8_000) == pytest.approx([440, 880, 660], abs=2)


def test_streams_with_open_sizes_are_told_apart() -> None:
    header = bytearray(encode(tone(440), "WAV", subtype="PCM_16"))
    header[4:8] = header[40:44] = b"\xff" * 4
    audio = read_audio(bytes(header) * 2)
    assert audio.used_s == 2.0
    assert hz_by_second(audio.samples) == [440, 440]


def test_joined_files_are_one_clip_for_the_limit() -> None:
    part = encode(tone(440, 2.0), "WAV")
    assert read_audio(part * 2, max_audio_s=4).used_s == 4
    with pytest.raises(AudioTooLongError, match="holds 6 s, the limit is 5 s"):
        read_audio(part * 3, max_audio_s=5)
    with pytest.raises(AudioTooLongError):
        read_audio(encode(tone(440, 2.0), "MP3") * 3, max_audio_s=5)


def test_a_recording_that_cannot_be_read_is_named() -> None:
    good = encode(tone(440), "FLAC")
    audio = read_audio(good + b"fLaC\0\0\0\x22" + b"\xff" * 500)
    assert audio.used_s == 1.0
    assert any("recording 2 of 2 in it was left out" in note for note in audio.notes)


def test_thousands_of_headers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    header = encode(tone(440, 0.001), "WAV")
    audio = read_audio(header * 3_000)
    assert audio.used_s == pytest.approx(1.0, abs=0.01)
    assert any("left out: not sound" in note for note in audio.notes)


# --- headers that say too little ----------------------------------------------------------------


def understated(container: str, content: bytes) -> bytes:
    """As a recorder leaves it that was killed: sizes as at its start."""
    made = bytearray(content)
    if container in ("WAV", "WAVEX"):
        at = content.index(b"data")
        made[4:8], made[at + 4 : at + 8] = struct.pack("<I", at), bytes(4)
    elif container == "RF64":
        at = content.index(b"ds64") + 8
        made[at + 8 : at + 16] = bytes(8)
    elif container == "W64":
        at = content.index(b"data\xf3\xac\xd3\x11") + 16
        made[at : at + 8] = struct.pack("<Q", 24)
    elif container == "AIFF":
        at, common = content.index(b"SSND"), content.index(b"COMM")
        made[4:8], made[at + 4 : at + 8] = struct.pack(">I", at + 8), struct.pack(">I", 8)
        made[common + 10 : common + 14] = bytes(4)
    elif container == "AU":
        made[8:12] = bytes(4)
    elif container == "CAF":
        at = content.index(b"data", 60)
        made[at + 4 : at + 12] = struct.pack(">q", 4)
    else:
        raise ValueError(container)
    return bytes(made)


@pytest.mark.parametrize(("container", "subtype"), PCM)
def test_a_killed_recorder_of_every_encoding(container: str, subtype: str) -> None:
    content = encode(tone(440, 3.78), container, subtype=subtype)
    audio = read_audio(understated(container, content))
    np.testing.assert_array_equal(audio.samples, decode(content))
    assert audio.received_s == audio.used_s == 3.78
    assert audio.notes == ("its header announces 0.00 s, but 3.78 s follow: read to the end",)


@pytest.mark.parametrize("container", ["WAV", "AIFF", "AU", "CAF", "W64"])
def test_two_killed_recordings_in_one_file(container: str) -> None:
    parts = [encode(tone(hz, 1.5), container, subtype="PCM_16") for hz in (440, 880)]
    audio = read_audio(b"".join(understated(container, part) for part in parts))
    np.testing.assert_array_equal(audio.samples, np.concatenate([decode(part) for part in parts]))


def test_a_header_that_says_too_little_is_not_believed() -> None:
    content = bytearray(encode(tone(440, 2.0), "WAV", subtype="PCM_16"))
    content[40:44] = struct.pack("<I", RATE_HZ)  # half a second
    audio = read_audio(bytes(content))
    assert audio.used_s == 2.0
    assert "announces 0.50 s, but 2.00 s follow" in audio.notes[0]
    flac = bytearray(encode(tone(440, 2.0), "FLAC"))
    flac[22:26] = struct.pack(">I", RATE_HZ // 2)
    audio = read_audio(bytes(flac))
    np.testing.assert_array_equal(audio.samples, decode(encode(tone(440, 2.0), "FLAC")))
    assert "announces 0.50 s, but 2.00 s follow" in audio.notes[0]
    mp3 = bytearray(encode(tone(440, 2.0, 44_100), "MP3", 44_100))
    at = max(mp3.find(b"Xing"), mp3.find(b"Info")) + 8
    mp3[at : at + 4] = struct.pack(">I", 20)
    audio = read_audio(bytes(mp3))
    assert audio.used_s == pytest.approx(2.0, abs=0.06)
    assert any("follow: read to the end" in note for note in audio.notes)


def test_what_follows_the_sound_is_not_taken_for_sound() -> None:
    content = encode(tone(440), "WAV", subtype="PCM_16")
    text = b"recorded in the garden\0\0"
    chunk = b"LIST" + struct.pack("<I", 12 + len(text)) + b"INFOICMT"
    chunk += struct.pack("<I", len(text)) + text
    for after in (chunk, bytes(512), chunk * 3, b"TAG" + b"x" * 125, id3(300), b"\0"):
        audio = read_audio(content + after)
        assert audio.used_s == 1.0, after[:4]
        assert audio.notes == ()
    audio = read_audio(content + chunk + np.random.default_rng(0).bytes(9_000))
    assert audio.used_s == 1.0
    assert audio.notes == ("9000 bytes at its end left out: not sound",)


def test_silence_after_a_size_of_nothing_is_silence() -> None:
    content = encode(np.zeros(2 * RATE_HZ, np.float32), "WAV", subtype="PCM_16")
    audio = read_audio(understated("WAV", content))
    assert audio.used_s == 2.0
    assert not audio.samples.any()


def test_a_header_without_length_is_no_recording_of_its_own() -> None:
    # An .au file whose header says that it is 0 bytes long.
    content = b".snd" + struct.pack(">5I", 0, 0, 3, RATE_HZ, 1) + b"\1\2" * 4_000
    with pytest.raises(AudioError):
        read_audio(content[:24])
    read_audio(content)


# --- what stands around the sound ---------------------------------------------------------------


@pytest.mark.parametrize(
    "lead",
    [
        b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n\r\n",
        bytes(4_096),
        np.random.default_rng(5).bytes(50_000),
    ],
    ids=["http", "zeros", "noise"],
)
@pytest.mark.parametrize("container", ["WAV", "MP3", "FLAC", "OGG", "AIFF"])
def test_what_stands_before_the_sound_is_passed_over(container: str, lead: bytes) -> None:
    content = encode(tone(440, 3.0, 44_100), container, 44_100)
    audio = read_audio(lead + content)
    np.testing.assert_array_equal(audio.samples, read_audio(content).samples)
    assert audio.notes == (f"{len(lead)} bytes in front of it left out: not sound",)


def test_damage_in_the_middle_of_an_mp3_costs_a_moment() -> None:
    content = encode(tone(440, 20.0, 44_100), "MP3", 44_100, compression_level=0.1)
    half = len(content) // 2
    for damage in (np.random.default_rng(6).bytes(3_000), bytes(30_000), b"<html>" * 100):
        audio = read_audio(content[:half] + damage + content[half:])
        assert audio.used_s == pytest.approx(20.0, abs=0.2)
        assert hz_by_second(audio.samples, 44_100) == pytest.approx([440] * 20, abs=2)
        assert any("bytes in its middle left out" in note for note in audio.notes)


def riff(*chunks: bytes) -> bytes:
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content


def test_chunks_of_recorders_do_not_matter() -> None:
    content = encode(tone(440), "WAV", subtype="PCM_16")
    form, data = content[12:36], content[36:]
    for first in (
        chunk(b"JUNK", bytes(28)),
        chunk(b"bext", bytes(602)),
        chunk(b"FLLR", bytes(4_044)),
        chunk(b"LIST", bytes(393_164)),  # as some portable recorders write it: nothing but zeros
    ):
        for parts in ((first, form, data), (form, first, data)):
            audio = read_audio(riff(*parts))
            assert (audio.used_s, audio.notes) == (1.0, ())
            # Joined, the second file is recognised whatever its first chunk is.
            twice = read_audio(riff(*parts) * 2)
            assert twice.used_s == 2.0
            assert hz_by_second(twice.samples) == [440, 440]
    for field, width in ((28, 4), (32, 2)):  # bytes a second, bytes a frame: not needed
        wrong = bytearray(content)
        wrong[field : field + width] = b"\1" + bytes(width - 1)
        assert read_audio(bytes(wrong)).used_s == 1.0


@pytest.mark.parametrize(
    ("content", "kind", "advice"),
    [
        (b"<!DOCTYPE html><html>not found</html>", "a web page", "download"),
        (b"\n\n<HTML><body>", "a web page", "download"),
        (b"#EXTM3U\n#EXTINF:9,\na.ts\n", "a playlist", "files that it names"),
        (b"PK\3\4" + bytes(500), "an archive", "unpack"),
        (b"x" * 257 + b"ustar" + bytes(300), "an archive", "unpack"),
        (b"%PDF-1.4\n" + bytes(500), "a PDF document", "audio file"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(500), "a picture", "audio file"),
        (b"MThd\0\0\0\6" + bytes(50), "a MIDI file", "render"),
        (b"\x1f\x43\xb6\x75" + bytes(50), "a later piece of a webm recording", "first piece"),
    ],
)
def test_what_is_no_audio_is_called_by_its_name(content: bytes, kind: str, advice: str) -> None:
    with pytest.raises(AudioError) as caught:
        read_audio(content)
    assert f"is {kind}" in str(caught.value)
    assert "not audio" in str(caught.value)
    assert advice in str(caught.value)


def test_a_stream_that_was_read_before_is_told_to_be_one() -> None:
    stream = io.BytesIO(encode(tone(440), "WAV"))
    assert read_audio(stream).used_s == 1.0
    with pytest.raises(AudioError, match="nothing is left in it"):
        read_audio(stream)
    with pytest.raises(AudioError, match="is empty"):
        read_audio(io.BytesIO())


# --- sources ------------------------------------------------------------------------------------


def test_a_url_is_told_to_be_one() -> None:
    for url in ("https://example.org/a.wav", "HTTP://example.org/a.mp3", "s3://bucket/a.wav"):
        with pytest.raises(AudioError, match="is a URL, and nothing is fetched") as caught:
            read_audio(url)
        assert "download it first" in str(caught.value)


def test_raw_samples_ask_for_their_rate(tmp_path: Path) -> None:
    path = tmp_path / "clip.raw"
    path.write_bytes((tone(440) * 32_767).astype("<i2").tobytes())
    with pytest.raises(AudioError, match="--pcm-rate 16000"):
        read_audio(path)


def test_an_entry_of_a_data_set(tmp_path: Path) -> None:
    samples = tone(440)
    path = tmp_path / "a.wav"
    path.write_bytes(encode(samples, "WAV", subtype="FLOAT"))
    entries = (
        {"array": samples, "sampling_rate": RATE_HZ, "path": "gone.wav"},
        {"array": samples.tolist(), "sampling_rate": RATE_HZ},
        {"array": np.stack([samples, samples]), "sampling_rate": RATE_HZ},  # channels first
        {"bytes": path.read_bytes(), "path": None},
        {"bytes": None, "path": str(path)},
    )
    for entry in entries:
        audio = read_audio(entry)
        np.testing.assert_allclose(audio.samples, samples, atol=1e-7)
        assert audio.sampling_rate_hz == RATE_HZ
    for entry in ({}, {"array": samples}, {"text": "x"}):
        with pytest.raises(AudioError, match="expected array and sampling_rate"):
            read_audio(entry)


def test_an_interrupt_while_a_decoder_reads_is_not_lost(tmp_path: Path) -> None:
    # KeyboardInterrupt inside a callback of libsndfile was printed ("Exception ignored from cffi
    # callback") and forgotten: the clip was read on, or half of it was missing.
    program = textwrap.dedent("""
        import os, signal, sys
        from tinygiant.runtime import encoded
        from tinygiant.runtime.audio import read_audio
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Interrupted(encoded.Window):
            reads = 0
            def readinto(self, buffer):
                Interrupted.reads += 1
                if Interrupted.reads == 3:
                    os.kill(os.getpid(), signal.SIGINT)
                return super().readinto(buffer)
        encoded.Window = Interrupted
        try:
            read_audio(sys.argv[1])
        except KeyboardInterrupt:
            print("interrupted")
    """)
    path = tmp_path / "a.flac"
    path.write_bytes(encode(tone(440, 5.0), "FLAC"))
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_a_chunk_of_no_length_does_not_hold_up_the_reader() -> None:
    """A W64 chunk's size counts its own header: of one that says 0, the walk never left."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(800), 8_000, format="W64")
    content = bytearray(file.getvalue())
    assert content[40:43] == b"fmt"
    content[56:64] = bytes(8)
    with contextlib.suppress(AudioError):
        read_audio(bytes(content))
