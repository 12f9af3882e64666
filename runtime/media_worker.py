"""Decode FFmpeg's formats in a process of its own: a program, not a module of the runtime.

    python -I -S media_worker.py MAX_S pyav FOLDER_OF_PYAV
    python -I -S media_worker.py MAX_S ffmpeg /usr/bin/ffmpeg

Reads an encoded file at standard input, which can be searched, and writes its first sound track as
32-bit floats in Sun's ``.snd`` form: through PyAV, with what its header says as JSON in the
annotation, or by becoming the program ``ffmpeg``. FFmpeg's many decoders are large, and their input
may be hostile: so this process may not write files or use much memory or time, and if it dies, it
dies alone. An error is the last line of standard error.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["main"]

MAX_MEMORY_BYTES = 2 << 30
MAX_CPU_S = 120
# Containers of sound, and of films. Not: playlists and scripts, which make FFmpeg open other files.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,aac,loas,amr,amrnb,amrwb,asf,avi,flv,mpegts,mpeg,ogg,wav,"
    "aiff,caf,mp3,flac,wv,ape,tta,mpc,mpc8,ac3,eac3,dts,dtshd,truehd,tak,dsf,iff,rm,oma,qcp,au,w64"
)
_LITTLE_ENDIAN = sys.byteorder == "little"


def main() -> None:
    """Bound this process, then decode."""
    max_s, decoder, path = float(sys.argv[1]), sys.argv[2], sys.argv[3]
    for limit, value in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_CPU, MAX_CPU_S),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        _, most = resource.getrlimit(limit)
        allowed = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (allowed, allowed))
    if decoder == "ffmpeg":
        _become(path, max_s)
    sys.path.append(path)  # without the rest of the site's packages, which take long to look at
    try:
        for block in _decoded(max_s):
            sys.stdout.buffer.write(block)
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # enough was read
        os._exit(0)
    except Exception as error:
        sys.stderr.write(f"{getattr(error, 'strerror', None) or error}\n")
        sys.stderr.flush()
        os._exit(1)


def _become(program: str, max_s: float) -> None:
    """Run ffmpeg; no word of its command line comes from the file."""
    source = "file:/dev/fd/0"
    arguments = [
        *("ffmpeg", "-nostdin", "-hide_banner", "-v", "error"),
        *("-protocol_whitelist", "file", "-format_whitelist", DEMUXERS, "-i", source),
        *("-map", "0:a:0", "-vn", "-sn", "-dn", "-t", f"{max_s + 1:g}"),
        *("-c:a", "pcm_f32be", "-f", "au", "pipe:1"),
    ]
    os.execv(program, arguments)


def _decoded(max_s: float) -> Iterator[bytes]:
    """The header, then packed frames until the end or a second beyond ``max_s``."""
    import av

    av.logging.set_level(None)
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "none"}
    with av.open(sys.stdin.buffer, options=options) as container:
        if not container.streams.audio:
            raise ValueError("no sound track")
        stream = container.streams.audio[0]
        for other in container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        resampler, n_frames, rate_hz, note = None, 0, 0, ""
        frames = _frames(container, stream)
        for frame in frames:
            if isinstance(frame, str):
                note = frame
                continue
            if resampler is None:
                rate_hz = frame.sample_rate
                layout, n_channels = frame.layout, frame.layout.nb_channels
                yield _header(container, stream, rate_hz, n_channels)
                resampler, shape = av.AudioResampler("flt", layout, rate_hz), _shape(frame)
            elif _shape(frame) != shape:
                # A broadcast changes between stereo and surround: to the form of the beginning.
                for rest in resampler.resample(None):
                    yield _packed(rest, n_channels)
                resampler, shape = av.AudioResampler("flt", layout, rate_hz), _shape(frame)
            frame.pts = None
            for packed in resampler.resample(frame):
                yield _packed(packed, n_channels)
                n_frames += packed.samples
            if n_frames > (max_s + 1) * rate_hz:
                return
        if resampler is None:
            raise ValueError(note or "no sound in its sound track")
        for rest in resampler.resample(None):
            yield _packed(rest, n_channels)
        if note:
            sys.stderr.write(note + "\n")


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of the stream; as text what could not be decoded, which is passed over."""
    from av.error import FFmpegError

    try:
        for packet in container.demux(stream):
            try:
                yield from packet.decode()
            except FFmpegError as error:
                if packet.size:
                    yield f"some of it cannot be decoded ({error.strerror})"
    except FFmpegError as error:
        yield f"reading stopped ({error.strerror})"
    except LookupError:  # PyAV does not know streams that appear later, as in damaged .ts
        yield "reading stopped (another stream begins)"


def _shape(frame: Any) -> tuple[object, ...]:
    return frame.format.name, frame.layout.name, frame.layout.nb_channels, frame.sample_rate


def _packed(frame: Any, n_channels: int) -> bytes:
    """Interleaved samples; a plane may be longer than what it holds."""
    return bytes(memoryview(frame.planes[0])[: 4 * frame.samples * n_channels])


def _header(container: Any, stream: Any, rate_hz: int, n_channels: int) -> bytes:
    announced_s = None
    if stream.duration is not None and stream.time_base is not None:
        announced_s = float(stream.duration * stream.time_base)
    lasts_s = announced_s if container.duration is None else container.duration / 1e6
    said = {
        "announced_s": announced_s,
        "lasts_s": announced_s if announced_s is not None else lasts_s,
        "n_tracks": len(container.streams.audio),
    }
    annotation = json.dumps(said).encode()
    annotation += bytes(8 - len(annotation) % 8)
    order, magic = ("<", b"dns.") if _LITTLE_ENDIAN else (">", b".snd")
    numbers = (24 + len(annotation), 0xFFFF_FFFF, 6, rate_hz, n_channels)
    return magic + struct.pack(f"{order}5I", *numbers) + annotation


if __name__ == "__main__":
    main()
