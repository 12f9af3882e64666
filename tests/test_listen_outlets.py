"""Outlets: a slow or broken one loses nothing silently; clips and files keep to their bounds."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from tests.listen_stub import a_sound, an_answer, wait_for
from tinygiant.runtime.errors import MissingDependencyError, StorageError, UsageError
from tinygiant.runtime.listen import keeping, metrics, outlets
from tinygiant.runtime.listen.keeping import ClipFolder
from tinygiant.runtime.listen.metrics import MetricsServer
from tinygiant.runtime.listen.outlets import EventsFile, Outlet, StandardOutput, Webhook
from tinygiant.runtime.listen.questions import Reply
from tinygiant.runtime.listen.service import is_news
from tinygiant.runtime.listen.settings import (
    EventsSettings,
    KeepSettings,
    MetricsSettings,
    QuestionSettings,
    WebhookSettings,
)
from tinygiant.runtime.listen.telling import Record, sound_record, text_line


def record(number: int = 1, text: str = "yes", *, notify: bool = True) -> Record:
    question = QuestionSettings(name="dog", choices=("yes", "no"))
    answer = an_answer(text, question.choices, None)
    return sound_record(
        a_sound(number), [Reply(question, "answered", answer=answer, notify=notify)]
    )


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlets, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(outlets, "_LONGEST_RETRY_S", 0.02)


# --- a webhook ---------------------------------------------------------------------------------


class Receiver(ThreadingHTTPServer):
    """Takes posts; ``answers`` are its next statuses, then 200."""

    def __init__(self) -> None:
        self.posts: list[tuple[dict[str, str], Any]] = []
        self.answers: list[int] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.server.answers.pop(0) if self.server.answers else 200
        if status == 200:
            self.server.posts.append((dict(self.headers), json.loads(body)))
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    found = Receiver()
    yield found
    found.shutdown()
    found.server_close()


def webhook(url: str, lines: list[str], **keys: Any) -> Outlet:
    carrier = Webhook(WebhookSettings(url=url, **keys))
    outlet = Outlet("webhook", carrier, buffer=100, tell=lines.append)
    outlet.begin()
    return outlet


def test_a_webhook_gets_each_record_once_though_the_other_side_fails(
    receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    receiver.answers = [500, 503, 429]
    lines: list[str] = []
    outlet = webhook(receiver.url, lines, token_file=str(tmp_path / "token"))
    for number in (1, 2, 3):
        outlet.put(record(number))
    assert outlet.close(10.0) == 0
    assert [body["number"] for _, body in receiver.posts] == [1, 2, 3]
    headers, _ = receiver.posts[0]
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert lines == [
        "webhook: answered 500 Internal Server Error; kept and tried again",
        "webhook: works again, 2 records waiting",
    ]


def test_what_is_refused_for_good_is_dropped_and_said(receiver: Receiver) -> None:
    receiver.answers = [404]
    lines: list[str] = []
    outlet = webhook(receiver.url, lines)
    outlet.put(record(1))
    outlet.put(record(2))
    assert outlet.close(10.0) == 0
    assert [body["number"] for _, body in receiver.posts] == [2]
    assert outlet.n_dropped == 1
    assert lines == ["webhook: was refused with 404 Not Found; the record was dropped"]


def test_a_webhook_that_is_not_there_is_tried_again() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines: list[str] = []
    outlet = webhook(f"http://127.0.0.1:{port}/", lines)
    outlet.put(record())
    wait_for(lambda: lines)
    assert "webhook: not reached" in lines[0] and "Connection refused" in lines[0]
    assert outlet.close(0.1) == 1 and outlet.n_dropped == 1


def test_a_token_that_cannot_be_read_is_said() -> None:
    with pytest.raises(UsageError, match="token_file: /nowhere cannot be read"):
        Webhook(WebhookSettings(url="http://a/", token_file="/nowhere"))


def test_only_news_is_told_where_that_is_asked_for() -> None:
    assert is_news(record(), only_notify=True)
    assert not is_news(record(notify=False), only_notify=True)
    assert is_news(record(notify=False), only_notify=False)
    assert not is_news({"event": "status"}, only_notify=False)


# --- a slow outlet -----------------------------------------------------------------------------


class Slow:
    def __init__(self) -> None:
        self.gate = threading.Event()
        self.carried: list[int] = []

    def begin(self) -> None:
        pass

    def carry(self, record: Record, stopping: threading.Event) -> None:
        self.gate.wait(20)
        self.carried.append(record["number"])

    def close(self) -> None:
        pass


def test_a_slow_outlet_holds_up_nobody_and_its_losses_are_counted() -> None:
    carrier = Slow()
    outlet = Outlet("slow", carrier, buffer=3, tell=print)
    outlet.begin()
    outlet.put(record(1))
    wait_for(lambda: len(outlet) == 1 and not outlet._records)  # in hand
    for number in range(2, 11):
        outlet.put(record(number))
    assert carrier.carried == []  # nobody waited for it
    carrier.gate.set()
    assert outlet.close(10.0) == 0
    assert carrier.carried == [1, 8, 9, 10]
    assert outlet.n_dropped == 6


def test_a_patient_outlet_waits_and_loses_nothing() -> None:
    carrier = Slow()
    outlet = Outlet("slow", carrier, buffer=2, tell=print, patient=True)
    outlet.begin()
    threading.Timer(0.2, carrier.gate.set).start()
    for number in range(1, 11):
        outlet.put(record(number))
    assert outlet.close(10.0) == 0
    assert carrier.carried == list(range(1, 11))


# --- files -------------------------------------------------------------------------------------


def write(carrier: EventsFile | StandardOutput, *numbers: int) -> None:
    for number in numbers:
        carrier.carry(record(number), threading.Event())


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


def test_the_events_file_turns_over_at_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    carrier = EventsFile(EventsSettings(file=str(path), max_mb=0.01))
    write(carrier, *range(1, 31))
    old, new = numbers(tmp_path / "events.jsonl.1"), numbers(path)
    assert old[-1] + 1 == new[0] and new[-1] == 30
    assert path.stat().st_size < 12_000 and len(list(tmp_path.iterdir())) == 2


def test_a_torn_line_of_a_crash_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"schema": "tinygi')
    write(EventsFile(EventsSettings(file=str(path))), 1)
    first, second = path.read_text().splitlines()
    assert first == '{"schema": "tinygi' and json.loads(second)["number"] == 1


def test_logrotate_may_move_the_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    carrier = EventsFile(EventsSettings(file=str(path)))
    write(carrier, 1)
    path.rename(tmp_path / "moved")
    write(carrier, 2)
    assert (numbers(tmp_path / "moved"), numbers(path)) == ([1], [2])


def test_an_events_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"Is a directory.*\[events\] file"):
        EventsFile(EventsSettings(file=str(tmp_path)))


def test_what_people_read_is_one_line_whatever_the_model_writes() -> None:
    line = text_line(record(text="yes") | {"time": "2026-11-30T07:05:00.123+01:00"})
    assert line == "2026-11-30 07:05:00 hall, 0.5 s: dog: yes"
    nasty = record()
    nasty["answers"][0] |= {"text": "a\ndog\x1b[2J", "probability": 0.734, "status": "unsure"}
    assert text_line(nasty).endswith(r"dog: a dog\x1b[2J (73 %), not sure")  # type: ignore[union-attr]


# --- clips -------------------------------------------------------------------------------------


def test_a_clip_is_the_sound_to_the_bit(tmp_path: Path) -> None:
    folder = ClipFolder(KeepSettings(folder=str(tmp_path / "new" / "clips")))
    name = folder.keep(a_sound(7, when=1_700_000_000.5))
    assert name == "20231114T221320500Z-hall-7.flac"
    samples, rate_hz = soundfile.read(tmp_path / "new" / "clips" / name, dtype="int16")
    assert rate_hz == 16_000 and np.array_equal(samples, a_sound().samples)


def test_the_folder_keeps_to_its_size_and_touches_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "mine.flac").write_bytes(bytes(200_000))
    (tmp_path / ".20231114T221320500Z-hall-7.flac.part").write_bytes(
        b"of a process that was killed"
    )
    folder = ClipFolder(KeepSettings(folder=str(tmp_path), max_mb=0.1))
    names = [folder.keep(a_sound(n, when=1_700_000_000.0 + n)) for n in range(30)]
    kept = sorted(path.name for path in tmp_path.iterdir() if path.name != "mine.flac")
    assert kept == names[-len(kept) :] and 3 < len(kept) < 30
    assert sum((tmp_path / name).stat().st_size for name in kept) <= 100_000
    assert (tmp_path / "mine.flac").exists()


def test_old_clips_are_removed_and_those_of_a_clock_that_was_wrong(tmp_path: Path) -> None:
    folder = ClipFolder(KeepSettings(folder=str(tmp_path), max_days=1.0))
    names = [folder.keep(a_sound(n, when=1_700_000_000.0 + n)) for n in range(3)]
    now = time.time()
    for name, age_s in zip(names, (2 * 86_400, -2 * 86_400, 3_600), strict=True):
        os.utime(tmp_path / name, (now - age_s, now - age_s))
    last = folder.keep(a_sound(9, when=1_700_000_009.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [names[2], last]


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ClipFolder(KeepSettings(folder=str(tmp_path)))

    def full(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keeping.soundfile, "write", full)
    with pytest.raises(StorageError, match="No space left on device"):
        folder.keep(a_sound())
    assert list(tmp_path.iterdir()) == []


# --- metrics -----------------------------------------------------------------------------------


def test_metrics_tell_the_counts() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = {
        ("sounds", "hall"): 3.0,
        ("answers", "dog answered"): 2.0,
        ("unanswered", "queue_full"): 1.0,
        ("source_up", "hall"): 1.0,
        ("waiting", ""): 0.0,
    }
    server = MetricsServer(MetricsSettings(port=port), lambda: found)
    server.begin()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
            lines = reply.read().decode().splitlines()
        for line in (
            'tinygiant_listen_sounds_total{source="hall"} 3.0',
            'tinygiant_listen_answers_total{question="dog",status="answered"} 2.0',
            'tinygiant_listen_unanswered_total{reason="queue_full"} 1.0',
            'tinygiant_listen_source_up{source="hall"} 1.0',
            "tinygiant_listen_waiting 0.0",
        ):
            assert line in lines
        assert any(line.startswith("process_resident_memory_bytes") for line in lines)
        with pytest.raises(UsageError, match=f"port {port} cannot be served"):
            MetricsServer(MetricsSettings(port=port), lambda: found).begin()
    finally:
        server.close()


def test_metrics_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"tinygiant\[listen\]"):
        MetricsServer(MetricsSettings(port=1), dict)
