"""From a PyTorch module to a graph whose weights quantizers can see.

The contract of :func:`trace`: every Linear becomes ``MatMul(x, weight)`` with the weight stored as
a constant ``(in, out)`` under its PyTorch name (and ``Add`` of the bias), the node carries the name
of its module, and every ``scaled_dot_product_attention`` becomes one
``com.microsoft.MultiHeadAttention``. Weights are not copied: a transposed one is made when it is
written.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxscript
import onnxscript.optimizer
import torch

from tinygiant.models.family import Part

from .decoder import OPSET

__all__ = ["trace"]

_CONTRIB = "com.microsoft"


def trace(part: Part) -> ir.Model:
    """Export ``part`` with ``torch.onnx`` and bring its graph into this project's form."""
    shapes = {name: dict(part.dynamic.get(name, {})) for name in part.inputs}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            part.module,
            args=(),
            kwargs=dict(part.inputs),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
            custom_translation_table={
                torch.ops.aten.scaled_dot_product_attention.default: _fused_attention,
                torch.ops.aten.upsample_bicubic2d.vec: _stretched_time,
            },
        )
    if program is None:  # only where torch.onnx.export writes a file itself
        raise RuntimeError("torch.onnx.export returned no program")
    model = program.model
    traced_values = list(model.graph.initializers.values())
    _split_gemms(model.graph)
    _fold_transposes(model.graph)
    _optimize(model)
    common_passes.IdentityEliminationPass()(model)
    _optimize(model)
    _drop_idle_reshapes(model.graph)
    _cancel_transposes(model.graph)
    _drop_idle_reshapes(model.graph)  # those around the transposes that have gone
    common_passes.RemoveUnusedNodesPass()(model)
    common_passes.RemoveUnusedOpsetsPass()(model)
    common_passes.ClearMetadataAndDocStringPass()(model)
    _name_after_weights(model.graph)
    own = model.clone()
    # onnxscript's rewriter keeps the last graph it has seen: let it keep no weights.
    for value in (*traced_values, *model.graph.initializers.values()):
        value.const_value = None
    return own


def _optimize(model: ir.Model) -> None:
    """Fold constants up to the size of HTS-AT's attention masks, and simplify."""
    onnxscript.optimizer.optimize(model, input_size_limit=1 << 20, output_size_limit=1 << 20)


def _attention_schema() -> onnx.defs.OpSchema:
    """The part of MultiHeadAttention's signature that is used (onnxruntime, ContribOperators)."""
    schema = onnx.defs.OpSchema
    kinds = schema.AttrType
    return schema(
        "MultiHeadAttention",
        _CONTRIB,
        1,
        inputs=[schema.FormalParameter(name, "T") for name in ("query", "key", "value")],
        outputs=[schema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            schema.Attribute("num_heads", kinds.INT, required=True),
            schema.Attribute("scale", kinds.FLOAT, required=False),
        ],
    )


_MULTI_HEAD_ATTENTION = onnxscript.values.Op(
    onnxscript.values.Opset(_CONTRIB, 1), "MultiHeadAttention", _attention_schema()
)


def _fused_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translation of ``scaled_dot_product_attention``: (B, heads, S, d) in and out."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("only full, unmasked attention is translated")
    op: Any = onnxscript.opset21
    _, n_heads, _, head_dim = query.shape

    def flat(heads: Any) -> Any:
        return op.Reshape(
            op.Transpose(heads, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1])
        )

    out = _MULTI_HEAD_ATTENTION(
        flat(query),
        flat(key),
        flat(value),
        num_heads=int(n_heads),
        scale=float(scale if scale is not None else head_dim**-0.5),
    )
    # Shape inference knows no contrib operators.
    out.shape = ir.Shape([query.shape[0], query.shape[2], int(n_heads) * int(head_dim)])
    out.dtype = query.dtype
    heads = op.Reshape(out, op.Constant(value_ints=[0, 0, int(n_heads), int(head_dim)]))
    return op.Transpose(heads, perm=[0, 2, 1, 3])


def _stretched_time(
    source: Any, output_size: Any, align_corners: bool, scale_factors: Any = None
) -> Any:
    """Translation of ``upsample_bicubic2d`` where only the height changes.

    HTS-AT stretches its 1001 frames to 1024 so. Every output row is a weighted sum of four input
    rows; the weights are PyTorch's own, whereas onnxruntime's ``Resize`` rounds its coordinates
    differently (3e-5 of the encoder's output).
    """
    height, width = int(source.shape[2]), int(source.shape[3])
    n_out = int(output_size[0])
    if int(output_size[1]) != width:
        raise NotImplementedError("only a change of height is translated")
    rows = torch.nn.functional.interpolate(
        torch.eye(height)[None, None], (n_out, height), mode="bicubic", align_corners=align_corners
    )[0, 0]
    taps = rows.abs().topk(4).indices  # (n_out, 4)
    weights = rows.gather(1, taps)[..., None]
    op: Any = onnxscript.opset21
    gathered = op.Gather(source, op.Constant(value=ir.tensor(taps)), axis=2)
    weighted = op.Mul(gathered, op.Constant(value=ir.tensor(weights)))
    return op.ReduceSum(weighted, op.Constant(value_ints=[3]), keepdims=0)


def _split_gemms(graph: ir.Graph) -> None:
    """``Gemm(x, w, b)`` -> ``MatMul`` and ``Add``: dynamic quantization knows only MatMul."""
    for node in [node for node in graph if node.op_type == "Gemm"]:
        source, weight, *bias = node.inputs
        if any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
            continue
        if node.attributes.get_int("transA", 0):
            continue
        replacement: list[ir.Node] = []
        if node.attributes.get_int("transB", 0):
            replacement.append(ir.node("Transpose", [weight], {"perm": [1, 0]}))
            weight = replacement[-1].outputs[0]
        replacement.append(ir.node("MatMul", [source, weight]))
        if bias:
            replacement.append(ir.node("Add", [replacement[-1].outputs[0], bias[0]]))
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], replacement, node.outputs, replacement[-1].outputs
        )


def _fold_transposes(graph: ir.Graph) -> None:
    """Replace ``Transpose(weight)`` by a weight that is stored transposed, whatever its size."""
    for node in [node for node in graph if node.op_type == "Transpose"]:
        weight = node.inputs[0]
        perm = node.attributes.get_ints("perm")
        if weight is None or not weight.is_initializer() or perm is None:
            continue
        tensor = weight.const_value
        if tensor is None or graph.initializers.get(weight.name or "") is not weight:
            continue
        (output,) = node.outputs
        stored = ir.Value(
            name=weight.name,
            shape=_permuted(tensor, perm),
            type=ir.TensorType(tensor.dtype),
            const_value=_transposed(tensor, perm),
        )
        if len(weight.uses()) == 1:
            del graph.initializers[str(weight.name)]
        else:
            stored.name = f"{weight.name}.transposed"
        output.replace_all_uses_with(stored)
        graph.remove(node, safe=True)
        graph.initializers[str(stored.name)] = stored


def _transposed(tensor: ir.TensorProtocol, perm: Sequence[int]) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        return ir.tensor(tensor.numpy().transpose(perm).copy(), name=tensor.name)

    return ir.LazyTensor(make, dtype=tensor.dtype, shape=_permuted(tensor, perm), name=tensor.name)


def _permuted(tensor: ir.TensorProtocol, perm: Sequence[int]) -> ir.Shape:
    sizes = tensor.shape.numpy()
    return ir.Shape([sizes[axis] for axis in perm])


def _cancel_transposes(graph: ir.Graph) -> None:
    """Drop pairs of Transposes that undo one another, as around fused attention."""
    for node in [node for node in graph if node.op_type == "Transpose"]:
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is None or producer.op_type != "Transpose" or producer.inputs[0] is None:
            continue
        first, second = (n.attributes.get_ints("perm") for n in (producer, node))
        if first is None or second is None or node.outputs[0].is_graph_output():
            continue
        if [first[axis] for axis in second] == list(range(len(first))):
            node.outputs[0].replace_all_uses_with(producer.inputs[0])


def _drop_idle_reshapes(graph: ir.Graph) -> None:
    """Drop Reshapes whose output is, by name of every size, a value that they come from.

    Fused attention takes and gives ``(B, S, heads * d)``, so the reshapes to and from single heads
    around it are idle.
    """
    for node in [node for node in graph if node.op_type == "Reshape"]:
        source, output = node.inputs[0], node.outputs[0]
        if source is None or output.is_graph_output() or output.shape is None:
            continue
        origin = source
        while (producer := origin.producer()) is not None and producer.op_type == "Reshape":
            if producer.inputs[0] is None or producer.inputs[0].shape is None:
                break
            origin = producer.inputs[0]
        known = [value for value in _reshape_chain(source, origin) if value.shape == output.shape]
        if known:
            output.replace_all_uses_with(known[0])


def _reshape_chain(last: ir.Value, first: ir.Value) -> Iterator[ir.Value]:
    """The values from ``last`` back to ``first`` through a chain of Reshapes."""
    value = last
    yield value
    while value is not first:
        producer = value.producer()
        if producer is None or producer.inputs[0] is None:
            return
        value = producer.inputs[0]
        yield value


def _name_after_weights(graph: ir.Graph) -> None:
    """Give every node with a weight of its own the name of the weight's module."""
    taken: set[str] = set()
    for node in graph:
        weights = [v for v in node.inputs if v is not None and v.is_initializer() and v.name]
        module = next(
            (str(v.name).removesuffix(".weight") for v in weights if _is_weight(str(v.name))), None
        )
        if module is not None and module not in taken:
            taken.add(module)
            node.name = module


def _is_weight(name: str) -> bool:
    return name.endswith(".weight")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx tells of optional packages and of its own deprecations; none concern the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
