"""Qwen3 decoder to ONNX, node by node, from a configuration and a state dict.

The graph is written rather than traced: it computes logits only at the positions that are asked
for, takes the number of valid KV positions directly, shares past and present buffers, and needs
only one tensor of the checkpoint in memory at a time. Inputs and outputs are those of
:class:`~tinygiant.runtime.config.DecoderConfig`.

Architecture after ``Qwen3ForCausalLM`` (transformers, modeling_qwen3.py); attention is onnxruntime's
``com.microsoft.GroupQueryAttention`` with rotary embeddings inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from tinygiant.export.external import ExternalWeights, weights_name
from tinygiant.runtime.config import DecoderConfig
from tinygiant.runtime.errors import CheckpointError

__all__ = ["LM_HEAD", "TensorSource", "build_decoder"]

TensorSource = npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]
"""An array, or a function that reads it when it is needed."""

LM_HEAD = "lm_head"
"""Name of the node that turns hidden states into logits."""

_OPSET = 21
_IR_VERSION = 10
_CONTRIB = "com.microsoft"


def build_decoder(config: DecoderConfig, tensors: Mapping[str, TensorSource], path: Path) -> None:
    """Write the decoder graph to ``path`` and its weights beside it.

    ``tensors`` has the names of ``Qwen3ForCausalLM.state_dict()``; without ``lm_head.weight`` the
    head is tied to the token embeddings. Every tensor is read once (the embeddings only if tied),
    converted to float32 and dropped again.

    Raises:
        CheckpointError: missing or wrongly shaped tensors, all of them in one message.
    """
    _check_names(config, tensors)
    with ExternalWeights(path.parent / weights_name(path.name)) as weights:
        builder = _Builder(config, tensors, weights)
        builder.decoder()
    graph = helper.make_graph(
        builder.nodes,
        "qwen3_decoder",
        inputs=_inputs(config),
        outputs=_outputs(config),
        initializer=weights.initializers,
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(_CONTRIB, 1)],
        ir_version=_IR_VERSION,
        producer_name="tinygiant",
    )
    onnx.save(model, path)


def _layer_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors, by their names below ``model.layers.{i}.``."""
    hidden, head, ffn = config.hidden_size, config.head_dim, config.ffn_size
    n_q, n_kv = config.n_heads * head, config.n_kv_heads * head
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (n_q, hidden),
        "self_attn.k_proj.weight": (n_kv, hidden),
        "self_attn.v_proj.weight": (n_kv, hidden),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "self_attn.o_proj.weight": (hidden, n_q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }


def _head_name(tensors: Mapping[str, TensorSource]) -> str:
    return "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"


def _check_names(config: DecoderConfig, tensors: Mapping[str, TensorSource]) -> None:
    needed = {
        f"model.layers.{layer}.{name}"
        for layer in range(config.n_layers)
        for name in _layer_shapes(config)
    } | {"model.norm.weight", _head_name(tensors)}
    missing = sorted(needed - set(tensors))
    unknown = sorted(set(tensors) - needed - {"model.embed_tokens.weight"})
    if missing or unknown:
        raise CheckpointError(
            f"decoder tensors do not fit {config.n_layers} Qwen3 layers: "
            f"missing {_shorten(missing)}, unknown {_shorten(unknown)}"
        )


def _shorten(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _cache_shape(config: DecoderConfig) -> list[int | str]:
    return [1, config.n_kv_heads, "capacity", config.head_dim]


def _inputs(config: DecoderConfig) -> list[onnx.ValueInfoProto]:
    value = helper.make_tensor_value_info
    return [
        value("inputs_embeds", TensorProto.FLOAT, [1, "sequence", config.hidden_size]),
        value("seqlens_k", TensorProto.INT32, [1]),
        value("total_sequence_length", TensorProto.INT32, []),
        value("logits_positions", TensorProto.INT64, ["n_logits"]),
        *(
            value(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, _cache_shape(config))
            for layer in range(config.n_layers)
            for kind in ("key", "value")
        ),
    ]


def _outputs(config: DecoderConfig) -> list[onnx.ValueInfoProto]:
    value = helper.make_tensor_value_info
    return [
        value("logits", TensorProto.FLOAT, [1, "n_logits", config.vocab_size]),
        *(
            value(f"present.{layer}.{kind}", TensorProto.FLOAT, _cache_shape(config))
            for layer in range(config.n_layers)
            for kind in ("key", "value")
        ),
    ]


def _rotary_caches(
    config: DecoderConfig,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines ``(max_positions, head_dim / 2)``, as ``Qwen3RotaryEmbedding`` has them.

    Angles are computed in float32 because the reference does; at far positions the rounding of the
    product is part of what the model was trained with.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.int64).astype(np.float32)
    frequencies = 1.0 / (np.float32(config.rope_theta) ** (exponents / np.float32(config.head_dim)))
    positions = np.arange(config.max_positions, dtype=np.float32)
    angles = np.outer(positions, frequencies.astype(np.float32))
    return np.cos(angles), np.sin(angles)


class _Builder:
    """Collects the nodes of the graph; weights go straight to ``weights``."""

    def __init__(
        self,
        config: DecoderConfig,
        tensors: Mapping[str, TensorSource],
        weights: ExternalWeights,
    ) -> None:
        self._config = config
        self._tensors = tensors
        self._weights = weights
        self.nodes: list[onnx.NodeProto] = []

    def decoder(self) -> None:
        """Layers, final norm, the asked-for rows, LM head."""
        config, weights = self._config, self._weights
        cos, sin = _rotary_caches(config)
        weights.add("rotary.cos_cache", cos)
        weights.add("rotary.sin_cache", sin)
        # 0 keeps a dimension of the input: (1, T, heads * head_dim) <-> (1, T, heads, head_dim)
        weights.add("shape.heads", np.array([0, 0, -1, config.head_dim], dtype=np.int64))
        weights.add("shape.flat", np.array([0, 0, -1], dtype=np.int64))
        residual, branch = "inputs_embeds", None
        for layer in range(config.n_layers):
            residual, branch = self._layer(layer, residual, branch)
        _, hidden = self._norm("model.norm", (config.hidden_size,), residual, branch)
        self._node("Gather", "logits_rows", [hidden, "logits_positions"], ["logits_rows"], axis=1)
        head = self._tensor(_head_name(self._tensors), (config.vocab_size, config.hidden_size))
        weights.add(f"{LM_HEAD}.weight", head.T)
        self._node("MatMul", LM_HEAD, ["logits_rows", f"{LM_HEAD}.weight"], ["logits"])

    def _layer(self, index: int, residual: str, branch: str | None) -> tuple[str, str]:
        """One transformer layer; returns the residual and the branch still to be added to it."""
        config, shapes = self._config, _layer_shapes(self._config)
        name = f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"

        def linear(module: str, source: str) -> str:
            return self._linear(f"{name}.{module}", shapes[f"{module}.weight"], source)

        hidden_shape = (config.hidden_size,)
        residual, hidden = self._norm(f"{name}.input_layernorm", hidden_shape, residual, branch)
        query = self._head_norm(f"{attention}.q_norm", linear("self_attn.q_proj", hidden))
        key = self._head_norm(f"{attention}.k_norm", linear("self_attn.k_proj", hidden))
        value = linear("self_attn.v_proj", hidden)
        self._node(
            "GroupQueryAttention",
            attention,
            [
                query,
                key,
                value,
                f"past_key_values.{index}.key",
                f"past_key_values.{index}.value",
                "seqlens_k",
                "total_sequence_length",
                "rotary.cos_cache",
                "rotary.sin_cache",
            ],
            [f"{attention}.out", f"present.{index}.key", f"present.{index}.value"],
            domain=_CONTRIB,
            num_heads=config.n_heads,
            kv_num_heads=config.n_kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=float(config.head_dim**-0.5),
        )
        attended = linear("self_attn.o_proj", f"{attention}.out")
        residual, hidden = self._norm(
            f"{name}.post_attention_layernorm", hidden_shape, residual, attended
        )
        gate = linear("mlp.gate_proj", hidden)
        self._node("QuickGelu", f"{mlp}.silu", [gate], [f"{mlp}.silu"], domain=_CONTRIB, alpha=1.0)
        up = linear("mlp.up_proj", hidden)
        self._node("Mul", f"{mlp}.gated", [f"{mlp}.silu", up], [f"{mlp}.gated"])
        return residual, linear("mlp.down_proj", f"{mlp}.gated")

    def _norm(
        self, name: str, shape: tuple[int, ...], residual: str, branch: str | None
    ) -> tuple[str, str]:
        """RMS norm of residual plus branch; returns that sum and its norm."""
        scale = self._weights.add(f"{name}.weight", self._tensor(f"{name}.weight", shape))
        epsilon = self._config.rms_norm_eps
        if branch is None:
            self._node(
                "SimplifiedLayerNormalization", name, [residual, scale], [name],
                axis=-1, epsilon=epsilon, stash_type=1,
            )  # fmt: skip
            return residual, name
        total = f"{name}.residual"
        # Outputs: the norm, two that only training uses, the sum (unless nobody reads it).
        outputs = [name] if name == "model.norm" else [name, "", "", total]
        self._node(
            "SkipSimplifiedLayerNormalization", name, [branch, residual, scale], outputs,
            domain=_CONTRIB, epsilon=epsilon,
        )  # fmt: skip
        return total, name

    def _head_norm(self, name: str, source: str) -> str:
        """RMS norm over each head of ``(1, T, heads * head_dim)``."""
        shape = (self._config.head_dim,)
        scale = self._weights.add(f"{name}.weight", self._tensor(f"{name}.weight", shape))
        heads, normed, flat = f"{name}.heads", f"{name}.normed", f"{name}.flat"
        self._node("Reshape", heads, [source, "shape.heads"], [heads])
        self._node(
            "SimplifiedLayerNormalization", name, [heads, scale], [normed],
            axis=-1, epsilon=self._config.rms_norm_eps, stash_type=1,
        )  # fmt: skip
        self._node("Reshape", flat, [normed, "shape.flat"], [flat])
        return flat

    def _linear(self, name: str, shape: tuple[int, ...], source: str) -> str:
        """``source @ weight.T``, with the weight stored as (in, out) for quantizers."""
        weight = self._weights.add(f"{name}.weight", self._tensor(f"{name}.weight", shape).T)
        self._node("MatMul", name, [source, weight], [f"{name}.out"])
        return f"{name}.out"

    def _tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        source = self._tensors[name]
        array = np.asarray(source() if callable(source) else source, dtype=np.float32)
        if array.shape != shape:
            raise CheckpointError(
                f"decoder tensor {name} has shape {array.shape}, the config says {shape}"
            )
        return array

    def _node(
        self, kind: str, name: str, inputs: list[str], outputs: list[str], **attributes: Any
    ) -> None:
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))
