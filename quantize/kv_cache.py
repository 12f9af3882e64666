"""Keys and values in 8 bits: the decoder's past and present become int8, with scales that stay.

The contract: graph in, graph out, from the largest keys and values that were seen. Every
``GroupQueryAttention`` writes ``rint(x / scale)``, clipped to int8, and reads it times the scale;
all products are still float32. A scale belongs to a channel of a head of a layer (onnxruntime's
``PER_CHANNEL``): keys of Qwen3 have channels that are far larger than the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tinygiant.quantize.graph import add_initializer

__all__ = ["HEADROOM", "KvPeaks", "kv_peaks", "kv_scales", "quantize_kv_cache"]

HEADROOM = 1.25
"""How much larger than what was seen a key or value may be before it is clipped."""

_ATTENTION = "GroupQueryAttention"
_PASTS, _PRESENTS = slice(3, 5), slice(1, 3)  # inputs and outputs of the operator
_K_SCALE, _V_SCALE = 12, 13  # inputs of it as well
_ATTRIBUTES: Mapping[str, str | int] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
_LARGEST = 127
_LEAST = 1e-3  # of the largest peak of the layer


@dataclass(frozen=True, eq=False)
class KvPeaks:
    """The largest magnitudes of one layer's keys and values, ``(n_kv_heads, head_dim)`` each."""

    keys: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]

    def __or__(self, other: KvPeaks) -> KvPeaks:
        """The peaks of both texts."""
        return KvPeaks(np.maximum(self.keys, other.keys), np.maximum(self.values, other.values))


def kv_peaks(keys: npt.NDArray[np.float32], values: npt.NDArray[np.float32]) -> KvPeaks:
    """What ``keys`` and ``values (n_kv_heads, T, head_dim)`` of one layer reach at any position.

    Rotary embeddings turn channel ``i`` of a key into channel ``i + head_dim / 2`` and back as
    positions go by. So both have the length of the pair: it is the same at every position, and a
    text of some hundred tokens tells it for all.
    """
    first, second = np.split(keys, 2, axis=-1)
    pairs = np.hypot(first, second).max(axis=1)
    return KvPeaks(np.concatenate([pairs, pairs], axis=-1), np.abs(values).max(axis=1))


def kv_scales(peaks: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scales ``(1, n_kv_heads, 1, head_dim)``, as the operator takes them, of such peaks."""
    # A channel that was never used must not have a step of 0.
    least = np.float32(_LEAST * peaks.max()) or np.float32(1.0)
    scales = np.maximum(peaks, least) * np.float32(HEADROOM / _LARGEST)
    return scales[None, :, None, :].astype(np.float32)


def quantize_kv_cache(graph: ir.Graph, peaks: Sequence[KvPeaks]) -> None:
    """Keep the keys and values of every layer of a decoder ``graph`` in int8.

    Args:
        graph: one whose attention takes a past and gives a present in float32.
        peaks: of each layer, in order.

    Raises:
        ValueError: another number of peaks than of layers.
    """
    nodes = [node for node in graph if node.op_type == _ATTENTION]
    for node, of_layer in zip(nodes, peaks, strict=True):
        node.resize_inputs(_V_SCALE + 1)
        for position, name, found in (
            (_K_SCALE, "key_scale", of_layer.keys),
            (_V_SCALE, "value_scale", of_layer.values),
        ):
            scale = add_initializer(graph, f"{node.name}.{name}", kv_scales(found))
            node.replace_input_with(position, scale)
        for attribute in ir.convenience.convert_attributes(_ATTRIBUTES):
            node.attributes.add(attribute)
        for cache in (*node.inputs[_PASTS], *node.outputs[_PRESENTS]):
            assert cache is not None
            cache.type = ir.TensorType(ir.DataType.INT8)
