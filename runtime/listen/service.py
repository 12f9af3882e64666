"""The life of a sensor: listeners, one worker that asks the model, outlets, signals, the watchdog.

Threads: one a source, one for the model, one an outlet; the main thread only watches. SIGTERM and
SIGINT end it: sources are closed, the sound that is on is cut, the question being answered has
``GRACE_S`` to finish, what still waits is reported as unanswered, and outlets have a moment to
deliver. SIGHUP reads the settings again; wrong ones are reported and change nothing.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from ..cli.interrupt import INTERRUPTED
from ..errors import StorageError, TinyGiantError
from ..text import counted, one_line, printable
from .ear import Sound
from .keeping import ClipFolder
from .listener import Listener
from .metrics import MetricsServer
from .mqtt import Broker
from .notifying import Notifier
from .outlets import EventsFile, Outlet, StandardOutput, Webhook
from .questions import Asker, Model, Reply
from .settings import Settings
from .sources import make_source
from .telling import Counts, Record, report, sound_record, status
from .waiting import Waiting, WaitingQueue

__all__ = ["BROKEN_PIPE", "Service"]

BROKEN_PIPE = 141
GRACE_S = 10.0
_FLUSH_S = 5.0
_TICK_S = 0.25
_LATE_S = 5.0
_REPORT_S = 3_600.0
_STUCK_S = 300.0  # no question takes so long on a machine that is fit for it
_STDOUT_BUFFER = 1_000

Numbers = dict[tuple[str, str], float]


class Service:
    """One sensor. Make it on the main thread before the model is loaded: it takes the signals."""

    def __init__(
        self,
        settings: Settings,
        *,
        read_again: Callable[[], Settings],
        as_json: bool = False,
        quiet: bool = False,
    ) -> None:
        """Prepare what ``settings`` describe; nothing is opened yet.

        ``read_again`` gives the settings anew, or raises UsageError.
        """
        self.settings = settings
        self.counts = Counts()
        self._read_again = read_again
        self._as_json = as_json
        self._quiet = quiet
        self._notifier = Notifier()
        self._listeners: dict[str, Listener] = {}
        self._started: list[Listener] = []
        self._outlets: dict[str, Outlet] = {}
        self._made_of: dict[str, Any] = {}
        self._others: dict[str, ClipFolder | MetricsServer] = {}
        self._gone: Numbers = {}
        self._told_losses: dict[tuple[str, str], int] = {}
        self._queue = WaitingQueue(settings.queue, self._unanswered)
        self._asker: Asker | None = None
        self._busy_since: float | None = None
        self._worker = threading.Thread(target=self._answer_all, name="model", daemon=True)
        self._no_more = threading.Event()
        self._signals: list[int] = []
        self._reload = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def run(self, model: Model) -> int:
        """Listen until a signal or until every source has ended; returns the exit code.

        Raises:
            TinyGiantError: an outlet cannot be opened, or no source could.
        """
        self._asker = Asker(model, self.settings.question)
        self._open_outlets(self.settings)
        opened = self._open_sources(self.settings)
        self._require_a_source()
        self._worker.start()
        self._notifier.ready(self._summary())
        self._tell("started", None, f"listening to {', '.join(self._listeners)}")
        self._tell_problems(opened)
        try:
            self._watch()
        finally:
            code = self._end()
        return code

    @property
    def is_abandoned(self) -> bool:
        """Whether a thread is left behind in native code, which would hold up the end of Python."""
        return self._worker.is_alive() or any(one.is_running for one in self._started)

    def numbers(self) -> Numbers:
        """All counts, by name and label."""
        found = self.counts.all()
        for (name, label), number in self._gone.items():
            found[name, label] = found.get((name, label), 0) + number
        for name, label, number in self._live_numbers():
            found[name, label] = found.get((name, label), 0) + number
        found["waiting", ""] = len(self._queue)
        for name, listener in self._listeners.items():
            found["source_up", name] = float(listener.problem is None and not listener.ended)
        for name, outlet in self._outlets.items():
            found["undelivered", name] = len(outlet)
        return found

    def emit(self, record: Record) -> None:
        """Give a record to every outlet."""
        for outlet in list(self._outlets.values()):
            outlet.put(record)

    # --- the main thread -----------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        next_report = last + _REPORT_S
        while not self._signals:
            time.sleep(_TICK_S)
            before, last = last, time.monotonic()
            if last - before > _LATE_S:  # this process was stopped: nobody else could move either
                for listener in self._listeners.values():
                    listener.wake()
            if self._reload:
                self._reload = False
                self._read_settings_again()
            if self._is_alive():
                self._notifier.alive(self._summary())
            self._tell_losses()
            for listener in self._listeners.values():
                listener.tell_if_stuck()
            if last >= next_report:
                next_report += _REPORT_S
                self.emit(report(self.numbers()))
            if any(outlet.is_broken for outlet in self._outlets.values()):
                return
            if all(one.ended or one.is_stuck() for one in self._listeners.values()):
                return

    def _tell_losses(self) -> None:
        """Say of each source what was lost or unusable since it was said last."""
        for name, listener in self._listeners.items():
            source = listener.source
            for kind, total, text in (
                ("bad", source.n_bad, "samples were not numbers (NaN, infinite), read as silence"),
                ("overflow", source.n_overflows, "times this machine was too busy and lost sound"),
            ):
                number = total - self._told_losses.get((kind, name), 0)
                if number:
                    self._told_losses[kind, name] = total
                    self._tell("samples_lost", name, f"{number} {text}")

    def _end(self) -> int:
        """Stop everything in order; returns the exit code."""
        self._notifier.stopping()
        if self._signals or any(outlet.is_broken for outlet in self._outlets.values()):
            self._queue.close()  # else the sources have ended, and what waits is answered
        for listener in self._listeners.values():
            listener.stop(2.0)
        self._tell_losses()
        self._no_more.set()
        finished = self._wait_for_worker()
        self._queue.close()
        code = self._code()
        self.emit(report(self.numbers()))
        self._tell("stopped", None, self._summary() if finished else "an answer was given up")
        for name in list(self._made_of):
            self._close_outlet(name)
        return code

    def _wait_for_worker(self) -> bool:
        """Wait for the answers: all of them if the sources ended, else one of them for a while."""
        while self._worker.is_alive():
            self._worker.join(GRACE_S if self._signals else _TICK_S)
            if self._signals:
                break
            if self._is_alive():
                self._notifier.alive(self._summary())
        self._queue.close()
        return not self._worker.is_alive()

    def _code(self) -> int:
        if any(outlet.is_broken for outlet in self._outlets.values()):
            return BROKEN_PIPE
        if signal.SIGINT in self._signals:
            return INTERRUPTED
        problems = [one.problem for one in self._listeners.values() if one.problem is not None]
        return problems[0].exit_code if problems and not self._signals else 0

    def _require_a_source(self) -> None:
        """Raise the first source's problem if not one of them could be opened."""
        found = list(self._listeners.values())
        heard = any(one.was_heard for one in found)
        if found[0].problem is not None and not heard and not self._signals:
            for listener in self._listeners.values():
                listener.stop(2.0)
            for name in list(self._made_of):
                self._close_outlet(name)
            raise found[0].problem

    def _read_settings_again(self) -> None:
        self._notifier.reloading()
        try:
            settings = self._read_again()
            self._open_outlets(settings)
        except TinyGiantError as error:
            self._tell("reload_failed", None, f"nothing is changed: {one_line(error)}")
        else:
            if settings.model != self.settings.model:
                self._say("[model] takes effect when tg-listen is started again")
            assert self._asker is not None
            self._asker.questions = settings.question
            self._queue.settings = settings.queue
            opened = self._open_sources(settings)
            self.settings = settings
            n_sources = counted(len(settings.source), "source")
            self._tell("reloaded", None, f"settings read again; {n_sources}")
            self._tell_problems(opened)
        self._notifier.ready(self._summary())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        elif self._signals and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C does not wait
        elif self._asker is None:  # the model is still being loaded
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)
        else:
            self._signals.append(number)

    def _is_alive(self) -> bool:
        """Whether everything that should move does."""
        since = self._busy_since
        stuck = since is not None and time.monotonic() - since > _STUCK_S
        return not stuck and not any(one.is_stuck() for one in self._listeners.values())

    # --- sources and outlets -------------------------------------------------------------------

    def _open_sources(self, settings: Settings) -> list[Listener]:
        """Start new sources, stop those that are gone, leave the others as they are."""
        started = []
        for name in list(self._listeners):
            if settings.source.get(name) != self.settings.source.get(name):
                listener = self._listeners.pop(name)
                listener.stop(2.0)
                for kind in ("bad", "overflow"):
                    self._told_losses.pop((kind, name), None)
                for key, label, number in _of_listener(name, listener):
                    self._gone[key, label] = self._gone.get((key, label), 0) + number
            else:
                self._listeners[name].gate = settings.gate
        for name, source in settings.source.items():
            if name not in self._listeners:
                listener = Listener(
                    name,
                    make_source(name, source),
                    settings.gate,
                    hand_on=self._hand_on,
                    tell=self._tell,
                )
                self._listeners[name] = listener
                self._started.append(listener)
                listener.start()
                started.append(listener)
        for listener in started:
            listener.tried.wait(GRACE_S)
        return started

    def _tell_problems(self, opened: Iterable[Listener]) -> None:
        """Say of sources that were just started which could not be opened."""
        for listener in opened:
            if listener.problem is not None and not listener.was_heard:
                self._tell("source_lost", listener.name, one_line(listener.problem))

    def _open_outlets(self, settings: Settings) -> None:
        """Open what is new or changed, close what is gone; if one cannot be opened, change nothing.

        Raises:
            TinyGiantError: one cannot be opened.
        """
        wanted = _outlets(settings)
        made: dict[str, tuple[Any, Any]] = {}
        for name, (made_of, make) in wanted.items():
            if self._made_of.get(name) != made_of:
                made[name] = made_of, make(self)
        for name in {*self._made_of} - {*wanted} | {*made}:
            self._close_outlet(name)
        for name, (made_of, outlet) in made.items():
            outlet.begin()
            self._made_of[name] = made_of
            if isinstance(outlet, Outlet):
                self._outlets[name] = outlet
            else:
                self._others[name] = outlet

    def _close_outlet(self, name: str) -> None:
        self._made_of.pop(name, None)
        other = self._others.pop(name, None)
        if other is not None:
            other.close()
        outlet = self._outlets.pop(name, None)
        if outlet is not None:
            n_left = outlet.close(_FLUSH_S)
            self.counts.add("dropped", name, outlet.n_dropped)
            if n_left and not outlet.is_broken:
                self._say(f"{name}: {counted(n_left, 'record')} could not be delivered")

    def outlet(self, name: str, carrier: Any, **options: Any) -> Outlet:
        """An outlet whose lines are printed under this service's name."""
        return Outlet(name, carrier, tell=self._say, **options)

    # --- threads -------------------------------------------------------------------------------

    def _hand_on(self, sound: Sound, can_wait: bool, sign: Callable[[], None]) -> None:
        """A listener's thread has cut out a sound."""
        self.counts.add("sounds", sound.source)
        self._queue.put(sound, can_wait=can_wait, sign=sign)

    def _answer_all(self) -> None:
        """The worker's thread."""
        while True:
            item = self._queue.get(_TICK_S)
            if item is not None:
                self._busy_since = time.monotonic()
                self._answer(item)
                self._busy_since = None
            elif self._no_more.is_set():
                return

    def _answer(self, item: Waiting) -> None:
        assert self._asker is not None
        sound, waited_s = item.sound, time.monotonic() - item.since
        replies: tuple[Reply, ...] = ()
        try:
            replies = self._asker.ask(sound)
        except Exception as error:  # of the clip itself; those of questions are in the replies
            self._unanswered(sound, f"failed: {one_line(error)}")
            return
        for reply in replies:
            self.counts.add("answers", f"{reply.question.name} {reply.status}")
            if reply.error is not None:
                self._say(f"{reply.question.name} failed: {reply.error['message']}")
        record = sound_record(sound, replies, waited_s=waited_s)
        record["clip"] = self._keep(sound, replies)
        self.counts.add("answer_seconds", "", time.monotonic() - item.since - waited_s)
        self.emit(record)

    def _keep(self, sound: Sound, replies: Iterable[Reply]) -> str | None:
        """Keep a clip if that is asked for; the name of its file."""
        clips = self._others.get("keep")
        if not isinstance(clips, ClipFolder):
            return None
        if clips.settings.only_notify and not any(reply.notify for reply in replies):
            return None
        try:
            return clips.keep(sound)
        except StorageError as error:
            self.counts.add("clips_not_kept")
            self._tell("clip_not_kept", sound.source, one_line(error))
            return None

    def _unanswered(self, sound: Sound, reason: str) -> None:
        self.counts.add("unanswered", reason.partition(":")[0])
        self.emit(sound_record(sound, unanswered=reason))
        self._say(f"{sound.source}: the sound at {sound.start_s:.1f} s goes unanswered ({reason})")

    def _tell(self, what: str, source: str | None, message: str) -> None:
        self.emit(status(what, source, message))
        self._say(message if source is None else f"{source}: {message}")

    def _say(self, text: str) -> None:
        if not self._quiet and sys.stderr is not None:
            print(f"tg-listen: {printable(text)}", file=sys.stderr, flush=True)

    def _summary(self) -> str:
        n_sounds = sum(listener.n_sounds for listener in self._listeners.values())
        unanswered = sum(n for (name, _), n in self.counts.all().items() if name == "unanswered")
        lost = [name for name, one in self._listeners.items() if one.problem is not None]
        away = f", lost: {', '.join(lost)}" if lost else ""
        sounds, n_waiting = counted(n_sounds, "sound"), len(self._queue)
        return f"{sounds}, {unanswered:g} unanswered, {n_waiting} waiting{away}"

    def _live_numbers(self) -> Iterable[tuple[str, str, float]]:
        for name, listener in self._listeners.items():
            yield from _of_listener(name, listener)
        for name, outlet in self._outlets.items():
            yield "dropped", name, outlet.n_dropped


def _of_listener(name: str, listener: Listener) -> Iterable[tuple[str, str, float]]:
    yield "heard_seconds", name, listener.heard_s
    yield "away_seconds", name, listener.lost_s
    yield "overflows", name, listener.source.n_overflows
    yield "bad_samples", name, listener.source.n_bad


def _outlets(settings: Settings) -> dict[str, tuple[Any, Callable[[Service], Any]]]:
    """For each outlet that ``settings`` ask for: what it is made of, and how."""
    found: dict[str, tuple[Any, Callable[[Service], Any]]] = {}
    if sys.stdout is not None:  # else it was closed, as some ways to start a service have it
        found["standard output"] = "", _stdout
    if settings.events.file is not None:
        found["events"] = (
            settings.events,
            lambda service: service.outlet("events", EventsFile(settings.events), buffer=1_000),
        )
    if settings.keep.folder is not None:
        found["keep"] = settings.keep, lambda service: ClipFolder(settings.keep)
    if settings.webhook.url is not None:
        only = settings.webhook.only_notify
        found["webhook"] = (
            settings.webhook,
            lambda service: service.outlet(
                "webhook",
                Webhook(settings.webhook),
                buffer=settings.webhook.buffer,
                wants=lambda record: is_news(record, only_notify=only),
            ),
        )
    if settings.mqtt.host is not None:
        found["mqtt"] = (
            (settings.mqtt, settings.question, tuple(settings.source)),
            lambda service: service.outlet(
                "mqtt", Broker(settings, service._say), buffer=settings.mqtt.buffer
            ),
        )
    if settings.metrics.port is not None:
        found["metrics"] = (
            settings.metrics,
            lambda service: MetricsServer(settings.metrics, service.numbers),
        )
    return found


def _stdout(service: Service) -> Outlet:
    as_json = service._as_json
    return service.outlet(
        "standard output",
        StandardOutput(sys.stdout.fileno(), as_json=as_json),
        buffer=_STDOUT_BUFFER,
        wants=lambda record: as_json or record["event"] == "sound",
        patient=True,
    )


def is_news(record: Record, *, only_notify: bool) -> bool:
    """Whether a record is a sound, with ``only_notify`` one with an answer worth telling."""
    if record["event"] != "sound":
        return False
    return not only_notify or any(answer["notify"] for answer in record["answers"])
