"""The settings of ``tg-listen``: one tree of frozen dataclasses, from a TOML file or from options.

The names of tables and keys in the file are those of the classes and fields here. Whatever is
wrong (an unknown key, a value of another type or out of range, keys that do not go together) is a
:class:`~tinygiant.runtime.errors.UsageError` of one line that begins with the table and the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from ..asking import AskOptions
from ..errors import QuestionError, UsageError
from ..prompt import check_choices, check_question
from ..text import one_line, printable

__all__ = [
    "DAYS",
    "YES_NO",
    "EventsSettings",
    "GateSettings",
    "KeepSettings",
    "MetricsSettings",
    "ModelSettings",
    "MqttSettings",
    "QuestionSettings",
    "QueueSettings",
    "Settings",
    "SourceSettings",
    "WebhookSettings",
    "minutes",
    "read_settings",
    "settings_of",
]

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
YES_NO = ("yes", "no")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SPAN = re.compile(r"(\d\d):(\d\d)-(\d\d):(\d\d)")
_TOPIC = re.compile(r"[^#+\0/]+(/[^#+\0/]+)*")
T = TypeVar("T")


def _number(default: float | None, least: float, most: float) -> Any:
    """A field that holds a number from ``least`` to ``most``."""
    return field(default=default, metadata={"range": (least, most)})


@dataclass(frozen=True)
class SourceSettings:
    """``[source.NAME]``: where sound comes from.

    Attributes:
        kind: a microphone, standard input, or a file that may grow.
        device: number or part of the name of a microphone; the default one if None.
        path: of the file.
        follow: wait for more at the end of the file; if not, the source ends there.
        rate_hz: of raw samples; of a microphone, the rate to open it at (its own if None).
        format: of raw samples, little-endian; a WAV header, where there is one, decides itself.
        channels: of raw samples, averaged to one.
    """

    kind: Literal["microphone", "stdin", "file"] = "microphone"
    device: str | None = None
    path: str | None = None
    follow: bool = True
    rate_hz: int | None = _number(None, 1_000, 768_000)
    format: Literal["s16le", "s24le", "s32le", "f32le"] = "s16le"
    channels: int = _number(1, 1, 64)

    def problem(self) -> str | None:
        """What does not go together."""
        if (self.kind == "file") != (self.path is not None):
            return 'path goes with kind = "file", which needs it'
        if self.device is not None and self.kind != "microphone":
            return 'device goes with kind = "microphone"'
        return None


@dataclass(frozen=True)
class GateSettings:
    """``[gate]``: when something sounds.

    Attributes:
        start_db: a sound begins this far above the room's level.
        stay_db: and goes on while it is this far above it.
        least_s: shorter than this is a click.
        pre_roll_s: kept before the first and after the last loud moment.
        hang_over_s: a pause up to this long does not end a sound.
        longest_s: a longer sound is cut; what stays as loud is the room from then on.
        follow_s: the room's level is that of the quietest moment of the last so many seconds.
        quiet_db: the room's level is never taken to be below this.
        voice: Silero's voice detector: where it is installed, always, never.
    """

    start_db: float = _number(10.0, 1.0, 60.0)
    stay_db: float = _number(6.0, 0.5, 60.0)
    least_s: float = _number(0.08, 0.0, 5.0)
    pre_roll_s: float = _number(0.5, 0.0, 10.0)
    hang_over_s: float = _number(1.0, 0.1, 30.0)
    longest_s: float = _number(10.0, 1.0, 120.0)
    follow_s: float = _number(30.0, 2.0, 3_600.0)
    quiet_db: float = _number(-70.0, -100.0, 0.0)
    voice: Literal["auto", "on", "off"] = "auto"

    def problem(self) -> str | None:
        """What does not go together."""
        if self.stay_db > self.start_db:
            return f"stay_db = {self.stay_db:g} is above start_db = {self.start_db:g}"
        if self.least_s > self.longest_s:
            return f"least_s = {self.least_s:g} is above longest_s = {self.longest_s:g}"
        return None


@dataclass(frozen=True)
class QueueSettings:
    """``[queue]``: sounds that wait for their answers.

    Attributes:
        size: how many may wait.
        when_full: which sound goes unanswered (and is reported) if one more comes: the ``oldest``
            that waits or the ``newest``; ``wait``: neither, the source is not read until there is
            room, for recordings. A file always waits.
    """

    size: int = _number(8, 1, 1_000)
    when_full: Literal["oldest", "newest", "wait"] = "oldest"


@dataclass(frozen=True)
class QuestionSettings:
    """``[[question]]``: what to ask about each sound.

    Attributes:
        name: short, for topics and metrics.
        ask: the question in plain words.
        choices: possible answers; free if None.
        think: whether the model thinks first.
        only_if: a first question, answered with yes or no without thought; this one is asked only
            after a yes.
        confidence: least probability of the answer (with ``only_if``, of the yes as well); below it
            the answer is ``unsure``. Without ``only_if`` it needs choices and ``think = false``.
        notify: which choices are worth telling (outlets may filter by it); all if None.
        refractory_s: after an answer worth telling, not asked for so long (time of the stream).
        sources: names of the sources it is asked of; all if None.
        hours: local times at which it is asked, such as "22:00-06:00"; always if None.
        days: days on which the hours begin.
        max_new_tokens: how much the model may write.
    """

    name: str = "what"
    ask: str = "What is heard?"
    choices: tuple[str, ...] | None = None
    think: bool = True
    only_if: str | None = None
    confidence: float | None = _number(None, 0.0, 1.0)
    notify: tuple[str, ...] | None = None
    refractory_s: float = _number(0.0, 0.0, 86_400.0)
    sources: tuple[str, ...] | None = None
    hours: tuple[str, ...] | None = None
    days: tuple[str, ...] | None = None
    max_new_tokens: int = _number(512, 1, 8_192)

    @property
    def options(self) -> AskOptions:
        """How the model is to answer."""
        return AskOptions(think=self.think, max_new_tokens=self.max_new_tokens, fit=True)

    def problem(self) -> str | None:
        """What cannot be asked."""
        if not _NAME.fullmatch(self.name):
            return f"name = {self.name!r}: expected letters, digits, - and _, at most 64"
        try:
            check_question(self.ask)
            if self.only_if is not None:
                check_question(self.only_if)
            if self.choices is not None:
                check_choices(self.choices)
        except QuestionError as error:
            return one_line(error)
        scored = self.choices is not None and not self.think
        if self.confidence is not None and not scored and self.only_if is None:
            return "confidence needs choices and think = false: only then are there probabilities"
        for answer in self.notify or ():
            if answer not in (self.choices or ()):
                return f"notify: {answer!r} is not one of the choices"
        for day in self.days or ():
            if day not in DAYS:
                return f"days: {day!r} is not one of {', '.join(DAYS)}"
        for span in self.hours or ():
            try:
                minutes(span)
            except ValueError:
                return f'hours: {span!r} is not a span of a day; expected one such as "22:00-06:00"'
        return None


@dataclass(frozen=True)
class EventsSettings:
    """``[events]``: a file with a line of JSON for everything that happens.

    Attributes:
        file: its path; it grows to ``max_mb`` and is then renamed to ``FILE.1``.
        max_mb: see ``file``.
    """

    file: str | None = None
    max_mb: float = _number(10.0, 0.01, 10_000.0)


@dataclass(frozen=True)
class KeepSettings:
    """``[keep]``: sounds kept as FLAC files; none are unless this is there.

    Attributes:
        folder: where they lie.
        max_mb: the oldest are removed beyond this, all together.
        max_days: older ones are removed.
        only_notify: keep only what got an answer worth telling.
    """

    folder: str | None = None
    max_mb: float = _number(100.0, 0.1, 1_000_000.0)
    max_days: float = _number(7.0, 0.001, 3_650.0)
    only_notify: bool = False


@dataclass(frozen=True)
class MqttSettings:
    """``[mqtt]``: a broker, and Home Assistant's discovery through it.

    Attributes:
        host: the broker.
        port: 8883 with TLS, else 1883, if None.
        tls: encrypt, and check the broker's certificate.
        ca_file: certificates to trust; the system's if None.
        cert_file: this client's certificate, if the broker asks for one.
        key_file: its key.
        user: name to log in with.
        password_file: the file that holds the password; else the variable
            TINYGIANT_MQTT_PASSWORD.
        topic: begins every topic.
        discovery: prefix of Home Assistant's discovery topics; "" for none.
        device: name of the device in Home Assistant.
        buffer: messages kept while the broker is away; beyond it the oldest are dropped and
            counted.
    """

    host: str | None = None
    port: int | None = _number(None, 1, 65_535)
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    user: str | None = None
    password_file: str | None = None
    topic: str = "tinygiant"
    discovery: str = "homeassistant"
    device: str = "TinyGiant"
    buffer: int = _number(1_000, 1, 1_000_000)

    def problem(self) -> str | None:
        """What does not go together."""
        if not self.tls and (self.ca_file or self.cert_file or self.key_file):
            return "ca_file, cert_file and key_file need tls = true"
        if (self.cert_file is None) != (self.key_file is None):
            return "cert_file and key_file go together; give both"
        if self.password_file is not None and self.user is None:
            return "password_file needs user"
        for name in ("topic", "discovery"):
            value = getattr(self, name)
            if not _TOPIC.fullmatch(value) and (name == "topic" or value):
                return (
                    f"{name} = {value!r} is not a topic; expected words between slashes, no # or +"
                )
        return None


@dataclass(frozen=True)
class WebhookSettings:
    """``[webhook]``: a POST of JSON for each sound.

    Attributes:
        url: where to.
        token_file: the file that holds a bearer token.
        only_notify: only what got an answer worth telling.
        timeout_s: for one request.
        buffer: as for MQTT.
    """

    url: str | None = None
    token_file: str | None = None
    only_notify: bool = True
    timeout_s: float = _number(10.0, 0.1, 300.0)
    buffer: int = _number(1_000, 1, 1_000_000)

    def problem(self) -> str | None:
        """What cannot be reached."""
        if self.url is None:
            return None
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            return f"url = {self.url!r}: expected http://HOST/PATH or https://HOST/PATH"
        return None


@dataclass(frozen=True)
class MetricsSettings:
    """``[metrics]``: counters for Prometheus over HTTP; none unless there is a port."""

    port: int | None = _number(None, 1, 65_535)
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class ModelSettings:
    """``[model]``: what answers; the same as the options of ``tg-run``."""

    bundle: str | None = None
    threads: int | None = _number(None, 1, 1_024)
    memory: Literal["default", "low"] = "default"
    provider: str = "cpu"


@dataclass(frozen=True)
class Settings:
    """Everything; see the classes of the fields."""

    source: dict[str, SourceSettings]
    question: tuple[QuestionSettings, ...] = (QuestionSettings(),)
    gate: GateSettings = GateSettings()
    queue: QueueSettings = QueueSettings()
    model: ModelSettings = ModelSettings()
    events: EventsSettings = EventsSettings()
    keep: KeepSettings = KeepSettings()
    mqtt: MqttSettings = MqttSettings()
    webhook: WebhookSettings = WebhookSettings()
    metrics: MetricsSettings = MetricsSettings()


def read_settings(path: str) -> dict[str, Any]:
    """The tables of a TOML file, not yet checked.

    Raises:
        UsageError: it cannot be read, or is no TOML.
    """
    name = printable(path)
    try:
        return tomllib.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise UsageError(f"{name}: cannot be read ({error.strerror}); check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{name}: not valid TOML ({one_line(error)}); correct it") from error


def settings_of(tables: Mapping[str, Any], name: str) -> Settings:
    """Check ``tables`` and make settings of them; ``name`` says where they are from, in messages.

    Raises:
        UsageError: something is wrong; the message names the table and the key.
    """
    known = {f.name: f for f in dataclasses.fields(Settings)}
    for key in tables:
        if key not in known:
            raise UsageError(f"{name}: [{key}] is unknown{_instead(key, known)}")
    found: dict[str, Any] = {}
    for key in tables:
        if key == "source":
            found[key] = _sources(tables[key], name)
        elif key == "question":
            found[key] = _questions(tables[key], name)
        else:
            kind = typing.get_type_hints(Settings)[key]
            found[key] = _table(kind, tables[key], f"{name}: [{key}]")
    found.setdefault("source", {"microphone": SourceSettings()})
    settings = Settings(**found)
    for question in settings.question:
        for source in question.sources or ():
            if source not in settings.source:
                where = f"{name}: [[question]] {question.name}"
                raise UsageError(f"{where}: there is no [source.{printable(source)}]")
    return settings


def minutes(span: str) -> tuple[int, int]:
    """Start and end of "22:00-06:00" in minutes of the day; the end may be 24:00.

    Raises:
        ValueError: it is no such span.
    """
    match = _SPAN.fullmatch(span)
    if match is None:
        raise ValueError(span)
    from_h, from_min, to_h, to_min = map(int, match.groups())
    start, end = 60 * from_h + from_min, 60 * to_h + to_min
    if start >= 1_440 or end > 1_440 or from_min > 59 or to_min > 59 or start == end:
        raise ValueError(span)
    return start, end


def _sources(tables: Any, name: str) -> dict[str, SourceSettings]:
    if not isinstance(tables, dict) or not all(isinstance(t, dict) for t in tables.values()):
        raise UsageError(f"{name}: sources have names; write [source.NAME]")
    found = {}
    for key, table in tables.items():
        if not _NAME.fullmatch(key):
            raise UsageError(
                f"{name}: [source.{printable(key)}]: expected a name of letters, digits, - and _"
            )
        found[key] = _table(SourceSettings, table, f"{name}: [source.{key}]")
    if not found:
        raise UsageError(f"{name}: there is no source; write [source.NAME]")
    if sum(source.kind == "stdin" for source in found.values()) > 1:
        raise UsageError(f"{name}: two sources read standard input; only one can")
    return found


def _questions(tables: Any, name: str) -> tuple[QuestionSettings, ...]:
    if not isinstance(tables, list) or not tables:
        raise UsageError(f"{name}: questions are a list; write [[question]]")
    found = tuple(
        _table(QuestionSettings, table, f"{name}: [[question]] {number}")
        for number, table in enumerate(tables, start=1)
    )
    names = [question.name for question in found]
    for twice in names:
        if names.count(twice) > 1:
            raise UsageError(f"{name}: two questions have the name {twice}; give each its own")
    return found


def _table(kind: type[T], table: Any, where: str) -> T:
    """A dataclass from a table of the file."""
    if not isinstance(table, dict):
        raise UsageError(f"{where}: expected a table of keys, found {type(table).__name__}")
    hints = typing.get_type_hints(kind)
    ranges = {f.name: f.metadata.get("range") for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in hints:
            raise UsageError(f"{where}: {printable(key)} is unknown{_instead(key, hints)}")
        values[key] = _value(value, hints[key], ranges[key], f"{where}: {key}")
    made = kind(**values)
    problem = getattr(made, "problem", lambda: None)()
    if problem:
        raise UsageError(f"{where}: {problem}")
    return made


def _value(value: Any, hint: Any, bounds: tuple[float, float] | None, where: str) -> Any:
    """A value of the file as a field of type ``hint`` holds it."""
    options = [hint]
    if isinstance(hint, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
    [wanted] = options
    shown = printable(repr(value))
    if typing.get_origin(wanted) is Literal:
        allowed = typing.get_args(wanted)
        if value not in allowed:
            raise UsageError(f"{where} = {shown}: expected one of {', '.join(allowed)}")
        return value
    if typing.get_origin(wanted) is tuple:
        if not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
            raise UsageError(f"{where} = {shown}: expected a list of texts")
        return tuple(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise UsageError(f"{where} = {shown}: expected {names[wanted]}")
    if bounds is not None and not (math.isfinite(value) and bounds[0] <= value <= bounds[1]):
        raise UsageError(f"{where} = {shown}: expected {bounds[0]:,g} to {bounds[1]:,g}")
    if wanted is str and not value.isprintable():
        raise UsageError(f"{where} = {shown}: expected a text on one line")
    return value


def _instead(key: str, known: Mapping[str, Any]) -> str:
    """What a wrong key may have meant."""
    near = difflib.get_close_matches(key.lower(), known, n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
