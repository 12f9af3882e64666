"""Dense labels of a scene, for pre-training an encoder.

``FRAME_TAGS`` and ``CLIP_TAGS`` are ordered: column k of a label array is tag k. A frame row covers
100 ms: row r is the time from r/10 to (r+1)/10 s. *Active* tags are set in every row the thing
touches, *onset* tags only in the row in which it starts.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .scene import Scene
from .vocabulary import BACKGROUNDS, INSTRUMENTS, SOUND_CLASSES, WORDS

__all__ = ["CLIP_TAGS", "FRAME_TAGS", "ROWS_PER_S", "clip_labels", "frame_labels", "n_rows"]

ROWS_PER_S = 10

_MUSIC_TAGS = ("rising", "falling", "fast", "slow", "major", "minor", "three", "four")
_SHARED = (
    *(f"sound:{c}" for c in SOUND_CLASSES),
    "near",
    "far",
    *(f"background:{b}" for b in BACKGROUNDS),
    *(f"instrument:{i}" for i in INSTRUMENTS),
    *_MUSIC_TAGS,
    "speech",
    "woman",
    "man",
    *(f"word:{w}" for w in WORDS),
)
FRAME_TAGS: tuple[str, ...] = (
    *_SHARED,
    *(f"onset:{c}" for c in SOUND_CLASSES),
    "note_onset",
    "downbeat",
    "word_onset",
)
# Of the clip: what occurs at all, how often each class sounds, and how many words are said.
CLIP_TAGS: tuple[str, ...] = (
    *_SHARED,
    *(f"count:{c}:{k}" for c in SOUND_CLASSES for k in (1, 2, 3, 4)),
    *(f"words:{k}" for k in (1, 2, 3)),
)
_FRAME = {tag: k for k, tag in enumerate(FRAME_TAGS)}
_CLIP = {tag: k for k, tag in enumerate(CLIP_TAGS)}


def n_rows(scene: Scene) -> int:
    """Label rows of a clip: ``ceil(duration_s * 10)``."""
    return math.ceil(scene.duration_s * ROWS_PER_S)


def frame_labels(scene: Scene) -> NDArray[np.uint8]:
    """``(n_rows, len(FRAME_TAGS)) uint8`` of 0 and 1."""
    out = np.zeros((n_rows(scene), len(FRAME_TAGS)), np.uint8)

    def active(tag: str, start_s: float, end_s: float) -> None:
        first = int(start_s * ROWS_PER_S)
        out[first : max(first + 1, math.ceil(end_s * ROWS_PER_S)), _FRAME[tag]] = 1

    def onset(tag: str, start_s: float) -> None:
        out[int(start_s * ROWS_PER_S), _FRAME[tag]] = 1

    for event in scene.sounds:
        active(f"sound:{event.kind}", event.start_s, event.end_s)
        active("near" if event.near else "far", event.start_s, event.end_s)
        onset(f"onset:{event.kind}", event.start_s)
    if scene.music:
        for tag in _music_tags(scene):
            active(tag, scene.music.start_s, scene.music.end_s)
        for beat in range(len(scene.music.pitches)):
            start_s = scene.music.start_s + beat * scene.music.beat_s
            onset("note_onset", start_s)
            if beat % scene.music.meter == 0:
                onset("downbeat", start_s)
    if scene.speech:
        for tag in ("speech", scene.speech.gender):
            active(tag, scene.speech.start_s, scene.speech.end_s)
        for word, start_s, end_s in zip(
            scene.speech.words, scene.speech.starts_s, scene.speech.ends_s, strict=True
        ):
            active(f"word:{word}", start_s, end_s)
            onset("word_onset", start_s)
    if scene.background:
        active(f"background:{scene.background.kind}", 0.0, scene.duration_s)
    return out


def clip_labels(scene: Scene) -> NDArray[np.uint8]:
    """``(len(CLIP_TAGS),) uint8`` of 0 and 1."""
    tags: set[str] = set()
    for event in scene.sounds:
        tags |= {f"sound:{event.kind}", "near" if event.near else "far"}
        count = sum(e.kind == event.kind for e in scene.sounds)
        tags.add(f"count:{event.kind}:{count}")
    if scene.music:
        tags |= set(_music_tags(scene))
    if scene.speech:
        tags |= {"speech", scene.speech.gender, f"words:{len(scene.speech.words)}"}
        tags |= {f"word:{w}" for w in scene.speech.words}
    if scene.background:
        tags.add(f"background:{scene.background.kind}")
    out = np.zeros(len(CLIP_TAGS), np.uint8)
    out[[_CLIP[tag] for tag in sorted(tags)]] = 1
    return out


def _music_tags(scene: Scene) -> tuple[str, ...]:
    music = scene.music
    if music is None:
        return ()
    return (
        f"instrument:{music.instrument}",
        "rising" if music.rising else "falling",
        "fast" if music.fast else "slow",
        "major" if music.major else "minor",
        "three" if music.meter == 3 else "four",
    )
