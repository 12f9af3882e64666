"""A report on a quantized graph: every product, quantized or left in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from .graph import weights_path

__all__ = ["GraphReport", "graph_size_bytes", "weighted_nodes"]

_WEIGHTED_OPS = frozenset({"MatMul", "Gemm", "Conv", "MultiHeadAttention", "GroupQueryAttention"})


@dataclass(frozen=True)
class GraphReport:
    """One graph before and after.

    Attributes:
        graph: its name.
        scheme: the label of the scheme.
        size_before_bytes: graph and weights, in float32.
        size_after_bytes: the same, quantized.
        quantized: names of the nodes that now multiply quantized weights.
        kept: names of the nodes that multiply in float32, each with the reason.
    """

    graph: str
    scheme: str
    size_before_bytes: int
    size_after_bytes: int
    quantized: tuple[str, ...]
    kept: dict[str, str]


def graph_size_bytes(path: Path) -> int:
    """Bytes of a graph file and its weights on disk."""
    return sum(part.stat().st_size for part in (path, weights_path(path)) if part.exists())


def weighted_nodes(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that do the multiplying: the ones a report must account for."""
    return [node for node in graph if node.op_type in _WEIGHTED_OPS]
