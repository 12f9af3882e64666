"""The PyTorch reference of TinyGiantALM: architecture, checkpoints, training.

Needs torch and transformers (extras ``export`` or ``train``). Import direction: this package
imports ``tinygiant.runtime`` (configuration, features, chunks, prompts) and no other package. Names
are imported when they are first used, so that `tg-train` can say which extra is missing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load, load_component, load_config, save
    from .config import PRESETS, TinyGiantConfig, preset
    from .generate import encode_audio, greedy, input_embeddings
    from .parts import Parts, assemble, load_part, parts_config
    from .projector import Projector, ProjectorOutput
    from .tinygiant import COMPONENTS, TinyGiantALM, build, build_component

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

_MODULE_OF = {
    "COMPONENTS": "tinygiant",
    "PRESETS": "config",
    "Parts": "parts",
    "Projector": "projector",
    "ProjectorOutput": "projector",
    "TinyGiantALM": "tinygiant",
    "TinyGiantConfig": "config",
    "assemble": "parts",
    "build": "tinygiant",
    "build_component": "tinygiant",
    "encode_audio": "generate",
    "greedy": "generate",
    "input_embeddings": "generate",
    "load": "checkpoint",
    "load_component": "checkpoint",
    "load_config": "checkpoint",
    "load_part": "parts",
    "parts_config": "parts",
    "preset": "config",
    "save": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
