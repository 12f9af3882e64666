"""MQTT through a real broker, mosquitto: order, outages, refusals, TLS, Home Assistant's rules."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from tests.listen_stub import a_sound, an_answer, wait_for
from tinygiant.runtime.errors import MissingDependencyError, UsageError
from tinygiant.runtime.listen import mqtt
from tinygiant.runtime.listen.mqtt import Broker, discovery
from tinygiant.runtime.listen.outlets import Outlet
from tinygiant.runtime.listen.questions import Reply
from tinygiant.runtime.listen.settings import Settings, settings_of
from tinygiant.runtime.listen.telling import Record, report, sound_record, status

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")

DOG = {
    "name": "dog", "ask": "Dog?", "choices": ["yes", "no"], "think": False, "notify": ["yes"],
}  # fmt: skip
FREE = {"name": "what", "ask": "What?"}


def settings(port: int = 1_883, *questions: dict[str, Any], **keys: Any) -> Settings:
    tables = {
        "source": {"hall": {}},
        "question": list(questions or (DOG, FREE)),
        "mqtt": {"host": "localhost", "port": port, "topic": "home/sensor", **keys},
    }
    return settings_of(tables, "listen.toml")


def sound(number: int, text: str = "yes", question: dict[str, Any] = DOG) -> Record:
    [asked] = settings(1, question).question
    shares = (0.9, 0.1) if asked.choices else None
    answer = an_answer(text, asked.choices, shares)
    notify = asked.notify is None or text in asked.notify
    reply = Reply(asked, "answered", answer=answer, probability=0.9 if shares else None,
                  notify=notify)  # fmt: skip
    return sound_record(a_sound(number), [reply])


class Mosquitto:
    """A broker of the test's own, which can be stopped and started again on its port."""

    def __init__(self, folder: Path, *lines: str, host: str = "127.0.0.1") -> None:
        with socket.socket() as free:
            free.bind((host, 0))
            self.port = free.getsockname()[1]
        self.config = folder / "mosquitto.conf"
        self.config.write_text("\n".join([f"listener {self.port} {host}", *lines, ""]))
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        assert MOSQUITTO is not None
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.config)], stderr=subprocess.DEVNULL
        )

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_for(answers)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(10)
            self.process = None


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    found = Mosquitto(tmp_path, "allow_anonymous true", "persistence false")
    yield found
    found.stop()


class Reader:
    """Whoever reads: keeps everything, and connects again by itself."""

    def __init__(self, port: int, *, tls: str | None = None, user: str | None = None) -> None:
        self.messages: list[tuple[str, str, bool]] = []
        self.connected = threading.Event()
        client = paho.Client(CallbackAPIVersion.VERSION2)
        client.reconnect_delay_set(1, 1)
        if tls is not None:
            client.tls_set(tls)
        if user is not None:
            client.username_pw_set(user, "secret")
        client.on_connect = self._on_connect
        client.on_message = lambda _, __, m: self.messages.append(
            (m.topic, m.payload.decode(), m.retain)
        )
        client.on_subscribe = lambda *_: self.connected.set()
        client.connect_async("localhost", port)
        client.loop_start()
        self.client = client
        assert self.connected.wait(20)

    def _on_connect(self, client: paho.Client, *_: Any) -> None:
        client.subscribe("#", qos=1)

    def of(self, topic: str) -> list[Any]:
        return [json.loads(text) for found, text, _ in self.messages if found == topic]

    def last(self, topic: str) -> str | None:
        found = [text for name, text, _ in self.messages if name == topic]
        return found[-1] if found else None

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


Make = Callable[..., Outlet]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Outlets to a broker, closed at the end; ``lines`` collects what is told."""
    monkeypatch.setattr(mqtt, "_RETRY_S", (1, 1))
    made: list[Outlet] = []

    def connect(wanted: Settings, lines: list[str], buffer: int = 1_000) -> Outlet:
        carrier = Broker(wanted, lines.append)
        made.append(Outlet("mqtt", carrier, buffer=buffer, tell=lines.append))
        made[-1].begin()
        return made[-1]

    yield connect
    for outlet in made:
        outlet.close(0.1)


@needs_broker
def test_answers_arrive_in_order_and_the_last_one_stays(broker: Mosquitto, make: Make) -> None:
    reader = Reader(broker.port)
    outlet = make(settings(broker.port), [])
    for number in range(1, 21):
        outlet.put(sound(number, "yes" if number % 2 else "no"))
    outlet.put(sound(21, "a dog far away", FREE))
    wait_for(lambda: len(reader.of("home/sensor/sound")) == 21)
    assert [r["number"] for r in reader.of("home/sensor/sound")] == list(range(1, 22))
    assert [a["text"] for a in reader.of("home/sensor/hall/dog/answer")] == ["yes", "no"] * 10
    # Only what is worth telling is an event.
    assert [e["event_type"] for e in reader.of("home/sensor/hall/dog/event")] == ["yes"] * 10
    wait_for(lambda: reader.of("home/sensor/hall/what/event"))
    [event] = reader.of("home/sensor/hall/what/event")
    assert (event["event_type"], event["text"]) == ("answer", "a dog far away")
    reader.close()
    late = Reader(broker.port)
    wait_for(lambda: late.last("home/sensor/status") == "online")
    wait_for(lambda: late.of("home/sensor/hall/dog/answer"))
    assert late.of("home/sensor/hall/dog/answer")[0]["text"] == "no"
    assert late.of("home/sensor/sound") == []
    outlet.close(5.0)
    wait_for(lambda: late.last("home/sensor/status") == "offline")
    late.close()


@needs_broker
def test_a_broker_that_is_down_for_a_while_gets_everything_once_and_in_order(
    broker: Mosquitto, make: Make
) -> None:
    lines: list[str] = []
    outlet = make(settings(broker.port), lines)
    reader = Reader(broker.port)
    for number in range(1, 6):
        outlet.put(sound(number))
    wait_for(lambda: len(reader.of("home/sensor/sound")) == 5)
    broker.stop()
    for number in range(6, 31):
        outlet.put(sound(number))
    wait_for(lambda: len(lines) == 1)
    reader.connected.clear()
    broker.start()
    assert reader.connected.wait(30)
    wait_for(lambda: {r["number"] for r in reader.of("home/sensor/sound")} >= {30}, 60)
    numbers = [r["number"] for r in reader.of("home/sensor/sound")]
    # What was told before the reader was back is the broker's to forget; nothing is out of order.
    assert numbers == sorted(numbers)
    assert numbers[:5] == [1, 2, 3, 4, 5] and len(set(numbers)) == len(numbers)
    assert outlet.n_dropped == 0
    assert "kept and tried again" in lines[0] and "connected to localhost" in lines[-1]
    reader.close()


@needs_broker
def test_beyond_the_buffer_the_oldest_are_dropped_and_counted(
    broker: Mosquitto, make: Make
) -> None:
    broker.stop()
    outlet = make(settings(broker.port), [], 3)
    outlet.put(sound(1))
    wait_for(lambda: len(outlet) == 1 and not outlet._records)  # in hand
    for number in range(2, 11):
        outlet.put(sound(number))
    assert outlet.n_dropped == 6  # three wait
    broker.start()
    reader = Reader(broker.port)
    wait_for(lambda: len(outlet) == 0, 30)
    assert outlet.n_dropped == 6
    reader.close()


@needs_broker
def test_a_wrong_password_is_said_once_and_tried_again(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "tg", "secret"], check=True)
    passwords.chmod(0o644)
    found = Mosquitto(tmp_path, f"password_file {passwords}", "allow_anonymous false", "user root")
    try:
        lines: list[str] = []
        (tmp_path / "wrong").write_text("guess\n")
        wanted = settings(found.port, user="tg", password_file=str(tmp_path / "wrong"))
        outlet = make(wanted, lines)
        outlet.put(sound(1))
        wait_for(lambda: lines)
        time.sleep(2.5)  # refused again meanwhile
        assert len(lines) == 1
        assert "refuses (Not authorized); check user and password" in lines[0]
        assert len(outlet) == 1
        assert outlet.close(0.1) == 1  # told as not delivered
        monkeypatch.setenv(mqtt.PASSWORD_VARIABLE, "secret")
        reader = Reader(found.port, user="tg")
        outlet = make(settings(found.port, user="tg"), lines)
        outlet.put(sound(2))
        wait_for(lambda: reader.of("home/sensor/sound"))
        reader.close()
    finally:
        found.stop()


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for ``name`` that signs itself, and its key."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout",
         str(key), "-out", str(cert), "-subj", f"/CN={name}", "-addext",
         f"subjectAltName=DNS:{name}"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    key.chmod(0o644)
    return cert, key


@needs_broker
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_tls_with_a_certificate_that_is_trusted_and_one_that_is_not(
    tmp_path: Path, make: Make
) -> None:
    cert, key = certificate(tmp_path, "localhost")
    other, _ = certificate(tmp_path, "elsewhere")
    lines_of_broker = (f"certfile {cert}", f"keyfile {key}", "allow_anonymous true", "user root")
    found = Mosquitto(tmp_path, *lines_of_broker)
    try:
        reader = Reader(found.port, tls=str(cert))
        outlet = make(settings(found.port, tls=True, ca_file=str(cert)), [])
        outlet.put(sound(1))
        wait_for(lambda: reader.of("home/sensor/sound"))
        lines: list[str] = []
        make(settings(found.port, tls=True, ca_file=str(other), topic="b"), lines).put(sound(2))
        wait_for(lambda: lines)
        assert "its certificate is not trusted: self-signed certificate" in lines[0]
        assert len(reader.of("home/sensor/sound")) == 1 and not reader.of("b/sound")
        reader.close()
    finally:
        found.stop()


@needs_broker
def test_a_process_that_dies_is_offline_by_its_last_will(broker: Mosquitto) -> None:
    reader = Reader(broker.port)
    code = (
        "import os, sys;"
        "from tinygiant.runtime.listen.mqtt import Broker;"
        "from tinygiant.runtime.listen.settings import settings_of;"
        f"b = Broker(settings_of({{'mqtt': {{'host': 'localhost', 'port': {broker.port},"
        " 'topic': 'home/sensor'}}, 't'), print); b.begin();"
        "sys.stdin.read(); os._exit(1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as dying:
        wait_for(lambda: reader.last("home/sensor/status") == "online", 60)
        dying.communicate()
    wait_for(lambda: reader.last("home/sensor/status") == "offline")
    assert [text for topic, text, _ in reader.messages if topic == "home/sensor/status"] == [
        "online",
        "offline",
    ]
    reader.close()


@needs_broker
def test_home_assistant_s_restart_and_questions_that_are_gone(
    broker: Mosquitto, make: Make
) -> None:
    reader = Reader(broker.port)
    first = make(settings(broker.port, DOG, FREE), [])
    topic = "homeassistant/sensor/home_sensor/hall-what/config"
    wait_for(lambda: reader.last(topic))
    first.close(5.0)
    # Started again without one of the questions: its entities are taken back, others stay.
    make(settings(broker.port, DOG), [])
    wait_for(lambda: reader.last(topic) == "")
    wait_for(lambda: reader.last("homeassistant/event/home_sensor/hall-what-event/config") == "")
    kept = "homeassistant/sensor/home_sensor/hall-dog/config"
    n_before = len(reader.of(kept))
    reader.client.publish("homeassistant/status", "online", qos=1)
    wait_for(lambda: len(reader.of(kept)) > n_before)
    reader.close()
    late = Reader(broker.port)
    wait_for(lambda: late.last(kept))
    assert late.last(topic) is None
    late.close()


@needs_broker
def test_a_lost_microphone_and_counts_are_seen(broker: Mosquitto, make: Make) -> None:
    reader = Reader(broker.port)
    outlet = make(settings(broker.port), [])
    wait_for(lambda: reader.last("home/sensor/hall/state") == "heard")
    outlet.put(status("source_lost", "hall", "gone"))
    wait_for(lambda: reader.last("home/sensor/hall/state") == "lost")
    outlet.put(status("source_back", "hall", "is back"))
    wait_for(lambda: reader.last("home/sensor/hall/state") == "heard")
    outlet.put(report({("unanswered", "queue_full"): 2, ("unanswered", "stopped"): 1}))
    wait_for(lambda: reader.of("home/sensor/counts"))
    assert reader.of("home/sensor/counts")[-1]["unanswered"] == 3
    reader.close()


# --- Home Assistant's rules --------------------------------------------------------------------

# What https://www.home-assistant.io/integrations/mqtt/ and the pages of its sensor, binary_sensor
# and event say of a discovery message; unknown keys are refused there as well.
COMMON = {
    "name": {"type": "string"},
    "unique_id": {"type": "string"},
    "state_topic": {"type": "string", "pattern": "^[^#+]+$"},
    "availability_topic": {"type": "string", "pattern": "^[^#+]+$"},
    "json_attributes_topic": {"type": "string", "pattern": "^[^#+]+$"},
    "value_template": {"type": "string"},
    "entity_category": {"enum": ["diagnostic"]},
    "device": {
        "type": "object",
        "required": ["identifiers"],
        "additionalProperties": False,
        "properties": {
            "identifiers": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "name": {"type": "string"},
            "manufacturer": {"type": "string"},
        },
    },
    "origin": {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "sw_version": {"type": "string"}},
    },
}
OWN = {
    "sensor": {
        "device_class": {"enum": ["enum"]},
        "options": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "state_class": {"enum": ["measurement", "total", "total_increasing"]},
    },
    "binary_sensor": {
        "device_class": {"enum": ["problem", "sound"]},
        "payload_on": {"type": "string"},
        "payload_off": {"type": "string"},
    },
    "event": {"event_types": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
}
REQUIRED = {"event": ["event_types"]}


def test_discovery_is_as_home_assistant_documents_it() -> None:
    seen: dict[str, int] = {}
    unique = set()
    for message in discovery(settings(1, DOG, FREE)):
        prefix, component, node, key, end = message.topic.split("/")
        assert (prefix, end, message.retain) == ("homeassistant", "config", True)
        assert node.replace("_", "").isalnum() and key.replace("-", "").isalnum()
        config = json.loads(message.payload)
        schema = {
            "type": "object",
            "additionalProperties": False,
            "required": ["state_topic", "unique_id", "device", *REQUIRED.get(component, [])],
            "properties": COMMON | OWN[component],
        }
        jsonschema.validate(config, schema)
        # Home Assistant refuses an enum with a state class, and options without an enum.
        assert ("options" in config) == (config.get("device_class") == "enum")
        assert not ("options" in config and "state_class" in config)
        unique.add(config["unique_id"])
        seen[component] = seen.get(component, 0) + 1
    assert seen == {"binary_sensor": 1, "sensor": 4, "event": 2}
    assert len(unique) == 7


def test_home_assistant_s_own_schemas_take_it() -> None:
    """Where Home Assistant is installed: its own validators of discovery messages."""
    mqtt = "homeassistant.components.mqtt"
    pytest.importorskip(mqtt, reason="Home Assistant is not installed")
    binary_sensor, event, sensor = (
        importlib.import_module(f"{mqtt}.{name}") for name in ("binary_sensor", "event", "sensor")
    )

    schemas = {
        "sensor": sensor.DISCOVERY_SCHEMA,
        "binary_sensor": binary_sensor.DISCOVERY_SCHEMA,
        "event": event.DISCOVERY_SCHEMA,
    }
    for message in discovery(settings(1, DOG, FREE)):
        schemas[message.topic.split("/")[1]](json.loads(message.payload))


def test_what_is_published_is_what_the_entities_expect() -> None:
    """Each state topic of discovery is one that records are published to, in the form announced."""
    found = Broker(settings(1, DOG, FREE), print)
    records = [sound(1), sound(2, "far " * 100, FREE)]
    published = {m.topic: m for record in records for m in found._messages(record)}
    for message in discovery(settings(1, DOG, FREE)):
        config = json.loads(message.payload)
        component = message.topic.split("/")[1]
        if component == "event":
            payload = json.loads(published[config["state_topic"]].payload)
            assert payload["event_type"] in config["event_types"]
            assert not published[config["state_topic"]].retain  # else it would happen again
        elif "json_attributes_topic" in config:
            payload = json.loads(published[config["state_topic"]].payload)
            assert len(payload["text"]) <= 255  # Home Assistant's longest state
            assert payload["text"] in config.get("options", [payload["text"]])
            assert published[config["state_topic"]].retain


# --- what cannot work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"user": "a", "password_file": "/nowhere"}, "password_file: /nowhere cannot be read"),
        ({"tls": True, "ca_file": "/nowhere"}, "certificates: .*check ca_file"),
    ],
)
def test_what_cannot_be_read_is_said(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Broker(settings(1, **keys), print)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"tinygiant\[listen\]"):
        Broker(settings(), print)


def test_a_host_that_does_not_exist_is_said(make: Make) -> None:
    lines: list[str] = []
    wanted = settings_of({"mqtt": {"host": "no-such-host.invalid", "topic": "x"}}, "listen.toml")
    make(wanted, lines)
    wait_for(lambda: lines)
    assert "no-such-host.invalid cannot be reached" in lines[0]
