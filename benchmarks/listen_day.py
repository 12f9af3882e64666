"""A day of sound for ``tg-listen``: every known event once, no false ones, memory flat.

    python -m benchmarks.listen_day --hours 24
    python -m benchmarks.listen_day --hours 1 --speed 20
    python -m benchmarks.listen_day --quiet-s 120 [--microphone]

A room is synthesised: pink noise whose level follows the hours (24 dB from night to noon), and in
it events at random moments: bells, knocks, barks, beeps, speech (a word of the example's recording)
and machines that run for half a minute, 15 to 35 dB above the room. It is piped into the command as
raw samples, as fast as they are taken (``--when-full wait``) or at ``--speed`` times real time, so
that the queue may overflow. Every event must have exactly one record whose onset is within half a
second, every record must belong to an event, none may go unanswered, and memory must not rise:
resident memory is read at equal steps of sound, and the median of the last quarter may exceed that
of the second quarter by ``--max-mib`` at most.

With ``--quiet-s`` the room alone is piped at real time, and processor time is measured: at most 3 %
of one core; with ``--microphone`` it is played to one of 44.1 kHz, through PulseAudio. The last
line of the output is the report as JSON; the exit code is 1 if it failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import soundfile
import soxr
from numpy.typing import NDArray

from benchmarks.virtual_microphone import DEVICE, Daemon

__all__ = ["main"]

RATE_HZ = 16_000
ROOM_DB = -58.0
SWING_DB = 12.0
MICROPHONE_HZ = 44_100
GAP_S, MEAN_GAP_S = 15.0, 110.0  # from the end of an event to the next one: least, mean of the rest
ONSET_S = 0.5
MOST_CPU = 0.03
QUESTION = "What is heard?"
CHOICES = ("somebody speaks", "another sound")

Samples = NDArray[np.float32]


def main() -> int:
    """Run the day; returns 0 if it passed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=24.0)
    parser.add_argument("--speed", type=float, help="times real time; as fast as possible if left")
    parser.add_argument("--quiet-s", type=float, help="measure processor time in a quiet room")
    parser.add_argument("--microphone", action="store_true", help="a quiet room through PulseAudio")
    parser.add_argument("--bundle")
    parser.add_argument("--voice", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-mib", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="write the report there as well")
    options = parser.parse_args()
    report = quiet(options) if options.quiet_s else day(options)
    text = json.dumps(report)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(not report["passed"])


def day(options: argparse.Namespace) -> dict[str, Any]:
    """Pipe the day through the command and compare what it says with what there was."""
    n_seconds = round(options.hours * 3_600)
    events = plan(n_seconds, options.seed)
    room = Room(events, options.seed)
    policy = [] if options.speed else ["--when-full", "wait"]
    with listening(*arguments(options, *policy)) as command:
        start = time.monotonic()
        step_s = max(60, n_seconds // 96)
        rss: list[float] = []
        for second, samples in enumerate(room.seconds(n_seconds)):
            command.feed(samples)
            if options.speed:
                time.sleep(max(0.0, start + (second + 1) / options.speed - time.monotonic()))
            if (second + 1) % step_s == 0:
                rss.append(command.process.memory_info().rss / 2**20)
        records = command.finish()
        wall_s, cpu_s = time.monotonic() - start, command.cpu_s
    report = compare(events, records)
    quarter = len(rss) // 4
    first, last = rss[quarter : 2 * quarter] or rss, rss[-quarter:] or rss
    growth = float(np.median(last) - np.median(first))
    report |= {
        "hours": options.hours,
        "voice": options.voice,
        "speed": round(n_seconds / wall_s, 1),
        "cpu_s": round(cpu_s, 1),
        "rss_mib": [round(value, 1) for value in rss],
        "rss_growth_mib": round(growth, 2),
        "exit_code": command.code,
    }
    wrong = ("missed", "twice", "false", "unanswered")
    report["passed"] = (
        not any(report[key] for key in wrong)
        and report["worst_onset_s"] <= ONSET_S
        and growth <= options.max_mib
        and command.code == 0
    )
    return report


def quiet(options: argparse.Namespace) -> dict[str, Any]:
    """Processor time while nothing sounds, at real time."""
    room = Room([], options.seed).seconds(round(options.quiet_s) + 5)
    with contextlib.ExitStack() as stack:
        feed: Callable[[NDArray[np.int16]], object] = lambda samples: None  # noqa: E731
        if options.microphone:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            daemon = Daemon(folder, MICROPHONE_HZ)
            stack.callback(daemon.end)
            room = list(room)
            soundfile.write(folder / "room.wav", np.concatenate(room), RATE_HZ)
            command = stack.enter_context(listening(*arguments(options), env=daemon.env))
            while not command.records:  # it tells that it has started
                time.sleep(0.1)
            player = threading.Thread(target=daemon.play, args=(folder / "room.wav",))
            player.start()
            stack.callback(player.join)
        else:
            command = stack.enter_context(listening(*arguments(options)))
            feed = command.feed
        for warm, samples in enumerate(room):
            if warm == 5:
                start, before_s = time.monotonic(), command.cpu_now_s()
            feed(samples)
            time.sleep(1.0)
        share = (command.cpu_now_s() - before_s) / (time.monotonic() - start)
        if options.microphone:
            command.process.terminate()
        records = command.finish()
    n_sounds = sum(record["event"] == "sound" for record in records)
    return {
        "quiet_s": options.quiet_s,
        "microphone_hz": MICROPHONE_HZ if options.microphone else None,
        "voice": options.voice,
        "cpu_share": round(share, 4),
        "sounds": n_sounds,
        "passed": share <= MOST_CPU and n_sounds == 0,
    }


def compare(events: list[Event], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found of what there was."""
    sounds = [record for record in records if record["event"] == "sound"]
    starts = np.array([sound["start_s"] for sound in sounds])
    found: Counter[int] = Counter()
    onset_s: list[float] = []
    twice, missed = 0, []
    for event in events:
        near = np.flatnonzero(np.abs(starts - event.at_s) <= ONSET_S)
        found.update(near.tolist())
        twice += near.size > 1
        if near.size:
            onset_s.append(float(np.abs(starts[near] - event.at_s).min()))
        else:
            missed.append({"kind": event.kind, "at_s": round(event.at_s, 2)})
    false = [sound["start_s"] for number, sound in enumerate(sounds) if not found[number]]
    answers = Counter(a["status"] for sound in sounds for a in sound["answers"])
    return {
        "events": len(events),
        "kinds": dict(Counter(event.kind for event in events)),
        "found": len(onset_s),
        "missed": missed,
        "twice": twice,
        "false": false,
        "worst_onset_s": round(max(onset_s, default=0.0), 3),
        "unanswered": dict(Counter(s["unanswered"] for s in sounds if s["unanswered"])),
        "answers": dict(answers),
    }


def arguments(options: argparse.Namespace, *more: str) -> list[str]:
    """The command's own arguments; ``more`` are added."""
    bundle = ("--bundle", str(Path(options.bundle).resolve())) if options.bundle else ()
    source = ("--device", DEVICE) if options.microphone else ("-", "--pcm-rate", str(RATE_HZ))
    return [
        *(*source, QUESTION, "--jsonl", "-q", "--no-think", "--threads", "1"),
        *("--voice", options.voice),
        *(*bundle, *more, "--choices", *CHOICES),
    ]


class listening:
    """The command, with what it writes being read, and its processor time."""

    def __init__(
        self,
        *arguments: str,
        stderr: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start it with ``arguments``; what it tells goes to ``stderr``."""
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tinygiant.runtime.listen.cli", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=env,
        )
        self.process = psutil.Process(self._popen.pid)
        self.records: list[dict[str, Any]] = []
        self.code: int | None = None
        self.cpu_s = 0.0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> listening:
        return self

    def __exit__(self, *_: object) -> None:
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()

    def feed(self, samples: NDArray[np.int16]) -> None:
        """Write samples to its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(samples.tobytes())
        self._popen.stdin.flush()

    def cpu_now_s(self) -> float:
        """Processor time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)

    def finish(self) -> list[dict[str, Any]]:
        """End its input, wait for the last answer; every record it wrote."""
        assert self._popen.stdin is not None
        self.cpu_s = self.cpu_now_s()
        self._popen.stdin.close()
        self._reader.join()
        self.code = self._popen.wait()
        return self.records

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            record = json.loads(line)
            for answer in record.get("answers", ()):
                del answer["answer"]
            self.records.append(record)


class Event:
    """Something that sounds, ``gain_db`` above the room, from ``at_s`` on."""

    def __init__(self, kind: str, at_s: float, gain_db: float, sound: Samples) -> None:
        """Its samples have a level of 0 dB."""
        self.kind = kind
        self.at_s = at_s
        self.gain_db = gain_db
        self.sound = sound

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.at_s + self.sound.size / RATE_HZ


def plan(n_seconds: int, seed: int) -> list[Event]:
    """The events of a day; their kinds take turns, so that a short day has each."""
    rng = np.random.default_rng(seed)
    sounds = make_sounds(rng)
    kinds = list(sounds)
    events: list[Event] = []
    at_s = 60.0  # the ear knows the room by then
    while True:
        at_s += GAP_S + rng.exponential(MEAN_GAP_S)
        kind = kinds[len(events) % len(kinds)]
        variants = sounds[kind]
        event = Event(
            kind, at_s, float(rng.uniform(15, 35)), variants[int(rng.integers(len(variants)))]
        )
        if event.end_s > n_seconds - 5.0:
            return events
        events.append(event)
        at_s = event.end_s


class Room:
    """Pink noise whose level follows the hours, with the events in it."""

    def __init__(self, events: list[Event], seed: int) -> None:
        """The noise repeats after 97 s."""
        rng = np.random.default_rng(seed + 1)
        spectrum = np.fft.rfft(rng.standard_normal(97 * RATE_HZ))
        spectrum /= np.sqrt(np.maximum(1, np.arange(spectrum.size) / 97 / 50))  # flat below 50 Hz
        self._noise = level(np.fft.irfft(spectrum))
        self._events = sorted(events, key=lambda event: event.at_s)

    def seconds(self, n_seconds: int) -> Iterator[NDArray[np.int16]]:
        """The sound, second by second: ``(16000,) int16``."""
        waiting = list(reversed(self._events))
        sounding: list[Event] = []
        for second in range(n_seconds):
            db = ROOM_DB - SWING_DB * np.cos(2 * np.pi * second / 86_400)
            start = second % 97 * RATE_HZ
            samples = self._noise[start : start + RATE_HZ] * np.float32(10 ** (db / 20))
            while waiting and waiting[-1].at_s < second + 1:
                sounding.append(waiting.pop())
            for event in sounding:
                gain = np.float32(10 ** ((db + event.gain_db) / 20))
                at = round(event.at_s * RATE_HZ) - second * RATE_HZ
                piece = event.sound[max(0, -at) : RATE_HZ - at]
                samples[max(0, at) : max(0, at) + piece.size] += gain * piece
            sounding = [event for event in sounding if event.end_s > second + 1]
            yield np.rint(samples.clip(-1, 1) * 32_767).astype(np.int16)


def make_sounds(rng: np.random.Generator) -> dict[str, list[Samples]]:
    """Variants of each kind of event."""
    return {
        "bell": [tone(rng, [f, f * 0.8], 0.6, decay_s=0.5) for f in (660.0, 880.0, 1_040.0)],
        "knock": [series(noise(rng, 0.12, decay_s=0.04), n, 0.2) for n in (2, 3, 4)],
        "bark": [series(noise(rng, 0.25, decay_s=0.1), n, 0.5) for n in (1, 2, 3)],
        "beep": [series(tone(rng, [f], 0.2), 3, 0.45) for f in (1_000.0, 2_000.0)],
        "speech": [speech()],
        "machine": [noise(rng, 30.0), tone(rng, [100.0, 200.0, 340.0], 30.0)],
    }


def tone(
    rng: np.random.Generator, pitches_hz: list[float], seconds: float, decay_s: float = 1e9
) -> Samples:
    """Sines together, or dying away one after another."""
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    waves = [np.sin(2 * np.pi * f * t + rng.uniform(0, 6)) for f in pitches_hz]
    if decay_s > 1e6:
        return level(np.sum(waves, axis=0))
    return level(np.concatenate([wave * np.exp(-t / decay_s) for wave in waves]))


def noise(rng: np.random.Generator, seconds: float, decay_s: float = 1e9) -> Samples:
    """White noise, dying away."""
    t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    return level(rng.standard_normal(t.size) * np.exp(-t / decay_s))


def series(sound: Samples, n: int, every_s: float) -> Samples:
    """A sound ``n`` times."""
    every = round(every_s * RATE_HZ)
    found = np.zeros((n - 1) * every + sound.size, np.float32)
    for start in range(0, n * every, every):
        found[start : start + sound.size] += sound
    return found


def speech() -> Samples:
    """The word of the example's recording, from where it is loud."""
    path = Path(__file__).resolve().parents[1] / "examples" / "tiger-and-birds.flac"
    samples, rate_hz = soundfile.read(path, dtype="float32")
    samples = soxr.resample(samples, rate_hz, RATE_HZ)
    loud = np.flatnonzero(np.abs(samples) > 0.1 * np.abs(samples).max())
    return level(samples[loud[0] : loud[0] + RATE_HZ])


def level(samples: Any) -> Samples:
    """Scaled to a level of 0 dB in its loudest 32 ms."""
    size = 512
    padded = np.pad(samples, (0, -len(samples) % size)).reshape(-1, size)
    loudest = np.sqrt(np.square(padded).mean(axis=1).max())
    return np.asarray(samples / loudest, np.float32)


if __name__ == "__main__":
    sys.exit(main())
