"""Where sound comes from: a microphone, standard input, a file that grows.

A source gives ``Block``s for as long as it can, and None at least twice a second while there is
nothing, so that whoever waits can tell that it is not stuck. Its end shows the cause: it simply
stops at the end of a pipe; an :class:`~tinygiant.runtime.errors.AudioError` is a loss that may pass
(a microphone unplugged), after which it can be opened again.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from ..cli.microphone import BLOCK_S, device_errors, find_device, sound_library
from ..errors import AudioError, UsageError
from ..text import printable
from .decoding import StreamDecoder
from .ear import Block
from .settings import SourceSettings

__all__ = ["FileSource", "Microphone", "Pipe", "Source", "make_source"]

_READ_BYTES = 1 << 16
_WAIT_S = 0.25
_portaudio = threading.Lock()
_n_streams = 0  # open ones of this process
# Nobody waits for a sensor: a long buffer halves what listening costs (fewer wake-ups), and nothing
# is lost while a question takes all cores.
_BUFFER_S = 0.5
_SILENT_S = 5.0  # a microphone that delivers nothing for so long is lost


class Source(Protocol):
    """A stream of samples.

    Attributes:
        rate_hz: of the blocks that come; set before the first.
        n_bad: samples that were not numbers (NaN, infinite) and became silence.
        n_overflows: times that this machine was too busy and samples were lost.
        can_wait: nothing is lost if it is not read for a while.
        may_return: what was lost may come back, so that opening it again makes sense.
    """

    rate_hz: int
    n_bad: int
    n_overflows: int
    can_wait: bool
    may_return: bool

    def blocks(self) -> Iterator[Block | None]:
        """Open it and read on; see the module.

        Raises:
            AudioError: it cannot be opened, or is lost.
            UsageError: it is described wrongly; opening it again does not help.
            MissingDependencyError: what it needs is not installed.
        """
        ...


def make_source(name: str, settings: SourceSettings) -> Source:
    """The source that ``[source.NAME]`` describes; nothing is opened yet.

    Raises:
        UsageError: standard input is a terminal or closed.
    """
    if settings.kind == "microphone":
        return Microphone(settings)
    if settings.kind == "file":
        return FileSource(settings)
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(
            f"source {name}: standard input is a terminal; pipe sound in, such as "
            "arecord -t raw -f S16_LE -r 16000 | tg-listen - --pcm-rate 16000"
        )
    return Pipe(sys.stdin.fileno(), settings)


class Microphone:
    """A microphone through PortAudio, opened anew each time it is read."""

    can_wait = False
    may_return = True

    def __init__(self, settings: SourceSettings) -> None:
        """Read the device that ``settings`` name."""
        self.rate_hz = 0
        self.n_bad = 0
        self.n_overflows = 0
        self._settings = settings
        self._opened = False

    def blocks(self) -> Iterator[Block | None]:
        """Blocks of 32 ms; see :class:`Source`."""
        global _n_streams
        library = sound_library()
        with _portaudio:
            # PortAudio lists devices once: it must start again to see what came back, which would
            # end the streams of other microphones.
            if self._opened and _n_streams == 0:
                library._terminate()
                library._initialize()
            self._opened = True
            _n_streams += 1
        try:
            yield from self._heard(library)
        finally:
            with _portaudio:
                _n_streams -= 1

    def _heard(self, library: Any) -> Iterator[Block | None]:
        with device_errors(library, "--device"):
            device, own_hz, name = find_device(library, self._settings.device)
            self.rate_hz = self._settings.rate_hz or own_hz
            size = round(BLOCK_S * self.rate_hz)
            with library.RawInputStream(
                device=device,
                samplerate=self.rate_hz,
                channels=1,
                dtype="int16",
                blocksize=size,
                latency=_BUFFER_S,
            ) as stream:
                yield from self._read(stream, size, name)

    def _read(self, stream: Any, size: int, name: str) -> Iterator[Block | None]:
        last = time.monotonic()
        while True:
            # A blocking read never returns where the device has gone.
            if stream.read_available < size:
                if time.monotonic() - last > _SILENT_S:
                    raise AudioError(f"{name}: delivers nothing for {_SILENT_S:g} s")
                yield None
                time.sleep(2 * BLOCK_S)
                continue
            data, overflowed = stream.read(size)
            last = time.monotonic()
            self.n_overflows += bool(overflowed)
            yield np.frombuffer(bytes(data), np.int16)


class _Bytes:
    """What streams of bytes share: decoding and cutting into blocks."""

    def __init__(self, settings: SourceSettings) -> None:
        self.rate_hz = settings.rate_hz or 0
        self.n_bad = 0
        self.n_overflows = 0
        self._settings = settings
        self._rest = np.zeros(0, np.int16)

    def _whole(self, decoder: StreamDecoder, data: bytes) -> Iterator[Block]:
        """Blocks of 32 ms; the rest waits, for writers may send a few samples at a time."""
        before = decoder.n_bad
        samples = np.concatenate([self._rest, decoder.feed(data)])
        self.n_bad += decoder.n_bad - before
        self.rate_hz = decoder.rate_hz or 0
        size = max(1, round(BLOCK_S * self.rate_hz))
        n_whole = samples.size - samples.size % size
        for start in range(0, n_whole, size):
            yield samples[start : start + size]
        self._rest = samples[n_whole:].copy()

    def _end(self, decoder: StreamDecoder) -> Iterator[Block]:
        """What is left at the end, shorter than a block."""
        decoder.require_header()
        if self._rest.size:
            yield self._rest
            self._rest = self._rest[:0]


class Pipe(_Bytes):
    """Standard input, or whatever else ends when its writer does."""

    can_wait = False
    may_return = False

    def __init__(self, descriptor: int, settings: SourceSettings) -> None:
        """Read from an open file descriptor."""
        super().__init__(settings)
        self._descriptor = descriptor
        self._decoder = StreamDecoder(settings, "standard input")

    def blocks(self) -> Iterator[Block | None]:
        """Blocks of 32 ms, the last one shorter; see :class:`Source`."""
        while True:
            readable, _, _ = select.select([self._descriptor], [], [], _WAIT_S)
            if not readable:
                yield None
                continue
            data = os.read(self._descriptor, _READ_BYTES)
            if not data:
                break
            yield from self._whole(self._decoder, data)
        yield from self._end(self._decoder)


class FileSource(_Bytes):
    """A file of raw samples or WAV, from its start; one that is being written is waited for.

    If another file takes its place, or it is emptied, that is read from its start.
    """

    can_wait = True

    def __init__(self, settings: SourceSettings) -> None:
        """Read the file that ``settings`` name."""
        super().__init__(settings)
        self.may_return = settings.follow
        assert settings.path is not None
        self._path = settings.path
        self._name = printable(settings.path)

    def blocks(self) -> Iterator[Block | None]:
        """Blocks of at most 32 ms; see :class:`Source`."""
        while True:
            try:
                with open(self._path, "rb", buffering=0) as file:
                    yield from self._read(file)
            except OSError as error:
                if isinstance(error, AudioError):
                    raise
                raise AudioError(
                    f"{self._name}: cannot be read ({error.strerror}); check the path"
                ) from error
            if not self._settings.follow:
                return

    def _read(self, file: io.FileIO) -> Iterator[Block | None]:
        follow = self._settings.follow
        decoder = StreamDecoder(self._settings, self._name, open_ended=follow)
        while True:
            data = file.read(_READ_BYTES)
            if data:
                yield from self._whole(decoder, data)
            elif not follow:
                yield from self._end(decoder)
                return
            elif self._is_replaced(file):
                self._rest = self._rest[:0]
                return
            else:
                yield None
                time.sleep(_WAIT_S)

    def _is_replaced(self, file: io.FileIO) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:  # being replaced; what is open is still read
            return False
        here = os.fstat(file.fileno())
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino) or (
            here.st_size < file.tell()
        )
