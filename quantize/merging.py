"""Products of one input become one product of all their columns, before they are quantized.

A token of a small decoder waits for the start of each product more than for its numbers, and a
narrow product (keys and values of few heads) leaves threads without work. Columns are quantized and
multiplied as they were alone, so results are the same to the bit.

Queries, keys and values go to the attention as one: onnxruntime's ``GroupQueryAttention`` takes
them one behind another. Others, as those of a gated MLP, or where norms of queries and keys stand
between, get a ``Split`` behind them. It copies the rows, which costs a prompt up to a tenth; so
only graphs whose weights alone are quantized have it, which are for tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from .graph import add_initializer, add_tensor, drop_unused
from .recipes import Scheme, matches

__all__ = ["merge_products"]

_ATTENTION = "GroupQueryAttention"
_PARTS = 3  # of its inputs: query, key, value
_SUFFIX = "_proj"


def merge_products(graph: ir.Graph, scheme: Scheme, chosen: Collection[str]) -> set[str]:
    """Merge those of the ``chosen`` products in a decoder's ``graph`` that ``scheme`` treats alike.

    Returns the names of what is to be quantized now: merged products, and those that stay alone.

    Args:
        graph: its products are ``MatMul`` by a constant ``(in, out)``. One without
            ``GroupQueryAttention`` is left alone.
        scheme: which weights have how many bits, or scales of their own.
        chosen: names of the nodes that will be quantized.
    """
    left = set(chosen)
    if not any(node.op_type == _ATTENTION for node in graph):
        return left
    alike: dict[tuple[ir.Value, int, bool], list[ir.Node]] = {}
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if node.name in chosen and source is not None:
            alike.setdefault((source, *_treatment(str(node.name), scheme)), []).append(node)
    for (_, *treatment), products in alike.items():
        name = _joined([str(node.name) for node in products])
        if len(products) == 1 or [*_treatment(name, scheme)] != treatment:
            continue
        if users := _attention(products):
            _pack(graph, name, products, users)
        elif scheme.kind == "weight_only":
            _split(graph, name, products)
        else:
            continue
        left = left - {str(node.name) for node in products} | {name}
    return left


def _treatment(name: str, scheme: Scheme) -> tuple[int, bool]:
    """Bits of a weight, and whether rows of activations have scales of their own."""
    return scheme.bits_of(name), matches(name, scheme.row_scaled)


def _joined(names: Sequence[str]) -> str:
    """``mlp.gate_proj`` and ``mlp.up_proj`` are ``mlp.gate_up_proj``."""
    stem = names[0].rpartition(".")[0]
    parts = [name.removeprefix(f"{stem}.").removesuffix(_SUFFIX) for name in names]
    return f"{stem}.{'_'.join(parts)}{_SUFFIX}"


def _attention(products: Sequence[ir.Node]) -> list[ir.Node]:
    """The nodes that take the three as query, key and value, or blocks of their rows, in order."""
    if len(products) != _PARTS:
        return []
    taken: list[list[ir.Node]] = []
    for part, product in enumerate(products):
        blocks = _blocks(product)
        uses = [
            use for value in (blocks.outputs if blocks else product.outputs) for use in value.uses()
        ]
        if any(user.op_type != _ATTENTION or index != part for user, index in uses):
            return []
        taken.append([user for user, _ in uses])
    return taken[0] if taken[0] == taken[1] == taken[2] else []


def _blocks(product: ir.Node) -> ir.Node | None:
    """The ``Split`` of a product into blocks of rows, if it is cut."""
    users = [user for user, _ in product.outputs[0].uses()]
    return users[0] if len(users) == 1 and users[0].op_type == "Split" else None


def _pack(
    graph: ir.Graph, name: str, products: Sequence[ir.Node], users: Sequence[ir.Node]
) -> None:
    """Give the attention ``users`` one product of all columns, or blocks of its rows."""
    merged = _merged(graph, name, products)
    first, *others = (_blocks(product) for product in products)
    if first is not None:
        first.replace_input_with(0, merged.outputs[0])
    rows = first.outputs if first is not None else merged.outputs
    for user, block in zip(users, rows, strict=True):
        for part in range(_PARTS):
            user.replace_input_with(part, None if part else block)
    _remove(graph, [*filter(None, others), *products])


def _split(graph: ir.Graph, name: str, products: Sequence[ir.Node]) -> None:
    """Let one product of all columns, split again, stand for ``products``."""
    sizes = np.array([_shape(product)[1] for product in products], np.int64)
    merged = _merged(graph, name, products)
    lengths = add_initializer(graph, f"{merged.name}.columns", sizes)
    outputs = [ir.val(f"{product.name}.columns") for product in products]
    split = ir.node(
        "Split",
        [*merged.outputs, lengths],
        {"axis": -1},
        outputs=outputs,
        name=f"{merged.name}.split",
    )
    graph.insert_after(merged, split)
    for product, output in zip(products, outputs, strict=True):
        product.outputs[0].replace_all_uses_with(output)
    _remove(graph, products)


def _merged(graph: ir.Graph, name: str, products: Sequence[ir.Node]) -> ir.Node:
    """One product of the columns of all, put before the first; its weight is read when wanted."""
    weights = [_weight(product) for product in products]
    shape = ir.Shape([_shape(products[0])[0], sum(_shape(product)[1] for product in products)])

    def columns() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([weight.numpy() for weight in weights], axis=1))

    weight = f"{name}.weight"
    tensor = ir.LazyTensor(columns, weights[0].dtype, shape, name=weight)
    value = add_tensor(graph, weight, tensor)
    inputs, outputs = [products[0].inputs[0], value], [ir.val(f"{name}.out")]
    merged = ir.node("MatMul", inputs, outputs=outputs, name=name)
    graph.insert_before(products[0], merged)
    return merged


def _weight(product: ir.Node) -> ir.TensorProtocol:
    value = product.inputs[1]
    assert value is not None and value.const_value is not None, "it is quantized: a constant"
    return value.const_value


def _shape(product: ir.Node) -> tuple[int, ...]:
    """``(in, out)``."""
    return tuple(_weight(product).shape.numpy())


def _remove(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Take nodes out, and the weights that only they had."""
    values = [value for node in nodes for value in node.inputs]
    graph.remove(nodes, safe=True)
    drop_unused(graph, values)
