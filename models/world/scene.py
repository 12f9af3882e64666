"""A scene: everything that is heard in one clip, as data, and its seeded sampling.

The contract: a scene alone (with the banks) fixes the audio, the labels, the questions and the
answers. ``sample_scene`` is a pure function of its arguments.

Continuous parameters are drawn by ``draw``: each range is cut into bands, and train, validation
and test own different, interleaved bands; the shifted split lies outside the range. So no value of
a test clip was ever heard in training, although test is from the same domain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from .recordings import SPOKEN, recordings_of
from .sounds import SOUND_PARAMETERS
from .vocabulary import (
    BACKGROUNDS,
    INSTRUMENT_PROGRAMS,
    INSTRUMENTS,
    LEXICON,
    MODALITIES,
    SOUND_CLASSES,
    SPLITS,
    WORD_CATEGORY,
    Kind,
    Modality,
    Split,
)
from .voices import SPEAKERS, VOICE_BY_NAME, VOICES, Gender

__all__ = [
    "LONGEST_S",
    "MAX_DURATION_S",
    "SHORTEST_S",
    "Background",
    "Copy",
    "Item",
    "Music",
    "RecordingDuration",
    "Room",
    "Scene",
    "SoundEvent",
    "Speech",
    "WordDuration",
    "draw",
    "sample_scene",
    "scene_from_dict",
    "scene_to_dict",
    "timeline",
]

MIN_DURATION_S, MAX_DURATION_S = 3.0, 10.0
# A clip of 29 s and its silent margin fill Whisper's window.
_LONG_S, LONGEST_S, SHORTEST_S = 10.5, 29.0, 0.3

# (voice, setting, word) -> seconds: all that sampling must know of the word bank.
WordDuration = Callable[[str, int, str], float]
RecordingDuration = Callable[[int], float]  # number in RECORDINGS -> seconds
# Through what finished audio went: nothing, a low rate, codecs, a telephone, a laptop's microphone.
Copy = Literal["none", "8 kHz", "mp3", "vorbis", "telephone", "laptop"]

_BANDS = 20
_OWNER: dict[Split, tuple[int, ...]] = {
    "train": (0, 2, 3),
    "validation": (1,),
    "test": (4,),
}


@dataclass(frozen=True)
class SoundEvent:
    """One event; ``params`` are named as in ``SOUND_PARAMETERS``.

    A recorded one has the number of its recording, and as ``params`` its length and how many times
    as fast it is played (``rate``).
    """

    kind: str
    start_s: float
    near: bool
    level_db: float
    params: dict[str, float]
    grain: int
    recording: int | None = None

    @property
    def end_s(self) -> float:
        """End of the event itself, without its reverberation."""
        return self.start_s + self.params["duration_s"]


@dataclass(frozen=True)
class Music:
    """A melody going up or down a scale from its tonic, with the tonic chord on every downbeat.

    ``pitches`` has one MIDI note a beat; ``detune`` multiplies all frequencies.
    """

    instrument: str
    font: str
    start_s: float
    beat_s: float
    meter: Literal[3, 4]
    major: bool
    rising: bool
    tonic: int
    pitches: tuple[int, ...]
    detune: float
    level_db: float

    @property
    def fast(self) -> bool:
        """Whether a beat lasts less than 0.28 s."""
        return self.beat_s < 0.28

    @property
    def end_s(self) -> float:
        """End of the last note, which rings for 1.6 beats."""
        return self.start_s + (len(self.pitches) + 0.6) * self.beat_s


@dataclass(frozen=True)
class Speech:
    """One utterance of 1 to 3 words; word ``k`` fills ``starts_s[k]`` to ``ends_s[k]``."""

    voice: str
    setting: int
    words: tuple[str, ...]
    starts_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    rate: float
    level_db: float

    @property
    def gender(self) -> Gender:
        """The speaker, as a listener would name him or her."""
        return VOICE_BY_NAME[self.voice].gender

    @property
    def start_s(self) -> float:
        """Start of the first word."""
        return self.starts_s[0]

    @property
    def end_s(self) -> float:
        """End of the last word."""
        return self.ends_s[-1]


@dataclass(frozen=True)
class Background:
    """A bed under the whole clip: ``offset`` (0..1) is the place in the bank's recordings."""

    kind: str
    level_db: float
    offset: float


@dataclass(frozen=True)
class Room:
    """Reverberation: energy of the tail relative to the direct sound, near and far."""

    rt60_s: float
    wet_near: float
    wet_far: float
    far_cutoff_hz: float


@dataclass(frozen=True)
class Scene:
    """One clip. ``copy`` says through what the finished audio went.

    The power of the hiss falls with the frequency to the power of ``hiss_slope``: 0 is white noise,
    1 pink, 2 brown.
    """

    id: str
    split: Split
    modality: Modality
    seed: tuple[int, ...]
    duration_s: float
    sounds: tuple[SoundEvent, ...]
    music: Music | None
    speech: Speech | None
    background: Background | None
    room: Room
    noise_db: float
    gain_db: float
    copy: Copy = "none"
    kind: Kind = "core"
    hiss_slope: float = 0.0


@dataclass(frozen=True)
class Item:
    """One entry of the timeline: a sound event, the music or the speech."""

    label: str
    start_s: float
    end_s: float
    sound: SoundEvent | None = None


def timeline(scene: Scene) -> tuple[Item, ...]:
    """What is heard in the foreground, by start; labels are a sound class, music or speech."""
    items = [Item(s.kind, s.start_s, s.end_s, s) for s in scene.sounds]
    if scene.music:
        items.append(Item("music", scene.music.start_s, scene.music.end_s))
    if scene.speech:
        items.append(Item("speech", scene.speech.start_s, scene.speech.end_s))
    return tuple(sorted(items, key=lambda item: item.start_s))


def draw(rng: np.random.Generator, split: Split, low: float, high: float) -> float:
    """A value of ``low..high`` from the bands that ``split`` owns; shifted: just outside of it.

    Outside means up to 15 % of the range's width below or above (a positive range stays above half
    of its low end).
    """
    if split == "shifted":
        beyond = rng.uniform(0.0, 0.15) * (high - low)
        below = max(0.5 * low, low - beyond) if low > 0 else low - beyond
        return below if rng.random() < 0.5 else high + beyond
    group = int(rng.integers(_BANDS // 5)) * 5
    number = group + int(rng.choice(_OWNER[split]))
    return low + (high - low) * (number + rng.uniform(0.05, 0.95)) / _BANDS


# Of a hundred clips of training, how many are of each kind.
_MIXED: dict[Kind, float] = {
    "core": 0.58,
    "long": 0.18,
    "short": 0.1,
    "empty": 0.06,
    "noise": 0.08,
}
_SILENT_KINDS = ("empty", "noise")
# How often a sound that has recordings is one of them.
_RECORDED = {"train": 0.5, "validation": 0.5, "test": 0.0, "shifted": 0.0}


def sample_scene(
    split: Split,
    index: int,
    seed: int,
    word_duration_s: WordDuration,
    modality: Modality | None = None,
    kind: Kind = "core",
    recording_duration_s: RecordingDuration | None = None,
) -> Scene:
    """Clip ``index`` of ``split``.

    ``modality`` None takes the modalities in turn, so that any run of clips holds them equally.
    Without ``recording_duration_s`` no real recording is heard. Of a test's clips of another kind
    than ``real`` no sound is a recording, so that the two can be told apart.
    """
    key = (seed, SPLITS.index(split), index)
    rng = np.random.default_rng(key)
    if kind == "mixed":
        kind = list(_MIXED)[int(rng.choice(len(_MIXED), p=list(_MIXED.values())))]
    parts = modality or MODALITIES[index % len(MODALITIES)]
    if kind == "short":
        parts = "sound" if rng.random() < 0.6 else "speech"
    elif kind in _SILENT_KINDS or (kind == "real" and "music" in parts):
        parts = "sound"
    recorded = 0.0 if recording_duration_s is None else _RECORDED[split]
    if kind == "real":
        recorded = 1.0
    sounds: list[SoundEvent] = []
    music = speech = None
    if kind not in _SILENT_KINDS:
        if "sound" in parts:
            alone = parts == "sound"
            sounds = _sample_sounds(rng, split, alone, kind, recorded, recording_duration_s)
        if "music" in parts:
            music = _sample_music(rng, split)
        if "speech" in parts:
            speech = _sample_speech(rng, split, word_duration_s, kind, recorded)
    placed_sounds, placed_music, placed_speech, duration_s = _place(
        rng, sounds, music, speech, kind
    )
    quiet = rng.random() < 0.5
    background = Background(
        kind=BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))],
        level_db=draw(rng, split, -27, -20),
        offset=float(rng.random()),
    )
    room = Room(
        rt60_s=draw(rng, split, 0.2, 0.8),
        wet_near=draw(rng, split, 0.02, 0.1),
        wet_far=draw(rng, split, 0.9, 2.0),
        far_cutoff_hz=draw(rng, split, 1200, 2000),
    )
    shifted = split == "shifted"
    noise_db = float(rng.uniform(-48, -38) if shifted else rng.uniform(-66, -50))
    gain_db = float(rng.uniform(-10, 0))
    if kind == "empty":
        gain_db = float(rng.uniform(-55, -6))
        if quiet and rng.random() < 0.5:
            noise_db = -400.0  # digital silence
    hiss_slope = 0.0
    if kind == "noise":
        quiet, gain_db = True, float(rng.uniform(-60, -8))
        hiss_slope = draw(rng, split, 0, 2)
    return Scene(
        id=f"{split}-{index:06d}",
        split=split,
        modality=parts,
        seed=key,
        duration_s=duration_s,
        sounds=placed_sounds,
        music=placed_music,
        speech=placed_speech,
        background=None if quiet else background,
        room=room,
        noise_db=noise_db,
        gain_db=gain_db,
        copy=_sample_copy(rng, split),
        kind=kind,
        hiss_slope=hiss_slope,
    )


def _sample_copy(rng: np.random.Generator, split: Split) -> Copy:
    """Shifted clips go through copies that no other split's clips do."""
    if split == "shifted":
        return "8 kHz" if rng.random() < 0.5 else "mp3"
    copies: tuple[Copy, ...] = ("vorbis", "telephone", "laptop")
    return copies[int(rng.integers(3))] if rng.random() < 0.4 else "none"


def _sample_sounds(
    rng: np.random.Generator,
    split: Split,
    alone: bool,
    kind: Kind,
    recorded: float,
    recording_duration_s: RecordingDuration | None,
) -> list[SoundEvent]:
    """Events with placeholder starts, in order. The first class drawn is the counted one.

    Its count is uniform (1..4 alone, 1..3 in a mixture), so that a count cannot be guessed.
    """
    most = 4 if alone else 3
    count = int(rng.integers(1, most + 1))
    others = int(rng.integers(1 if alone and count < most else 0, most - count + 1))
    if kind == "short":
        count, others = 1, 0
    elif kind == "long":
        others += int(rng.integers(0, 3))
    known = [c for c in SOUND_CLASSES if kind != "real" or recordings_of(c, split)]
    classes = [str(c) for c in rng.permutation(known)[: 1 + others]]
    names = [classes[0]] * count + classes[1:]
    events = []
    for name in rng.permutation(names):
        name = str(name)
        near = bool(rng.random() < 0.5)
        found = recordings_of(name, split)
        recording = None
        if found and recording_duration_s is not None and rng.random() < recorded:
            recording = int(rng.choice(found))
            rate = draw(rng, split, 0.88, 1.14)
            params = {"duration_s": recording_duration_s(recording) / rate, "rate": rate}
        else:
            params = {
                parameter: draw(rng, split, low, high)
                for parameter, (low, high) in SOUND_PARAMETERS[name].items()
            }
        events.append(
            SoundEvent(
                kind=name,
                start_s=0.0,
                near=near,
                level_db=draw(rng, split, -5, 0) if near else draw(rng, split, -13, -9),
                params=params,
                grain=int(rng.integers(2**31)),
                recording=recording,
            )
        )
    return events


def _sample_music(rng: np.random.Generator, split: Split) -> Music:
    instrument = INSTRUMENTS[int(rng.integers(len(INSTRUMENTS)))]
    meter: Literal[3, 4] = 3 if rng.random() < 0.5 else 4
    fast, major, rising = (bool(rng.random() < 0.5) for _ in range(3))
    # Fast music has time for a bar more; the last beat is always a downbeat.
    n_beats = meter * (3 if meter == 3 and fast else 2) + 1
    scale = np.array([0, 2, 4, 5, 7, 9, 11] if major else [0, 2, 3, 5, 7, 8, 10])
    degrees = np.arange(n_beats)
    notes = scale[degrees % 7] + 12 * (degrees // 7)
    tonic = INSTRUMENT_PROGRAMS[instrument][1] + int(rng.integers(12))
    pitches = tonic + (notes if rising else notes[::-1])
    return Music(
        instrument=instrument,
        font="timgm" if split == "shifted" else "fluid",
        start_s=0.0,
        beat_s=draw(rng, split, 0.16, 0.21) if fast else draw(rng, split, 0.34, 0.4),
        meter=meter,
        major=major,
        rising=rising,
        tonic=tonic,
        pitches=tuple(int(p) for p in pitches),
        detune=2 ** (draw(rng, split, -0.5, 0.5) / 12),
        level_db=draw(rng, split, -8, -3),
    )


def _sample_speech(
    rng: np.random.Generator,
    split: Split,
    word_duration_s: WordDuration,
    kind: Kind,
    recorded: float,
) -> Speech:
    gender = "woman" if rng.random() < 0.5 else "man"
    if rng.random() < (1.0 if kind == "real" else 0.2 * recorded):
        voice = SPEAKERS[split]
        spoken = tuple(SPOKEN[voice.name])
    else:
        voices = [v for v in VOICES[split] if v.gender == gender]
        voice = voices[int(rng.integers(len(voices)))]
        spoken = tuple(WORD_CATEGORY)
    setting = int(rng.integers(len(voice.settings)))
    rate = draw(rng, split, 0.94, 1.06)
    pools = [[w for w in words if w in spoken] for words in LEXICON.values()]
    pools = [pool for pool in pools if pool]
    n_words = 1 if kind == "short" else int(rng.integers(1, 4))
    chosen = [pools[int(k)] for k in rng.permutation(len(pools))[:n_words]]
    words = tuple(str(rng.choice(pool)) for pool in chosen)
    starts, ends, now = [], [], 0.0
    for word in words:
        starts.append(now)
        ends.append(now + word_duration_s(voice.name, setting, word) / rate)
        now = ends[-1] + float(rng.uniform(0.06, 0.14))
    level = draw(rng, split, -4, 0)
    return Speech(voice.name, setting, words, tuple(starts), tuple(ends), rate, level)


def _place(
    rng: np.random.Generator,
    sounds: list[SoundEvent],
    music: Music | None,
    speech: Speech | None,
    kind: Kind,
) -> tuple[tuple[SoundEvent, ...], Music | None, Speech | None, float]:
    """Put the items on the time line in a random order; returns them and the clip's length.

    Two sound events never overlap; music may run on under what follows it, speech rarely. If a
    try is too long the gaps shrink, never the content: counts and orders stay uniform.
    """
    if kind == "empty":
        return (), None, None, float(rng.choice([rng.uniform(0.5, 6), rng.uniform(6, 20)]))
    if kind == "noise":
        return (), None, None, float(np.exp(rng.uniform(np.log(SHORTEST_S), np.log(LONGEST_S))))
    order: list[SoundEvent | Music | Speech] = list(sounds)
    labels = len({s.kind for s in sounds})
    for extra in (music, speech):
        if extra:
            labels += 1
            order.insert(_insertion(rng, len(order), labels), extra)
    for attempt in range(13):
        starts, end_s = _starts(rng, order, 1.0 - attempt / 12)
        if kind == "long" or end_s + 0.2 <= MAX_DURATION_S:
            break
    if kind == "short":
        start = float(rng.uniform(0, 0.12))
        starts, end_s = [start], start + order[0].end_s - order[0].start_s
        duration_s = max(SHORTEST_S, end_s + float(rng.uniform(0.03, 0.4)))
    elif kind == "long":
        duration_s = max(float(rng.uniform(_LONG_S, LONGEST_S)), min(end_s + 0.3, LONGEST_S))
        # What is left over goes between the items, and before and after them.
        shares = rng.dirichlet(np.ones(len(order) + 1))
        before = np.cumsum(shares)[:-1] * max(0.0, duration_s - end_s - 0.2)
        starts = [start + float(gap) for start, gap in zip(starts, before, strict=True)]
    else:
        duration_s = end_s + float(rng.uniform(0.25, 0.6))
        duration_s = min(MAX_DURATION_S, max(MIN_DURATION_S, duration_s))
    placed_sounds: list[SoundEvent] = []
    for item, start in zip(order, starts, strict=True):
        if isinstance(item, SoundEvent):
            placed_sounds.append(replace(item, start_s=start))
        elif isinstance(item, Music):
            music = replace(item, start_s=start)
        else:
            speech = replace(
                item,
                starts_s=tuple(start + s for s in item.starts_s),
                ends_s=tuple(start + e for e in item.ends_s),
            )
    return tuple(placed_sounds), music, speech, duration_s


def _insertion(rng: np.random.Generator, n_items: int, n_labels: int) -> int:
    """Where to insert an item of a new label: first, or last, as often as any of the labels.

    A plain uniform position would put music first less often than a class that sounds three times,
    and "what comes first?" could be guessed.
    """
    if n_items < 2 or n_labels == 2:
        return n_items * int(rng.integers(2))
    ends = 1.0 / n_labels
    p = [ends, *[(1 - 2 * ends) / (n_items - 1)] * (n_items - 1), ends]
    return int(rng.choice(n_items + 1, p=p))


def _starts(
    rng: np.random.Generator, order: list[SoundEvent | Music | Speech], slack: float
) -> tuple[list[float], float]:
    now = float(rng.uniform(0.1, 0.2 + 0.4 * slack))
    starts: list[float] = []
    sounds_end = 0.0
    last_end = 0.0
    for item in order:
        start = now
        if isinstance(item, SoundEvent):
            start = max(start, sounds_end + 0.15)
        starts.append(start)
        length = item.end_s - item.start_s
        last_end = max(last_end, start + length)
        if isinstance(item, SoundEvent):
            sounds_end = start + length
            now = sounds_end + 0.15 + float(rng.uniform(0, 0.45)) * slack
        elif isinstance(item, Music):
            now = start + max(0.4, length * (0.3 + float(rng.uniform(0, 0.8)) * slack))
        elif rng.random() < 0.75 * slack:
            now = start + length + 0.05 + float(rng.uniform(0, 0.3)) * slack
        else:
            now = start + max(0.4, length * (0.5 + 0.3 * slack))
    return starts, last_end


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """The scene as JSON can hold it."""
    return asdict(scene)


def scene_from_dict(data: dict[str, Any]) -> Scene:
    """Inverse of ``scene_to_dict``, also after a trip through JSON (lists become tuples)."""
    values: dict[str, Any] = dict(data, seed=tuple(data["seed"]))
    values["sounds"] = tuple(SoundEvent(**s) for s in data["sounds"])
    if data["music"] is not None:
        values["music"] = Music(**{**data["music"], "pitches": tuple(data["music"]["pitches"])})
    if data["speech"] is not None:
        lists = {k: tuple(data["speech"][k]) for k in ("words", "starts_s", "ends_s")}
        values["speech"] = Speech(**{**data["speech"], **lists})
    if data["background"] is not None:
        values["background"] = Background(**data["background"])
    values["room"] = Room(**data["room"])
    return Scene(**values)
