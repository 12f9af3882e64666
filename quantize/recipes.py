"""Quantization recipes: which role gets which scheme, and how far it may then be off.

The contract: a recipe is data, fixed before anything is measured. A bundle that misses one of its
recipe's limits is not written.

Why these schemes (docs/decisions.md has the measurements): the encoders run once over hundreds of
rows, where 8-bit integer products are fastest and 4-bit weights are slower than float32; the
decoder runs once a token on one row, where the bytes of the weights decide. Weights of the
encoders use 7 of the 8 bits, because the product of unsigned and signed bytes saturates on x86
processors without VNNI.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Literal

from tinygiant.runtime.config import KvType, Role
from tinygiant.runtime.errors import UsageError

__all__ = [
    "CLOSER",
    "RECIPES",
    "QualityLimits",
    "Recipe",
    "Scheme",
    "candidates",
    "closer",
    "matches",
    "recipe",
    "with_prompts",
]


_HEAD = "lm_head"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (fnmatch) is that of ``name``."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Scheme:
    """How the weights of one graph are stored and multiplied.

    ``none``: float32. ``dynamic_int8``: 8-bit weights, activations quantized as they come.
    ``weight_only``: weights of ``bits`` bits in blocks of ``block_size`` along the input axis, each
    with a float32 scale, and a zero point unless ``symmetric``; with ``accuracy_level`` 4,
    activations are quantized to 8 bits for the product.

    The rest are patterns (fnmatch) of node names: ``excluded`` stay in float32, ``wide`` have 8
    bits whatever ``bits`` says, and in ``row_scaled`` products of ``dynamic_int8`` each row of
    activations has a scale of its own. With ``calibrated``, ``weight_only`` weights are fitted to
    what the graph's products see (:mod:`tinygiant.quantize.gptq`). ``rotated`` asks for a decoder
    in a rotated basis, whose activations have no outliers (``tinygiant.export.rotation``).
    """

    kind: Literal["none", "dynamic_int8", "weight_only"] = "none"
    bits: Literal[4, 8] = 8
    per_channel: bool = True
    reduce_range: bool = True
    block_size: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    excluded: tuple[str, ...] = ()
    wide: tuple[str, ...] = ()
    row_scaled: tuple[str, ...] = ()
    calibrated: bool = False
    rotated: bool = False

    def bits_of(self, node: str) -> int:
        """Bits of a weight of the node of that name."""
        return 8 if matches(node, self.wide) else self.bits

    @property
    def label(self) -> str:
        """A short name, as the manifest and the tables show it."""
        if self.kind == "none":
            return "fp32"
        if self.kind == "dynamic_int8":
            range_ = "-7bit" if self.reduce_range else ""
            rows = "-rows" if self.row_scaled else ""
            rotated = "-rotated" if self.rotated else ""
            channels = "-per-channel" if self.per_channel else ""
            return f"dynamic-int8{range_}{channels}{rows}{rotated}"
        zero_point = "" if self.symmetric else "-zp"
        head_only = "-head8" if self.wide == (_HEAD,) else "-mixed"
        wide = head_only if self.bits == 4 and self.wide else ""
        gptq = "-gptq" if self.calibrated else ""
        return f"int{self.bits}-b{self.block_size}{zero_point}{wide}{gptq}"


@dataclass(frozen=True)
class QualityLimits:
    """How much worse than its float32 decoder a quantized one may be, on text of the model's own.

    ``perplexity_ratio`` is quantized over float32; ``same_choice`` the share of tokens at which
    both find the same one most likely.
    """

    perplexity_ratio: float
    same_choice: float


@dataclass(frozen=True)
class Recipe:
    """A named choice of schemes, and the limits its result must keep.

    ``token_agreement`` is the share of decoding steps at which the bundle, given the tokens that
    PyTorch chose so far, chooses PyTorch's next token too. ``graphs`` has a scheme for every role,
    whatever a model's graphs are called. ``relative_errors`` says for each role, and for
    ``embed_tokens``, how far an output may be from PyTorch's on the same inputs: ``||a - b|| /
    ||b||`` over the output, the largest of all checks. Steps at
    which PyTorch's two best logits lie within ``tie_margin`` standard deviations of the logits do
    not count: there, rounding decides. ``kv_cache`` is how keys and values are kept: in ``int8``, a
    quarter of the memory and faster to read a token; prompts attend in float32. ``prompts`` is the
    scheme of a second decoder graph that only reads prompts, if there is one.
    """

    name: str
    graphs: Mapping[Role, Scheme]
    relative_errors: Mapping[str, float]
    quality: QualityLimits
    embeddings: Literal["fp32", "int8"]
    token_agreement: float
    tie_margin: float
    kv_cache: KvType = "fp32"
    prompts: Scheme | None = None


_DYNAMIC = Scheme("dynamic_int8")

_CHECKED = (*typing.get_args(Role), "embed_tokens")


def _int8_but(decoder: Scheme) -> dict[Role, Scheme]:
    return {"encoder": _DYNAMIC, "projector": _DYNAMIC, "decoder": decoder}


# A few hundred tokens tell the share of same choices to two points, and text drawn at temperature 1
# holds many near ties: SmolLM2-135M in 8 bits and blocks of 128 has 1.013 and 90 % there, where it
# loses 0.5 % of other text's perplexity and keeps 95 %. In today's 4 bits it has 2.29 and 54 %.
_QUALITY_INT8 = QualityLimits(perplexity_ratio=1.02, same_choice=0.87)
_QUALITY_INT4 = QualityLimits(perplexity_ratio=1.1, same_choice=0.8)


def _int8(name: str, decoder: Scheme, kv_cache: KvType = "fp32") -> Recipe:
    return Recipe(
        name=name,
        graphs=_int8_but(decoder),
        relative_errors=dict.fromkeys(_CHECKED, 0.1),
        quality=_QUALITY_INT8,
        embeddings="int8",
        token_agreement=0.98,
        tie_margin=0.05,
        kv_cache=kv_cache,
    )


def _int4(name: str, decoder: Scheme) -> Recipe:
    return Recipe(
        name=name,
        graphs=_int8_but(decoder),
        quality=_QUALITY_INT4,
        relative_errors=dict.fromkeys(_CHECKED, 0.1) | {"decoder": 0.3},
        embeddings="int8",
        token_agreement=0.9,
        tie_margin=0.3,
        kv_cache="int8",
    )


# Weights have all 8 bits: with VNNI, or Arm's dot product, nothing saturates.
_ROWS = Scheme(
    "dynamic_int8",
    reduce_range=False,
    excluded=("*rotation",),
    row_scaled=("*_proj", _HEAD),
    rotated=True,
)
_INT4_B32 = Scheme("weight_only", bits=4, wide=(_HEAD,))

RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        "fp32": Recipe(
            name="fp32",
            graphs=dict.fromkeys(typing.get_args(Role), Scheme()),
            relative_errors=dict.fromkeys(_CHECKED, 1e-4),
            quality=QualityLimits(perplexity_ratio=1.001, same_choice=0.99),
            embeddings="fp32",
            token_agreement=1.0,
            tie_margin=1e-3,
        ),
        # Small blocks are closer to the float32 weights, large ones faster to multiply.
        "int8": _int8("int8", Scheme("weight_only", bits=8, block_size=32)),
        "int8-b128": _int8("int8-b128", Scheme("weight_only", bits=8, block_size=128), "int8"),
        "int8-rows": _int8("int8-rows", _ROWS),
        "int4": _int4("int4", dataclasses.replace(_INT4_B32, block_size=128)),
        "int4-b32": _int4("int4-b32", _INT4_B32),
        "int4-gptq": _int4(
            "int4-gptq",
            dataclasses.replace(
                _INT4_B32, calibrated=True, wide=(_HEAD, "*.down_proj", "*.v_proj")
            ),
        ),
    }
)
"""All recipes by name."""


CLOSER = ("int4", "int4-b32", "int4-gptq", "int8-b128", "int8")
"""Quantized recipes, each closer to float32 than the one before, and slower or larger."""

_LARGE_WEIGHTS = 300_000_000


def candidates(n_weights: int) -> tuple[Recipe, ...]:
    """The recipes that ``auto`` tries, in order, for a decoder of so many weights.

    A small decoder gains little from 4 bits, and loses most. ``int8-rows`` is not among them: on a
    processor without VNNI, or Arm's dot product, its products saturate.
    """
    names = CLOSER[2:] if n_weights >= _LARGE_WEIGHTS else CLOSER[3:]
    return tuple(RECIPES[name] for name in names)


def with_prompts(recipe: Recipe) -> Recipe:
    """``recipe``, and a second decoder graph that reads prompts with 8-bit products.

    Raises:
        UsageError: the recipe's decoder does so by itself, or is not quantized.
    """
    if recipe.graphs["decoder"].kind != "weight_only":
        names = ", ".join(
            n for n, r in RECIPES.items() if r.graphs["decoder"].kind == "weight_only"
        )
        raise UsageError(f"recipe {recipe.name} has no graph for prompts; those that may: {names}")
    return dataclasses.replace(recipe, prompts=_ROWS)


def closer(name: str) -> tuple[Recipe, ...]:
    """The recipes closer to float32 than the one of that name; none for a recipe of one's own."""
    rest = CLOSER[CLOSER.index(name) + 1 :] if name in CLOSER else ()
    return tuple(RECIPES[other] for other in rest)


def recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in RECIPES:
        raise UsageError(f"recipe {name!r} is unknown; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]
