"""A decoder in a rotated basis: the same function, weights and activations smoothed.

A few channels of a language model's residual stream are far larger than the others, and 8 bits with
one scale a row are too coarse for both. An orthogonal matrix spreads them over all channels: what
is added to the stream is rotated by it, what is read from the stream is rotated back, and all of it
is folded into the weights (after Ashkboos et al., *QuaRot*, and Liu et al., *SpinQuant*, 2024). RMS
norms commute with a rotation once their weights are folded into the products behind them. Rows that
enter the decoder are rotated by the graph's first product, so its inputs and outputs stay what they
are, and neither embeddings nor projector know of it.

The input of an MLP's last product has outliers of its own, and no linear layer before it into which
a rotation could be folded. The graph rotates it, in blocks: a small product for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Rotation", "TensorSource", "block_rotation", "random_rotation", "rotated"]

TensorSource = npt.NDArray[Any] | Callable[[], npt.NDArray[Any]]
"""An array, or a function that reads it when it is needed."""

Matrix = npt.NDArray[np.float64]

# Products that read the stream, by the norm before them, and those that are added to it.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_HEAD, _EMBEDDINGS, _LAST_NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


_LARGEST_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Rotation:
    """Orthogonal matrices: ``stream (D, D)``; ``gated (B, B)``, for each B channels of an MLP."""

    stream: Matrix
    gated: Matrix

    @classmethod
    def random(cls, hidden_size: int, ffn_size: int, seed: int = 0) -> Rotation:
        """Those of a decoder of these sizes, the same for the same seed."""
        return cls(random_rotation(hidden_size, seed), block_rotation(ffn_size, seed))


def block_rotation(size: int, seed: int = 0) -> Matrix:
    """A Hadamard matrix with random signs, of the largest power of two, up to 128, in ``size``."""
    block = np.ones((1, 1))
    while len(block) < _LARGEST_BLOCK and size % (2 * len(block)) == 0:
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

    def reader(name: str, norm: str) -> TensorSource:
        return lambda: ((read(name) * read(norm)) @ rotation.stream).astype(np.float32)

    def writer(name: str) -> TensorSource:
        return lambda: (rotation.stream.T @ read(name)).astype(np.float32)

    def last(name: str) -> TensorSource:
        def make() -> npt.NDArray[np.float32]:
            weight = rotation.stream.T @ read(name)
            blocks = weight.reshape(len(weight), -1, len(rotation.gated)) @ rotation.gated
            return blocks.reshape(weight.shape).astype(np.float32)

        return make

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
                result[name] = reader(name, weight)
        attended, gated = (f"{prefix}.{product}.weight" for product in _WRITERS)
        result |= {attended: writer(attended), gated: last(gated)}
    head = _HEAD if _HEAD in tensors else _EMBEDDINGS
    result[_HEAD] = reader(head, _LAST_NORM)
    result[_LAST_NORM] = ones(_LAST_NORM)
    return result
