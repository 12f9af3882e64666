"""The projector against a second implementation: numpy, double precision, from the papers.

Sources: TinyGiantALM, section 2, for the intent query and the gate; Kim et al., "E-Branchformer"
(SLT 2022), for the blocks. It shares nothing with the PyTorch module but the names of its weights,
so that a norm, a residual or a convention that is lost there is noticed here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tinygiant.models.tinygiant import TinyGiantALM

Array = NDArray[np.float64]
TOLERANCE = 2e-5  # float32 against float64; a lost norm or residual is more than 0.01


class Witness:
    """The weights of a projector, and what the paper does with them."""

    def __init__(self, state: dict[str, torch.Tensor], n_heads: int) -> None:
        self.weights = {name: tensor.double().numpy() for name, tensor in state.items()}
        self.n_heads = n_heads

    def linear(self, name: str, x: Array) -> Array:
        return np.asarray(x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Array) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return np.asarray(scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])

    def convolve(self, name: str, x: Array) -> Array:
        """Depth-wise, over time, zeros outside: ``(N, C) -> (N, C)``."""
        kernel, bias = self.weights[f"{name}.weight"][:, 0], self.weights[f"{name}.bias"]
        reach = kernel.shape[1] // 2
        padded = np.pad(x, ((reach, reach), (0, 0)))
        spans = range(kernel.shape[1])
        return np.asarray(sum(padded[i : i + len(x)] * kernel[:, i] for i in spans) + bias)

    def attend(self, name: str, queries: Array, rows: Array) -> tuple[Array, Array]:
        """Multi-head attention of ``queries (Q, D)`` over ``rows (N, D)``, and its weights."""
        q, k, v = (
            self.linear(f"{name}.{kind}_proj", x)
            for kind, x in (("q", queries), ("k", rows), ("v", rows))
        )
        size = q.shape[1] // self.n_heads
        heads, shares = [], []
        for head in range(self.n_heads):
            span = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, span] @ k[:, span].T / math.sqrt(size))
            shares.append(scores / scores.sum(1, keepdims=True))
            heads.append(shares[-1] @ v[:, span])
        return self.linear(f"{name}.out_proj", np.concatenate(heads, 1)), np.mean(shares, axis=0)

    def cgmlp(self, name: str, x: Array) -> Array:
        hidden = self.linear(f"{name}.channel_proj1", x)
        hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        half = hidden.shape[1] // 2
        gate = self.convolve(f"{name}.conv", self.norm(f"{name}.norm", hidden[:, half:]))
        return self.linear(f"{name}.channel_proj2", hidden[:, :half] * gate)

    def block(self, name: str, x: Array) -> Array:
        normed = self.norm(f"{name}.norm_attention", x)
        attended, _ = self.attend(f"{name}.attention", normed, normed)
        gated = self.cgmlp(f"{name}.cgmlp", self.norm(f"{name}.norm_cgmlp", x))
        both = np.concatenate([attended, gated], axis=1)
        merged = both + self.convolve(f"{name}.merge_conv", both)
        return self.norm(f"{name}.norm_out", x + self.linear(f"{name}.merge_proj", merged))

    def __call__(
        self, streams: Array, anchor: Array, instruction: Array, mask: Array
    ) -> tuple[Array, Array, Array]:
        """``streams (N, S)``, ``anchor (A,)``, instruction ``(L, D)`` -> rows, attention, gate."""
        x = self.linear("input_proj", streams)
        n, size = x.shape
        for position in range(n):
            for i in range(size // 2):
                angle = position / 10_000 ** (i / (size // 2))
                x[position, i] += math.sin(angle)
                x[position, size // 2 + i] += math.cos(angle)
        n_blocks = len({name.split(".")[1] for name in self.weights if name.startswith("blocks.")})
        for index in range(n_blocks):
            x = self.block(f"blocks.{index}", x)
        query = instruction[mask > 0].mean(axis=0, keepdims=True)
        attended, attention = self.attend("intent", query, x)
        x = self.norm("intent.norm", x + attended)
        gate = 1 / (1 + np.exp(-self.linear("gate.proj", anchor)))
        return x * (0.5 * gate + 0.5), attention[0], gate


def test_the_projector_is_the_paper_s(tiny_model: TinyGiantALM) -> None:
    generator = torch.Generator().manual_seed(5)
    projector = tiny_model.projector
    state = {
        # Norms and the gating convolution start as the identity, which would hide what they do.
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in projector.state_dict().items()
    }
    size = projector.input_proj.out_features
    gate = projector.gate
    assert gate is not None
    streams = torch.randn(23, projector.input_proj.in_features, generator=generator)
    anchor = torch.randn(gate.proj.in_features, generator=generator)
    instruction = torch.randn(7, size, generator=generator)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0])
    with torch.no_grad():
        found = torch.func.functional_call(
            projector, state, (streams[None], anchor[None], instruction[None], mask[None])
        )
    n_heads = next(m.n_heads for m in projector.modules() if hasattr(m, "n_heads"))
    wanted = Witness(state, n_heads)(
        *(tensor.double().numpy() for tensor in (streams, anchor, instruction, mask))
    )
    for name, value, truth in zip(found._fields, found, wanted, strict=True):
        error = np.abs(value[0].numpy() - truth).max() / np.abs(truth).max()
        assert error <= TOLERANCE, f"{name}: {error:.1e}"
