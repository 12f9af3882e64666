"""A synthetic audio-reasoning world: scenes, their audio, questions and true thoughts.

    scene -> audio -> features          sound, music and speech made by procedures and real engines
    scene -> labels, questions          so that every answer and every thought is true

``build`` makes a split, ``WorldDataset`` reads it. docs/world.md describes what is in it.
"""

from __future__ import annotations

from .dataset import WorldDataset, build
from .labels import CLIP_TAGS, FRAME_TAGS, clip_labels, frame_labels
from .thought import describe, format_response, parse_caption

__all__ = [
    "CLIP_TAGS",
    "FRAME_TAGS",
    "WorldDataset",
    "build",
    "clip_labels",
    "describe",
    "format_response",
    "frame_labels",
    "parse_caption",
]
