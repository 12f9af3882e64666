"""Saving and loading a TinyGiantALM checkpoint.

A checkpoint is a folder: ``config.json`` (:class:`TinyGiantConfig`), ``model.safetensors`` (every
tensor under its component's name) and ``tokenizer.json``. It is written to a temporary folder and
renamed, so that a folder of that name is always whole.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from tinygiant.runtime.errors import CheckpointError, StorageError

from .config import TinyGiantConfig
from .tensors import PrefixedTensors, load_into, open_tensors, tied_heads, undrawn_weights
from .tinygiant import COMPONENTS, TinyGiantALM

__all__ = [
    "CONFIG_FILE",
    "TOKENIZER_FILE",
    "WEIGHTS_FILE",
    "load",
    "load_component",
    "load_config",
    "save",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


def save(model: TinyGiantALM, path: str | os.PathLike[str], *, tokenizer: Path) -> None:
    """Write a checkpoint folder, replacing one of the same name only when the new one is whole.

    Args:
        model: the model; weights are stored as they are (float32 unless it was converted).
        path: the folder to make.
        tokenizer: the ``tokenizer.json`` to store with the weights.

    Raises:
        StorageError: the folder cannot be written; nothing is left behind.
    """
    target = Path(path)
    tied = tied_heads(model)
    tensors = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise StorageError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        model.config.save(staging / CONFIG_FILE)
        save_file(tensors, staging / WEIGHTS_FILE)
        shutil.copyfile(tokenizer, staging / TOKENIZER_FILE)
        if target.exists():
            shutil.rmtree(target)
        staging.rename(target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise StorageError(f"{target}: cannot be written ({error.strerror})") from error


def load(path: str | os.PathLike[str]) -> TinyGiantALM:
    """Load a checkpoint folder, in evaluation mode.

    Raises:
        CheckpointError: the folder is not a checkpoint, or tensors do not fit; all are named.
    """
    config = load_config(path)
    with undrawn_weights():
        model = TinyGiantALM(config)
    load_into(model, open_tensors(Path(path) / WEIGHTS_FILE), where=str(path))
    return model.eval()


def load_config(path: str | os.PathLike[str]) -> TinyGiantConfig:
    """The configuration of a checkpoint folder.

    Raises:
        CheckpointError: the folder is not a checkpoint.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a TinyGiantALM checkpoint")
    missing = [
        name
        for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)
        if not (folder / name).is_file()
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: not a TinyGiantALM checkpoint, it lacks {', '.join(missing)}"
        )
    return TinyGiantConfig.load(folder / CONFIG_FILE)


def load_component(path: str | os.PathLike[str], name: str) -> nn.Module | None:
    """One part of a checkpoint, without reading the others; None if the model has no such part.

    Args:
        path: the checkpoint folder.
        name: a key of :data:`~tinygiant.models.tinygiant.COMPONENTS`.
    """
    with undrawn_weights():
        module = COMPONENTS[name](load_config(path))
    if module is None:
        return None
    tensors = PrefixedTensors(open_tensors(Path(path) / WEIGHTS_FILE), name + ".")
    load_into(module, tensors, where=f"{path} ({name})")
    return module.eval()
