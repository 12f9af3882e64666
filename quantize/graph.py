"""Reading and writing graphs: a small ``.onnx`` file and one file of weights next to it.

The contract: weights go to disk one tensor after another, so a graph of any size is written in the
memory of its largest tensor, and no protobuf message comes near its limit of 2 GiB. Small tensors
stay inside the graph, where onnxruntime's shape inference reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

__all__ = [
    "add_initializer",
    "add_tensor",
    "constant_input",
    "drop_unused",
    "load_graph",
    "save_graph",
    "weights_path",
]

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


def constant_input(node: ir.Node) -> tuple[ir.Value, npt.NDArray[np.float32]]:
    """The weight of a ``MatMul`` by a constant: the second input, and its ``(in, out)`` array.

    Raises:
        ValueError: the second input is no constant.
    """
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or weight.const_value is None:
        raise ValueError(f"node {node.name} does not multiply by a constant")
    return weight, weight.const_value.numpy()


def add_initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Store ``array`` in the graph under ``name``."""
    return add_tensor(graph, name, ir.Tensor(array, name=name))


def add_tensor(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Store ``tensor``, which may be one that is read when wanted, in the graph under ``name``."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.initializers[name] = value
    return value


def drop_unused(graph: ir.Graph, values: Iterable[ir.Value | None]) -> None:
    """Take those of ``values`` out of the graph that are weights which no node reads any more."""
    for value in values:
        if value is not None and value.is_initializer() and not value.uses():
            del graph.initializers[str(value.name)]
