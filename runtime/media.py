"""Formats of phones, browsers and films, through FFmpeg: m4a, mp4, webm, 3gp, amr, wma, ...

FFmpeg comes as PyAV (extra ``[media]``) or as the program ``ffmpeg``; either works in a process of
its own (``media_worker.py``), bounded in memory and time. It is given an open file: no file name
can become an option or a URL, and no shell is called.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import AudioError
from .text import printable

if TYPE_CHECKING:  # the doctor reads this module where numpy may be broken
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Sound", "is_available", "kind_of", "may_know", "opened"]

MAX_WALL_S = 120.0
_BLOCK_BYTES = 1 << 18
_MAX_COMPLAINT_BYTES = 4_096
_WORKER = Path(__file__).with_name("media_worker.py")

# How a file begins, and what it is called. From each format's specification.
_KINDS = (
    (rb"....ftyp", "an MPEG-4 file (m4a, mp4, mov, 3gp)"),
    (rb"....(?:moov|mdat|wide|free|skip)", "a QuickTime file (mov)"),
    (rb"\x1a\x45\xdf\xa3", "a Matroska file (webm, mkv, mka)"),
    (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a Windows Media file (wma, wmv, asf)"),
    (rb"#!AMR", "an AMR file (a phone's recorder)"),
    (rb"\xff[\xf0\xf1\xf8\xf9]", "an AAC file"),
    (rb"\x56[\xe0-\xff]..\x20", "an AAC file (LATM)"),
    (rb"RIFF....AVI ", "an AVI film"),
    (rb"RIFF....QLCM", "a QCP file (a phone's recorder)"),
    (rb"FLV\x01", "a Flash video"),
    (rb"\0\0\x01\xba", "an MPEG film (mpg, vob)"),
    (rb"\x47.{187}\x47.{187}\x47", "an MPEG transport stream (ts)"),
    (rb".{4}\x47.{191}\x47.{191}\x47", "an MPEG transport stream (m2ts)"),
    (rb"wvpk", "a WavPack file"),
    (rb"MAC ", "a Monkey's Audio file"),
    (rb"TTA[12]", "a True Audio file"),
    (rb"MP\+|MPCK", "a Musepack file"),
    (rb"tBaK", "a TAK file"),
    (rb"\x0b\x77", "a Dolby Digital file (ac3)"),
    (rb"\x7f\xfe\x80\x01", "a DTS file"),
    (rb"DSD ", "a DSD file"),
    (rb"\.RMF", "a RealMedia file"),
    (rb"ea3\x03", "an ATRAC file"),
)
_PATTERNS = tuple((re.compile(pattern, re.DOTALL), kind) for pattern, kind in _KINDS)
# Containers of which libsndfile knows some contents.
_SHARED = (b"OggS", b"RIFF", b"RF64", b"FORM", b"caff", b"ID3")


def kind_of(head: bytes) -> str | None:
    """The kind of a file, in words, by its first bytes; None if FFmpeg is not needed."""
    return next((kind for pattern, kind in _PATTERNS if pattern.match(head)), None)


def is_available() -> bool:
    """Whether PyAV or ffmpeg is installed."""
    return _decoder() is not None


def may_know(head: bytes) -> bool:
    """Whether FFmpeg is installed and may read a file of a shared kind that libsndfile refused."""
    return head.startswith(_SHARED) and is_available()


def _decoder() -> tuple[str, str] | None:
    """``pyav`` or ``ffmpeg``, and where it lies."""
    folder = _folder_of_pyav()
    if folder is not None:
        return "pyav", folder
    program = shutil.which("ffmpeg")
    return None if program is None else ("ffmpeg", program)


@functools.cache
def _folder_of_pyav() -> str | None:
    spec = importlib.util.find_spec("av")
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parents[1])


class Sound:
    """A sound track while it is decoded; see :func:`opened`.

    Attributes:
        rate_hz: of the frames.
        channels: of the frames.
        announced_s: seconds that the sound track's header announces; None if it does not say.
        lasts_s: the same, or else what the file's header says; None if neither does.
    """

    def __init__(self, process: subprocess.Popen[bytes], kind: str, name: str) -> None:
        """Read the header that the process writes. Use :func:`opened`."""
        assert process.stdout is not None and process.stderr is not None
        self._process, self._kind, self._name = process, kind, name
        self._out: IO[bytes] = process.stdout
        self._complaint = b""
        self._listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        self._listener.start()
        self._killer = threading.Timer(MAX_WALL_S, process.kill)
        self._killer.daemon = True
        self._killer.start()
        self._deadline = time.monotonic() + MAX_WALL_S
        head = self._out.read(24)
        if len(head) < 24:
            raise self._failed()
        order = "<" if head[:4] == b"dns." else ">"
        start, _, _, self.rate_hz, self.channels = struct.unpack(f"{order}5I", head[4:])
        said = self._said(self._out.read(start - 24))
        self.announced_s: float | None = said.get("announced_s")
        self.lasts_s: float | None = said.get("lasts_s")
        self._n_tracks = int(said.get("n_tracks", 1))
        import numpy as np

        self._type = np.dtype(f"{order}f4")

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Frames as they are decoded, ``(n, channels) float32``.

        Raises:
            AudioError: FFmpeg gave up before the first of them.
        """
        import numpy as np

        frame_bytes = 4 * self.channels
        n_bytes = 0
        while block := self._out.read(_BLOCK_BYTES // frame_bytes * frame_bytes):
            n_bytes += len(block)
            whole = block[: len(block) // frame_bytes * frame_bytes]
            frames = np.frombuffer(whole, dtype=self._type).reshape(-1, self.channels)
            yield frames.astype(np.float32)
        self._process.wait()
        if n_bytes == 0 or self._process.returncode < 0:
            raise self._failed()

    def notes(self) -> tuple[str, ...]:
        """Everything the user should know, after all frames were read."""
        notes = []
        if self._n_tracks > 1:
            notes.append(f"it has {self._n_tracks} sound tracks; the first of them was read")
        if complaint := self._last_complaint():
            notes.append(f"FFmpeg: {complaint}")
        return tuple(notes)

    def close(self) -> None:
        """End the process."""
        self._killer.cancel()
        self._process.kill()
        self._process.wait()
        self._listener.join()
        self._out.close()

    def _listen(self, stream: IO[bytes]) -> None:
        with stream:
            while block := stream.read(1 << 12):
                self._complaint = (self._complaint + block)[-_MAX_COMPLAINT_BYTES:]

    def _last_complaint(self) -> str:
        self._listener.join(timeout=1.0)
        lines = self._complaint.decode("utf-8", "replace").strip().splitlines()
        return printable(re.sub(r"^\[[^]]*\] *", "", lines[-1]))[:120] if lines else ""

    @staticmethod
    def _said(annotation: bytes) -> dict[str, Any]:
        """The worker's own annotation of the sound; that of the program ffmpeg is not read."""
        with suppress(ValueError):
            said = json.loads(annotation.rstrip(b"\0"))
            if isinstance(said, dict):
                return said
        return {}

    def _failed(self) -> AudioError:
        code = self._process.wait()
        reason = self._last_complaint() or "it holds no sound"
        if time.monotonic() >= self._deadline:
            reason = f"it took more than {MAX_WALL_S:.0f} s"
        elif code < 0:
            reason = f"FFmpeg crashed: {signal.Signals(-code).name}"
        return AudioError(
            f"{self._name}: is {self._kind}, and FFmpeg cannot read it ({reason}); record or copy "
            "it again, or convert it to wav"
        )


@contextmanager
def opened(source: IO[bytes], kind: str, name: str, max_s: float) -> Iterator[Sound]:
    """The first sound track of an encoded file.

    Args:
        source: a file that can be searched.
        kind: what it is, in words.
        name: of the source, for messages.
        max_s: decoding stops one second later.

    Raises:
        AudioError: FFmpeg is not installed, or cannot read the file.
    """
    decoder = _decoder()
    if decoder is None:
        raise AudioError(
            f"{name}: is {kind}, which needs FFmpeg; run: pip install 'tinygiant[media]', or "
            "install the program ffmpeg"
        )
    with _copied(source) as file:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WORKER), f"{max_s:g}", *decoder],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # an interrupt of the terminal is for this process to handle
        )
        sound = None
        try:
            sound = Sound(process, kind, name)
            yield sound
        finally:
            if sound is not None:
                sound.close()
            else:
                process.kill()
                process.wait()


@contextmanager
def _copied(source: IO[bytes]) -> Iterator[IO[bytes]]:
    """The source as an open file of the system, in memory where that can be."""
    if hasattr(os, "memfd_create"):
        copy: IO[bytes] = os.fdopen(os.memfd_create("clip"), "w+b")
    else:
        copy = tempfile.TemporaryFile()  # noqa: SIM115
    with copy:
        source.seek(0)
        shutil.copyfileobj(source, copy)
        copy.flush()
        copy.seek(0)
        yield copy
