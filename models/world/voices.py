"""The voices of each split: no voice is heard in two of them.

A voice is synthetic, except for the people of ``SPEAKERS``, who were recorded and say only the
words of ``recordings.SPOKEN``. A synthetic one is a name of espeak-ng (language + variant) or of
flite; a *setting* is one pitch and speed at which the word bank holds all its words. espeak-ng
silently ignores an unknown variant, so every voice here was checked to differ from the plain voice
and to have the pitch of its gender.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .vocabulary import Split

__all__ = ["SPEAKERS", "VOICES", "VOICE_BY_NAME", "Gender", "Voice"]

Gender = Literal["woman", "man"]


@dataclass(frozen=True)
class Voice:
    """One speaker; ``settings`` are (pitch, speed) in the engine's own units.

    espeak-ng: pitch 0..99, words a minute. flite: mean pitch in Hz, duration stretch. A recorded
    speaker has a single setting, which means nothing.
    """

    name: str
    engine: Literal["espeak-ng", "flite", "recorded"]
    gender: Gender
    settings: tuple[tuple[float, float], ...]


# Training voices are higher and lower than those of any other split, men always below women.
_TRAIN_WOMEN = ((38.0, 140.0), (48.0, 160.0), (60.0, 150.0), (78.0, 155.0))
_TRAIN_MEN = ((30.0, 145.0), (42.0, 140.0), (52.0, 160.0), (64.0, 150.0))
_VALIDATION = ((45.0, 150.0),)
_TEST = ((46.0, 145.0), (56.0, 155.0))
_SHIFTED = ((35.0, 125.0), (68.0, 175.0))


def _espeak(
    gender: Gender, settings: tuple[tuple[float, float], ...], names: str
) -> tuple[Voice, ...]:
    return tuple(Voice(name, "espeak-ng", gender, settings) for name in names.split())


VOICES: dict[Split, tuple[Voice, ...]] = {
    "train": (
        *_espeak("woman", _TRAIN_WOMEN, "en-us+f1 en-us+f2 en-gb-scotland+f3 en-us+f4"),
        *_espeak("woman", _TRAIN_WOMEN, "en-us+Annie en-us+linda en-us+Andrea en-gb-x-rp+aunty"),
        *_espeak("woman", _TRAIN_WOMEN, "en-gb-x-rp+f1 en-gb-scotland+f2 en-us+f3 en-gb-x-rp+f4"),
        *_espeak("woman", _TRAIN_WOMEN, "en-us+grandma en-gb-scotland+shelby en-gb-x-rp+linda"),
        Voice("slt", "flite", "woman", ((165.0, 1.0), (180.0, 1.15), (195.0, 1.05))),
        *_espeak("man", _TRAIN_MEN, "en-us+m1 en-gb-scotland+m3 en-us+m4 en-us+m5 en-us+m7"),
        *_espeak("man", _TRAIN_MEN, "en-us+paul en-gb-x-rp+edward en-us+Alex en-us+Denis"),
        *_espeak("man", _TRAIN_MEN, "en-gb-scotland+Andy en-us+Gene2 en-gb-x-rp+Mario"),
        *_espeak("man", _TRAIN_MEN, "en-us+robert en-gb-scotland+victor en-us+grandpa"),
        Voice("rms", "flite", "man", ((90.0, 1.0), (102.0, 1.1), (112.0, 1.0))),
        Voice("kal16", "flite", "man", ((95.0, 1.0), (108.0, 1.05), (118.0, 1.1))),
    ),
    "validation": (
        *_espeak("woman", _VALIDATION, "en-us+belinda"),
        *_espeak("man", _VALIDATION, "en-us+max"),
    ),
    "test": (
        *_espeak("woman", _TEST, "en-us+f5 en-us+steph en-us+anika"),
        *_espeak("man", _TEST, "en-us+m2 en-us+m6 en-us+Michael"),
    ),
    "shifted": (
        *_espeak("woman", _SHIFTED, "en-us+Alicia en-029+steph3"),
        *_espeak("man", _SHIFTED, "en-us+m8 en-029+john"),
        Voice("awb", "flite", "man", ((110.0, 1.0), (125.0, 1.2))),
    ),
}
# People, by split. Validation hears the one of training, shifted clips the one of the tests.
_AMERICAN = Voice("person-us", "recorded", "woman", ((0.0, 0.0),))
_BRITISH = Voice("person-gb", "recorded", "woman", ((0.0, 0.0),))
SPEAKERS: dict[Split, Voice] = {
    "train": _AMERICAN,
    "validation": _AMERICAN,
    "test": _BRITISH,
    "shifted": _BRITISH,
}
VOICE_BY_NAME: dict[str, Voice] = {
    voice.name: voice for voices in (*VOICES.values(), SPEAKERS.values()) for voice in voices
}
