"""A sensor as a whole: nothing is lost silently, what goes away comes back, signals are obeyed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile

from tests.listen_stub import RATE_HZ, FakeModel, FakeSource, a_sound, add, pcm, room, wait_for
from tinygiant.runtime.errors import AudioError, UsageError
from tinygiant.runtime.listen import listener, outlets, service
from tinygiant.runtime.listen.service import Service
from tinygiant.runtime.listen.settings import QueueSettings, Settings, settings_of
from tinygiant.runtime.listen.waiting import WaitingQueue

ROOT = Path(__file__).resolve().parents[1]


def bursts(*at_s: float, seconds: float) -> Any:
    samples = room(seconds)
    for at in at_s:
        add(samples, at, 0.5)
    return pcm(samples)


class Run:
    """A service in this process, with sources of the test, which writes its events to a file."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = folder / "events.jsonl"
        self.tables: dict[str, Any] = {
            "events": {"file": str(self.file)},
            "gate": {"voice": "off"},
            "source": {},
        }
        self.sources: dict[str, FakeSource] = {}
        self.service: Service | None = None
        monkeypatch.setattr(service, "make_source", lambda name, _: self.sources[name])

    def source(self, name: str, *acts: Any, **options: Any) -> None:
        self.sources[name] = FakeSource(*acts, **options)
        self.tables["source"][name] = {"kind": "microphone"}

    def settings(self) -> Settings:
        return settings_of(self.tables, "listen.toml")

    def go(self, model: FakeModel) -> int:
        self.service = Service(self.settings(), read_again=self.settings, quiet=True)
        return self.service.run(model)

    def listener_of(self, name: str) -> listener.Listener:
        assert self.service is not None
        return self.service._listeners[name]

    def records(self, event: str | None = None) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.file.read_text().splitlines()]
        for record in found:
            check(record)
        return [record for record in found if event in (None, record["event"])]


def check(record: dict[str, Any]) -> None:
    """Against the published schema; what is not in it is not published."""
    package = resources.files("tinygiant.runtime") / "schema"
    schema = json.loads((package / "listen.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(record, schema, jsonschema.Draft202012Validator)
    known = schema["$defs"][record["event"]]["properties"]
    assert set(record) == set(known)
    answers = json.loads((package / "answer.schema.json").read_text("utf-8"))
    for answer in record.get("answers", ()):
        assert set(answer) == set(schema["$defs"]["answer"]["properties"])
        if answer["answer"] is not None:
            jsonschema.validate(answer["answer"], answers, jsonschema.Draft202012Validator)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The service takes signals; the tests' own handlers come back."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def later(act: Callable[[], object]) -> None:
    threading.Thread(target=act, daemon=True).start()


def test_every_sound_of_every_source_has_its_record(run: Run) -> None:
    run.source("hall", bursts(2.0, 6.0, seconds=9.0), can_wait=True)
    run.source("garden", bursts(3.0, seconds=9.0), can_wait=True)
    assert run.go(FakeModel({"What is heard?": "a dog"})) == 0
    sounds = sorted(run.records("sound"), key=lambda r: (r["source"], r["start_s"]))
    assert [(r["source"], r["number"]) for r in sounds] == [
        ("garden", 1),
        ("hall", 1),
        ("hall", 2),
    ]
    assert [r["start_s"] for r in sounds] == pytest.approx([3.0, 2.0, 6.0], abs=0.04)
    assert all(r["answers"][0]["text"] == "a dog" and r["unanswered"] is None for r in sounds)
    assert len({r["id"] for r in sounds}) == 3
    counts = run.records("report")[-1]["counts"]
    assert counts["sounds"] == {"garden": 1, "hall": 2}
    assert counts["heard_seconds"] == {"garden": 9.0, "hall": 9.0}
    assert counts["answers"] == {"what answered": 3}


@pytest.mark.parametrize(
    ("when_full", "answered"), [("oldest", {1, 9, 10}), ("newest", {1, 2, 3}), ("wait", None)]
)
def test_what_the_queue_has_no_room_for_is_told(
    run: Run, when_full: str, answered: set[int] | None
) -> None:
    """Ten sounds while the model thinks about the first, and two places to wait."""
    gate, started = threading.Event(), threading.Event()

    def think() -> None:
        started.set()
        gate.wait(60)

    samples = bursts(*np.arange(2.0, 22.0, 2.0), seconds=24.0)
    first, rest = samples[: 4 * RATE_HZ - RATE_HZ // 4], samples[4 * RATE_HZ - RATE_HZ // 4 :]
    run.source("hall", first, lambda: started.wait(60), rest, gate.set)
    if when_full == "wait":
        gate.set()
    run.tables["queue"] = {"size": 2, "when_full": when_full}
    assert run.go(FakeModel(before=think)) == 0
    sounds = run.records("sound")
    assert sorted(r["number"] for r in sounds) == list(range(1, 11))
    found = {r["number"] for r in sounds if r["unanswered"] is None}
    assert found == (answered or set(range(1, 11)))
    reasons = {r["unanswered"] for r in sounds if r["number"] not in found}
    assert reasons == ({"queue_full"} if answered else set())
    counts = run.records("report")[-1]["counts"]
    assert counts.get("unanswered", {}) == ({"queue_full": 7} if answered else {})


def test_a_file_waits_whatever_the_policy() -> None:
    given_up: list[Any] = []
    queue = WaitingQueue(QueueSettings(size=1), lambda *what: given_up.append(what))
    queue.put(a_sound(1), can_wait=True, sign=lambda: None)
    signs: list[None] = []
    later(lambda: queue.put(a_sound(2), can_wait=True, sign=lambda: signs.append(None)))
    wait_for(lambda: signs)
    assert queue.get(1.0).sound.number == 1  # type: ignore[union-attr]
    assert queue.get(5.0).sound.number == 2  # type: ignore[union-attr]
    assert given_up == []


def test_a_microphone_that_comes_back_is_heard_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_FIRST_RETRY_S", 0.01)
    lost = AudioError("USB mic: gone")
    started = lambda: wait_for(lambda: "started" in run.file.read_text())  # noqa: E731
    run.source("hall", bursts(2.0, seconds=4.5), started, lost, lost, bursts(1.0, seconds=3.0))
    assert run.go(FakeModel()) == 0
    first, second = run.records("sound")
    assert first["start_s"] == pytest.approx(2.0, abs=0.04)
    assert second["start_s"] == pytest.approx(4.5 + 1.0, abs=0.04)  # of what was heard
    assert second["number"] == 2
    assert [r["what"] for r in run.records("status")] == [
        "started",
        "source_lost",
        "source_back",
        "source_ended",
        "stopped",
    ]
    assert run.records("report")[-1]["counts"]["away_seconds"]["hall"] > 0.0


def test_a_microphone_that_opens_before_it_sounds_is_told_as_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign of life without sound cleared the loss: the return was never told."""
    monkeypatch.setattr(listener, "_FIRST_RETRY_S", 0.01)
    started = lambda: wait_for(lambda: "started" in run.file.read_text())  # noqa: E731
    mute = AudioError("delivers nothing")
    run.source("hall", pcm(room(1.0)), started, mute, None, mute, None, None, pcm(room(1.0)))
    assert run.go(FakeModel()) == 0
    told = [r["what"] for r in run.records("status")]
    assert told == ["started", "source_lost", "source_back", "source_ended", "stopped"]


def test_what_sounds_when_the_microphone_goes_is_answered(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_FIRST_RETRY_S", 0.01)
    run.source("hall", bursts(2.0, seconds=2.5), AudioError("gone"), pcm(room(1.0)))
    assert run.go(FakeModel()) == 0
    [sound] = run.records("sound")
    assert sound["start_s"] == pytest.approx(2.0, abs=0.04) and sound["answers"]


def test_one_source_that_cannot_be_opened_does_not_end_the_others(run: Run) -> None:
    run.source("attic", UsageError("attic: rate not known"))
    run.source("hall", bursts(2.0, seconds=5.0))
    assert run.go(FakeModel()) == UsageError.exit_code  # and is not forgotten at the end
    assert len(run.records("sound")) == 1
    assert ("source_lost", "attic") in [(r["what"], r["source"]) for r in run.records("status")]


def test_an_interrupt_that_ends_the_writer_too_is_an_interrupt(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends both ends of a pipe: that nothing had come yet was told as the failure."""

    def both_end() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: run.service is not None and run.service._signals)

    run.source("hall", both_end, AudioError("ended after 0 bytes"))
    monkeypatch.setattr(run.sources["hall"], "may_return", False)
    assert run.go(FakeModel()) == 130


def test_no_source_at_all_is_an_error(run: Run) -> None:
    run.source("hall", AudioError("no microphone"))
    with pytest.raises(AudioError, match="no microphone"):
        run.go(FakeModel())


def test_the_model_s_failure_is_told_and_listening_goes_on(run: Run) -> None:
    calls = iter([True, False])

    def fail() -> None:
        if next(calls):
            raise MemoryError("no room")

    run.source("hall", bursts(2.0, 6.0, seconds=9.0), can_wait=True)
    assert run.go(FakeModel(before=fail)) == 0
    first, second = run.records("sound")
    assert first["answers"][0]["status"] == "failed"
    assert first["answers"][0]["error"]["message"] == "no room"
    assert second["answers"][0]["status"] == "answered"


def test_clips_are_kept_only_if_asked_and_hold_the_sound(run: Run, tmp_path: Path) -> None:
    samples = bursts(2.0, seconds=5.0)
    run.tables["keep"] = {"folder": str(tmp_path / "clips")}
    run.source("hall", samples)
    run.go(FakeModel())
    [sound] = run.records("sound")
    kept, rate_hz = soundfile.read(tmp_path / "clips" / sound["clip"], dtype="int16")
    start = round((sound["start_s"] - 0.5) * RATE_HZ)
    assert rate_hz == RATE_HZ
    assert np.array_equal(kept, samples[start : start + kept.size])


def test_nothing_is_written_unless_asked(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    del run.tables["events"]
    run.source("hall", bursts(2.0, seconds=5.0))
    assert run.go(FakeModel()) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_lines_and_they_are_written_when_there_is_room(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes half a line, then nothing for a while: no line is lost, torn or doubled."""
    monkeypatch.setattr(outlets, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(outlets, "_LONGEST_RETRY_S", 0.01)
    write, n_calls = os.write, 0

    def full(descriptor: int, data: bytes) -> int:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 3:
            return write(descriptor, data[:20])
        if 3 < n_calls < 30:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(outlets.os, "write", full)
    run.source("hall", bursts(2.0, 6.0, seconds=9.0), can_wait=True)
    assert run.go(FakeModel()) == 0
    assert [r["number"] for r in run.records("sound")] == [1, 2]
    assert n_calls >= 30


def test_a_reload_changes_questions_and_sources_and_a_wrong_one_nothing(run: Run) -> None:
    steps = threading.Event(), threading.Event()
    run.source("hall", bursts(2.0, seconds=4.5), lambda: steps[0].wait(60),
               bursts(2.0, seconds=4.5), lambda: steps[1].wait(60),
               bursts(2.0, seconds=4.5))  # fmt: skip
    run.tables["question"] = [{"ask": "One?"}]
    model = FakeModel()

    def operate() -> None:
        wait_for(lambda: model.asked == ["One?"])
        run.tables["question"] = [{"ask": "Two?"}]
        run.sources["garden"] = FakeSource(pcm(room(1.0)))
        run.tables["source"]["garden"] = {"kind": "microphone"}
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: "reloaded" in run.file.read_text())
        steps[0].set()
        wait_for(lambda: model.asked == ["One?", "Two?"])
        run.tables["question"] = [{"aks": "Three?"}]
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(lambda: "reload_failed" in run.file.read_text())
        steps[1].set()

    later(operate)
    assert run.go(model) == 0
    assert model.asked == ["One?", "Two?", "Two?"]
    status = {r["what"]: r["message"] for r in run.records("status")}
    assert "aks is unknown" in status["reload_failed"]
    assert [r["number"] for r in run.records("sound")] == [1, 2, 3]
    assert "garden" in run.records("report")[-1]["counts"]["heard_seconds"]


def test_a_source_taken_away_while_it_sounds_hands_its_sound_on(run: Run) -> None:
    sounding, done = threading.Event(), threading.Event()
    run.source("hall", bursts(2.0, seconds=2.5), sounding.set, lambda: done.wait(60),
               pcm(room(0.1)))  # fmt: skip
    run.source("garden", lambda: done.wait(60), pcm(room(0.1)))

    def operate() -> None:
        wait_for(lambda: run.service is not None and run.service.counts is not None
                 and run.file.exists() and "started" in run.file.read_text())  # fmt: skip
        assert sounding.wait(60)
        del run.tables["source"]["hall"]
        hall = run.listener_of("hall")
        os.kill(os.getpid(), signal.SIGHUP)
        wait_for(hall._stop.is_set)
        done.set()

    later(operate)
    assert run.go(FakeModel()) == 0
    [sound] = run.records("sound")
    assert sound["source"] == "hall" and sound["answers"][0]["status"] == "answered"
    assert run.records("report")[-1]["counts"]["heard_seconds"]["hall"] == pytest.approx(2.5, 0.1)


def test_a_signal_ends_it_in_order_and_what_waits_is_told(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, started, third_is_on = threading.Event(), threading.Event(), threading.Event()

    def think() -> None:
        started.set()
        gate.wait(60)

    def end() -> None:
        assert started.wait(60) and third_is_on.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: run.listener_of("hall")._stop.is_set())
        gate.set()

    run.source("hall", bursts(2.0, 6.0, seconds=9.0), bursts(1.0, seconds=1.5), third_is_on.set,
               lambda: wait_for(lambda: run.listener_of("hall")._stop.is_set()),
               pcm(room(0.1)))  # fmt: skip
    later(end)
    assert run.go(FakeModel(before=think)) == 0
    sounds = {r["number"]: r["unanswered"] for r in run.records("sound")}
    assert sounds == {1: None, 2: "stopped", 3: "stopped"}  # the third was still on


# --- the service manager -----------------------------------------------------------------------


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(0.05)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


def received(manager: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(manager.recv(4_096).decode())
        except TimeoutError:
            return found


def test_the_manager_hears_of_ready_life_and_end(run: Run, manager: socket.socket) -> None:
    told: list[str] = []

    def until_alive() -> None:
        wait_for(lambda: told.extend(received(manager)) or "WATCHDOG=1" in "".join(told))

    run.source("hall", pcm(room(1.0)), until_alive, pcm(room(0.1)))
    run.go(FakeModel())
    told += received(manager)
    assert told[0].startswith("READY=1\nSTATUS=0 sounds")
    assert any(message.startswith("WATCHDOG=1\n") for message in told)
    assert told[-1] == "STOPPING=1" or "STOPPING=1" in told


@pytest.mark.parametrize("what", ["source", "model"])
def test_a_hang_silences_the_watchdog(
    run: Run, manager: socket.socket, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Native code that never returns, in the device or in the model: systemd has to restart us."""
    monkeypatch.setattr(service, "_TICK_S", 0.02)
    hang, looks, seen = threading.Event(), list[bool](), list[list[str]]()
    is_alive = Service._is_alive

    def looked(self: Service) -> bool:
        looks.append(is_alive(self))
        return looks[-1]

    monkeypatch.setattr(Service, "_is_alive", looked)

    def stuck() -> None:
        """Hang, for longer than anything may take as soon as it begins."""
        assert run.service is not None
        if what == "source":
            run.listener_of("hall")._beat -= listener._STUCK_S + 1
        else:
            run.service._busy_since = time.monotonic() - service._STUCK_S - 1
        hang.wait(60)

    def look() -> None:
        wait_for(lambda: looks and not looks[-1])
        received(manager)
        n_looks = len(looks)
        wait_for(lambda: len(looks) >= n_looks + 10)
        seen.append(received(manager))
        hang.set()

    def beats() -> Iterator[Any]:
        while not hang.is_set():
            yield pcm(room(0.1))
            yield lambda: time.sleep(0.05)

    acts = (pcm(room(1.0)), stuck) if what == "source" else (bursts(2.0, seconds=5.0),)
    run.source("hall", *acts, pcm(room(0.1)))
    run.source("garden")
    run.sources["garden"].acts = beats()  # else nothing would be left to listen to
    later(look)
    run.go(FakeModel(before=stuck if what == "model" else lambda: None))
    [during] = seen
    assert not [message for message in during if "WATCHDOG" in message]


def test_a_source_that_hangs_is_told_and_ends_what_has_no_other(run: Run) -> None:
    """PulseAudio's library, when its daemon is killed, waits in itself for ever: without a service
    manager nobody was told that nothing is heard any more.
    """
    hang = threading.Event()

    def stuck() -> None:
        run.listener_of("hall")._beat -= listener._STUCK_S + 1
        hang.wait(60)

    run.source("hall", bursts(2.0, seconds=5.0), stuck)
    assert run.go(FakeModel()) == AudioError.exit_code
    assert run.service is not None and run.service.is_abandoned
    hang.set()
    assert len(run.records("sound")) == 1
    [lost] = [r for r in run.records("status") if r["what"] == "source_lost"]
    assert "gives no sign of life for 30 s" in lost["message"]
    counts = run.records("report")[-1]["counts"]
    assert counts["source_up"] == {"hall": 0.0}


def test_a_process_that_was_stopped_takes_no_source_for_hanging(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP, a debugger: the main thread wakes first and sees that nobody moved."""
    sleep, clock, waits, went_on = time.sleep, time.monotonic, list[float](), threading.Event()

    def stop_once(seconds: float) -> None:
        sleep(seconds)
        if threading.current_thread() is threading.main_thread():
            waits.append(seconds)
            if len(waits) == 2:  # the main thread has seen it all, and now the others wake
                went_on.set()

    monkeypatch.setattr(service.time, "sleep", stop_once)
    monkeypatch.setattr(
        service.time, "monotonic", lambda: clock() + (listener._STUCK_S + 1 if waits else 0)
    )
    run.source("hall", pcm(room(1.0)), lambda: went_on.wait(60), bursts(2.0, seconds=5.0))
    assert run.go(FakeModel()) == 0
    assert [r["what"] for r in run.records("status")] == ["started", "source_ended", "stopped"]


# --- the command -------------------------------------------------------------------------------


def command(*words: str, data: bytes, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tinygiant.runtime.listen.cli", *words],
        input=data,
        capture_output=True,
        cwd=ROOT,
        timeout=120,
        check=False,
        **options,
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_the_command_hears_a_tiger_in_a_pipe() -> None:
    """The whole path with the model inside: raw sound in, a line with the answer out."""
    clip, rate_hz = soundfile.read(ROOT / "examples" / "tiger-and-birds.flac")
    samples = room(12.0, rate_hz=rate_hz)
    samples[4 * rate_hz : 4 * rate_hz + clip.size] += clip
    question = "What animal is heard in the speech?"
    done = command(
        *("-", question, "--pcm-rate", str(rate_hz), "--jsonl", "-q"),
        *("--choices", "monkey", "tiger", "spider", "rabbit"),
        data=pcm(samples).tobytes(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    [sound] = [r for r in map(json.loads, done.stdout.splitlines()) if r["event"] == "sound"]
    check(sound)
    assert 4.0 <= sound["start_s"] < 5.0  # the clip begins with a faint moment
    assert sound["answers"][0]["text"] == "tiger"


@pytest.mark.parametrize(
    ("words", "data", "code", "message"),
    [
        (("-",), b"\0" * 64, 2, "rate is not known"),
        (("-",), b"", 3, "ended after 0 bytes"),
        (("-", "--bundle", "/nowhere"), b"", 4, "/nowhere"),
        (("-", "--events", "/nowhere/x.jsonl", "--pcm-rate", "8000"), b"", 8, r"[events]"),
        (("-", "--keep", "/proc/x", "--pcm-rate", "8000"), b"", 8, "no clip can be kept"),
    ],
)
def test_bad_input_is_one_line_and_a_code(
    words: tuple[str, ...], data: bytes, code: int, message: str
) -> None:
    done = command(*words, data=data)
    assert done.returncode == code
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_samples_that_are_no_numbers_are_counted_and_said() -> None:
    samples = room(3.0).astype("<f4")
    samples[100:110] = np.nan
    done = command(
        *("-", "--pcm-rate", "16000", "--pcm-format", "f32le", "--jsonl"), data=samples.tobytes()
    )
    assert done.returncode == 0
    reports = [r for r in map(json.loads, done.stdout.splitlines()) if r["event"] == "report"]
    assert reports[-1]["counts"]["bad_samples"] == {"stdin": 10}
    assert "10 samples were not numbers" in done.stderr


def test_a_reader_that_leaves_ends_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tinygiant.runtime.listen.cli", "-", "-q", "--pcm-rate", "16000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdout.close()
    process.stdin.write(bursts(2.0, seconds=5.0).tobytes())
    process.stdin.flush()
    assert process.wait(60) == service.BROKEN_PIPE
    process.stdin.close()


def test_closed_streams_do_not_matter(tmp_path: Path) -> None:
    """Some ways to start a service close them: events still go where the settings say."""
    events = tmp_path / "events.jsonl"
    words = f"- --pcm-rate 16000 --voice off --events {events}"
    line = f"{sys.executable} -m tinygiant.runtime.listen.cli {words} >&- 2>&-"
    done = subprocess.run(
        ["bash", "-c", line], input=pcm(room(1.0)).tobytes(), cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0
    assert [json.loads(text)["event"] for text in events.read_text().splitlines()] == [
        "status", "status", "report", "status",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("speed", "seconds", "at_s"), [(1, 7.0, [3.0]), (20, 60.0, [5.0, 17.0, 29.0, 41.0, 53.0])]
)
def test_a_pipe_at_the_pace_of_sound_and_at_twenty_times(
    speed: int, seconds: float, at_s: list[float]
) -> None:
    """Every sound has its record; at the pace of sound before the next one could come."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tinygiant.runtime.listen.cli", "-", "What is heard?", "-q"),
            *("--pcm-rate", "16000", "--jsonl", "--voice", "off", "--threads", "1"),
            *("--no-think", "--choices", "a bell", "a dog"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    sounds: list[dict[str, Any]] = []

    def read() -> None:
        for line in process.stdout or ():
            record = json.loads(line)
            if record["event"] == "sound":
                sounds.append(record)
            started.set()

    started = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    process.stdin.write(pcm(room(0.1)).tobytes())
    process.stdin.flush()
    assert started.wait(60)
    samples = bursts(*at_s, seconds=seconds)
    begin, size = time.monotonic(), RATE_HZ // 10
    for start in range(0, samples.size, size):
        process.stdin.write(samples[start : start + size].tobytes())
        process.stdin.flush()
        time.sleep(max(0.0, begin + (start + size) / RATE_HZ / speed - time.monotonic()))
    if speed == 1:  # told after the second of silence that ends it, not at the pipe's end
        wait_for(lambda: sounds)
    process.stdin.close()
    assert process.wait(60) == 0
    reader.join()
    found = sorted(sounds, key=lambda record: int(record["number"]))
    assert [record["start_s"] - 0.1 for record in found] == pytest.approx(at_s, abs=0.05)
    assert {record["unanswered"] for record in found} <= (
        {None} if speed == 1 else {None, "queue_full"}
    )
