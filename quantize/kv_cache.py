"""Keys and values in 8 bits: the decoder's past and present become int8, with scales that stay.

The contract: graph in, graph out, from the largest keys and values that were seen. Every
``GroupQueryAttention`` writes ``rint(x / scale)``, clipped to int8, and reads it times the scale;
all products are still float32. A scale belongs to a channel of a head of a layer (onnxruntime's
``PER_CHANNEL``): keys of Qwen3 have channels that are far larger than the others.

onnxruntime's attention over int8 is fast for single tokens and slow for prompts. So each node
becomes an ``If``: its *short* branch is that attention, its *long* one makes the past float32,
attends in float32, and quantizes what is new by itself, to the bit as onnxruntime does. Past and
present are one buffer with room for the new rows, as the runtime binds them: nothing else is
written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .graph import add_initializer

__all__ = ["HEADROOM", "LONGEST_STEP", "KvPeaks", "kv_peaks", "kv_scales", "quantize_kv_cache"]

HEADROOM = 1.25
"""How much larger than what was seen a key or value may be before it is clipped."""

LONGEST_STEP = 32
"""So many tokens at once are still read by the attention over int8.

A step of decoding has one token, with drafts at most 16 (speculation's ``MAX_DRAFT_TOKENS``): all
of them take the same branch. It reads a quarter of the bytes; to make the whole past float32 for a
few tokens costs more than the faster products save.
"""

_ATTENTION = "GroupQueryAttention"
_CONTRIB = "com.microsoft"
# Inputs of it: query, key, value, the pasts, seqlens_k, total_sequence_length, ...
_QUERY, _PASTS, _TOTAL = 0, slice(3, 5), 6
_K_SCALE = 12  # the values' follows
_KINDS = ("key", "value")
_ATTRIBUTES: Mapping[str, str | int] = {
    "k_quant_type": "PER_CHANNEL",
    "v_quant_type": "PER_CHANNEL",
    "kv_cache_bit_width": 8,
}
_SMALLEST, _LARGEST = -128, 127
_LEAST = 1e-3  # of the largest peak of the layer
_POSITIONS = 2  # axis of a cache (1, n_kv_heads, capacity, head_dim)
_END = 2**63 - 1  # of an axis, whatever its length


@dataclass(frozen=True, eq=False)
class KvPeaks:
    """The largest magnitudes of one layer's keys and values, ``(n_kv_heads, head_dim)`` each."""

    keys: npt.NDArray[np.float32]
    values: npt.NDArray[np.float32]

    def __or__(self, other: KvPeaks) -> KvPeaks:
        """The peaks of both texts."""
        return KvPeaks(np.maximum(self.keys, other.keys), np.maximum(self.values, other.values))


def kv_peaks(keys: npt.NDArray[np.float32], values: npt.NDArray[np.float32]) -> KvPeaks:
    """The largest ``keys`` and ``values (n_kv_heads, T, head_dim)`` of one layer at any position.

    Rotary embeddings turn channel ``i`` of a key into channel ``i + head_dim / 2`` and back as
    positions go by. So both get the length of the pair: it is the same at every position, and a
    text of some hundred tokens is enough to find it.
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


def quantize_kv_cache(
    graph: ir.Graph, peaks: Sequence[KvPeaks], *, only_long: bool = False
) -> None:
    """Keep the keys and values of every layer of a decoder ``graph`` in int8.

    Args:
        graph: one whose attention takes a past and gives a present in float32.
        peaks: of each layer, in order.
        only_long: it only reads prompts: the long branch alone, without an ``If``. Its attention
            may be cut into blocks of rows, each of which takes the presents of the one before.

    Raises:
        ValueError: another number of peaks than of layers, or layers with different numbers of
            heads.
    """
    blocks = _blocks(graph)
    layers = list(zip(blocks, peaks, strict=True))
    if not layers:
        return
    reading = _reading(graph, blocks, head_dim=peaks[0].keys.shape[1])
    for of_rows, of_layer in layers:
        node = of_rows[-1]
        scales = [
            add_initializer(graph, f"{node.name}.{kind}_scale", kv_scales(found))
            for kind, found in zip(_KINDS, (of_layer.keys, of_layer.values), strict=True)
        ]
        for past in of_rows[0].inputs[_PASTS]:
            assert past is not None
            past.type = ir.TensorType(ir.DataType.INT8)
        if only_long:
            nodes, outputs = _long_blocks(graph, of_rows, scales, reading)
        else:
            (node,) = of_rows
            branches = {
                "then_branch": _branch(f"{node.name}.long", *_long(node, scales, reading)),
                "else_branch": _branch(f"{node.name}.short", *_short(node, scales)),
            }
            choice = ir.node("If", [reading.is_long], branches, num_outputs=3, name=node.name)
            nodes, outputs = [choice], choice.outputs
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, outputs)
        for present in outputs[1:]:
            present.type = ir.TensorType(ir.DataType.INT8)


def _blocks(graph: ir.Graph) -> list[list[ir.Node]]:
    """The attention of each layer: the nodes of its blocks of rows, in order."""
    layers: list[list[ir.Node]] = []
    for node in graph:
        if node.op_type != _ATTENTION:
            continue
        past = node.inputs[_PASTS.start]
        if layers and past is not None and past.producer() is layers[-1][-1]:
            layers[-1].append(node)
        else:
            layers.append([node])
    return layers


@dataclass(frozen=True, eq=False)
class _Reading:
    """The values of one run that all layers need, and constants.

    Attributes:
        is_long: whether more than :data:`LONGEST_STEP` tokens are read.
        n_past: ``(1,)``, how many tokens were read before.
        rows: ``(1, n_kv_heads, n_new, 3)``, the index in a cache of each new row.
        start, end, positions: of ``Slice``, the first row, beyond the last, and the axis.
        ones: ``(head_dim,)``.
        smallest, largest: of int8, in float32.
    """

    is_long: ir.Value
    n_past: ir.Value
    rows: ir.Value
    start: ir.Value
    end: ir.Value
    positions: ir.Value
    ones: ir.Value
    smallest: ir.Value
    largest: ir.Value


def _reading(graph: ir.Graph, blocks: Sequence[Sequence[ir.Node]], head_dim: int) -> _Reading:
    """Compute it once for all layers, before the first one."""
    (n_heads,) = {node.attributes["kv_num_heads"].as_int() for of in blocks for node in of}
    queries = [node.inputs[_QUERY] for node in blocks[0]]
    nodes_before = _Nodes("kv")

    def integers(name: str, values: Any) -> ir.Value:
        return add_initializer(graph, f"kv.{name}", np.array(values, np.int64))

    def numbers(name: str, values: Any) -> ir.Value:
        return add_initializer(graph, f"kv.{name}", np.array(values, np.float32))

    add, start = nodes_before.add, integers("start", [0])
    # What the first layer's query is cut from has all rows.
    source = queries[0].producer() if len(queries) > 1 and queries[0] is not None else None
    rows = source.inputs[0] if source is not None else queries[0]
    n_new = add("Shape", "n_new.dimension", [rows], start=1, end=2)
    n_new = add("Squeeze", "n_new", [n_new])
    is_long = add("Greater", "is_long", [n_new, integers("longest_step", LONGEST_STEP)])
    total = add("Cast", "n_total", [blocks[0][-1].inputs[_TOTAL]], to=ir.DataType.INT64)
    n_past = add("Sub", "n_past.scalar", [total, n_new])
    position = add("Range", "positions", [n_past, total, integers("step", 1)])
    # The row of head h at position p is (0, h, p).
    position = add("Unsqueeze", "positions.column", [position, integers("last_axis", [-1])])
    position = add("Mul", "positions.index", [position, integers("index.position", [0, 0, 1])])
    heads = [[[[0, head, 0]] for head in range(n_heads)]]
    reading = _Reading(
        is_long=is_long,
        n_past=add("Unsqueeze", "n_past", [n_past, start]),
        rows=add("Add", "rows", [position, integers("index.head", heads)]),
        start=start,
        end=integers("end", [_END]),
        positions=integers("axis", [_POSITIONS]),
        ones=numbers("ones", np.ones(head_dim)),
        smallest=numbers("smallest", _SMALLEST),
        largest=numbers("largest", _LARGEST),
    )
    graph.insert_before(blocks[0][0], nodes_before.nodes)
    return reading


def _short(node: ir.Node, scales: Sequence[ir.Value]) -> tuple[list[ir.Node], Sequence[ir.Value]]:
    """Attention over the int8 cache, which onnxruntime also writes."""
    nodes = _Nodes(f"{node.name}.short")
    empty = [None] * (_K_SCALE - len(node.inputs))
    attributes = {**_attributes(node), **_ATTRIBUTES}
    return nodes.nodes, nodes.attention([*node.inputs, *empty, *scales], attributes)


def _long(
    node: ir.Node, scales: Sequence[ir.Value], reading: _Reading
) -> tuple[list[ir.Node], Sequence[ir.Value]]:
    """Attention in float32 over the past times its scale; new rows are written behind it."""
    nodes = _Nodes(f"{node.name}.long")
    inputs = list(node.inputs)
    pasts = inputs[_PASTS]
    inputs[_PASTS] = [
        nodes.dequantized(kind, past, scale, reading)
        for kind, past, scale in zip(_KINDS, pasts, scales, strict=True)
    ]
    attended, *wholes = nodes.attention(inputs, _attributes(node))
    return nodes.nodes, [attended, *nodes.all_written(pasts, wholes, scales, reading)]


def _long_blocks(
    graph: ir.Graph, blocks: Sequence[ir.Node], scales: Sequence[ir.Value], reading: _Reading
) -> tuple[list[ir.Node], Sequence[ir.Value]]:
    """The same for attention in ``blocks``: what is to take the last one's place.

    The first takes the float32 past; what each leaves for the next stays inside of the graph.
    """
    first, last = blocks[0], blocks[-1]
    pasts = list(first.inputs[_PASTS])
    before, after = _Nodes(f"{last.name}.past"), _Nodes(f"{last.name}.long")
    for index, (kind, past, scale) in enumerate(zip(_KINDS, pasts, scales, strict=True)):
        known = before.dequantized(kind, past, scale, reading)
        first.replace_input_with(_PASTS.start + index, known)
    graph.insert_before(first, before.nodes)
    for node in blocks[:-1]:
        for present in node.outputs[1:]:
            graph.outputs.remove(present)
            present.type = present.shape = None
    attended, *wholes = after.attention(list(last.inputs), _attributes(last))
    return after.nodes, [attended, *after.all_written(pasts, wholes, scales, reading)]


def _branch(name: str, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> ir.Graph:
    """Nodes and what they give, attention first, as a branch of an ``If``."""
    attended, *presents = outputs
    attended.type = ir.TensorType(ir.DataType.FLOAT)
    for present in presents:
        present.type = ir.TensorType(ir.DataType.INT8)
    return ir.Graph([], outputs, nodes=nodes, name=name)


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


class _Nodes:
    """Nodes of a graph or a branch in order, all named after it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.nodes: list[ir.Node] = []

    def add(
        self, kind: str, name: str, inputs: Sequence[ir.Value | None], **attributes: Any
    ) -> ir.Value:
        """Add a node of ONNX with one output of the same name."""
        name = f"{self._name}.{name}"
        self.nodes.append(ir.node(kind, inputs, attributes, outputs=[ir.val(name)], name=name))
        return self.nodes[-1].outputs[0]

    def attention(
        self, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        """Add the attention; returns its output, the keys and the values."""
        outputs = [ir.val(f"{self._name}.{name}") for name in ("out", *_KINDS)]
        self.nodes.append(
            ir.node(
                _ATTENTION, inputs, attributes, domain=_CONTRIB, outputs=outputs, name=self._name
            )
        )
        return outputs

    def dequantized(
        self, kind: str, past: ir.Value | None, scale: ir.Value, reading: _Reading
    ) -> ir.Value:
        """The rows of ``past`` that hold a token, in float32."""
        span = [reading.start, reading.n_past, reading.positions]
        known = self.add("Slice", f"{kind}.known", [past, *span])
        known = self.add("Cast", f"{kind}.float", [known], to=ir.DataType.FLOAT)
        return self.add("Mul", f"{kind}.past", [known, scale])

    def written(
        self,
        kind: str,
        past: ir.Value | None,
        whole: ir.Value,
        scale: ir.Value,
        reading: _Reading,
    ) -> ir.Value:
        """The buffer ``past`` with the new rows of ``whole`` in it, quantized.

        onnxruntime multiplies by the reciprocal of the scale, rounds to even at a tie and clips.
        ``Reciprocal`` may approximate; a quotient is exact, and one that divides a single 1 would
        be drawn into the product.
        """
        new = self.add(
            "Slice", f"{kind}.new", [whole, reading.n_past, reading.end, reading.positions]
        )
        per_scale = self.add("Div", f"{kind}.per_scale", [reading.ones, scale])
        steps = self.add("Mul", f"{kind}.steps", [new, per_scale])
        steps = self.add("Round", f"{kind}.rounded", [steps])
        steps = self.add("Clip", f"{kind}.clipped", [steps, reading.smallest, reading.largest])
        steps = self.add("Cast", f"{kind}.int8", [steps], to=ir.DataType.INT8)
        # In place: onnxruntime copies the past only if the present is another buffer.
        return self.add("ScatterND", f"{kind}.present", [past, reading.rows, steps])

    def all_written(
        self,
        pasts: Sequence[ir.Value | None],
        wholes: Sequence[ir.Value],
        scales: Sequence[ir.Value],
        reading: _Reading,
    ) -> list[ir.Value]:
        """:meth:`written` for keys and values."""
        return [
            self.written(kind, past, whole, scale, reading)
            for kind, past, whole, scale in zip(_KINDS, pasts, wholes, scales, strict=True)
        ]
