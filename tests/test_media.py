"""Formats of phones, browsers and films are heard, through PyAV or the program ffmpeg.

The clips are written by PyAV's encoders. What must come out is known: tones of chosen frequencies,
one a second, of a stated length.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.test_recordings import hz_by_second, tone
from tinygiant.runtime import media
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.errors import AudioError, AudioTooLongError

av = pytest.importorskip("av")

HZ = (440, 880, 660)
# Name, container, codec, rate: what phones' recorders, messengers, browsers and cameras write.
FORMATS = [
    ("m4a", "ipod", "aac", 44_100),
    ("mp4", "mp4", "aac", 48_000),
    ("mov", "mov", "alac", 44_100),
    ("aac", "adts", "aac", 16_000),
    ("ts", "mpegts", "aac", 48_000),
    ("webm", "webm", "libopus", 48_000),
    ("weba", "webm", "vorbis", 44_100),
    ("mka", "matroska", "flac", 16_000),
    ("wma", "asf", "wmav2", 44_100),
    ("3gp", "3gp", "libopencore_amrnb", 8_000),
    ("amr", "amr", "libopencore_amrnb", 8_000),
    ("avi", "avi", "mp2", 44_100),
    ("flv", "flv", "aac", 44_100),
    ("wv", "wv", "wavpack", 44_100),
    ("tta", "tta", "tta", 44_100),
    ("ac3", "ac3", "ac3", 48_000),
    ("mkv", "matroska", "pcm_s16le", 16_000),
]


def encode(
    samples: np.ndarray,
    container: str,
    codec: str,
    rate_hz: int,
    *,
    layout: str = "mono",
    options: dict[str, str] | None = None,
    n_tracks: int = 1,
) -> bytes:
    """``samples (n,)`` or ``(n, channels)`` as a media file."""
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=container, options=options or {}) as out:
            streams = [out.add_stream(codec, rate=rate_hz) for _ in range(n_tracks)]
            for stream in streams:
                # FFmpeg's own vorbis encoder is experimental and takes two channels.
                stream.layout = layout = "stereo" if codec == "vorbis" else layout
                stream.bit_rate = 12_200 if "amr" in codec else 96_000
                if codec == "vorbis":
                    stream.codec_context.options = {"strict": "experimental"}
            for stream in streams:
                for frame in frames_of(samples, stream, rate_hz):
                    out.mux(stream.encode(frame))
                out.mux(stream.encode(None))
        return Path(file.name).read_bytes()


def frames_of(samples: np.ndarray, stream: Any, rate_hz: int) -> Iterator[Any]:
    """Frames of the size and kind that the stream's encoder takes."""
    n_channels = stream.layout.nb_channels
    frames = samples if samples.ndim == 2 else np.repeat(samples[:, None], n_channels, axis=1)
    packed = np.ascontiguousarray(frames, np.float32).reshape(1, -1)
    whole = av.AudioFrame.from_ndarray(packed, "flt", stream.layout.name)
    whole.sample_rate = rate_hz
    resampler = av.AudioResampler(stream.format, stream.layout, rate_hz)
    fifo = av.AudioFifo()
    for part in [*resampler.resample(whole), *resampler.resample(None)]:
        fifo.write(part)
    size = stream.codec_context.frame_size or 1_024
    while (part := fifo.read(size, partial=True)) is not None:
        yield part


def tones(rate_hz: int) -> np.ndarray:
    return np.concatenate([tone(hz, 1.0, rate_hz) for hz in HZ])


@pytest.fixture(params=["pyav", "ffmpeg"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two ways; a program ffmpeg is not everywhere."""
    if request.param == "ffmpeg":
        if shutil.which("ffmpeg") is None:
            pytest.skip("ffmpeg is not installed")
        monkeypatch.setattr(media, "_folder_of_pyav", lambda: None)
    else:
        monkeypatch.setenv("PATH", "/nothing")
    return str(request.param)


@pytest.mark.parametrize(
    ("name", "container", "codec", "rate_hz"), FORMATS, ids=[f"{f[0]}-{f[2]}" for f in FORMATS]
)
def test_every_format_is_heard(
    decoder: str, name: str, container: str, codec: str, rate_hz: int, tmp_path: Path
) -> None:
    path = tmp_path / f"clip.{name}"
    path.write_bytes(encode(tones(rate_hz), container, codec, rate_hz))
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(path)  # so it is FFmpeg that hears it
    audio = read_audio(path)
    assert audio.sampling_rate_hz == rate_hz
    assert audio.used_s == pytest.approx(3.0, abs=0.12)
    assert audio.dropped_s == pytest.approx(0, abs=0.1)
    assert hz_by_second(audio.samples, rate_hz) == pytest.approx(HZ, abs=3)
    np.testing.assert_array_equal(read_audio(path.read_bytes()).samples, audio.samples)


def test_a_films_sound_is_heard_without_its_pictures(decoder: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("aac", rate=16_000)
        sound.layout = "mono"
        for number in range(30):
            picture = np.full((48, 64, 3), 8 * number, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture)))
        out.mux(video.encode(None))
        for part in frames_of(tones(16_000), sound, 16_000):
            out.mux(sound.encode(part))
        out.mux(sound.encode(None))
    audio = read_audio(file.getvalue())
    assert hz_by_second(audio.samples) == pytest.approx(HZ, abs=3)


@pytest.mark.parametrize(
    ("container", "codec", "layout"),
    [
        *(("ipod", "aac", "7.1"), ("webm", "libopus", "7.1"), ("matroska", "flac", "5.1")),
        *(("matroska", "pcm_s16le", "hexadecagonal"), ("mp4", "aac", "stereo")),
    ],
)
def test_every_channel_of_surround_sound_is_heard(
    decoder: str, container: str, codec: str, layout: str
) -> None:
    # More than 8 planes, or 7.1 sound, once broke PyAV's frames (a segmentation fault).
    rate_hz, n_channels = 48_000, len(av.AudioLayout(layout).channels)
    for channel in {0, n_channels - 1}:
        frames = np.zeros((3 * rate_hz, n_channels), np.float32)
        frames[:, channel] = tones(rate_hz)
        audio = read_audio(encode(frames, container, codec, rate_hz, layout=layout))
        assert audio.channels == n_channels
        assert hz_by_second(audio.samples, rate_hz) == pytest.approx(HZ, abs=3)
        assert np.abs(audio.samples).max() == pytest.approx(0.4 / n_channels, rel=0.4)


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        *(("ipod", "aac"), ("webm", "libopus"), ("matroska", "flac"), ("wv", "wavpack")),
        *(("adts", "aac"), ("asf", "wmav2"), ("amr", "libopencore_amrnb")),
    ],
)
def test_joined_files_are_heard_to_the_end(decoder: str, container: str, codec: str) -> None:
    rate_hz = {"libopus": 48_000, "libopencore_amrnb": 8_000}.get(codec, 44_100)
    part = encode(tones(rate_hz), container, codec, rate_hz)
    audio = read_audio(part + part)
    assert audio.used_s == pytest.approx(2 * read_audio(part).used_s, abs=0.1)
    assert hz_by_second(audio.samples, rate_hz)[:3] == pytest.approx(HZ, abs=3)
    half = audio.samples[audio.samples.size // 2 :]
    assert hz_by_second(half, rate_hz)[:3] == pytest.approx(HZ, abs=3)


def test_what_is_missing_is_said(decoder: str) -> None:
    whole = encode(tones(44_100), "ipod", "aac", 44_100, options={"movflags": "faststart"})
    audio = read_audio(whole[: len(whole) * 2 // 3])
    assert 1.0 < audio.used_s < 2.9
    if decoder == "pyav":
        assert audio.received_s == pytest.approx(3.0, abs=0.1)
        assert any("truncated" in note for note in audio.notes)
    assert audio.notes


def test_damaged_packets_cost_themselves_alone() -> None:
    content = bytearray(encode(tones(44_100), "ipod", "aac", 44_100))
    start = content.index(b"mdat") + 4
    content[start + 3_000 : start + 3_400] = np.random.default_rng(0).bytes(400)
    audio = read_audio(bytes(content))
    assert 2.7 < audio.used_s < 3.1
    assert hz_by_second(audio.samples, 44_100)[2] == pytest.approx(HZ[2], abs=3)
    assert any("some of it cannot be decoded" in note for note in audio.notes)


def test_pieces_of_a_browsers_recording_out_of_order() -> None:
    # A recorder hands out pieces; only the first has the header.
    live = {"live": "1", "cluster_time_limit": "500"}
    content = encode(tones(48_000), "webm", "libopus", 48_000, options=live)
    first = content.index(b"\x1f\x43\xb6\x75")
    second = content.index(b"\x1f\x43\xb6\x75", first + 4)
    audio = read_audio(content[second:] + content[:second])
    assert 0.3 < audio.used_s < 0.8  # what the piece with the header holds
    assert any("bytes in front of it left out" in note for note in audio.notes)
    with pytest.raises(AudioError, match="a later piece of a webm recording"):
        read_audio(content[second:])


def test_a_cover_is_no_sound_and_no_length() -> None:
    # A cover that "lasts" longer than the sound made the file look longer, or truncated.
    picture = np.zeros((32, 32, 3), np.uint8)
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format="mp4") as out:
            cover = out.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            sound = out.add_stream("aac", rate=16_000)
            sound.layout = "mono"
            for number in range(20):
                frame = av.VideoFrame.from_ndarray(picture)
                frame.pts = number
                out.mux(cover.encode(frame))
            out.mux(cover.encode(None))
            for part in frames_of(tones(16_000), sound, 16_000):
                out.mux(sound.encode(part))
            out.mux(sound.encode(None))
        content = Path(file.name).read_bytes()
    audio = read_audio(content, max_audio_s=10)
    assert audio.received_s == audio.used_s == pytest.approx(3.0, abs=0.1)
    assert audio.notes == ()


def test_a_rate_that_changes_is_followed() -> None:
    content = encode(tones(44_100), "adts", "aac", 44_100) + encode(
        tones(24_000), "adts", "aac", 24_000
    )
    audio = read_audio(content)
    assert audio.used_s == pytest.approx(6.0, abs=0.2)
    assert hz_by_second(audio.samples, 44_100)[:3] == pytest.approx(HZ, abs=3)
    assert hz_by_second(audio.samples, 44_100)[3:] == pytest.approx(HZ, abs=3)


def test_several_sound_tracks_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    two = encode(tones(44_100), "matroska", "aac", 44_100, n_tracks=2)
    assert "it has 2 sound tracks; the first of them was read" in read_audio(two).notes


def test_lengths_are_capped(decoder: str, tmp_path: Path) -> None:
    long = encode(np.tile(tone(440), 20), "ipod", "aac", 16_000)
    with pytest.raises(AudioTooLongError, match="the limit is 10 s"):
        read_audio(long, max_audio_s=10)
    # A browser's recorder does not know the length when it writes the header.
    live = encode(np.tile(tone(440), 20), "webm", "libopus", 48_000, options={"live": "1"})
    with pytest.raises(AudioTooLongError, match="the limit is 4 s"):
        read_audio(live, max_audio_s=4)


def test_what_ffmpeg_cannot_read_is_one_line(decoder: str) -> None:
    good = encode(tones(44_100), "ipod", "aac", 44_100)
    rng = np.random.default_rng(0)
    silent_film = io.BytesIO()
    with av.open(silent_film, "w", format="mp4") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        out.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
        out.mux(video.encode(None))
    for content in (
        good[:40],
        good[:12] + rng.bytes(5_000),
        b"\x1a\x45\xdf\xa3" + rng.bytes(3_000),
        b"#!AMR\n",
        silent_film.getvalue(),
    ):
        with pytest.raises(AudioError) as caught:
            read_audio(content)
        message = str(caught.value)
        assert message.startswith("audio bytes: is a")
        assert "FFmpeg cannot read it" in message
        assert message.isprintable()
        assert len(message) < 400


def test_without_ffmpeg_one_line_names_both_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_folder_of_pyav", lambda: None)
    monkeypatch.setenv("PATH", "/nothing")
    for content, kind in (
        (b"\0\0\0\x20ftypM4A " + bytes(100), "an MPEG-4 file (m4a, mp4, mov, 3gp)"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "a Matroska file (webm, mkv, mka)"),
        (b"#!AMR\n" + bytes(100), "an AMR file (a phone's recorder)"),
        (b"\xff\xf1\x50\x80" + bytes(100), "an AAC file"),
    ):
        with pytest.raises(AudioError) as caught:
            read_audio(content)
        assert str(caught.value) == (
            f"audio bytes: is {kind}, which needs FFmpeg; run: pip install 'tinygiant[media]', or "
            "install the program ffmpeg"
        )


def test_playlists_and_scripts_open_nothing(decoder: str, tmp_path: Path) -> None:
    # To FFmpeg a playlist is a file like any other: it would read what the playlist names.
    secret = tmp_path / "secret.wav"
    soundfile.write(secret, tone(440), 16_000)
    for content in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {secret}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 9 RTP/AVP 0\n",
    ):
        for before in (b"", b"RIFF\0\0\0\0WAVE", b"ID3\4\0\0\0\0\0\0"):
            with pytest.raises(AudioError):
                read_audio(before + content.encode())


def test_no_name_is_an_option(
    decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = encode(tones(16_000), "ipod", "aac", 16_000)
    for name in ("-version.m4a", "pipe:0.m4a", "concat:a|b.m4a", "$(touch x).m4a", "; touch x.m4a"):
        Path(name).write_bytes(content)
        assert read_audio(name).used_s == pytest.approx(3.0, abs=0.1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name == "x") == []


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of one's own in ffmpeg's place."""

    def write(script: str) -> None:
        path = tmp_path / "ffmpeg"
        path.write_text(f"#!{sys.executable}\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(media, "_folder_of_pyav", lambda: None)
        monkeypatch.setenv("PATH", str(tmp_path))

    return write


def test_a_decoder_that_hangs_or_dies_is_ended(
    program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "MAX_WALL_S", 1.0)
    clip = b"\0\0\0\x20ftypM4A " + bytes(100)
    program("import time; time.sleep(60)")
    with pytest.raises(AudioError, match="it took more than 1 s"):
        read_audio(clip)
    monkeypatch.setattr(media, "MAX_WALL_S", 60.0)
    program("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(AudioError, match="FFmpeg crashed: SIGSEGV"):
        read_audio(clip)
    header = "b'.snd' + struct.pack('>5I', 24, 2**32 - 1, 6, 8000, 1)"
    program(f"import os, struct\nos.write(1, {header})\nwhile True: os.write(1, bytes(65536))")
    with pytest.raises(AudioTooLongError):
        read_audio(clip, max_audio_s=60)


def test_the_worker_is_bounded(program: Callable[[str], None]) -> None:
    clip = b"\0\0\0\x20ftypM4A " + bytes(100)
    program("bytearray(3 << 30)")
    with pytest.raises(AudioError, match="MemoryError"):
        read_audio(clip)
    program("open('/tmp/tinygiant-written', 'wb', buffering=0).write(b'x')")
    with pytest.raises(AudioError, match="File too large"):
        read_audio(clip)
    os.unlink("/tmp/tinygiant-written")
    program("import sys; sys.stderr.write('x' * 10_000_000 + '\\nlast words'); sys.exit(1)")
    with pytest.raises(AudioError, match="last words"):
        read_audio(clip)


def test_the_program_hears_the_same(tmp_path: Path, tiny_bundle: Path) -> None:
    clip = tmp_path / "memo.m4a"
    clip.write_bytes(encode(tones(44_100), "ipod", "aac", 44_100))
    command = [sys.executable, "-m", "tinygiant.runtime.cli.main", "--bundle", str(tiny_bundle)]
    asked = ["What?", "--json", "-q", "--max-new-tokens", "2"]
    for source, stdin in ((str(clip), b""), ("-", clip.read_bytes())):
        done = subprocess.run([*command, source, *asked], input=stdin, capture_output=True)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b'"used_s": 3.0' in done.stdout
