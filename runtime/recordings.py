"""Where the recordings in a file begin and end, from its bytes.

A file may hold several recordings, put one behind another by ``cat`` or by a recorder that was
started again, and the header of a recorder that was killed may announce less than what follows.
Decoders silently stop at the first end that a header announces. :func:`recordings` finds every
recording to its true end, and a header in which that end is right; :class:`Window` shows a
recording to a decoder as a file of its own.

Read as a recording's end: RIFF, RF64, W64, AIFF, AU and CAF by their sizes, Ogg by its pages, MP3
by its frames, MPEG-4 by its boxes, WavPack by its blocks; in other files the start of the next.
"""

from __future__ import annotations

import bisect
import io
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Literal

__all__ = ["Recording", "Window", "after_tags", "recordings"]

MAX_RECORDINGS = 1_000
# Larger sizes are what writers leave that do not know the length: there is no end then.
OPEN_ENDED_BYTES = 0x7FFF_F000
_MAX_HEADER_BYTES = 1 << 20
# libmpg123 looks no further than 1,024 bytes for the next frame.
_LEAST_HOLE_BYTES = 512
_SCAN_BYTES = 1 << 20

_W64_RIFF = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"
_W64_TAIL = b"\xf3\xac\xd3\x11\x8c\xd1\x00\xc0\x4f\x8e\xdb\x8a"
_ASF = b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c"
_EBML = b"\x1a\x45\xdf\xa3"
# Long enough that no samples look like it by chance.
_START = re.compile(
    rb"RIFF....(?:WAVE[a-zA-Z]{3}[a-zA-Z ]|AVI LIST)|(?:RF64|BW64)....WAVEds64"
    rb"|FORM....AIF[FC][A-Z]{4}"
    rb"|\.snd\0\0[\0-\x04].....\0\0\0[\x01-\x1b]|caff\0\x01\0\0desc|fLaC[\0\x80]\0\0\x22"
    rb"|OggS\0[\x02\x06]\0{8}|#!AMR(?:-WB)?\n|NIST_1A\n|Creative Voice File\x1a"
    rb"|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]..(?:\0{9}|\0{17}|\0{32})(?:Xing|Info)"
    rb"|\x1a\x45\xdf\xa3.{1,8}\x42[\x82\x86]|" + re.escape(_W64_RIFF) + rb"|" + re.escape(_ASF),
    re.DOTALL,
)
_ARCHIVE = re.compile(rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf|.{257}ustar", re.DOTALL)
_START_BYTES = 64  # the longest of them


@dataclass(frozen=True)
class Recording:
    """Bytes ``start`` to ``end`` of a file.

    Attributes:
        body: where to decode from; ``start``, unless a header in front of it is to be passed over.
        head: bytes to read in place of those at ``body``: a header with the true length.
        holes: places in it, from and to, that are not sound and would stop a decoder.
        lead_bytes: bytes in front of it that belong to no recording.
        leftover_bytes: the same at its end.
        announced_share: how much of the sound the file's own header announces, from 0 to 1.
    """

    start: int
    end: int
    body: int
    head: bytes = b""
    holes: tuple[tuple[int, int], ...] = ()
    lead_bytes: int = 0
    leftover_bytes: int = 0
    announced_share: float = 1.0

    @classmethod
    def plain(cls, start: int, end: int) -> Recording:
        """A recording whose own header is right."""
        return cls(start, end, start)


class Window(io.RawIOBase):
    """Part of a file as a file, without holes and with ``head`` in place of its first bytes."""

    def __init__(
        self,
        file: IO[bytes],
        start: int,
        end: int,
        head: bytes = b"",
        holes: tuple[tuple[int, int], ...] = (),
    ) -> None:
        """Show bytes ``start`` to ``end`` of ``file``, which stays open and is the caller's."""
        self._file, self._head = file, head
        self._position = 0
        self._n_bytes = 0
        self._spans: list[tuple[int, int, int]] = []  # from and to in the window; from in the file
        edges = [start, *(edge for hole in holes for edge in hole), end]
        for begins, ends in zip(edges[::2], edges[1::2], strict=True):
            self._spans.append((self._n_bytes, self._n_bytes + ends - begins, begins))
            self._n_bytes += ends - begins

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As for any file."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._n_bytes}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """As for any file."""
        position, content = self._position, b""
        if position < len(self._head):
            content = self._head[position : position + len(buffer)]
        elif position < self._n_bytes:
            span = bisect.bisect(self._spans, position, key=lambda span: span[0]) - 1
            begins, ends, where = self._spans[span]
            self._file.seek(where + position - begins)
            content = self._file.read(min(len(buffer), ends - position))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def recordings(file: IO[bytes], n_bytes: int, max_s: float) -> list[Recording]:
    """The recordings in a seekable file of ``n_bytes``, in order; at least one.

    Frames of MP3 are counted up to ``max_s`` seconds: a longer clip is refused anyway.
    """
    found: list[Recording] = []
    start: int | None = 0
    while start is not None and start < n_bytes:
        recording, start = _walk(_Bytes(file, n_bytes, max_s), start)
        found.append(recording)
        if len(found) == MAX_RECORDINGS and start is not None:
            found[-1] = replace(found[-1], leftover_bytes=n_bytes - start)
            break
    return found or [Recording.plain(0, n_bytes)]


class _Bytes:
    """A file's bytes by position."""

    def __init__(self, file: IO[bytes], size: int, max_s: float) -> None:
        self._file, self.size, self.max_s = file, size, max_s

    def at(self, position: int, n_bytes: int) -> bytes:
        self._file.seek(position)
        return self._file.read(n_bytes)

    def number(self, position: int, n_bytes: int, order: Literal["little", "big"]) -> int:
        return int.from_bytes(self.at(position, n_bytes), order)

    def next_start(self, position: int) -> int:
        """Where the next recording begins; the end of the file if there is none."""
        while position < self.size:
            content = self.at(position, _SCAN_BYTES + _START_BYTES)
            match = _START.search(content)
            if match is not None:
                return position + match.start()
            position += _SCAN_BYTES
        return self.size

    def is_start(self, position: int) -> bool:
        """Whether a recording begins here; for an MP3 two frames have to follow one another."""
        head = self.at(position, _START_BYTES)
        if _START.match(head) or head[4:8] == b"ftyp" or head[:4] == b"wvpk":
            return True
        first = _mp3_frame(self, position)
        return first is not None and _mp3_frame(self, position + first.n_bytes) is not None

    def is_zero(self, start: int, end: int) -> bool:
        return not any(
            any(self.at(position, min(_SCAN_BYTES, end - position)))
            for position in range(start, end, _SCAN_BYTES)
        )


_Walked = tuple[Recording, int | None]  # and where the next one begins


def _walk(file: _Bytes, start: int) -> _Walked:
    """The recording that begins at ``start``, tags in front of it left out."""
    start = _skip_tags(file, start)
    head = file.at(start, 64)
    for is_like, walker in _WALKERS:
        if is_like(head):
            return walker(file, start)
    if head[:3] == b"ID3" or _mp3_frame(file, start) is not None:
        return _mp3(file, start)
    if _START.match(head):  # a kind that does not say where it ends
        return _until_the_next(file, start)
    later = _first_start(file, start) if start == 0 else file.size
    if later < file.size:
        recording, following = _walk(file, later)
        return replace(recording, lead_bytes=later), following
    return Recording.plain(start if start < file.size else 0, file.size), None


def _first_start(file: _Bytes, position: int) -> int:
    """Where a recording begins behind what is none, in the first MiB; the file's size if nowhere.

    Such are the head of an HTTP answer, padding, pieces of a stream that came out of order.
    """
    content = file.at(position, _SCAN_BYTES)
    if _ARCHIVE.match(content):
        return file.size
    match = _START.search(content)
    later = position + match.start() if match else file.size
    for match in re.finditer(rb"\xff[\xe2-\xff]", content):
        at = position + match.start()
        if at >= later:
            break
        frames = 0
        while frames < 4 and (frame := _mp3_frame(file, at)) is not None:
            frames, at = frames + 1, at + frame.n_bytes
        if frames == 4:
            return position + match.start()
    return later


def _until_the_next(file: _Bytes, start: int) -> _Walked:
    """Until the next of its kind; others may be part of it, as a FLAC header is of Matroska's."""
    kind = file.at(start, 4)
    end = file.next_start(start + 4)
    while end < file.size and file.at(end, 4) != kind:
        end = file.next_start(end + 4)
    return Recording.plain(start, end), end


# -- tags


def after_tags(head: bytes) -> int:
    """Length of the ID3v2 tags at the start of a file, of which ``head`` are the first bytes."""
    position = 0
    while (length := _id3_bytes(head[position : position + 10])) > 0:
        position += length
    return position


def _id3_bytes(head: bytes) -> int:
    """Length of an ID3v2 tag, whose size is four times seven bits; 0 if there is none."""
    if len(head) < 10 or head[:3] != b"ID3" or any(byte & 0x80 for byte in head[6:10]):
        return 0
    size = 0
    for byte in head[6:10]:
        size = size << 7 | byte
    return 10 + size + (10 if head[5] & 0x10 else 0)


def _skip_tags(file: _Bytes, position: int) -> int:
    """The first byte after tags (ID3v2, ID3v1, APE), as music players put them around frames."""
    while True:
        head = file.at(position, 32)
        length = _id3_bytes(head)
        if head[:3] == b"TAG":
            length = 128
        elif head[:8] == b"APETAGEX":
            length = 32 + int.from_bytes(head[12:16], "little")
        if not length:
            return min(position, file.size)
        position += length


# -- chunks with sizes


@dataclass(frozen=True)
class _Layout:
    """How a container of chunks writes them.

    Attributes:
        order: of the bytes of a number.
        id_bytes: of a chunk's name.
        size_bytes: of its size.
        size_from: what a size counts from: 0 the chunk's first byte, else the end of its header.
        align: chunks begin at multiples of it.
        first: offset of the first chunk.
        total: offset of the size of the whole; None if there is none.
        total_from: offset that the size of the whole counts from.
        data: name of the chunk with the sound.
    """

    order: Literal["little", "big"]
    id_bytes: int
    size_bytes: int
    size_from: int
    align: int
    first: int
    total: int | None
    total_from: int
    data: bytes

    @property
    def header(self) -> int:
        return self.id_bytes + self.size_bytes

    def aligned(self, position: int, start: int) -> int:
        return start + -(-(position - start) // self.align) * self.align


_RIFF = _Layout("little", 4, 4, 8, 2, 12, 4, 8, b"data")
_FORM = _Layout("big", 4, 4, 8, 2, 12, 4, 8, b"SSND")
_CAF = _Layout("big", 4, 8, 12, 1, 8, None, 0, b"data")
_W64 = _Layout("little", 16, 8, 0, 8, 40, 16, 0, b"data" + _W64_TAIL)


def _chunked(layout: _Layout) -> Callable[[_Bytes, int], _Walked]:
    def walk(file: _Bytes, start: int) -> _Walked:
        position, sizes_at = start + layout.first, None
        while position + layout.header <= file.size:
            name = file.at(position, layout.id_bytes)
            field = position + layout.id_bytes
            n_bytes = file.number(field, layout.size_bytes, layout.order)
            if name == b"ds64":  # RF64 keeps its sizes here: of the whole, of the sound
                sizes_at = position + 8
            if layout.size_from + n_bytes < layout.header:  # W64's sizes count their own header
                return _until_the_next(file, start)
            if name == layout.data:
                break
            position = layout.aligned(position + layout.size_from + n_bytes, start)
        else:
            return _until_the_next(file, start)
        patches: dict[int, tuple[int, int]] = {}  # position -> bytes of the number, counted from
        if sizes_at is not None and n_bytes == 0xFFFF_FFFF:
            n_bytes = file.number(sizes_at + 8, 8, "little")
            patches = {sizes_at: (8, start + 8), sizes_at + 8: (8, position + 8)}
        else:
            patches[field] = layout.size_bytes, position + layout.size_from
            if layout.total is not None:
                patches[start + layout.total] = layout.size_bytes, start + layout.total_from
        end = position + layout.size_from + n_bytes
        if end > file.size:  # more is announced than there is: cut short, or the size left open
            end = file.next_start(position + layout.header)
            return Recording.plain(start, end), end
        return _to_the_true_end(file, start, position + layout.header, end, patches, layout)

    return walk


def _au(file: _Bytes, start: int) -> _Walked:
    order: Literal["little", "big"] = "big" if file.at(start, 4) == b".snd" else "little"
    body = start + max(24, file.number(start + 4, 4, order))
    n_bytes = file.number(start + 8, 4, order)
    if body + n_bytes > file.size:
        return _until_the_next(file, start)
    layout = _Layout(order, 4, 4, 8, 1, 24, None, 0, b"")
    patches = {start + 8: (4, body)}
    return _to_the_true_end(file, start, body, body + n_bytes, patches, layout)


def _to_the_true_end(
    file: _Bytes,
    start: int,
    body: int,
    end: int,
    patches: dict[int, tuple[int, int]],
    layout: _Layout,
) -> _Walked:
    """What follows the announced ``end``: nothing, chunks, another recording, or more samples."""
    position, n_chunks = end, 0
    while position < file.size:
        for candidate in {position, layout.aligned(position, start)}:
            after = _skip_tags(file, candidate)
            if after >= file.size or file.is_start(after):
                return Recording.plain(start, min(after, file.size)), after
        position = layout.aligned(position, start)
        chunk_end = _chunk_end(file, position, layout) if layout.data else None
        if chunk_end is None:
            break
        position, n_chunks = chunk_end, n_chunks + 1
    if position >= file.size:
        return Recording.plain(start, file.size), None
    following = file.next_start(position)
    if n_chunks:  # so the announced end was one
        return replace(Recording.plain(start, following), leftover_bytes=following - position), (
            following
        )
    padding = end > body + 8 and file.is_zero(end, following)
    if padding or following - end < 16 or body - start > _MAX_HEADER_BYTES:
        return Recording.plain(start, following), following
    head = bytearray(file.at(start, body - start))
    for field, (n_bytes, counted_from) in patches.items():
        true = min(following - counted_from, 256**n_bytes - 1)
        head[field - start : field - start + n_bytes] = true.to_bytes(n_bytes, layout.order)
    share = (end - body) / (following - body)
    recording = Recording(start, following, start, bytes(head), announced_share=share)
    return recording, following


def _chunk_end(file: _Bytes, position: int, layout: _Layout) -> int | None:
    """The end of the chunk that begins here; None if what is here is none."""
    name = file.at(position, layout.id_bytes)
    is_w64 = layout.id_bytes == 16
    if len(name) < layout.id_bytes or (is_w64 and name[4:] != _W64_TAIL):
        return None
    if not all(0x20 <= byte < 0x7F for byte in name[:4]):
        return None
    n_bytes = file.number(position + layout.id_bytes, layout.size_bytes, layout.order)
    end = position + layout.size_from + n_bytes
    return end if position + layout.header <= end <= file.size + 1 else None


# -- others


def _flac(file: _Bytes, start: int) -> _Walked:
    """The number of samples (36 bits) is cleared, so that the frames themselves decide."""
    frames, is_last = start + 4, False
    while not is_last and frames + 4 <= file.size:  # blocks of metadata may hold a WAV's header
        block = file.number(frames, 4, "big")
        frames, is_last = frames + 4 + (block & 0xFF_FFFF), bool(block >> 31)
    end = file.next_start(min(frames, file.size))
    head = bytearray(file.at(start, 26))
    if len(head) == 26:
        head[21] &= 0xF0
        head[22:26] = bytes(4)
    return Recording(start, end, start, bytes(head)), end


def _ogg(file: _Bytes, start: int) -> _Walked:
    """Until a page that begins a stream after pages that did not."""
    position, in_streams = start, False
    while position + 27 <= file.size:
        page = file.at(position, 27 + 255)
        if page[:4] != b"OggS":
            again = file.at(position, _SCAN_BYTES).find(b"OggS")
            position = position + again if again >= 0 else position + _SCAN_BYTES - 3
            continue
        begins = bool(page[5] & 2)
        if begins and in_streams:
            return Recording.plain(start, position), position
        in_streams |= not begins
        n_segments = page[26]
        position += 27 + n_segments + sum(page[27 : 27 + n_segments])
    return Recording.plain(start, file.size), None


def _mpeg4(file: _Bytes, start: int) -> _Walked:
    """Until an ``ftyp`` box after boxes with sound."""
    position, has_sound = start, False
    while position + 8 <= file.size:
        box = file.at(position, 16)
        if box[4:8] == b"ftyp" and has_sound:
            return Recording.plain(start, position), position
        has_sound |= box[4:8] in (b"moov", b"mdat", b"moof")
        n_bytes = int.from_bytes(box[:4], "big")
        if n_bytes == 1:
            n_bytes = int.from_bytes(box[8:16], "big")
        if n_bytes < 8:  # 0: to the end of the file
            break
        position += n_bytes
    return Recording.plain(start, file.size), None


def _wavpack(file: _Bytes, start: int) -> _Walked:
    """Until a block that counts its samples from 0 again."""
    position, last = start, 0
    while position + 32 <= file.size:
        block = file.at(position, 32)
        if block[:4] != b"wvpk":
            after = _skip_tags(file, position)
            if after == position:
                break
            position = after
            continue
        size, index, count = (int.from_bytes(block[i : i + 4], "little") for i in (4, 16, 20))
        if count and index == 0 and last:
            return Recording.plain(start, position), position
        last = index or last
        position += 8 + size
    return Recording.plain(start, file.size), None


# -- MPEG audio


_BITRATES = {  # kbit/s by index, for MPEG-1 layers I, II, III and MPEG-2 layers I and II+III
    (1, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
_RATES_HZ = (44_100, 48_000, 32_000)


@dataclass(frozen=True)
class _Frame:
    n_bytes: int
    seconds: float
    counted: int | None  # frames that a length header (Xing, Info, VBRI) announces
    is_length_header: bool


def _mp3_frame(file: _Bytes, position: int) -> _Frame | None:
    """The MPEG audio frame that begins here, ISO/IEC 11172-3, 2.4.2.3."""
    head = file.at(position, 64)
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    version = {0: 4, 2: 2, 3: 1}.get(head[1] >> 3 & 3)  # 4 is MPEG-2.5: half the rates again
    layer = 4 - (head[1] >> 1 & 3)
    bitrate, rate = head[2] >> 4, head[2] >> 2 & 3
    if version is None or layer == 4 or not 0 < bitrate < 15 or rate == 3:
        return None
    bit_s = 1_000 * _BITRATES[min(version, 2), layer if version == 1 else min(layer, 2)][bitrate]
    rate_hz, padding = _RATES_HZ[rate] // version, head[2] >> 1 & 1
    if layer == 1:
        n_bytes = (12 * bit_s // rate_hz + padding) * 4
    else:
        n_bytes = (72 if layer == 3 and version > 1 else 144) * bit_s // rate_hz + padding
    n_samples = 384 if layer == 1 else 576 if layer == 3 and version > 1 else 1_152
    seconds = n_samples / rate_hz
    is_mono = head[3] >> 6 == 3
    side = (17 if is_mono else 32) if version == 1 else (9 if is_mono else 17)
    if layer == 3 and head[4 + side : 8 + side] in (b"Xing", b"Info") and len(head) >= 16 + side:
        flags, count = struct.unpack(">II", head[8 + side : 16 + side])
        return _Frame(n_bytes, seconds, count if flags & 1 else None, True)
    if layer == 3 and head[36:40] == b"VBRI" and len(head) >= 54:
        return _Frame(n_bytes, seconds, struct.unpack(">I", head[50:54])[0], True)
    return _Frame(n_bytes, seconds, None, False)


def _mp3(file: _Bytes, start: int) -> _Walked:
    """Until a tag or a length header after frames; a length header that says too little is cut."""
    first = body = end = None
    holes: list[tuple[int, int]] = []
    n_frames, counted, seconds = 0, None, 0.0
    for position, frame in _mp3_frames(file, start):
        if n_frames and (frame is None or frame.is_length_header):
            break
        if frame is None:
            continue
        first = position if first is None else first
        if end is not None and position - end >= _LEAST_HOLE_BYTES and len(holes) < MAX_RECORDINGS:
            holes.append((end, position))
        end = position + frame.n_bytes
        if frame.is_length_header:
            counted, body = frame.counted, end
            continue
        n_frames, seconds = n_frames + 1, seconds + frame.seconds
        if seconds > file.max_s + 1:
            return Recording.plain(first, file.size), None
    else:
        position = file.size
    if first is None or end is None:
        return Recording.plain(start, file.size), None
    if body is None or counted is None or counted >= n_frames - 1:
        body = first
    # Tags at the very end are no part of it, and no recording.
    leftover = max(0, position - end) if _skip_tags(file, end) < position else 0
    recording = Recording(first, position, body, holes=tuple(holes), leftover_bytes=leftover)
    return recording, position if _skip_tags(file, position) < file.size else None


def _mp3_frames(file: _Bytes, position: int) -> Iterator[tuple[int, _Frame | None]]:
    """Frames and their places; None where an ID3v2 tag stands. Anything between them is skipped."""
    while position < file.size:
        frame = _mp3_frame(file, position)
        if frame is not None:
            yield position, frame
            position += frame.n_bytes
            continue
        head = file.at(position, 10)
        after = _skip_tags(file, position)
        if after > position:
            if _id3_bytes(head):
                yield position, None
            position = after
            continue
        position = _resynchronised(file, position + 1)


def _resynchronised(file: _Bytes, position: int) -> int:
    """The next place with two frames one after the other, or a tag."""
    while position < file.size:
        content = file.at(position, _SCAN_BYTES)
        for match in re.finditer(rb"\xff[\xe0-\xff]|ID3|TAG|APETAGEX", content):
            at = position + match.start()
            frame = _mp3_frame(file, at)
            if frame is None:
                if match[0][0] != 0xFF:
                    return at
            elif at + frame.n_bytes >= file.size or _mp3_frame(file, at + frame.n_bytes):
                return at
        position += _SCAN_BYTES - 8 if len(content) == _SCAN_BYTES else _SCAN_BYTES
    return file.size


_WALKERS: tuple[tuple[Callable[[bytes], bool], Callable[[_Bytes, int], _Walked]], ...] = (
    (lambda head: head[:4] in (b"RIFF", b"RF64", b"BW64"), _chunked(_RIFF)),
    (lambda head: head[:4] == b"FORM" and head[8:11] == b"AIF", _chunked(_FORM)),
    (lambda head: head[:4] == b"caff", _chunked(_CAF)),
    (lambda head: head[:16] == _W64_RIFF, _chunked(_W64)),
    (lambda head: head[:4] in (b".snd", b"dns."), _au),
    (lambda head: head[:4] == b"fLaC", _flac),
    (lambda head: head[:4] == b"OggS", _ogg),
    (lambda head: head[4:8] == b"ftyp", _mpeg4),
    (lambda head: head[:4] == b"wvpk", _wavpack),
)
