"""The text a model must write: the caption's grammar and the four-part response.

A caption lists the whole foreground by start time, so that every question can be derived from it:

    Background rain. First dog bark near, then a woman says red tiger, then violin rising fast
    major in three, then bell far.

``describe`` writes it from a scene and ``parse_caption`` reads it back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .scene import Scene, timeline

__all__ = [
    "describe",
    "describe_parts",
    "format_answer",
    "format_response",
    "parse_caption",
    "sentence",
]


def describe_parts(scene: Scene) -> tuple[str, list[str]]:
    """The background's name (or none) and one phrase an item, in the order of their starts."""
    phrases = []
    for item in timeline(scene):
        if item.sound:
            phrases.append(f"{item.sound.kind} {'near' if item.sound.near else 'far'}")
        elif item.label == "music" and scene.music:
            music = scene.music
            direction = "rising" if music.rising else "falling"
            tempo = "fast" if music.fast else "slow"
            mode = "major" if music.major else "minor"
            meter = "three" if music.meter == 3 else "four"
            phrases.append(f"{music.instrument} {direction} {tempo} {mode} in {meter}")
        elif scene.speech:
            phrases.append(f"a {scene.speech.gender} says {' '.join(scene.speech.words)}")
    return (scene.background.kind if scene.background else "none"), phrases


def describe(scene: Scene) -> str:
    """The caption of a scene."""
    background, phrases = describe_parts(scene)
    return f"Background {background}. First {', then '.join(phrases) or 'nothing'}."


def sentence(scene: Scene) -> str:
    """What is heard, as one would say it: things in their order, then the background."""
    things = []
    for item in timeline(scene):
        if item.sound:
            article = "" if item.label in ("thunder", "applause") else "a "
            if article and item.label[0] in "aeio":
                article = "an "
            things.append(f"{article}{item.label} {'near' if item.sound.near else 'far'}")
        elif item.label == "music" and scene.music:
            music = scene.music
            tempo = "fast" if music.fast else "slow"
            direction = "rising" if music.rising else "falling"
            things.append(f"a {tempo} {direction} melody on {music.instrument}")
        elif scene.speech:
            things.append(f"a {scene.speech.gender} who says {' '.join(scene.speech.words)}")
    background = scene.background.kind if scene.background else None
    if not things:
        return f"Only {background} is heard." if background else "Nothing is heard."
    text = ", then ".join(things)
    text = text[0].upper() + text[1:]
    return f"{text}, with {background} in the background." if background else f"{text}."


def parse_caption(text: str) -> tuple[str, list[str]] | None:
    """Inverse of ``describe``: the background and the phrases; None for any other text."""
    match = re.fullmatch(r"Background (\w+)\. First (.+)\.", text.strip())
    if match is None:
        return None
    return match[1], [] if match[2] == "nothing" else match[2].split(", then ")


def format_response(record: Mapping[str, Any]) -> str:
    """The CoTA text of a record: four parts of thought, then the answer."""
    thinking = record["thinking"]
    parts = "\n".join(
        f"<{tag}>\n{thinking[tag.lower()]}</{tag}>"
        for tag in ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
    )
    return f"<think>\n{parts}\n</think>\n{format_answer(record)}"


def format_answer(record: Mapping[str, Any]) -> str:
    """The last part of :func:`format_response`: what is written where there is no thought."""
    return f"<RESPONSE>\n{record['answer']}</RESPONSE>"
