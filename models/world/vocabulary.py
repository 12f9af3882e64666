"""The closed vocabulary of the synthetic world: what can be heard, and what it is called.

Everything that names something audible lives here, in a fixed order: sampling, rendering, labels
and questions index these tuples, so that an index means the same everywhere and for ever.
"""

from __future__ import annotations

from typing import Literal

__all__ = [
    "BACKGROUNDS",
    "INSTRUMENTS",
    "INSTRUMENT_PROGRAMS",
    "KINDS",
    "LEXICON",
    "MODALITIES",
    "SOUND_CLASSES",
    "SPLITS",
    "WORDS",
    "WORD_CATEGORY",
    "Kind",
    "Modality",
    "Split",
]

Split = Literal["train", "validation", "test", "shifted"]
Modality = Literal[
    "sound",
    "music",
    "speech",
    "mix-sound-music",
    "mix-sound-speech",
    "mix-music-speech",
    "mix-sound-music-speech",
]

# What sort of clip: 3 to 10 s; 10 to 30 s; one thing in 0.3 to 2 s; nothing, or a background alone;
# steady noise of any colour; as core, of real recordings only; or any of these, as training has
# them.
Kind = Literal["core", "long", "short", "empty", "noise", "real", "mixed"]
KINDS: tuple[Kind, ...] = ("core", "long", "short", "empty", "noise", "real", "mixed")

SPLITS: tuple[Split, ...] = ("train", "validation", "test", "shifted")

# The names are MMAR's.
MODALITIES: tuple[Modality, ...] = (
    "sound",
    "music",
    "speech",
    "mix-sound-music",
    "mix-sound-speech",
    "mix-music-speech",
    "mix-sound-music-speech",
)

# No word is shared between two names: MMAR's scoring compares sets of words.
SOUND_CLASSES: tuple[str, ...] = (
    "dog bark",
    "door knock",
    "bell",
    "siren",
    "car horn",
    "clock tick",
    "glass break",
    "footstep",
    "bird chirp",
    "phone ring",
    "hand clap",
    "water drop",
    "alarm beep",
    "engine",
    "cow",
    "sheep",
    "duck",
    "cat meow",
    "insect buzz",
    "thunder",
    "applause",
    "drum",
    "helicopter",
)

BACKGROUNDS: tuple[str, ...] = ("rain", "wind", "crowd", "hum")

# General MIDI program (counted from 0) and the lowest tonic of a melody, as a MIDI note.
INSTRUMENT_PROGRAMS: dict[str, tuple[int, int]] = {
    "piano": (0, 55),
    "violin": (40, 60),
    "cello": (42, 43),
    "flute": (73, 62),
    "trumpet": (56, 58),
    "guitar": (24, 50),
    "organ": (19, 55),
    "xylophone": (13, 62),
    "saxophone": (65, 52),
}
INSTRUMENTS: tuple[str, ...] = tuple(INSTRUMENT_PROGRAMS)

LEXICON: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "purple", "orange"),
    "animal": ("tiger", "monkey", "rabbit", "elephant", "horse", "spider"),
    "number": ("one", "two", "three", "four", "five", "six", "seven", "eight"),
    "command": ("open", "close", "stop", "wait", "follow", "answer"),
    "place": ("kitchen", "garden", "river", "station", "hospital", "window"),
}
WORDS: tuple[str, ...] = tuple(word for words in LEXICON.values() for word in words)
WORD_CATEGORY: dict[str, str] = {
    word: category for category, words in LEXICON.items() for word in words
}
