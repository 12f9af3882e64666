"""``tg-listen`` at a microphone that is none (``benchmarks.virtual_microphone``), but real for
PortAudio. Skipped where the parts of that are not installed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import soundfile

from benchmarks.virtual_microphone import DEVICE, Daemon, missing
from tests.listen_stub import RATE_HZ, add, pcm, room, wait_for

needed = missing()
pytestmark = pytest.mark.skipif(bool(needed), reason=f"not installed: {', '.join(needed)}")


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    found = Daemon(tmp_path)
    yield found
    found.end()


class Listening:
    """``tg-listen`` at that microphone."""

    def __init__(self, daemon: Daemon) -> None:
        words = ("--device", DEVICE, "--jsonl", "--voice", "off", "--threads", "1", "--no-think")
        self._popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "tinygiant.runtime.listen.cli", *words),
                *("What is heard?", "--choices", "a bell", "a dog"),
            ],
            env=daemon.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.records: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=read)
            for read in (
                (self._popen.stdout, lambda line: self.records.append(json.loads(line))),
                (self._popen.stderr, self.lines.append),
            )
        ]
        for reader in self._readers:
            reader.start()
        wait_for(lambda: self.told("started"), 60)

    def _read(self, file: IO[str], take: Callable[[str], object]) -> None:
        for line in file:
            take(line)

    def told(self, what: str) -> list[dict[str, Any]]:
        return [record for record in list(self.records) if record.get("what") == what]

    @property
    def sounds(self) -> list[dict[str, Any]]:
        return [record for record in list(self.records) if record["event"] == "sound"]

    def end(self) -> int:
        self._popen.send_signal(signal.SIGTERM)
        code = self._popen.wait(60)
        for reader in self._readers:
            reader.join()
        return code


@pytest.fixture
def bursts(tmp_path: Path) -> Path:
    """Half a second of noise at -20 dB after 1, 3 and 5.5 s, in a room that is hardly heard."""
    samples = room(7.0, -80.0)
    for at_s in (1.0, 3.0, 5.5):
        add(samples, at_s, 0.5)
    soundfile.write(tmp_path / "bursts.wav", pcm(samples), RATE_HZ)
    return tmp_path / "bursts.wav"


def test_what_is_played_is_heard_where_and_as_loud_as_it_was(daemon: Daemon, bursts: Path) -> None:
    listening = Listening(daemon)
    daemon.play(bursts)
    wait_for(lambda: len(listening.sounds) == 3, 60)
    assert listening.end() == 0
    starts = [sound["start_s"] for sound in listening.sounds]
    assert [start - starts[0] for start in starts] == pytest.approx([0.0, 2.0, 4.5], abs=0.07)
    assert all(sound["end_s"] - sound["start_s"] < 1.0 for sound in listening.sounds)
    assert [sound["peak_db"] for sound in listening.sounds] == pytest.approx([-20.0] * 3, abs=1.5)
    assert [sound["answers"][0]["status"] for sound in listening.sounds] == ["answered"] * 3
    assert all(line.startswith("tg-listen: ") for line in listening.lines)


def test_the_list_of_microphones_has_it(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tinygiant.runtime.cli.main", "--list-devices"],
        env=daemon.env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert DEVICE in done.stdout and done.stderr == ""


@pytest.mark.parametrize("what", ["the device", "the sound system"])
def test_what_goes_away_comes_back_and_is_told_once_each_way(
    daemon: Daemon, bursts: Path, what: str
) -> None:
    """First found here: PortAudio opens what has just come back some time before it sounds, and the
    first sign, of silence, cleared the loss, so that nobody was told of the return.
    """
    listening = Listening(daemon)
    if what == "the device":
        daemon.control("unload-module", "module-null-sink")
    else:
        daemon.end()
    wait_for(lambda: listening.told("source_lost"), 60)
    if what == "the device":
        daemon.control("load-module", *daemon.sink.split())
    else:
        daemon.start()
    wait_for(lambda: listening.told("source_back"), 60)
    daemon.play(bursts)
    wait_for(lambda: len(listening.sounds) == 3, 60)
    assert listening.end() == 0
    assert len(listening.told("source_lost")) == len(listening.told("source_back")) == 1
    [lost] = listening.told("source_lost")
    assert "--device chooses; tried again until it is back" in lost["message"]
    # ALSA and PortAudio write lines of their own at each try.
    assert all(line.startswith("tg-listen: ") for line in listening.lines)


def test_a_microphone_that_is_not_there_is_one_line_and_a_code(daemon: Daemon) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tinygiant.runtime.listen.cli", "--device", "nothing"],
        env=daemon.env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "No input device matching 'nothing'" in done.stderr and "--device chooses" in done.stderr
