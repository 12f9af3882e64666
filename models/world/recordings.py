"""Real recordings of the world's sounds, from Debian packages; each belongs to one split.

A recording is one note of a sampled bank (General MIDI's sound effects and percussion are
recordings of real things) or one file of ``tuxpaint-stamps-default``. Splits share no recording:
a bank's note at another pitch counts as the same one. Nothing of them is part of this project; its
model has heard those of ``train``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .vocabulary import LEXICON, Split

__all__ = ["RECORDINGS", "SPOKEN", "STAMPS", "Note", "Recording", "recordings_of"]

STAMPS = "/usr/share/tuxpaint/stamps"  # tuxpaint-stamps-default


@dataclass(frozen=True)
class Note:
    """A key of a bank's program; ``bank`` 128 is percussion."""

    font: Literal["fluid", "fluid-gs", "timgm"]
    bank: int
    program: int
    keys: tuple[int, ...]


@dataclass(frozen=True)
class Recording:
    """One recording: what it is, where it comes from, and who may hear it.

    ``source`` is a note or a file below :data:`STAMPS`.
    """

    kind: str
    split: Split
    source: Note | str


def _notes(kind: str, split: Split, font: str, *places: tuple[int, int, int]) -> list[Recording]:
    """One recording for each (bank, program, key); an effect is also heard 3 keys up and down."""
    return [
        Recording(kind, split, Note(font, bank, program, (key,) if bank == 128 else keys))  # type: ignore[arg-type]
        for bank, program, key in places
        for keys in [(key - 3, key, key + 3)]
    ]


RECORDINGS: tuple[Recording, ...] = (
    *_notes("dog bark", "train", "fluid-gs", (1, 123, 60)),
    *_notes("bird chirp", "train", "fluid", (0, 123, 60)),
    *_notes("bird chirp", "train", "fluid-gs", (3, 123, 60)),
    *_notes("phone ring", "train", "fluid", (0, 124, 60)),
    *_notes("phone ring", "train", "fluid-gs", (1, 124, 60)),
    *_notes("siren", "train", "fluid-gs", (5, 125, 60)),
    *_notes("footstep", "train", "fluid-gs", (5, 126, 60)),
    *_notes("engine", "train", "fluid-gs", (1, 125, 60), (2, 125, 60), (3, 125, 60)),
    *_notes("bell", "train", "fluid", (0, 14, 60), (8, 14, 60), (0, 112, 72)),
    *_notes("hand clap", "train", "fluid", (128, 0, 39), (128, 25, 39)),
    *_notes("thunder", "train", "fluid-gs", (2, 122, 60)),
    *_notes("applause", "train", "fluid", (0, 126, 60)),
    *_notes("drum", "train", "fluid", (0, 116, 50), (0, 117, 55)),
    *_notes("drum", "train", "fluid", (128, 0, 36), (128, 0, 38), (128, 0, 45), (128, 16, 38)),
    *_notes("helicopter", "train", "fluid", (0, 125, 60)),
    *(
        Recording(kind, "train", f"animals/{path}.ogg")
        for kind, path in (
            ("bird chirp", "birds/lark"),
            ("cow", "mammals/bovines/cow"),
            ("cow", "mammals/bovines/bull"),
            ("sheep", "mammals/bovines/sheep"),
            ("sheep", "mammals/bovines/goat"),
            ("duck", "birds/duck"),
            ("insect buzz", "insects/bee"),
            ("insect buzz", "insects/mosquito"),
        )
    ),
    Recording("cat meow", "train", "seasonal/halloween/blackcat.ogg"),
    Recording("drum", "train", "hobbies/music/percussion/drumkit.ogg"),
    *_notes("bird chirp", "test", "timgm", (0, 123, 60)),
    *_notes("phone ring", "test", "timgm", (0, 124, 60)),
    *_notes("bell", "test", "timgm", (0, 14, 60), (0, 112, 72)),
    *_notes("hand clap", "test", "timgm", (128, 0, 39)),
    *_notes("applause", "test", "timgm", (0, 126, 60)),
    *_notes("drum", "test", "timgm", (0, 116, 50), (128, 0, 38), (128, 0, 45)),
    *_notes("helicopter", "test", "timgm", (0, 125, 60)),
    *(
        Recording(kind, "test", f"{path}.ogg")
        for kind, path in (
            ("dog bark", "animals/mammals/dogs/dog"),
            ("bird chirp", "animals/birds/blackbird"),
            ("siren", "vehicles/emergency/firetruck"),
            ("thunder", "naturalforces/lightningbolt"),
            ("cow", "animals/mammals/bovines/cow_white"),
            ("sheep", "animals/mammals/bovines/sheep_lamb"),
            ("duck", "animals/birds/drake"),
            ("insect buzz", "animals/insects/hornet"),
            ("drum", "hobbies/music/percussion/drum_tomtom_floor"),
        )
    ),
)

# Words said by people, as files below STAMPS: voice -> word -> file. The one from the United
# States is heard in training, the one from Britain only in tests.
SPOKEN: dict[str, dict[str, str]] = {
    person: {
        word: f"symbols/math/{digit}{suffix}.ogg"
        for digit, word in enumerate(LEXICON["number"], start=1)
    }
    for person, suffix in (("person-us", ""), ("person-gb", "_en_GB"))
}


def recordings_of(kind: str, split: Split) -> tuple[int, ...]:
    """Numbers, in :data:`RECORDINGS`, of those that clips of ``split`` may hold.

    Validation hears what training hears, since too few are there for three parts; shifted clips
    hear the tests'.
    """
    owner = {"validation": "train", "shifted": "test"}.get(split, split)
    return tuple(
        number for number, r in enumerate(RECORDINGS) if r.kind == kind and r.split == owner
    )
