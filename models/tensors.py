"""Reading weights from disk one tensor at a time, by name.

A checkpoint of several gigabytes is never held twice: safetensors files are mapped and a tensor is
read when it is asked for. PyTorch's pickled formats are read with ``weights_only=True``, which
executes nothing that the file contains.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.text import counted, one_line, printable

__all__ = [
    "PrefixedTensors",
    "TensorFile",
    "load_into",
    "open_tensors",
    "read_json",
    "tied_heads",
    "undrawn_weights",
]


# What a module computes itself; upstream files may hold it.
_DERIVED = ("relative_position_index", "num_batches_tracked")
_DRAWS = (Tensor.normal_, Tensor.uniform_)


class _Undrawn(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return args[0] if function in _DRAWS else function(*args, **(kwargs or {}))


def undrawn_weights() -> TorchFunctionMode:
    """A ``with`` block in which modules are made without drawing their random weights.

    For weights that are loaded next: to draw 600 million numbers takes longer than to read them.
    """
    return _Undrawn()


class TensorFile(Mapping[str, Tensor]):
    """A safetensors file, or a folder's worth of them, as a lazy mapping from name to tensor."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """``files`` says for each tensor's name which safetensors file holds it."""
        self._files = dict(files)

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: tensor {name!r} cannot be read ({one_line(error)})"
            ) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class PrefixedTensors(Mapping[str, Tensor]):
    """The tensors whose names start with ``prefix``, under their names without it."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        self._tensors = tensors
        self._prefix = prefix
        self._names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """Open the weights of a checkpoint file or of a Hugging Face folder.

    Args:
        path: ``*.safetensors``, a pickled ``*.bin``/``*.pt``/``*.ckpt``, or a folder holding
            ``model.safetensors``, its sharded form with an index, or ``pytorch_model.bin``.

    Raises:
        CheckpointError: nothing readable is there.
    """
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            return _sharded(index)
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (path / name).is_file():
                return open_tensors(path / name)
        raise CheckpointError(
            f"{path}: no weights found; expected model.safetensors, "
            "model.safetensors.index.json or pytorch_model.bin in this folder"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; give a weights file or its folder")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise CheckpointError(
                f"{path}: a git-lfs pointer, not the weights; run 'git lfs pull' in its repository"
            )
    if path.suffix == ".safetensors":
        return TensorFile(dict.fromkeys(_names(path), path))
    return _pickled(path)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Fill every parameter and persistent buffer of ``module`` from ``tensors``, as float32.

    Tensors that a module can compute itself (position indexes, batch counters, a tied LM head) may
    be absent. Unknown tensors are errors, and so is a tied head that is not the embedding table:
    weights would be lost.

    Raises:
        CheckpointError: naming every missing, unknown and misshapen tensor at once.
    """
    own, tied = module.state_dict(), tied_heads(module)
    known = {name for name in own if not name.endswith(_DERIVED) and name not in tied}
    problems = [f"missing {name}" for name in own if name in known and name not in tensors]
    problems += [
        f"unknown {name}" for name in tensors if name not in own and not name.endswith(_DERIVED)
    ]
    problems += [
        f"{head} is not {table}, to which the configuration ties it"
        for head, table in tied.items()
        if {head, table} <= {*tensors} and not _equal(tensors[head], tensors[table])
    ]
    state = {}
    for name in own:
        if name not in known or name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.shape != own[name].shape:
            problems.append(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
            )
        elif tensor.dtype.is_floating_point:
            if not bool(torch.isfinite(tensor).all()):
                problems.append(f"{name} holds NaN or infinity")
            state[name] = tensor.to(own[name].dtype)
        else:
            state[name] = tensor
    if problems:
        raise CheckpointError(
            f"{where}: {counted(len(problems), 'problem')} with its tensors: " + "; ".join(problems)
        )
    module.load_state_dict(state, strict=False, assign=True)
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()


def tied_heads(module: nn.Module) -> dict[str, str]:
    """LM heads that are an embedding table by another name: the names of both, by the head's."""
    return {
        f"{prefix}lm_head.weight": f"{prefix}model.embed_tokens.weight"
        for prefix, part in (
            (f"{name}." if name else "", part) for name, part in module.named_modules()
        )
        if isinstance(part, PreTrainedModel)
        and hasattr(part, "lm_head")
        and part.config.tie_word_embeddings
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON ({one_line(error)})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError, struct.error) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({one_line(error)})"
        ) from error


def _sharded(index: Path) -> TensorFile:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no 'weight_map'; fetch the checkpoint again")
    files = {}
    for name, shard in weight_map.items():
        # A shard is a file next to its index; anything else could name any file of this machine.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is not a file name in this folder")
        files[name] = index.parent / shard
    missing = sorted({str(path) for path in files.values() if not path.is_file()})
    if missing:
        raise CheckpointError(f"{index}: shards are missing: {', '.join(map(printable, missing))}")
    return TensorFile(files)


def _pickled(path: Path) -> Mapping[str, Tensor]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own words explain how to load it all the same.
        raise CheckpointError(
            f"{path}: not a readable PyTorch checkpoint (damaged, or more than tensors: such a "
            "file can run code when it is loaded); expected a plain state dict"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable PyTorch checkpoint ({reason})") from error
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a state dict, found {type(data).__name__}")
    return {str(name): value for name, value in data.items() if isinstance(value, Tensor)}
