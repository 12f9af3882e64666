"""An ear: the last seconds of a stream, and the sounds that rise above the room in them.

Levels are judged in blocks of 32 ms. The room's level is that of the quietest moment of the last
``follow_s`` seconds, so it falls at once and rises when a noise has stayed. A block ``start_db``
above it is loud, as is one in which the voice detector hears speech; enough loud blocks within half
a second open a sound, which ends after ``hang_over_s`` without one, or is cut at ``longest_s``.
After a cut the room is as loud as the quietest moment of the sound's second half: a machine that
goes on is the room from then on, while speech with its pauses goes on as the next sound.

Memory is bounded: samples lie in a ring of 16-bit numbers that holds the longest sound.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cli.microphone import (
    BLOCK_S,
    LOUD_DB,
    VOICE_STARTS,
    VOICE_STAYS,
    Voice,
    level_db,
    voice_block,
)
from .settings import GateSettings

__all__ = ["Block", "Ear", "Gate", "Ring", "Sound"]

Block = NDArray[np.int16]
"""``(n,) int16``, mono samples of a stream."""

_WINDOW_BLOCKS = 16  # half a second at least, within which loud blocks count together
_DIGITAL_SILENCE_DB = -95.0  # a muted or suspended microphone: nothing of the room


@dataclass(frozen=True, eq=False)
class Sound:
    """Something that sounded.

    Attributes:
        source: name of the source.
        number: 1 for the first of this source.
        time: of its onset by this computer's clock, in seconds since 1970.
        start_s: of its onset, in seconds of sound since the source was opened first.
        duration_s: from onset to the end of its last loud block.
        samples: ``(n,) int16``, the sound with what is kept before and after it.
        rate_hz: of the samples.
        peak_db: level of its loudest block; 0 is a full-scale square wave.
        floor_db: level of the room before it.
        cut: it went on when it was cut at the longest.
        continues: the sound before it was cut, and it follows at once.
    """

    source: str
    number: int
    time: float
    start_s: float
    duration_s: float
    samples: Block
    rate_hz: int
    peak_db: float
    floor_db: float
    cut: bool
    continues: bool


class Gate:
    """Whether a block is loud or spoken, against the room's level.

    Attributes:
        floor_db: the room's level.
    """

    def __init__(self, settings: GateSettings, voice: Voice | None = None) -> None:
        """Listen with ``voice`` as well: 1,024 bytes of PCM at 16 kHz to a probability."""
        self._settings = settings
        self._voice = voice
        self._smooth_db: float | None = None
        # The quietest moment of each second; at first, of what is loud the room is not.
        n_seconds = math.ceil(settings.follow_s)
        self._minima = deque([LOUD_DB] * n_seconds, maxlen=n_seconds)
        self._second_s = 0.0
        self.floor_db = LOUD_DB

    def take(self, db: float, pcm: Callable[[], bytes], *, is_on: bool) -> bool:
        """Whether a block of level ``db`` belongs to a sound; ``is_on``: one has begun."""
        settings = self._settings
        if db > _DIGITAL_SILENCE_DB:
            self._follow(db)
        loud = db > self.floor_db + (settings.stay_db if is_on else settings.start_db)
        # The detector is asked for every block: it remembers what came before.
        if self._voice is not None:
            loud |= self._voice(pcm()) >= (VOICE_STAYS if is_on else VOICE_STARTS)
        return loud

    def settle(self, db: float) -> None:
        """From now on the room is at least as loud as ``db``."""
        self._minima.extend(max(db, old) for old in tuple(self._minima))
        self.floor_db = max(self.floor_db, db)

    def _follow(self, db: float) -> None:
        smooth = db if self._smooth_db is None else 0.8 * self._smooth_db + 0.2 * db
        self._smooth_db = smooth
        self._second_s += BLOCK_S
        if self._second_s >= 1.0:
            self._second_s = 0.0
            self._minima.append(smooth)
        elif smooth < self._minima[-1]:
            self._minima[-1] = smooth
        self.floor_db = max(self._settings.quiet_db, min(self._minima))


class Ring:
    """The last ``size`` samples of a stream, by their place in it."""

    def __init__(self, size: int) -> None:
        """Hold ``size`` samples."""
        self._samples = np.zeros(size, np.int16)
        self.end = 0

    @property
    def start(self) -> int:
        """Place of the oldest sample held."""
        return max(0, self.end - self._samples.size)

    def put(self, block: Block) -> None:
        """Add samples; the oldest are forgotten."""
        n_passed = max(0, block.size - self._samples.size)
        block = block[n_passed:]
        self.end += n_passed
        at = self.end % self._samples.size
        n_first = min(block.size, self._samples.size - at)
        self._samples[at : at + n_first] = block[:n_first]
        self._samples[: block.size - n_first] = block[n_first:]
        self.end += block.size

    def cut(self, start: int, end: int) -> Block:
        """A copy of the samples from ``start`` to ``end``, as far as they are held."""
        start, end = max(start, self.start), min(end, self.end)
        places = np.arange(start, end) % self._samples.size
        return self._samples[places]


@dataclass
class _Open:
    """A sound that has not ended; places in samples."""

    first: int
    last_end: int
    time: float
    peak_db: float
    least_db: float
    floor_db: float
    continues: bool


class Ear:
    """Blocks of one stream in, sounds out."""

    def __init__(
        self,
        source: str,
        rate_hz: int,
        settings: GateSettings,
        voice: Voice | None = None,
        *,
        before_s: float = 0.0,
        n_before: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Listen to a stream at ``rate_hz``.

        ``before_s`` seconds and ``n_before`` sounds of the source came before this stream.
        """
        self.rate_hz = rate_hz
        self.block_size = round(BLOCK_S * rate_hz)
        self.n_sounds = n_before
        self.gate = Gate(settings, voice)
        self.settings = settings
        self._source = source
        self._before_s = before_s
        self._clock = clock
        self._least_blocks = max(1, math.ceil(settings.least_s / BLOCK_S))
        n_window = max(_WINDOW_BLOCKS, 2 * self._least_blocks)
        self._recent: deque[tuple[int, int, float]] = deque(maxlen=n_window)
        margin_s = 2 * settings.pre_roll_s + settings.hang_over_s + (n_window + 2) * BLOCK_S
        self._ring = Ring(round((settings.longest_s + margin_s) * rate_hz))
        self._open: _Open | None = None
        self._cut_at: int | None = None

    @property
    def heard_s(self) -> float:
        """Seconds of sound of the source so far."""
        return self._before_s + self._ring.end / self.rate_hz

    def take(self, block: Block) -> Sound | None:
        """Hear a block of at most ``block_size`` samples; returns the sound that ended with it."""
        start = self._ring.end
        self._ring.put(block)
        db = level_db(block)
        loud = self.gate.take(
            db, lambda: voice_block(block, self.rate_hz), is_on=self._open is not None
        )
        if self._open is None:
            self._watch(start, db, loud)
        else:
            self._open.peak_db = max(self._open.peak_db, db)
            self._open.least_db = min(self._open.least_db, db)
            if self._ring.end - self._open.first < self.settings.longest_s / 2 * self.rate_hz:
                self._open.least_db = db  # how it began says nothing of how it goes on
            if loud:
                self._open.last_end = self._ring.end
        return self._ended()

    def finish(self) -> Sound | None:
        """The stream has ended; returns the sound that was on."""
        return None if self._open is None else self._close(cut=False)

    def _watch(self, start: int, db: float, loud: bool) -> None:
        """Open a sound when enough of the last blocks were loud."""
        if not loud:
            db = -math.inf
        self._recent.append((start, self._ring.end, db))
        found = [block for block in self._recent if block[2] > -math.inf]
        if not loud or len(found) < self._least_blocks:
            return
        first = found[0][0]
        continues = self._cut_at is not None and (
            first - self._cut_at <= self.settings.hang_over_s * self.rate_hz
        )
        self._open = _Open(
            first=first,
            last_end=self._ring.end,
            time=self._clock() - (self._ring.end - first) / self.rate_hz,
            peak_db=max(block[2] for block in found),
            least_db=min(block[2] for block in found),
            floor_db=self.gate.floor_db,
            continues=continues,
        )
        self._recent.clear()

    def _ended(self) -> Sound | None:
        if self._open is None:
            return None
        if self._ring.end - self._open.last_end >= self.settings.hang_over_s * self.rate_hz:
            return self._close(cut=False)
        if self._ring.end - self._open.first >= self.settings.longest_s * self.rate_hz:
            self.gate.settle(self._open.least_db)
            return self._close(cut=True)
        return None

    def _close(self, *, cut: bool) -> Sound:
        sound, self._open = self._open, None
        assert sound is not None
        self._cut_at = self._ring.end if cut else None
        self.n_sounds += 1
        roll = round(self.settings.pre_roll_s * self.rate_hz)
        return Sound(
            source=self._source,
            number=self.n_sounds,
            time=sound.time,
            start_s=self._before_s + sound.first / self.rate_hz,
            duration_s=(sound.last_end - sound.first) / self.rate_hz,
            samples=self._ring.cut(sound.first - roll, sound.last_end + roll),
            rate_hz=self.rate_hz,
            peak_db=sound.peak_db,
            floor_db=sound.floor_db,
            cut=cut,
            continues=sound.continues,
        )
