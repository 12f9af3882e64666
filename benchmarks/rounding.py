"""Weights of 4 bits as onnxruntime's other methods round them: HQQ and k-quant, as float32.

Both give a block a zero point besides its scale, HQQ's in float32. Here weights are rounded and
kept in float32, so a trial shows what the method loses and nothing of its speed; activations, keys
and values are not rounded at all, which flatters it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import (
    HQQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantizer,
)
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

from tinygiant.export.decoder import LM_HEAD
from tinygiant.quantize.graph import constant_input, load_graph, save_graph
from tinygiant.quantize.recipes import Scheme
from tinygiant.quantize.weight_only import dequantize_blocks, quantize_blocks

__all__ = ["Method", "round_graph", "rounded"]

Method = Literal["hqq", "k-quant"]
Array = NDArray[np.float32]


def rounded(weight: Array, method: Method, block_size: int) -> Array:
    """``(K, N)`` as 4 bits in blocks along K hold it; K is a multiple of ``block_size``."""
    n_in, n_out = weight.shape
    rows = np.ascontiguousarray(weight.T)
    if method == "hqq":
        quantizer = HQQWeightOnlyQuantizer(HQQWeightOnlyQuantConfig(block_size, bits=4))
        steps, scale, zero = (
            found.numpy().reshape(n_out, n_in // block_size, -1)
            for found in quantizer.quantize_internal(
                torch.from_numpy(rows), bits=4, group_size=block_size
            )
        )
    else:
        steps, scale, zero = quant_tensor_k_quant_cpu(rows.reshape(-1, block_size), 4, block_size)
    values = (steps - zero.astype(np.float32)) * scale
    return np.ascontiguousarray(values.reshape(n_out, n_in).T, dtype=np.float32)


def round_graph(source: Path, target: Path, method: Method, block_size: int) -> None:
    """Write the decoder in ``source`` with rounded weights to ``target``; its head has 8 bits."""
    model = load_graph(source)
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        if not node.inputs[1].is_initializer():
            continue
        weight, array = constant_input(node)
        if node.name == LM_HEAD:
            head = Scheme("weight_only", bits=8, block_size=32)
            packed, scales, _ = quantize_blocks(array, 8, head)
            found = dequantize_blocks(packed, scales, 8, len(array))
        else:
            found = rounded(array, method, block_size)
        weight.const_value = ir.Tensor(found, name=weight.name)
    save_graph(model, target)
