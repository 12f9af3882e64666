"""Weight-only quantization: ``MatMul`` by a constant becomes ``com.microsoft.MatMulNBits``.

onnxruntime's own block quantizer works on each weight. The walk over the graph is ours, because
that of ``onnxruntime.quantization.matmul_nbits_quantizer`` reads the whole model into one protobuf
message, takes one number of bits for all nodes, and sets up the process's logging when imported.
Here one float32 weight is in memory at a time, beside the quantized ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from tinygiant.quantize.graph import add_initializer, constant_input
from tinygiant.quantize.recipes import Scheme

__all__ = ["HEAD_NODE", "dequantize_blocks", "quantize_blocks", "quantize_matmul"]

HEAD_NODE = "lm_head"
"""The node that a scheme's ``head_bits`` are for."""

_CONTRIB = "com.microsoft"


def quantize_matmul(graph: ir.Graph, node: ir.Node, scheme: Scheme) -> None:
    """Replace ``node``, a ``MatMul`` whose second input is a constant ``(K, N)``, in ``graph``."""
    weight, array = constant_input(node)
    bits = scheme.head_bits if node.name == HEAD_NODE and scheme.head_bits else scheme.bits
    packed, scales, zero_points = quantize_blocks(array, bits, scheme)
    values = [
        add_initializer(graph, f"{weight.name}.q{bits}", packed),
        add_initializer(graph, f"{weight.name}.scales", scales),
    ]
    if not scheme.symmetric:
        values.append(add_initializer(graph, f"{weight.name}.zero_points", zero_points))
    replacement = ir.node(
        "MatMulNBits",
        [node.inputs[0], *values],
        {
            "K": array.shape[0],
            "N": array.shape[1],
            "bits": bits,
            "block_size": scheme.block_size,
            "accuracy_level": scheme.accuracy_level,
        },
        domain=_CONTRIB,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [replacement], node.outputs, replacement.outputs
    )
    if not weight.uses():
        del graph.initializers[str(weight.name)]


def quantize_blocks(
    weight: npt.NDArray[np.float32], bits: int, scheme: Scheme
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Quantize ``(K, N)`` in blocks along K, as ``MatMulNBits`` reads it.

    Returns:
        ``packed (N, K / block_size, block_size * bits / 8)``, ``scales (N, K / block_size)``, and
        zero points, packed likewise along the blocks.
    """
    n_in, n_out = weight.shape
    n_blocks, values_per_byte = -(-n_in // scheme.block_size), 8 // bits
    padded = np.pad(weight, ((0, n_blocks * scheme.block_size - n_in), (0, 0)))
    packed = np.zeros((n_out, n_blocks, scheme.block_size // values_per_byte), np.uint8)
    scales = np.zeros((n_out, n_blocks), np.float32)
    zero_points = np.zeros((n_out, -(-n_blocks // values_per_byte)), np.uint8)
    kernel = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    kernel(packed, padded, scales, zero_points, scheme.block_size, n_out, n_in, scheme.symmetric)
    return packed, scales, zero_points


def dequantize_blocks(
    packed: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    bits: int,
    n_in: int,
    zero_points: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.float32]:
    """The weight ``(K, N)`` that :func:`quantize_blocks` stands for."""
    n_out, n_blocks, _ = packed.shape
    steps = _unpack(packed.reshape(n_out, -1), bits).reshape(n_out, n_blocks, -1)
    middle: npt.NDArray[Any] = np.full((n_out, n_blocks), 1 << (bits - 1))
    if zero_points is not None:
        middle = _unpack(zero_points, bits)[:, :n_blocks]
    values = (steps.astype(np.float32) - middle[..., None]) * scales[..., None]
    weight: npt.NDArray[np.float32] = values.reshape(n_out, -1)[:, :n_in].T.astype(np.float32)
    return weight


def _unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Bytes to numbers along the last axis; of two in a byte, the low half comes first."""
    if bits == 8:
        return packed
    return np.stack([packed & 0x0F, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
