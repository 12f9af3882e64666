"""Export: a checkpoint in, a verified bundle out.

Needs torch, transformers and onnx (extra ``export``). Import direction: this package may import all
others; nothing imports it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinygiant.models.sources import CheckpointSource, PartsSource, RandomSource

    from .decoder import build_decoder
    from .exporter import Export, export_bundle
    from .verify import Verification, verify_bundle

__all__ = [
    "CheckpointSource",
    "Export",
    "PartsSource",
    "RandomSource",
    "Verification",
    "build_decoder",
    "export_bundle",
    "verify_bundle",
]

_MODULE_OF = {
    "CheckpointSource": "tinygiant.models.sources",
    "Export": ".exporter",
    "PartsSource": "tinygiant.models.sources",
    "RandomSource": "tinygiant.models.sources",
    "Verification": ".verify",
    "build_decoder": ".decoder",
    "export_bundle": ".exporter",
    "verify_bundle": ".verify",
}


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `tg-export --help` does not wait for torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)
