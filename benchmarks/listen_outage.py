"""A broker that is away for an hour: what ``tg-listen`` hears meanwhile arrives, once and in order.

    python -m benchmarks.listen_outage --minutes 60

A room with a bell every ``--every-s`` seconds is piped into the command at real time, and a
mosquitto of this program's own takes its records. After ``--before`` minutes the broker is killed
(SIGKILL, between two bells), ``--minutes`` later it is started again on the same port, and the
command goes on for ``--after`` minutes. A reader whose subscription the broker keeps counts what
arrives. Passed, if every bell has its record on the command's own output and each of those arrived
once, in order, if none was dropped or went unanswered, and if memory at the end of the outage is
within ``--max-mib`` of that at its beginning. The last line of the output is the report as JSON;
the exit code is 1 if it failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from benchmarks.listen_day import (
    CHOICES,
    ONSET_S,
    QUESTION,
    RATE_HZ,
    Event,
    Room,
    compare,
    listening,
    make_sounds,
)

__all__ = ["main"]

FIRST_S = 10.0  # the ear knows the room by then
GAIN_DB = 25.0
TOPIC = "outage"


def main() -> int:
    """Run the outage; returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="that the broker is away")
    parser.add_argument("--before", type=float, default=2.0)
    parser.add_argument("--after", type=float, default=4.0, help="at least 1.5: the longest pause")
    parser.add_argument("--every-s", type=float, default=30.0, help="from bell to bell")
    parser.add_argument("--max-mib", type=float, default=2.0)
    parser.add_argument("--out", type=Path, help="write the report there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = outage(options, Path(folder))
    text = json.dumps(report)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(not report["passed"])


def outage(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Listen through the outage; what was told and what arrived."""
    n_seconds = round(60 * (options.before + options.minutes + options.after))
    [bell, *_] = make_sounds(np.random.default_rng(1))["bell"]
    events = [
        Event("bell", float(at_s), GAIN_DB, bell)
        for at_s in np.arange(FIRST_S, n_seconds - 5.0, options.every_s)
    ]
    room = Room(events, 1)
    away_s = quiet_moment(60 * options.before, options.every_s)
    back_s = quiet_moment(60 * (options.before + options.minutes), options.every_s)
    broker = Mosquitto(folder)
    reader = Reader(broker.port)
    rss: list[float] = []
    with (
        open(folder / "told", "w+b") as told,
        listening("--config", config(folder, broker.port), "--jsonl", stderr=told) as command,
    ):
        start = time.monotonic()
        for second, samples in enumerate(room.seconds(n_seconds)):
            if second == away_s:
                broker.kill()
            elif second == back_s:
                broker.start()
            command.feed(samples)
            time.sleep(max(0.0, start + second + 1 - time.monotonic()))
            if away_s + 30 <= second < back_s and second % max(1, round(options.minutes)) == 0:
                rss.append(command.process.memory_info().rss / 2**20)
        records = command.finish()
        time.sleep(2.0)
        lines = messages(told)
    numbers = reader.close()
    broker.kill()
    sent = [record["number"] for record in records if record["event"] == "sound"]
    [*_, counts] = [record["counts"] for record in records if record["event"] == "report"]
    tenth = max(1, len(rss) // 10)
    growth = float(np.median(rss[-tenth:]) - np.median(rss[:tenth]))
    report = compare(events, records) | {
        "minutes": round((back_s - away_s) / 60, 1),
        "sent_while_away": sum(away_s < event.at_s < back_s for event in events),
        "arrived": len(numbers),
        "lost": sorted({*sent} - {*numbers}),
        "arrived_twice": [number for number, n in Counter(numbers).items() if n > 1],
        "in_order": numbers == sorted(numbers),
        "dropped": counts.get("dropped"),
        "rss_mib": [round(value, 1) for value in rss],
        "rss_growth_mib": round(growth, 2),
        "told": lines,
        "exit_code": command.code,
    }
    wrong = ("missed", "twice", "false", "unanswered", "lost", "arrived_twice", "exit_code")
    report["passed"] = (
        not any(report[key] for key in wrong)
        and report["worst_onset_s"] <= ONSET_S
        and report["in_order"]
        and not any((counts.get("dropped") or {}).values())
        and growth <= options.max_mib
    )
    return report


def quiet_moment(at_s: float, every_s: float) -> int:
    """The second in the middle between two bells that is next to ``at_s``."""
    return round(FIRST_S + (round((at_s - FIRST_S) / every_s) + 0.5) * every_s)


def config(folder: Path, port: int) -> str:
    """The settings' file."""
    path = folder / "listen.toml"
    path.write_text(
        f"""
[source.room]
kind = "stdin"
rate_hz = {RATE_HZ}

[[question]]
name = "what"
ask = "{QUESTION}"
choices = {json.dumps(CHOICES)}
think = false

[model]
threads = 1

[mqtt]
host = "127.0.0.1"
port = {port}
topic = "{TOPIC}"
""",
        encoding="utf-8",
    )
    return str(path)


def messages(told: IO[bytes]) -> list[str]:
    """The lines that were told about the broker."""
    told.seek(0)
    return [line for line in told.read().decode().splitlines() if "mqtt" in line]


class Mosquitto:
    """A broker that keeps its subscriptions, and can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        """Start it on a free port."""
        found = shutil.which("mosquitto", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
        if found is None:
            sys.exit("mosquitto is not installed (Debian, Ubuntu: apt install mosquitto)")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._command = [found, "-c", str(folder / "mosquitto.conf")]
        (folder / "mosquitto.conf").write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\npersistence true\n"
            f"persistence_location {folder}/\nautosave_on_changes true\nautosave_interval 1\n"
            f"user {'root' if os.geteuid() == 0 else 'mosquitto'}\n",
            encoding="utf-8",
        )
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        self._popen = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.1)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._popen.kill()
        self._popen.wait()


class Reader:
    """Counts the sounds that arrive."""

    def __init__(self, port: int) -> None:
        """Subscribe; the broker keeps the subscription while this end is away."""
        self._numbers: list[int] = []
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id="reader", clean_session=False
        )
        self._client.reconnect_delay_set(1, 1)
        self._client.on_message = lambda _, __, message: self._numbers.append(
            json.loads(message.payload)["number"]
        )
        self._client.on_connect = lambda client, *_: client.subscribe(f"{TOPIC}/sound", qos=1)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def close(self) -> list[int]:
        """Leave; the numbers of the sounds that arrived, in their order."""
        self._client.disconnect()
        self._client.loop_stop()
        return self._numbers


if __name__ == "__main__":
    sys.exit(main())
