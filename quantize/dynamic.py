"""Dynamic int8: weights are quantized now, activations as they come.

The graph is, node for node and bit for bit, the one that ``onnxruntime.quantization``'s
``quantize_dynamic`` makes (a test compares them), so that onnxruntime fuses it. The walk is ours
because that function holds a model four times: 11 GB for the full-size Whisper encoder, where this
one needs the quantized weights and one float32 tensor.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .graph import add_initializer, constant_input, drop_unused
from .recipes import Scheme, matches

__all__ = ["quantize_columns", "quantize_matmul"]

_LEAST, _LAST_AXIS = "rows.least", "rows.axis"


def quantize_matmul(graph: ir.Graph, node: ir.Node, scheme: Scheme) -> None:
    """Replace ``node``, a ``MatMul`` by a constant, with integer arithmetic in ``graph``.

    ``x @ w`` becomes ``float(MatMulInteger(q(x), q(w))) * (scale of x * scale of w)``. Nodes with
    the same ``x`` share its quantization.
    """
    weight, array = constant_input(node)
    name = str(weight.name)
    rows, scales = quantize_columns(array, scheme)
    quantized = add_initializer(graph, f"{name}_quantized", rows)
    weight_scale = add_initializer(graph, f"{name}_scale", scales)
    weight_zero = add_initializer(graph, f"{name}_zero_point", np.zeros(scales.shape, np.int8))
    by_row = matches(str(node.name), scheme.row_scaled)
    largest = _scaled_rows(graph, node) if by_row else None
    source, scale, zero = _quantized_input(graph, node)
    product = ir.node("MatMulInteger", [source, quantized, zero, weight_zero], name=node.name)
    cast = ir.node("Cast", product.outputs, {"to": ir.DataType.FLOAT}, name=f"{node.name}.cast")
    both = ir.node("Mul", [scale, weight_scale], name=f"{node.name}.scales")
    scaled = ir.node("Mul", [*cast.outputs, *both.outputs], name=f"{node.name}.scaled")
    made = [product, cast, both, scaled]
    if largest is not None:
        made.append(ir.node("Mul", [*scaled.outputs, largest], name=f"{node.name}.rows"))
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], made, node.outputs, made[-1].outputs
    )
    drop_unused(graph, [weight])


def quantize_columns(
    weight: npt.NDArray[np.float32], scheme: Scheme
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """``(in, out)`` -> signed symmetric bytes of that shape, and scales ``(out,)`` or ``()``."""
    limit = 64 if scheme.reduce_range else 127
    largest = np.abs(weight).max(axis=0 if scheme.per_channel else None)
    scales = (largest.astype(np.float64) / limit).astype(np.float32)
    scales = np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(1.0))
    rows = np.clip(np.round(weight / scales), -128, 127).astype(np.int8)
    return rows, np.asarray(scales, np.float32)


def _scaled_rows(graph: ir.Graph, node: ir.Node) -> ir.Value:
    """Divide each row of ``node``'s first input by its largest magnitude; returns those.

    One scale then serves all rows, whatever their size: the first token's are far larger than the
    others' in some products of a language model.
    """
    source, name = node.inputs[0], str(node.name)
    least = graph.initializers.get(_LEAST) or add_initializer(
        graph, _LEAST, np.array(np.finfo(np.float32).tiny)
    )
    axis = graph.initializers.get(_LAST_AXIS) or add_initializer(
        graph, _LAST_AXIS, np.array([-1], np.int64)
    )
    magnitudes = ir.node("Abs", [source], name=f"{name}.magnitudes")
    largest = ir.node("ReduceMax", [*magnitudes.outputs, axis], name=f"{name}.largest")
    divisor = ir.node("Max", [*largest.outputs, least], name=f"{name}.divisor")
    rows = ir.node("Div", [source, *divisor.outputs], name=f"{name}.divided")
    graph.insert_before(node, [magnitudes, largest, divisor, rows])
    node.replace_input_with(0, rows.outputs[0])
    return divisor.outputs[0]


def _quantized_input(graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Quantized ``x``, its scale and its zero point."""
    source = node.inputs[0]
    if source is None:
        raise ValueError(f"node {node.name} has no first input")
    for user, _ in source.uses():
        if user.op_type == "DynamicQuantizeLinear":
            quantized, scale, zero = user.outputs
            return quantized, scale, zero
    quantize = ir.node(
        "DynamicQuantizeLinear", [source], num_outputs=3, name=f"{source.name}.quantize"
    )
    graph.insert_before(node, quantize)
    quantized, scale, zero = quantize.outputs
    return quantized, scale, zero
