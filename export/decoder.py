"""A decoder to ONNX, node by node, from a configuration and a state dict: Qwen3 or Llama.

The graph is written rather than traced: it computes logits only at the positions that are asked
for, takes the number of valid KV positions directly, shares past and present buffers, and needs
one tensor of the checkpoint in memory at a time. A step of one token may have any number of
sequences, each with its own length. Inputs and outputs are those of
:class:`~tinygiant.runtime.config.DecoderConfig`.

Architecture after ``Qwen3ForCausalLM`` and ``LlamaForCausalLM`` (transformers), which differ in the
norms of queries and keys; attention is onnxruntime's ``com.microsoft.GroupQueryAttention`` with
rotary embeddings inside. :meth:`DecoderSpec.of` refuses a family that has more than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from transformers import PretrainedConfig

from tinygiant.models.config import rope_theta
from tinygiant.quantize.graph import save_graph
from tinygiant.runtime.config import DecoderConfig
from tinygiant.runtime.errors import CheckpointError

from .rotation import Rotation, TensorSource

__all__ = [
    "LM_HEAD",
    "OPSET",
    "PROMPT_BLOCKS",
    "ROTATION",
    "DecoderSpec",
    "RopeScaling",
    "TensorSource",
    "build_decoder",
    "read_tensors",
]

LM_HEAD = "lm_head"
"""Name of the node that turns hidden states into logits."""

ROTATION = "rotation"
"""Name, or the end of the name, of the nodes that rotate rows, in a rotated decoder."""

PROMPT_BLOCKS = 4
"""Blocks of rows in which a graph for prompts attends: with more, little more is gained."""

OPSET = 21
_IR_VERSION = 10
_CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary positions, under transformers' names (``rope_type: llama3``).

    The model was first trained on ``original_max_position_embeddings`` positions. Frequencies that
    turn less than ``low_freq_factor`` times in them are divided by ``factor``, those that turn more
    than ``high_freq_factor`` times are kept; in between the two are mixed.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def of(cls, rotary: Mapping[str, Any]) -> RopeScaling | None:
        """The scaling in a configuration's rotary parameters; None if it is not of this kind."""
        if _rope_type(rotary) != "llama3":
            return None
        return cls(**{item.name: rotary[item.name] for item in dataclasses.fields(cls)})

    def applied(self, frequencies: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Radians a position, ``(n,)`` -> ``(n,)``."""
        turns = frequencies * np.float32(self.original_max_position_embeddings / (2 * np.pi))
        width = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - np.float32(self.low_freq_factor)) / np.float32(width), 0, 1)
        stretched = frequencies / np.float32(self.factor)
        scaled: npt.NDArray[np.float32] = (1 - kept) * stretched + kept * frequencies
        return scaled


def _rope_type(rotary: Mapping[str, Any]) -> str:
    return str(rotary.get("rope_type", rotary.get("type", "default")))


@dataclass(frozen=True)
class DecoderSpec(DecoderConfig):
    """The sizes that the graph is built from: the runtime's, and those inside of it.

    ``qk_norm``: queries and keys are normalised head by head, as in Qwen3; Llama has no such norms.
    ``rope_scaling``: how Llama 3.1 and later stretch rotary positions; None: not at all.
    """

    n_heads: int = field(kw_only=True)
    ffn_size: int = field(kw_only=True)
    rms_norm_eps: float = field(kw_only=True)
    rope_theta: float = field(kw_only=True)
    qk_norm: bool = field(kw_only=True)
    rope_scaling: RopeScaling | None = field(kw_only=True, default=None)

    @classmethod
    def of(cls, config: DecoderConfig, upstream: PretrainedConfig) -> DecoderSpec:
        """The decoder ``config`` with the inside of a transformers configuration.

        Raises:
            CheckpointError: it has something that the graph lacks: biases, another activation,
                rotary positions scaled in another way than Llama 3's, a family that is neither
                Qwen3 nor Llama.
        """
        kind = upstream.model_type
        if kind not in _QK_NORM:
            raise CheckpointError(
                f"no graph for a decoder of the family {kind}; expected {', '.join(_QK_NORM)}"
            )
        # transformers 5 calls it rope_parameters.
        rotary = getattr(upstream, "rope_parameters", None) or upstream.rope_scaling or {}
        problems = [
            what
            for what, wrong in (
                ("attention has biases", bool(getattr(upstream, "attention_bias", False))),
                ("the MLP has biases", bool(getattr(upstream, "mlp_bias", False))),
                (f"its activation is {upstream.hidden_act}", upstream.hidden_act != "silu"),
                (f"its heads have {config.head_dim} features", config.head_dim % 16 != 0),
                (
                    f"rotary positions are scaled the way {_rope_type(rotary)}",
                    _rope_type(rotary) not in ("default", "llama3"),
                ),
            )
            if wrong
        ]
        if problems:
            raise CheckpointError(
                f"no graph for this decoder: {'; '.join(problems)}; a plain Qwen3 or Llama is "
                "expected, its heads a multiple of 16 features"
            )
        return cls(
            **{f.name: getattr(config, f.name) for f in dataclasses.fields(DecoderConfig)},
            n_heads=upstream.num_attention_heads,
            ffn_size=upstream.intermediate_size,
            rms_norm_eps=upstream.rms_norm_eps,
            rope_theta=rope_theta(upstream),
            qk_norm=_QK_NORM[kind],
            rope_scaling=RopeScaling.of(rotary),
        )


_QK_NORM = {"qwen3": True, "llama": False}


def build_decoder(
    config: DecoderSpec,
    tensors: Mapping[str, TensorSource],
    path: Path,
    rotation: Rotation | None = None,
    *,
    prompt_blocks: int = 0,
) -> None:
    """Write the decoder graph to ``path`` and its weights next to it.

    ``tensors`` has the names of transformers' ``state_dict()``; without ``lm_head.weight`` the
    head is tied to the token embeddings. Every tensor is read when its turn to be written comes,
    converted to float32 and dropped again. ``rotation`` is that of
    :func:`tinygiant.export.rotation.rotated`, which ``tensors`` then come from.

    With ``prompt_blocks`` the graph only reads: it leaves keys and values behind and has no logits,
    so the last layer ends with its keys and values. Attention computes each query's products with
    all keys, those behind it too, and so takes the rows in so many blocks: of four, a block's keys
    are on average five eighths of all. The caches of the blocks are outputs too,
    ``present.LAYER.KIND.BLOCK``, to be bound to the one buffer: then nothing is copied. Of ``n``
    blocks none is empty if there are ``n * (n - 1)`` rows.

    Raises:
        CheckpointError: missing, unknown or wrongly shaped tensors.
    """
    _check_names(config, tensors)
    builder = _Builder(config, tensors, rotation, prompt_blocks)
    outputs = builder.reader() if prompt_blocks else builder.decoder()
    graph = ir.Graph(
        inputs=builder.inputs,
        outputs=outputs,
        nodes=builder.nodes,
        initializers=builder.weights,
        opset_imports={"": OPSET, _CONTRIB: 1},
        name="decoder",
    )
    model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="tinygiant")
    save_graph(model, path)


def read_tensors(path: Path) -> dict[str, TensorSource]:
    """The tensors of a graph that :func:`build_decoder` wrote: one is in memory at a time.

    Names and shapes are again transformers'; a head that was tied to the embeddings is there by
    itself, and the embeddings are not.
    """

    found: dict[str, TensorSource] = {}
    for name, value in ir.load(path).graph.initializers.items():
        if name.endswith(".weight") and value.const_value is not None:
            found[name] = partial(_stored, value.const_value)
    return found


def _stored(tensor: ir.TensorProtocol) -> npt.NDArray[np.float32]:
    return tensor.numpy().T  # products are stored as (in, out)


def _layer_shapes(config: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors, by their names below ``model.layers.{i}.``."""
    hidden, head, ffn = config.hidden_size, config.head_dim, config.ffn_size
    n_q, n_kv = config.n_heads * head, config.n_kv_heads * head
    norms = {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    return {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (n_q, hidden),
        "self_attn.k_proj.weight": (n_kv, hidden),
        "self_attn.v_proj.weight": (n_kv, hidden),
        **(norms if config.qk_norm else {}),
        "self_attn.o_proj.weight": (hidden, n_q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }


def _head_name(tensors: Mapping[str, TensorSource]) -> str:
    return "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"


def _check_names(config: DecoderSpec, tensors: Mapping[str, TensorSource]) -> None:
    needed = {
        f"model.layers.{layer}.{name}"
        for layer in range(config.n_layers)
        for name in _layer_shapes(config)
    } | {"model.norm.weight", _head_name(tensors)}
    missing = sorted(needed - set(tensors))
    unknown = sorted(set(tensors) - needed - {"model.embed_tokens.weight"})
    if missing or unknown:
        raise CheckpointError(
            f"decoder tensors do not fit {config.n_layers} layers: "
            f"missing {_shorten(missing)}, unknown {_shorten(unknown)}"
        )


def _shorten(names: list[str], limit: int = 8) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _rotary_caches(
    config: DecoderSpec,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Cosines and sines ``(max_positions, head_dim / 2)``, as transformers has them.

    Angles are computed in float32 because the reference does; at far positions the rounding of the
    product is part of what the model was trained with.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1.0) / np.float32(config.rope_theta) ** exponents
    if config.rope_scaling is not None:
        frequencies = config.rope_scaling.applied(frequencies)
    angles = np.outer(np.arange(config.max_positions, dtype=np.float32), frequencies)
    return np.cos(angles), np.sin(angles)


class _Builder:
    """Collects inputs, weights and nodes; every value has the name of the module it comes from."""

    def __init__(
        self,
        config: DecoderSpec,
        tensors: Mapping[str, TensorSource],
        rotation: Rotation | None,
        n_blocks: int = 0,
    ) -> None:
        self._config = config
        self._n_blocks = n_blocks
        self._tensors = tensors
        self._rotation = rotation
        self.inputs: list[ir.Value] = []
        self.weights: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        if config.qk_norm:
            # 0 keeps a dimension of the input: (B, T, heads * head_dim) <-> (B, T, heads, head_dim)
            self._heads = self._constant("shape.heads", np.array([0, 0, -1, config.head_dim]))
            self._flat = self._constant("shape.flat", np.array([0, 0, -1]))
        if rotation is not None:
            block = rotation.gated.astype(np.float32)
            self._block = self._constant(f"{ROTATION}.gated", block)
            # All sizes are named: of no rows none can be inferred.
            blocks = np.array([0, 0, config.ffn_size // len(block), len(block)])
            self._blocks = self._constant("shape.blocks", blocks)
            self._rows = self._constant("shape.rows", np.array([0, 0, config.ffn_size]))

    def decoder(self) -> list[ir.Value]:
        """Layers, the last one for the asked-for rows, norm, LM head: ``logits``, the presents."""
        config = self._config
        attention_inputs = self._shared_inputs()
        positions = self._input("logits_positions", ir.DataType.INT64, ["n_logits"])
        residual, branch = self._stream(), None
        presents: list[ir.Value] = []
        for index in range(config.n_layers):
            residual, attended, present = self._attention(index, residual, branch, attention_inputs)
            presents += present
            if index + 1 == config.n_layers:  # of the others, only keys and values are wanted
                residual, attended = (
                    self._node("Gather", f"{what}_rows", [rows, positions], axis=1)[0]
                    for what, rows in (("residual", residual), ("attended", attended))
                )
            residual, branch = self._mlp(index, residual, attended)
        _, rows = self._norm("model.norm", residual, branch, last=True)
        weight = self._weight(
            f"{LM_HEAD}.weight",
            _head_name(self._tensors),
            (config.vocab_size, config.hidden_size),
            transpose=True,
        )
        (logits,) = self._node("MatMul", LM_HEAD, [rows, weight], ["logits"])
        _declare(logits, ["batch", "n_logits", config.vocab_size])
        return [logits, *presents]

    def reader(self) -> list[ir.Value]:
        """Layers as far as their keys and values: the presents, of each block."""
        blocks = self._blocks_of(*self._shared_inputs())
        residual, branch = self._stream(), None
        presents: list[ir.Value] = []
        for index in range(self._config.n_layers):
            residual, attended, present = self._attention(index, residual, branch, *blocks)
            presents += present
            if index + 1 < self._config.n_layers:
                residual, branch = self._mlp(index, residual, attended)
        return presents

    def _shared_inputs(self) -> list[ir.Value]:
        """What attention takes in every layer."""
        self._embeds = self._input(
            "inputs_embeds", ir.DataType.FLOAT, ["batch", "sequence", self._config.hidden_size]
        )
        seqlens = self._input("seqlens_k", ir.DataType.INT32, ["batch"])
        total = self._input("total_sequence_length", ir.DataType.INT32, [])
        cos, sin = _rotary_caches(self._config)
        return [
            seqlens,
            total,
            self._constant("rotary.cos_cache", cos),
            self._constant("rotary.sin_cache", sin),
        ]

    def _stream(self) -> ir.Value:
        """The residual stream before the first layer."""
        if self._rotation is None:
            return self._embeds
        matrix = self._constant(f"{ROTATION}.stream", self._rotation.stream.astype(np.float32))
        return self._node("MatMul", ROTATION, [self._embeds, matrix])[0]

    def _blocks_of(
        self, seqlens: ir.Value, total: ir.Value, *others: ir.Value
    ) -> list[list[ir.Value]]:
        """What attention takes in every layer, for each block of rows.

        ``Split`` gives each block but the last as many rows, rounded up.
        """
        n_blocks = self._n_blocks
        (n_rows,) = self._node("Shape", "blocks.n_rows", [self._embeds], start=1, end=2)
        (n_rows,) = self._node("Cast", "blocks.n_rows.int32", [n_rows], to=ir.DataType.INT32)
        more = self._constant("blocks.more", np.array([n_blocks - 1], np.int32))
        (size,) = self._node("Add", "blocks.more.rows", [n_rows, more])
        divisor = self._constant("blocks.n", np.array([n_blocks], np.int32))
        (size,) = self._node("Div", "blocks.size", [size, divisor])
        (before,) = self._node("Sub", "blocks.before", [seqlens, n_rows])
        one = self._constant("blocks.one", np.array(1, np.int32))
        scalar = self._constant("shape.scalar", np.array([], np.int64))
        blocks = []
        for block in range(1, n_blocks):
            name = f"blocks.{block}"
            count = self._constant(f"{name}.count", np.array([block], np.int32))
            (rows,) = self._node("Mul", f"{name}.rows", [size, count])
            (last,) = self._node("Add", f"{name}.seqlens_k", [before, rows])
            (end,) = self._node("Reshape", f"{name}.last", [last, scalar])
            (end,) = self._node("Add", f"{name}.total_sequence_length", [end, one])
            blocks.append([last, end, *others])
        return [*blocks, [seqlens, total, *others]]

    def _attention(
        self,
        index: int,
        residual: ir.Value,
        branch: ir.Value | None,
        *blocks: list[ir.Value],
    ) -> tuple[ir.Value, ir.Value, list[ir.Value]]:
        """Half a layer: the residual, what attention found, the presents of each block of rows."""
        config, name = self._config, f"model.layers.{index}"
        attention = f"{name}.self_attn"
        cache_shape = ["batch", config.n_kv_heads, "capacity", config.head_dim]

        residual, hidden = self._norm(f"{name}.input_layernorm", residual, branch)
        query, key, value = (self._linear(f"{attention}.{x}_proj", hidden) for x in "qkv")
        if config.qk_norm:
            query = self._head_norm(f"{attention}.q_norm", query)
            key = self._head_norm(f"{attention}.k_norm", key)
        caches = [
            self._input(f"past_key_values.{index}.{kind}", ir.DataType.FLOAT, cache_shape)
            for kind in ("key", "value")
        ]
        rows = list(zip(*(self._split(x, len(blocks)) for x in (query, key, value)), strict=True))
        attended: list[ir.Value] = []
        presents: list[ir.Value] = []
        for block, others in enumerate(blocks):
            part = "" if block == len(blocks) - 1 else f".{block}"
            found, *caches = self._node(
                "GroupQueryAttention",
                f"{attention}{part}",
                [*rows[block], *caches, *others],
                [
                    f"{attention}.out{part}",
                    f"present.{index}.key{part}",
                    f"present.{index}.value{part}",
                ],
                domain=_CONTRIB,
                num_heads=config.n_heads,
                kv_num_heads=config.n_kv_heads,
                do_rotary=1,
                rotary_interleaved=0,
                scale=float(config.head_dim**-0.5),
            )
            for present in caches:
                _declare(present, cache_shape)
            attended.append(found)
            presents += caches
        if len(attended) > 1:
            attended = self._node("Concat", f"{attention}.blocks", attended, axis=1)
        return residual, attended[0], presents

    def _split(self, rows: ir.Value, n_blocks: int) -> list[ir.Value]:
        """``(B, S, F)`` in blocks of rows."""
        if n_blocks == 1:
            return [rows]
        outputs = [f"{rows.name}.{block}" for block in range(n_blocks)]
        return self._node(
            "Split", f"{rows.name}.blocks", [rows], outputs, axis=1, num_outputs=n_blocks
        )

    def _mlp(self, index: int, residual: ir.Value, attended: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The rest of a layer: the residual, and the branch not yet added to it."""
        name = f"model.layers.{index}"
        mlp = f"{name}.mlp"
        attended = self._linear(f"{name}.self_attn.o_proj", attended)
        residual, hidden = self._norm(f"{name}.post_attention_layernorm", residual, attended)
        gate = self._linear(f"{mlp}.gate_proj", hidden)
        # QuickGelu is x * sigmoid(alpha * x): SiLU at alpha 1, in one node.
        (gate,) = self._node("QuickGelu", f"{mlp}.silu", [gate], domain=_CONTRIB, alpha=1.0)
        up = self._linear(f"{mlp}.up_proj", hidden)
        (gated,) = self._node("Mul", f"{mlp}.gated", [gate, up])
        if self._rotation is not None:
            gated = self._rotated_blocks(f"{mlp}.{ROTATION}", gated)
        return residual, self._linear(f"{mlp}.down_proj", gated)

    def _rotated_blocks(self, name: str, rows: ir.Value) -> ir.Value:
        """``(B, S, F)``, each block of channels multiplied with the rotation's."""
        (blocks,) = self._node("Reshape", f"{name}.blocks", [rows, self._blocks])
        (product,) = self._node("MatMul", name, [blocks, self._block])
        (result,) = self._node("Reshape", f"{name}.flat", [product, self._rows])
        return result

    def _norm(
        self, name: str, residual: ir.Value, branch: ir.Value | None, *, last: bool = False
    ) -> tuple[ir.Value, ir.Value]:
        """Residual plus branch, and the RMS norm of that sum."""
        scale = self._weight(f"{name}.weight", f"{name}.weight", (self._config.hidden_size,))
        epsilon = self._config.rms_norm_eps
        if branch is None:
            return residual, self._rms_norm(name, residual, scale)
        # Outputs 1 and 2 are for training; the sum is left out where nobody reads it.
        outputs = [name] if last else [name, "", "", f"{name}.residual"]
        normed, *rest = self._node(
            "SkipSimplifiedLayerNormalization",
            name,
            [branch, residual, scale],
            outputs,
            domain=_CONTRIB,
            epsilon=epsilon,
        )
        return (rest[-1] if rest else residual), normed

    def _head_norm(self, name: str, source: ir.Value) -> ir.Value:
        """RMS norm over each head of ``(B, T, heads * head_dim)``."""
        scale = self._weight(f"{name}.weight", f"{name}.weight", (self._config.head_dim,))
        (heads,) = self._node("Reshape", f"{name}.heads", [source, self._heads])
        normed = self._rms_norm(name, heads, scale)
        (flat,) = self._node("Reshape", f"{name}.flat", [normed, self._flat])
        return flat

    def _rms_norm(self, name: str, source: ir.Value, scale: ir.Value) -> ir.Value:
        (normed,) = self._node(
            "SimplifiedLayerNormalization",
            name,
            [source, scale],
            axis=-1,
            epsilon=self._config.rms_norm_eps,
            stash_type=1,
        )
        return normed

    def _linear(self, module: str, source: ir.Value) -> ir.Value:
        """``source @ weight.T``; the weight is stored as (in, out), which quantizers expect."""
        name = f"{module}.weight"
        shape = _layer_shapes(self._config)[name.split(".", 3)[3]]
        (out,) = self._node("MatMul", module, [source, self._weight(name, name, shape, True)])
        return out

    def _weight(
        self, name: str, source: str, shape: tuple[int, ...], transpose: bool = False
    ) -> ir.Value:
        """A weight that is read from ``tensors[source]`` when it is written."""

        def read() -> ir.TensorProtocol:
            found = self._tensors[source]
            array = np.asarray(found() if callable(found) else found, dtype=np.float32)
            if array.shape != shape:
                raise CheckpointError(
                    f"decoder tensor {source} has shape {array.shape}, the config says {shape}"
                )
            return ir.Tensor(np.ascontiguousarray(array.T if transpose else array), name=name)

        stored = ir.Shape(shape[::-1] if transpose else shape)
        tensor = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=stored, name=name)
        return self._initializer(name, tensor)

    def _constant(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        return self._initializer(name, ir.Tensor(array, name=name))

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.weights.append(value)
        return value

    def _input(self, name: str, dtype: ir.DataType, shape: list[Any]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def _node(
        self,
        kind: str,
        name: str,
        inputs: list[ir.Value],
        outputs: list[str] | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node; returns its outputs but those with an empty name."""
        values = [ir.Value(name=output) for output in outputs or [f"{name}.out"]]
        self.nodes.append(
            ir.node(kind, inputs, attributes, domain=domain, outputs=values, name=name)
        )
        return [value for value in values if value.name]


def _declare(value: ir.Value, shape: list[Any]) -> None:
    """Give a graph output the type and shape that the file must state."""
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
