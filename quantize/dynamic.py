"""Dynamic int8: weights quantized now, activations as they come, by onnxruntime's quantizer."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic

from tinygiant.quantize.recipes import Scheme

__all__ = ["QUANTIZED_SUFFIX", "quantize_matmuls"]

QUANTIZED_SUFFIX = "_quant"
"""What onnxruntime adds to the name of a node that it quantizes."""


def quantize_matmuls(source: Path, target: Path, nodes: Collection[str], scheme: Scheme) -> None:
    """Write to ``target`` the graph ``source`` with the named ``MatMul`` nodes in 8 bits.

    Weights are signed and symmetric, activations unsigned; with ``scheme.reduce_range`` weights
    take 7 bits (see :mod:`tinygiant.quantize.recipes`).
    """
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it recommends a pre-processing that torch.onnx has done
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(nodes),
            per_channel=scheme.per_channel,
            reduce_range=scheme.reduce_range,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
        )
    finally:
        logger.setLevel(level)
