"""MQTT: sounds and answers go to a broker, and Home Assistant finds them by itself.

Under ``{topic}/``: ``status`` (``online``; ``offline`` by last will), ``sound`` (each sound's
whole record), ``{source}/{question}/answer`` (the last answer, retained),
``{source}/{question}/event`` (each answer worth telling), ``{source}/state`` (``heard`` or
``lost``), ``counts``. Home Assistant's discovery messages are retained; those of questions that are
gone are taken back.

Delivery is acknowledged (QoS 1) and in order: one message is under way at a time. paho connects
again by itself and repeats what was not acknowledged; meanwhile records wait in the outlet's
buffer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import ssl
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import MissingDependencyError, UsageError
from ..text import one_line, printable
from .outlets import read_secret
from .settings import MqttSettings, QuestionSettings, Settings
from .telling import Record

if TYPE_CHECKING:
    from paho.mqtt.client import Client, MQTTMessageInfo

__all__ = ["PASSWORD_VARIABLE", "Broker", "Message", "discovery"]

PASSWORD_VARIABLE = "TINYGIANT_MQTT_PASSWORD"
_LONGEST_STATE = 255  # characters that Home Assistant takes for a state
_KEEP_ALIVE_S = 60
_RETRY_S = (1, 60)


@dataclass(frozen=True)
class Message:
    """What is published; an empty payload takes a retained message back."""

    topic: str
    payload: str
    retain: bool = False


class Broker:
    """A carrier of records to an MQTT broker; it connects, and connects again, by itself."""

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        """Prepare the connection; nothing is sent before :meth:`begin`.

        Raises:
            MissingDependencyError: paho-mqtt is not installed.
            UsageError: a certificate or the password cannot be read.
        """
        if importlib.util.find_spec("paho") is None:
            raise MissingDependencyError(
                "[mqtt] needs paho-mqtt; run: pip install 'tinygiant[listen]'"
            )
        self._settings = settings.mqtt
        self._tell = tell
        self._discovery = {m.topic: m for m in discovery(settings)}
        self._states = {name: "heard" for name in settings.source}
        self._connected = threading.Event()
        self._problem = ""
        self._left: deque[Message] = deque()
        self._record: Record | None = None
        self._sent: MQTTMessageInfo | None = None
        self._client = self._make_client()

    def begin(self) -> None:
        """Connect, in a thread of paho's; an obstacle is reported once."""
        mqtt = self._settings
        assert mqtt.host is not None
        port = mqtt.port or (8_883 if mqtt.tls else 1_883)
        self._client.connect_async(mqtt.host, port, keepalive=_KEEP_ALIVE_S)
        self._client.loop_start()

    def carry(self, record: Record, stopping: threading.Event) -> None:
        """Publish the messages of a record; waits while the broker cannot be reached."""
        if record is not self._record:
            self._record = record
            self._left = deque(self._messages(record))
        while self._left:
            message = self._left[0]
            while not self._connected.wait(0.2):
                if stopping.is_set():
                    raise OSError(None, self._problem or "the broker cannot be reached")
            if self._sent is None:
                self._sent = self._publish(message)
            while not self._sent.is_published():
                if stopping.wait(0.005):
                    raise OSError(None, self._problem or "the broker does not acknowledge")
            self._sent = None
            self._left.popleft()
        self._record = None

    def close(self) -> None:
        """Say that this end is gone, and disconnect."""
        if self._connected.is_set():
            self._publish(Message(self._topic("status"), "offline", True)).wait_for_publish(1.0)
        self._client.disconnect()
        self._client.loop_stop()

    def _make_client(self) -> Client:
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        mqtt = self._settings
        client = Client(CallbackAPIVersion.VERSION2, client_id=_node(mqtt))
        client.reconnect_delay_set(*_RETRY_S)
        client.will_set(self._topic("status"), "offline", qos=1, retain=True)
        if mqtt.user is not None:
            client.username_pw_set(mqtt.user, _password(mqtt))
        if mqtt.tls:
            try:
                client.tls_set(mqtt.ca_file, mqtt.cert_file, mqtt.key_file)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"[mqtt] certificates: {one_line(error)}; check ca_file, cert_file, key_file"
                ) from error
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        return client

    # --- paho's thread -------------------------------------------------------------------------

    def _on_connect(self, client: Client, _: Any, flags: Any, code: Any, *__: Any) -> None:
        if code.is_failure:
            self._say(f"the broker refuses ({code}); check user and password")
            return
        if self._problem:
            self._tell(f"mqtt: connected to {printable(self._settings.host)}")
        self._problem = ""
        self._publish(Message(self._topic("status"), "online", True))
        for source, state in self._states.items():
            self._publish(Message(self._topic(source, "state"), state, True))
        if self._settings.discovery:
            # Home Assistant says when it has started; our own configurations are retained.
            client.subscribe([(f"{self._settings.discovery}/status", 1), (self._configs, 1)])
            self._announce()
        self._connected.set()

    def _on_connect_fail(self, client: Client, _: Any) -> None:
        error = sys.exc_info()[1]
        reason = getattr(error, "strerror", None) or (one_line(error) if error else "no answer")
        if isinstance(error, ssl.SSLCertVerificationError):
            reason = f"its certificate is not trusted: {error.verify_message}"
        self._say(f"{printable(self._settings.host)} cannot be reached ({reason})")

    def _on_disconnect(self, client: Client, _: Any, flags: Any, code: Any, *__: Any) -> None:
        self._connected.clear()
        if code.is_failure and not self._problem:
            self._say(f"the connection is lost ({code})")

    def _on_message(self, client: Client, _: Any, message: Any) -> None:
        prefix = self._settings.discovery
        if message.topic == f"{prefix}/status":
            if message.payload == b"online":
                self._announce()
        elif message.payload and message.topic not in self._discovery:
            self._publish(Message(message.topic, "", True))  # of a question that is gone

    def _say(self, problem: str) -> None:
        """Report a problem, once until another one or none."""
        if problem != self._problem:
            self._problem = problem
            self._tell(f"mqtt: {problem}; kept and tried again")

    def _announce(self) -> None:
        for message in self._discovery.values():
            self._publish(message)

    @property
    def _configs(self) -> str:
        return f"{self._settings.discovery}/+/{_node(self._settings)}/+/config"

    def _publish(self, message: Message) -> MQTTMessageInfo:
        return self._client.publish(message.topic, message.payload, qos=1, retain=message.retain)

    # --- records -------------------------------------------------------------------------------

    def _topic(self, *parts: str) -> str:
        return "/".join((self._settings.topic, *parts))

    def _messages(self, record: Record) -> Iterator[Message]:
        if record["event"] == "report":
            yield Message(self._topic("counts"), json.dumps(_flat(record["counts"])), True)
        elif record["event"] == "status" and record["source"] is not None:
            state = {"source_lost": "lost", "source_failed": "lost", "source_back": "heard"}.get(
                record["what"]
            )
            if state is not None:
                self._states[record["source"]] = state
                yield Message(self._topic(record["source"], "state"), state, True)
        elif record["event"] == "sound":
            yield Message(self._topic("sound"), json.dumps(record))
            for answer in record["answers"]:
                if answer["status"] == "answered":
                    yield from self._answer(record, answer)

    def _answer(self, record: Record, answer: Record) -> Iterator[Message]:
        told = {
            "text": answer["text"][:_LONGEST_STATE],
            "probability": answer["probability"],
            "source": record["source"],
            "time": record["time"],
            "duration_s": record["duration_s"],
            "clip": record["clip"],
            "id": record["id"],
        }
        place = record["source"], answer["name"]
        yield Message(self._topic(*place, "answer"), json.dumps(told), True)
        if answer["notify"]:
            with_choices = answer["answer"]["choice_index"] is not None
            kind = answer["text"] if with_choices else "answer"
            payload = json.dumps({"event_type": kind, **told})
            yield Message(self._topic(*place, "event"), payload)


def discovery(settings: Settings) -> Iterator[Message]:
    """Home Assistant's discovery messages: the entities of every source and question."""
    mqtt = settings.mqtt
    for source in settings.source:
        state = f"{mqtt.topic}/{source}/state"
        yield _config(
            mqtt, "binary_sensor", f"{source}-lost", f"{source} lost", state,
            device_class="problem", payload_on="lost", payload_off="heard",
            entity_category="diagnostic",
        )  # fmt: skip
        for question in settings.question:
            if question.sources is None or source in question.sources:
                yield from _entities(mqtt, source, question)
    for name in ("unanswered", "dropped"):
        yield _config(
            mqtt, "sensor", name, name, f"{mqtt.topic}/counts",
            value_template=f"{{{{ value_json.{name} | default(0) }}}}",
            state_class="total_increasing", entity_category="diagnostic",
        )  # fmt: skip


def _entities(mqtt: MqttSettings, source: str, question: QuestionSettings) -> Iterator[Message]:
    """A sensor with the last answer, and an event for each that is worth telling."""
    place = f"{mqtt.topic}/{source}/{question.name}"
    name = f"{source} {question.name}"
    options: dict[str, Any] = {}
    if question.choices is not None:
        options = {"device_class": "enum", "options": list(question.choices)}
    yield _config(
        mqtt, "sensor", f"{source}-{question.name}", name, f"{place}/answer",
        value_template="{{ value_json.text }}", json_attributes_topic=f"{place}/answer", **options,
    )  # fmt: skip
    kinds = question.notify or question.choices or ("answer",)
    yield _config(
        mqtt, "event", f"{source}-{question.name}-event", f"{name} heard", f"{place}/event",
        event_types=list(kinds),
    )  # fmt: skip


def _config(
    mqtt: MqttSettings, component: str, key: str, name: str, state_topic: str, **more: Any
) -> Message:
    """One entity's configuration."""
    node = _node(mqtt)
    payload = {
        "name": name,
        "unique_id": f"{node}-{key}",
        "state_topic": state_topic,
        "availability_topic": f"{mqtt.topic}/status",
        "device": {"identifiers": [node], "name": mqtt.device, "manufacturer": "TinyGiantALM"},
        "origin": {"name": "tg-listen"},
        **more,
    }
    topic = f"{mqtt.discovery}/{component}/{node}/{key}/config"
    return Message(topic, json.dumps(payload), retain=True)


def _node(mqtt: MqttSettings) -> str:
    """A name for this sensor, of the characters that discovery allows."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", mqtt.topic)


def _password(mqtt: MqttSettings) -> str | None:
    if mqtt.password_file is not None:
        return read_secret(mqtt.password_file, "[mqtt] password_file")
    return os.environ.get(PASSWORD_VARIABLE)


def _flat(counts: dict[str, Any]) -> dict[str, float]:
    """Counts by name alone, the labels added up."""
    return {
        name: sum(number.values()) if isinstance(number, dict) else number
        for name, number in counts.items()
    }
