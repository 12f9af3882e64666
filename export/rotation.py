"""A decoder whose residual stream is rotated: the same function, weights and activations smoothed.

A few channels of a language model's residual stream are far larger than the others, and 8 bits with
one scale a row are too coarse for both. An orthogonal matrix ``Q`` spreads them over all channels:
what is added to the stream is rotated by it, what is read from the stream is rotated back, and all
of it is folded into the weights (after Ashkboos et al., *QuaRot*, and Liu et al., *SpinQuant*,
2024). RMS norms commute with a rotation once their weights are folded into the products behind
them. Rows that enter the decoder are rotated by the graph's first product, so its inputs and
outputs stay what they are, and neither embeddings nor projector know of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .decoder import TensorSource

__all__ = ["random_rotation", "rotated"]

Matrix = npt.NDArray[np.float64]

# Products that read the stream, by the norm before them, and those that are added to it.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
_HEAD, _EMBEDDINGS, _LAST_NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def random_rotation(size: int, seed: int = 0) -> Matrix:
    """A random orthogonal matrix ``(size, size)``, the same for the same seed."""
    normal = np.random.default_rng(seed).standard_normal((size, size))
    q, r = np.linalg.qr(normal)
    rotation: Matrix = q * np.sign(np.diag(r))  # else the factors' signs are not the seed's
    return rotation


def rotated(
    tensors: Mapping[str, TensorSource], n_layers: int, rotation: Matrix
) -> dict[str, TensorSource]:
    """The tensors of a decoder in the rotated stream, each made when it is read.

    The names are those of ``build_decoder``, which is to be given ``rotation`` too. The LM head is
    no longer tied to the embeddings, which are left out.
    """

    def read(name: str) -> Matrix:
        found = tensors[name]
        return np.asarray(found() if callable(found) else found, dtype=np.float64)

    def reader(name: str, norm: str) -> TensorSource:
        return lambda: ((read(name) * read(norm)) @ rotation).astype(np.float32)

    def writer(name: str) -> TensorSource:
        return lambda: (rotation.T @ read(name)).astype(np.float32)

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
        for product in _WRITERS:
            name = f"{prefix}.{product}.weight"
            result[name] = writer(name)
    head = _HEAD if _HEAD in tensors else _EMBEDDINGS
    result[_HEAD] = reader(head, _LAST_NORM)
    result[_LAST_NORM] = ones(_LAST_NORM)
    return result
