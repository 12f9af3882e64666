"""Reading and writing graphs: a small ``.onnx`` file and one file of weights beside it.

The contract: weights go to disk one tensor after another, so a graph of any size is written in the
memory of its largest tensor, and no protobuf message comes near its limit of 2 GiB. Small tensors
stay inside the graph, where onnxruntime's shape inference reads them.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

__all__ = ["load_graph", "save_graph", "weights_path"]

_INLINE_LIMIT_BYTES = 1_024
# A tensor can be mapped from the file, rather than copied, where its offset is a multiple of the
# operating system's mapping granularity: 64 KiB covers all of them.
_ALIGNMENT_BYTES = 65_536


def weights_path(path: Path) -> Path:
    """The file that holds the weights of the graph in ``path``."""
    return path.with_name(f"{path.name}.data")


def load_graph(path: Path) -> ir.Model:
    """Read a graph; its weights stay on disk, mapped, until they are used."""
    return ir.load(path)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph to ``path`` and its weights to :func:`weights_path` of it."""
    ir.save(
        model,
        path,
        external_data=weights_path(path).name,
        size_threshold_bytes=_INLINE_LIMIT_BYTES,
        alignment=_ALIGNMENT_BYTES,
    )
