"""Graph in, graph out: apply one scheme to one graph, and report on it.

A decoder's keys and values may become int8 on the way; see :mod:`tinygiant.quantize.kv_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from . import dynamic, weight_only
from .graph import load_graph, save_graph
from .kv_cache import KvPeaks, quantize_kv_cache
from .merging import merge_products
from .recipes import Scheme, matches
from .report import GraphReport, graph_size_bytes, weighted_nodes

__all__ = ["quantize_graph"]

_NONE: Mapping[str, npt.NDArray[np.float32]] = MappingProxyType({})


def quantize_graph(
    source: Path,
    target: Path,
    scheme: Scheme,
    kv_peaks: Sequence[KvPeaks] | None = None,
    moments: Mapping[str, npt.NDArray[np.float32]] = _NONE,
    *,
    only_prompts: bool = False,
) -> GraphReport:
    """Write to ``target`` the float32 graph ``source``, quantized; report on every product.

    Args:
        source: a float32 graph whose linear layers are ``MatMul`` by a constant ``(in, out)``.
        target: the file to write; its weights go next to it. Must not be ``source``.
        scheme: what to do.
        kv_peaks: keep keys and values in int8, with room for these, layer by layer.
        moments: second moments of the inputs of products, by the input's name, for schemes that
            are ``calibrated``; weights of other products are rounded to the nearest.
        only_prompts: the graph is a decoder that reads prompts and nothing else.
    """
    model = load_graph(source)
    chosen, kept = _choose(model.graph, scheme)
    to_quantize = merge_products(model.graph, scheme, chosen)
    for node in [node for node in model.graph if node.name in to_quantize]:
        if scheme.kind == "weight_only":
            seen = node.inputs[0]
            known = moments.get(str(seen.name)) if scheme.calibrated and seen is not None else None
            weight_only.quantize_matmul(model.graph, node, scheme, known)
        else:
            dynamic.quantize_matmul(model.graph, node, scheme)
    if scheme.kind == "weight_only":
        model.opset_imports.setdefault("com.microsoft", 1)
    if kv_peaks is not None:
        quantize_kv_cache(model.graph, kv_peaks, only_long=only_prompts)
    save_graph(model, target)
    return GraphReport(
        graph=target.stem,
        scheme=scheme.label + ("" if kv_peaks is None else "-kv8"),
        size_before_bytes=graph_size_bytes(source),
        size_after_bytes=graph_size_bytes(target),
        quantized=tuple(sorted(chosen)),
        kept=kept,
    )


def _choose(graph: ir.Graph, scheme: Scheme) -> tuple[set[str], dict[str, str]]:
    """The nodes to quantize, and the reason for every other one."""
    chosen: set[str] = set()
    kept: dict[str, str] = {}
    for node in weighted_nodes(graph):
        name = str(node.name)
        reason = _reason_to_keep(node, scheme)
        if reason is None:
            chosen.add(name)
        else:
            kept[name] = reason
    return chosen, kept


def _reason_to_keep(node: ir.Node, scheme: Scheme) -> str | None:
    if scheme.kind == "none":
        return "the scheme is fp32"
    if node.op_type != "MatMul":
        return f"{node.op_type} stays in float32"
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return "a product of two activations"
    if len(weight.const_value.shape) != 2:
        return "the constant is not a matrix"
    if matches(str(node.name), scheme.excluded):
        return "excluded by the scheme"
    return None
