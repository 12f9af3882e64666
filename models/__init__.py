"""The PyTorch reference of TinyGiantALM: architecture, checkpoints, training.

Needs torch and transformers (extras ``export`` or ``train``). Import direction: this package reads
``tinygiant.runtime`` (configuration, features, chunks, prompts) and nothing of the other packages.
"""

from __future__ import annotations

from tinygiant.models.checkpoint import load, load_component, load_config, save
from tinygiant.models.config import PRESETS, TinyGiantConfig, preset
from tinygiant.models.generate import encode_audio, greedy, input_embeddings
from tinygiant.models.parts import Parts, assemble, load_part, parts_config
from tinygiant.models.projector import Projector, ProjectorOutput
from tinygiant.models.tinygiant import COMPONENTS, TinyGiantALM, build, build_component

__all__ = [
    "COMPONENTS",
    "PRESETS",
    "Parts",
    "Projector",
    "ProjectorOutput",
    "TinyGiantALM",
    "TinyGiantConfig",
    "assemble",
    "build",
    "build_component",
    "encode_audio",
    "greedy",
    "input_embeddings",
    "load",
    "load_component",
    "load_config",
    "load_part",
    "parts_config",
    "preset",
    "save",
]
