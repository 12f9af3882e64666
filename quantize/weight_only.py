"""Weight-only quantization: ``MatMul`` by a constant becomes ``com.microsoft.MatMulNBits``.

onnxruntime's own block quantizer works on each weight, except for symmetric 4 bits: there it takes
the scale from the largest weight of a block, and we search the scale of the least squared error.
The walk over the graph is ours, because that of ``onnxruntime.quantization.matmul_nbits_quantizer``
reads the whole model into one protobuf message, takes one number of bits for all nodes, and sets up
the process's logging when imported. Here one float32 weight at a time is in memory, besides the
quantized ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxruntime.capi._pybind_state import quantize_matmul_4bits, quantize_matmul_8bits

from .blocks import pack_steps, search_scales, to_steps
from .gptq import gptq_blocks
from .graph import add_initializer, constant_input, drop_unused
from .recipes import Scheme

__all__ = ["dequantize_blocks", "quantize_blocks", "quantize_matmul"]

_CONTRIB = "com.microsoft"

_CHUNK = 1 << 18  # weights that are searched at a time


def quantize_matmul(
    graph: ir.Graph,
    node: ir.Node,
    scheme: Scheme,
    moments: npt.NDArray[np.float32] | None = None,
) -> None:
    """Replace ``node``, a ``MatMul`` whose second input is a constant ``(K, N)``, in ``graph``.

    ``moments`` are those of the node's first input, ``(K, K)``, where the weight is to be fitted to
    them.
    """
    weight, array = constant_input(node)
    bits = scheme.bits_of(str(node.name))
    if moments is None:
        packed, scales, zero_points = quantize_blocks(array, bits, scheme)
    else:
        packed, scales = gptq_blocks(array, moments, bits, scheme.block_size)
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
    drop_unused(graph, [weight])


def quantize_blocks(
    weight: npt.NDArray[np.float32], bits: int, scheme: Scheme
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Quantize ``(K, N)`` in blocks along K, as ``MatMulNBits`` reads it.

    Returns:
        ``packed (N, K / block_size, block_size * bits / 8)``, ``scales (N, K / block_size)``, and
        zero points, packed likewise along the blocks.
    """
    if bits == 4 and scheme.symmetric:
        return (*_search_blocks(weight, scheme.block_size), np.zeros((0, 0), np.uint8))
    n_in, n_out = weight.shape
    n_blocks, values_per_byte = -(-n_in // scheme.block_size), 8 // bits
    padded = np.pad(weight, ((0, n_blocks * scheme.block_size - n_in), (0, 0)))
    packed = np.zeros((n_out, n_blocks, scheme.block_size // values_per_byte), np.uint8)
    scales = np.zeros((n_out, n_blocks), np.float32)
    zero_points = np.zeros((n_out, -(-n_blocks // values_per_byte)), np.uint8)
    kernel = quantize_matmul_4bits if bits == 4 else quantize_matmul_8bits
    kernel(packed, padded, scales, zero_points, scheme.block_size, n_out, n_in, scheme.symmetric)
    return packed, scales, zero_points


def _search_blocks(
    weight: npt.NDArray[np.float32], block_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Symmetric 4 bits of ``(K, N)``, each block with the scale of the least squared error."""
    n_in, n_out = weight.shape
    n_blocks = -(-n_in // block_size)
    packed = np.empty((n_out, n_blocks, block_size // 2), np.uint8)
    scales = np.empty((n_out, n_blocks), np.float32)
    rows = max(1, _CHUNK // (n_blocks * block_size))
    for start in range(0, n_out, rows):
        part = slice(start, start + rows)
        padded = np.pad(weight[:, part].T, ((0, 0), (0, n_blocks * block_size - n_in)))
        blocks = padded.reshape(-1, n_blocks, block_size)
        best = search_scales(blocks, 4)
        packed[part] = pack_steps(to_steps(blocks, best, 4), 4)
        scales[part] = best[..., 0]
    return packed, scales


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
