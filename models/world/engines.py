"""Banks of real engines' sound: notes of fluidsynth, words of espeak-ng and flite, background beds.

Starting a program for every clip would cost more than everything else, so each engine runs once,
into a cache folder, and clips are cut from the memory-mapped result. ``load_banks`` builds what is
missing; the folder appears complete or not at all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from tinygiant.runtime.audio import resample
from tinygiant.runtime.errors import MissingEngineError

from .dsp import RATE_HZ, Audio, loudness
from .recordings import RECORDINGS, SPOKEN, STAMPS, Note, Recording
from .sounds import bed
from .vocabulary import (
    BACKGROUNDS,
    INSTRUMENT_PROGRAMS,
    INSTRUMENTS,
    SPLITS,
    WORDS,
    Split,
)
from .voices import SPEAKERS, VOICES, Voice

__all__ = [
    "NOTE_RANGE",
    "SOUND_FONTS",
    "Banks",
    "banks_name",
    "check_engines",
    "load_banks",
    "render_notes",
    "speak",
]

# The shifted split plays another sound font: the same instruments, recorded by other people.
SOUND_FONTS: dict[str, Path] = {
    "fluid": Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"),
    "fluid-gs": Path("/usr/share/sounds/sf2/FluidR3_GS.sf2"),
    "timgm": Path("/usr/share/sounds/sf2/TimGM6mb.sf2"),
}
_FONT_PACKAGE = {
    "fluid": "fluid-soundfont-gm",
    "fluid-gs": "fluid-soundfont-gs",
    "timgm": "timgm6mb-soundfont",
}
# The fonts whose instruments play melodies; the third has sound effects alone.
_MELODIC = ("fluid", "timgm")
# A recorded event lasts this long at most: so a clip has room for four.
_RECORDING_S = 1.2
# Notes from an octave below an instrument's lowest tonic: 12 tonics and a melody of 17 semitones.
NOTE_RANGE = 12 + 12 + 17
_VELOCITIES = (75, 112)
_NOTE_S = 1.15
_NOTE_SLOT_S = 1.8
_BED_S = 30
# A single hum has a single pitch, and who heard only that takes another hum for wind. The splits
# that are asked about have one that training has not.
_RECORDINGS: dict[Split, int] = {"train": 16, "validation": 1, "test": 1, "shifted": 1}
_VERSION = "banks-3"  # of the code that makes them


@dataclass(frozen=True)
class Banks:
    """Memory-mapped sound, int16 at 48 kHz.

    ``notes[font]``: ``(n_instruments, NOTE_RANGE, 2 velocities, n)``; ``words``: ``(n,)`` with
    ``index["voice|setting|word"] = (start, length)``; ``beds[split]``:
    ``(n_backgrounds, n_recordings, n)``; ``recordings``: ``(n,)`` with, for each of RECORDINGS,
    the ``(start, length)`` of its variants.
    """

    notes: dict[str, NDArray[np.int16]]
    words: NDArray[np.int16]
    index: dict[str, tuple[int, int]]
    beds: dict[Split, NDArray[np.int16]]
    recordings: NDArray[np.int16]
    recorded: list[list[tuple[int, int]]]

    def recording_duration_s(self, number: int) -> float:
        """Length of a recording's longest variant as it lies in the bank."""
        return max(length for _, length in self.recorded[number]) / RATE_HZ

    def recording(self, number: int, variant: int) -> Audio:
        """Number ``number`` of RECORDINGS, ``(n,) float32``; a note has variants of pitch."""
        variants = self.recorded[number]
        start, length = variants[variant % len(variants)]
        return _to_float(self.recordings[start : start + length])

    def word_duration_s(self, voice: str, setting: int, word: str) -> float:
        """Length of a spoken word as it lies in the bank."""
        return self.index[f"{voice}|{setting}|{word}"][1] / RATE_HZ

    def word(self, voice: str, setting: int, word: str) -> Audio:
        """A spoken word, ``(n,) float32``, its loudest 50 ms at RMS 0.2."""
        start, length = self.index[f"{voice}|{setting}|{word}"]
        return _to_float(self.words[start : start + length])

    def note(self, font: str, instrument: str, midi: int, accent: bool) -> Audio:
        """A note of 1.15 s, ``(n,) float32``, its loudest 50 ms at RMS 0.2."""
        pitch = midi - (INSTRUMENT_PROGRAMS[instrument][1] - 12)
        row = self.notes[font][INSTRUMENTS.index(instrument), pitch, int(accent)]
        return _to_float(row)


def check_engines() -> None:
    """Raise MissingEngineError, naming the Debian package, unless every engine is installed."""
    for program in ("espeak-ng", "flite", "fluidsynth"):
        if shutil.which(program) is None:
            raise MissingEngineError(
                f"{program} was not found, and the synthetic world is made with it: "
                f"install the Debian package {program}"
            )
    for font, path in SOUND_FONTS.items():
        if not path.is_file():
            raise MissingEngineError(
                f"the sound font {path} was not found: "
                f"install the Debian package {_FONT_PACKAGE[font]}"
            )
    if not Path(STAMPS).is_dir():
        raise MissingEngineError(
            f"the recordings in {STAMPS} were not found: "
            "install the Debian package tuxpaint-stamps-default"
        )


def banks_name() -> str:
    """Folder of banks that hold what the lists name today: they are read by position."""
    lists = repr((RECORDINGS, SPOKEN, VOICES, SPEAKERS, INSTRUMENT_PROGRAMS, WORDS, BACKGROUNDS))
    return f"{_VERSION}-{hashlib.sha256(lists.encode()).hexdigest()[:8]}"


def load_banks(cache_dir: Path, threads: int = 2) -> Banks:
    """Open the banks in ``cache_dir``, building them first if they are not there (2 minutes).

    Raises:
        MissingEngineError: the banks must be built and an engine is missing.
    """
    folder = cache_dir / banks_name()
    if not folder.is_dir():
        check_engines()
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir, prefix="building-") as scratch:
            building = Path(scratch) / folder.name
            building.mkdir()
            _build(building, Path(scratch), threads)
            building.rename(folder)
    index = json.loads((folder / "words.json").read_text())
    return Banks(
        notes={font: np.load(folder / f"notes-{font}.npy", mmap_mode="r") for font in _MELODIC},
        words=np.load(folder / "words.npy", mmap_mode="r"),
        index={key: (start, length) for key, (start, length) in index.items()},
        beds={split: np.load(folder / f"beds-{split}.npy", mmap_mode="r") for split in SPLITS},
        recordings=np.load(folder / "recordings.npy", mmap_mode="r"),
        recorded=json.loads((folder / "recordings.json").read_text()),
    )


def _build(folder: Path, scratch: Path, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for font in _MELODIC:
            rendered = pool.map(partial(_instrument_notes, font, scratch=scratch), INSTRUMENTS)
            np.save(folder / f"notes-{font}.npy", np.stack(list(rendered)))
    index: dict[str, tuple[int, int]] = {}
    chunks: list[NDArray[np.int16]] = []
    position = 0
    jobs = [
        (voice, setting, word)
        for split in SPLITS
        for voice in VOICES[split]
        for setting in range(len(voice.settings))
        for word in WORDS
    ]
    jobs += [(voice, 0, word) for voice in set(SPEAKERS.values()) for word in SPOKEN[voice.name]]
    with ThreadPoolExecutor(threads) as pool:
        spoken = pool.map(lambda job: speak(job[0], job[1], job[2], scratch), jobs)
        for (voice, setting, word), audio in zip(jobs, spoken, strict=True):
            index[f"{voice.name}|{setting}|{word}"] = (position, audio.size)
            chunks.append(audio)
            position += audio.size
    sounds: list[NDArray[np.int16]] = []
    recorded: list[list[tuple[int, int]]] = []
    for recording in RECORDINGS:
        variants = _recorded(recording, scratch)
        starts = np.cumsum([sum(map(len, sounds)), *map(len, variants)])
        recorded.append([(int(s), len(v)) for s, v in zip(starts, variants, strict=False)])
        sounds += variants
    np.save(folder / "recordings.npy", np.concatenate(sounds))
    (folder / "recordings.json").write_text(json.dumps(recorded))
    words = np.concatenate(chunks)
    np.save(folder / "words.npy", words)
    (folder / "words.json").write_text(json.dumps(index))
    for number, split in enumerate(SPLITS):
        babble = _babble(words, index, split)
        np.save(folder / f"beds-{split}.npy", _beds(number, _RECORDINGS[split], babble))


def _recorded(recording: Recording, scratch: Path) -> list[NDArray[np.int16]]:
    """The variants of a recording: at most 1.2 s, trimmed, faded out, at one level."""
    if isinstance(recording.source, Note):
        note = recording.source
        played = [
            _to_float(samples)
            for samples in render_notes(
                note.font, note.program, [(key, 100) for key in note.keys], scratch, note.bank
            )
        ]
    else:
        samples, rate_hz = sf.read(Path(STAMPS) / recording.source, dtype="float32", always_2d=True)
        played = [resample(samples.mean(axis=1), rate_hz, RATE_HZ)]
    return [_to_int16(_event(samples)) for samples in played]


def _event(samples: Audio) -> Audio:
    """What is heard of a recording as one event: from its first sound, 1.2 s at most."""
    audible = np.flatnonzero(np.abs(samples) > 0.05 * np.abs(samples).max())
    first = max(0, int(audible[0]) - RATE_HZ // 200)
    last = min(int(audible[-1]) + RATE_HZ // 50, first + round(_RECORDING_S * RATE_HZ))
    cut = samples[first:last].copy()
    fade = min(cut.size // 4, RATE_HZ // 10)
    cut[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return _levelled(cut)


def _beds(split: int, n_recordings: int, babble: Audio) -> NDArray[np.int16]:
    """Recordings of each background, ``(n_backgrounds, n_recordings, n)``."""
    return np.stack(
        [
            [
                _to_int16(bed(kind, _BED_S * RATE_HZ, np.random.default_rng(seed), babble))
                for seed in ([split, k, recording] for recording in range(n_recordings))
            ]
            for k, kind in enumerate(BACKGROUNDS)
        ]
    )


def _babble(words: NDArray[np.int16], index: dict[str, tuple[int, int]], split: Split) -> Audio:
    """Some seconds of a split's own voices, every word once, in a fixed order."""
    voices = VOICES[split]
    parts = []
    for k, word in enumerate(WORDS):
        start, length = index[f"{voices[k % len(voices)].name}|0|{word}"]
        parts.append(words[start : start + length])
    return _to_float(np.concatenate(parts))


def speak(voice: Voice, setting: int, word: str, scratch: Path) -> NDArray[np.int16]:
    """One word by one voice: trimmed of silence, 48 kHz."""
    if voice.engine == "recorded":
        samples, rate_hz = sf.read(Path(STAMPS) / SPOKEN[voice.name][word], dtype="float32")
        return _word(samples if samples.ndim == 1 else samples.mean(axis=1), rate_hz)
    pitch, speed = voice.settings[setting]
    out = scratch / f"{voice.name}-{setting}-{word}.wav"
    if voice.engine == "espeak-ng":
        command = ["espeak-ng", "-v", voice.name, "-p", f"{pitch:g}", "-s", f"{speed:g}"]
        command += ["-w", str(out), word]
    else:
        command = ["flite", "-voice", voice.name, "--setf", f"int_f0_target_mean={pitch:g}"]
        command += ["--setf", f"duration_stretch={speed:g}", "-t", word, "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    samples, rate_hz = sf.read(out, dtype="float32")
    out.unlink()
    return _word(samples, rate_hz)


def _word(samples: Audio, rate_hz: int) -> NDArray[np.int16]:
    audible = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    margin = rate_hz // 100
    samples = samples[max(0, audible[0] - margin) : audible[-1] + margin]
    return _to_int16(_levelled(resample(samples, rate_hz, RATE_HZ)))


def render_notes(
    font: str, program: int, notes: list[tuple[int, int]], scratch: Path, bank: int = 0
) -> NDArray[np.int16]:
    """``(midi, velocity)`` notes of a General MIDI program: ``(n_notes, 1.15 s) int16``.

    ``bank`` 128 is percussion, whose keys are its sounds.

    One fluidsynth run without its reverberation and chorus, cut at the known times.
    """
    midi_path = scratch / f"{font}-{program}.mid"
    wave_path = midi_path.with_suffix(".wav")
    midi_path.write_bytes(_midi_file(program, notes, _NOTE_S, _NOTE_SLOT_S, bank))
    command = ["fluidsynth", "-ni", "-R", "0", "-C", "0", "-g", "0.8", "-r", str(RATE_HZ)]
    command += ["-F", str(wave_path), str(SOUND_FONTS[font]), str(midi_path)]
    subprocess.run(command, check=True, capture_output=True)
    samples = sf.read(wave_path, dtype="float32")[0].mean(axis=1)
    wave_path.unlink()
    n = round(_NOTE_S * RATE_HZ)
    starts = [round(k * _NOTE_SLOT_S * RATE_HZ) for k in range(len(notes))]
    return np.stack([_to_int16(_levelled(samples[s : s + n].astype(np.float32))) for s in starts])


def _instrument_notes(font: str, instrument: str, scratch: Path) -> NDArray[np.int16]:
    program, lowest_tonic = INSTRUMENT_PROGRAMS[instrument]
    pitches = range(lowest_tonic - 12, lowest_tonic - 12 + NOTE_RANGE)
    notes = [(midi, velocity) for midi in pitches for velocity in _VELOCITIES]
    cut = render_notes(font, program, notes, scratch)
    return cut.reshape(NOTE_RANGE, len(_VELOCITIES), -1)


def _levelled(samples: Audio) -> Audio:
    return (samples * (0.2 / max(1e-6, loudness(samples)))).astype(np.float32)


def _to_float(samples: NDArray[np.int16]) -> Audio:
    return np.asarray(samples, np.float32) * np.float32(1 / 32768)


def _to_int16(samples: Audio) -> NDArray[np.int16]:
    return np.round(np.clip(samples, -1, 1) * 32767).astype(np.int16)


def _midi_file(
    program: int, notes: list[tuple[int, int]], note_s: float, slot_s: float, bank: int
) -> bytes:
    """A one-track MIDI file playing ``(midi, velocity)`` notes one by one, each in its slot.

    Written by hand because it is thirty lines: 480 ticks a quarter at 120 quarters a minute make
    960 ticks a second.
    """

    def delta(seconds: float) -> bytes:
        ticks = round(seconds * 960)
        out = bytes([ticks & 0x7F])
        while ticks := ticks >> 7:
            out = bytes([0x80 | ticks & 0x7F]) + out
        return out

    channel = 9 if bank == 128 else 0
    select = bytes([0, 0xB0, 0, bank]) if bank < 128 else b""
    track = b"\x00\xff\x51\x03\x07\xa1\x20" + select + bytes([0, 0xC0 | channel, program])
    gap_s = 0.0
    for midi, velocity in notes:
        track += delta(gap_s) + bytes([0x90 | channel, midi, velocity])
        track += delta(note_s) + bytes([0x80 | channel, midi, 0])
        gap_s = slot_s - note_s
    track += delta(gap_s) + b"\xff\x2f\x00"
    header = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480)
    return header + b"MTrk" + struct.pack(">I", len(track)) + track
