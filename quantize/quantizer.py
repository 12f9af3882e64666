"""Graph in, graph out: apply one scheme to one graph, and say what was done."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from tinygiant.quantize.dynamic import QUANTIZED_SUFFIX, quantize_matmuls
from tinygiant.quantize.graph import load_graph, save_graph
from tinygiant.quantize.recipes import Scheme
from tinygiant.quantize.report import GraphReport, graph_size_bytes, weighted_nodes
from tinygiant.quantize.weight_only import quantize_matmul

__all__ = ["quantize_graph"]


def quantize_graph(source: Path, target: Path, scheme: Scheme) -> GraphReport:
    """Write to ``target`` the float32 graph ``source``, quantized; report on every product.

    Args:
        source: a float32 graph whose linear layers are ``MatMul`` by a constant ``(in, out)``.
        target: the file to write; its weights go beside it. Must be another than ``source``.
        scheme: what to do.
    """
    model = load_graph(source)
    chosen, kept = _choose(model.graph, scheme)
    if scheme.kind == "weight_only":
        for node in [node for node in model.graph if node.name in chosen]:
            quantize_matmul(model.graph, node, scheme)
        model.opset_imports.setdefault("com.microsoft", 1)
    if scheme.kind == "dynamic_int8" and chosen:
        # onnxruntime's quantizer writes its weights unaligned; they are written again here.
        with TemporaryDirectory(dir=target.parent, prefix=".quantize.") as folder:
            between = Path(folder) / source.name
            quantize_matmuls(source, between, chosen, scheme)
            model = load_graph(between)
            save_graph(model, target)
    else:
        save_graph(model, target)
    quantized = _quantized_nodes(model.graph)
    if missed := sorted(chosen - quantized):
        raise RuntimeError(f"onnxruntime's quantizer left out {missed}")
    return GraphReport(
        graph=target.stem,
        scheme=scheme.label,
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
    if any(fnmatchcase(str(node.name), pattern) for pattern in scheme.excluded):
        return "excluded by the scheme"
    return None


def _quantized_nodes(graph: ir.Graph) -> set[str]:
    weight_only = {str(node.name) for node in graph if node.op_type == "MatMulNBits"}
    dynamic = {
        str(node.name).removesuffix(QUANTIZED_SUFFIX)
        for node in graph
        if node.op_type == "MatMulInteger"
    }
    return weight_only | dynamic
