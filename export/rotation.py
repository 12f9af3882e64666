"""A decoder in a rotated basis: the same function, weights and activations smoothed.

A few channels of a language model's residual stream are far larger than the others, and 8 bits with
one scale a row are too coarse for both. An orthogonal matrix spreads them over all channels: what
is added to the stream is rotated by it, what is read from the stream is rotated back, and all of it
is folded into the weights (after Ashkboos et al., *QuaRot*, and Liu et al., *SpinQuant*, 2024). RMS
norms commute with a rotation once their weights are folded into the products behind them. Rows that
enter the decoder are rotated by the graph's first product, so its inputs and outputs stay what they
are, and neither embeddings nor projector know of it.

Values are rotated head by head, between the two products around attention, which costs nothing
either. The input of an MLP's last product has outliers of its own, and no linear layer before it
into which a rotation could be folded. The graph rotates it, in blocks: a small product for each
layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Rotation", "TensorSource", "block_rotation", "random_rotation", "rotated"]

TensorSource = npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]
"""An array, or a function that reads it when it is needed."""

Matrix = npt.NDArray[np.float64]

_VALUES = "self_attn.v_proj"
# Products that read the stream, by the norm before them, and those that are added to it.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", _VALUES),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_HEAD, _EMBEDDINGS, _LAST_NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
_LARGEST_BLOCK, _PROMPT_BLOCK = 128, 32
_IDENTITY: Matrix = np.eye(1)


@dataclass(frozen=True, eq=False)
class Rotation:
    """Orthogonal matrices, each the identity ``(1, 1)`` where nothing is to be rotated.

    Attributes:
        stream: ``(D, D)``, of the residual stream.
        values: of each block of a head's values.
        gated: of each block of the channels between an MLP's products.
    """

    stream: Matrix
    values: Matrix = field(default_factory=lambda: _IDENTITY)
    gated: Matrix = field(default_factory=lambda: _IDENTITY)

    @classmethod
    def random(cls, hidden_size: int, head_dim: int, ffn_size: int, seed: int = 0) -> Rotation:
        """Those of a decoder of these sizes, the same for the same seed."""
        return cls(
            random_rotation(hidden_size, seed),
            block_rotation(head_dim, seed),
            block_rotation(ffn_size, seed),
        )

    @classmethod
    def of_prompts(cls, hidden_size: int, ffn_size: int, seed: int = 0) -> Rotation:
        """Those of a graph that reads prompts, the same for the same seed.

        Values stay as they are: a decoder that is not rotated reads them too. The smaller blocks
        are a quarter of the products: 2 % of a prompt's time where blocks of 128 take 10 %.
        """
        gated = block_rotation(ffn_size, seed, largest=_PROMPT_BLOCK)
        return cls(random_rotation(hidden_size, seed), gated=gated)


def block_rotation(size: int, seed: int = 0, largest: int = _LARGEST_BLOCK) -> Matrix:
    """A Hadamard matrix with random signs, of the largest power of two, up to 128, in ``size``."""
    block = np.ones((1, 1))
    while len(block) < largest and size % (2 * len(block)) == 0:
        block = np.block([[block, block], [block, -block]])
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), len(block))
    rotation: Matrix = signs[:, None] * block / np.sqrt(len(block))
    return rotation


def random_rotation(size: int, seed: int = 0) -> Matrix:
    """A random orthogonal matrix ``(size, size)``, the same for the same seed."""
    normal = np.random.default_rng(seed).standard_normal((size, size))
    q, r = np.linalg.qr(normal)
    rotation: Matrix = q * np.sign(np.diag(r))  # else the factors' signs are not the seed's
    return rotation


def rotated(
    tensors: Mapping[str, TensorSource], n_layers: int, rotation: Rotation
) -> dict[str, TensorSource]:
    """The tensors of a decoder in the rotated basis, each made when it is read.

    The names are those of ``build_decoder``, which is to be given ``rotation`` too. The LM head is
    no longer tied to the embeddings, which are left out.
    """

    def read(name: str) -> Matrix:
        found = tensors[name]
        return np.asarray(found() if callable(found) else found, dtype=np.float64)

    def reader(name: str, norm: str, outputs: Matrix = _IDENTITY) -> TensorSource:
        def make() -> npt.NDArray[np.float32]:
            weight = (read(name) * read(norm)) @ rotation.stream
            return _blocks(weight.T, outputs).T.astype(np.float32)

        return make

    def writer(name: str, inputs: Matrix) -> TensorSource:
        return lambda: _blocks(rotation.stream.T @ read(name), inputs).astype(np.float32)

    def ones(name: str) -> TensorSource:
        return lambda: np.ones_like(read(name), dtype=np.float32)

    result: dict[str, TensorSource] = {
        name: tensor for name, tensor in tensors.items() if name != _EMBEDDINGS
    }
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}"
        for norm, readers in _READERS.items():
            weight = f"{prefix}.{norm}.weight"
            result[weight] = ones(weight)
            for product in readers:
                name = f"{prefix}.{product}.weight"
                outputs = rotation.values if product == _VALUES else _IDENTITY
                result[name] = reader(name, weight, outputs)
        for product, inputs in zip(_WRITERS, (rotation.values, rotation.gated), strict=True):
            name = f"{prefix}.{product}.weight"
            result[name] = writer(name, inputs)
    head = _HEAD if _HEAD in tensors else _EMBEDDINGS
    result[_HEAD] = reader(head, _LAST_NORM)
    result[_LAST_NORM] = ones(_LAST_NORM)
    return result


def _blocks(rows: Matrix, rotation: Matrix) -> Matrix:
    """``(n, F)``, each block of columns multiplied with ``rotation``."""
    result: Matrix = (rows.reshape(len(rows), -1, len(rotation)) @ rotation).reshape(rows.shape)
    return result
