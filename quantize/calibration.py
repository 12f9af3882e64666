"""Second moments of the inputs of a decoder's products, over texts.

The contract: a float32 decoder graph of :class:`~tinygiant.runtime.config.DecoderConfig` in, run
with onnxruntime over texts given as embeddings; for each value that a weight is multiplied with,
the mean of ``x x^T`` over all positions out. :mod:`tinygiant.quantize.gptq` needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tinygiant.runtime.ort.sessions import Graph, SessionSettings

from .graph import load_graph

__all__ = ["input_moments"]

_LAYER_INPUTS = "past_key_values."


def input_moments(
    source: Path, texts: Sequence[npt.NDArray[np.float32]], settings: SessionSettings
) -> dict[str, npt.NDArray[np.float32]]:
    """Second moments ``(K, K)`` of the inputs of a decoder's products, by the input's name.

    The LM head is left out.

    Args:
        source: the float32 graph; a file next to it is written and removed.
        texts: embeddings ``(T, D)`` of each.
        settings: how the graph is run.
    """
    model = load_graph(source)
    names = _add_outputs(model.graph)
    observed = source.with_name(f"{source.stem}.observed.onnx")
    # Its weights stay where they are: the file refers to them.
    ir.save(model, observed)
    moments: dict[str, npt.NDArray[np.float32]] = {}
    try:
        graph = Graph(observed, settings)
        for text in texts:
            outputs = graph.run(_inputs(model.graph, text))
            for name in names:
                rows = outputs[name][0]
                moment = rows.T @ rows
                moments[name] = moments[name] + moment if name in moments else moment
        graph.close()
    finally:
        observed.unlink(missing_ok=True)
    n_rows = np.float32(sum(len(text) for text in texts))
    return {name: moment / n_rows for name, moment in moments.items()}


def _add_outputs(graph: ir.Graph) -> list[str]:
    """Make the input of every product of a layer an output of the graph, which ends before logits.

    Returns the names of the inputs.
    """
    found: dict[str, ir.Value] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "MatMul" else None
        if source is None or source.shape is not None:
            continue
        if node.outputs[0] in graph.outputs:
            graph.outputs.remove(node.outputs[0])
            graph.remove(node)
        else:
            found[str(source.name)] = source
    for source in found.values():
        source.type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs.append(source)
    return [*found]


def _inputs(
    graph: ir.Graph, text: npt.NDArray[np.float32]
) -> dict[str, npt.NDArray[np.float32] | npt.NDArray[np.int32] | npt.NDArray[np.int64]]:
    """A run that begins with an empty cache.

    Logits are asked for at every position: the last layer goes on with no others.
    """
    length = len(text)
    pasts = {}
    for value in graph.inputs:
        if str(value.name).startswith(_LAYER_INPUTS) and value.shape is not None:
            n_heads, head_dim = (int(str(value.shape[axis])) for axis in (1, 3))
            pasts[str(value.name)] = np.zeros((1, n_heads, length, head_dim), np.float32)
    return {
        **pasts,
        "inputs_embeds": text[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "logits_positions": np.arange(length, dtype=np.int64),
    }
