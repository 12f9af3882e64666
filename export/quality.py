"""The gate: how much a quantized decoder loses on text that its own float32 model writes.

A recipe that leaves one model unharmed ruins another, so every export measures. The float32 decoder
continues the prompts of the verification set, each token drawn at temperature 1; then the quantized
one, in the runtime, reads the same tokens. The Kullback-Leibler divergence of the two, averaged
over the positions of such texts, has as its exponential the ratio of their perplexities: no other
text is needed, in any language, and no choice of text can flatter a recipe. It is taken over all
tokens that could have been drawn at a position: ``log p - log q`` of the drawn one has the same
mean, but its mean over a few hundred is off by as much as 8 bits lose.

The contract: prompts as rows of embeddings in, figures out; graphs are run as the runtime runs
them, single tokens behind a prompt that is read at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tinygiant.quantize.calibration import input_moments
from tinygiant.quantize.recipes import QualityLimits, Recipe
from tinygiant.runtime.config import DecoderConfig, KvType
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

__all__ = [
    "Gate",
    "Lookup",
    "Quality",
    "Text",
    "continue_prompts",
    "divergence",
    "log_softmax",
    "measure",
]

Array = NDArray[np.float32]

# Tokens that are judged: enough to tell a loss of some percent, a minute at full size.
_GATE_TOKENS = 256
_UNJUDGED_TOKENS = 32  # of random weights, which prove nothing
_CALIBRATION_TOKENS = 1_024
_GATE_SEED, _CALIBRATION_SEED = 0, 1
_LONGEST = 64  # tokens of one text
_ROUNDS = 16  # a model that says nothing is not asked for ever


class Lookup(Protocol):
    """Rows of token embeddings."""

    def lookup(self, token_ids: Sequence[int]) -> Array:
        """``n`` ids -> ``(n, D)``."""
        ...


@dataclass(frozen=True, eq=False)
class Text:
    """The float32 decoder's continuation of one prompt.

    Attributes:
        prompt: its index.
        token_ids: K tokens; the last may be one that ends an answer.
        log_probs: of all tokens at each position, ``(K, V)``.
    """

    prompt: int
    token_ids: tuple[int, ...]
    log_probs: Array


@dataclass(frozen=True)
class Quality:
    """A quantized decoder against its float32 one.

    Attributes:
        n_tokens: tokens judged.
        perplexity_ratio: 1 if nothing is lost.
        same_choice: share of the tokens at which both have the same first choice.
        judged: False where the weights are random, which proves nothing about quality.
        refused: the losses of the recipes that were tried before this one, by name.
    """

    n_tokens: int
    perplexity_ratio: float
    same_choice: float
    judged: bool = True
    refused: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def line(self) -> str:
        """The figures in words."""
        return (
            f"on {self.n_tokens} tokens that the model itself wrote, perplexity is "
            f"{self.perplexity_ratio:.3f} times float32's and {self.same_choice:.1%} of first "
            f"choices are the same"
        )

    def missed(self, limits: QualityLimits) -> str | None:
        """The figures that miss ``limits``, in words; None if none does."""
        # Written so that NaN fails.
        kept = (
            self.perplexity_ratio <= limits.perplexity_ratio
            and self.same_choice >= limits.same_choice
        )
        if kept or not self.judged:
            return None
        return (
            f"{self.line}; at most {limits.perplexity_ratio:g} times and at least "
            f"{limits.same_choice:.0%} are allowed"
        )


class Gate:
    """Judges quantized graphs of one decoder."""

    def __init__(
        self,
        source: Path,
        embeddings: Lookup,
        config: DecoderConfig,
        prompts: Sequence[Array],
        settings: SessionSettings,
        *,
        judged: bool = True,
    ) -> None:
        """Let the float32 decoder write.

        Args:
            source: its graph, which must stay until :meth:`moments` was called, if it is.
            embeddings: its token embeddings.
            config: its sizes.
            prompts: rows ``(1, T, D)`` of each.
            settings: how graphs are run.
            judged: whether the weights are trained.
        """
        self._source, self._embeddings, self._config = source, embeddings, config
        # Room for a text behind each.
        self._prompts = [prompt[:, : config.max_positions - _LONGEST] for prompt in prompts]
        self._settings, self._judged = settings, judged
        n_tokens = _GATE_TOKENS if judged else _UNJUDGED_TOKENS
        self._texts = self._write(n_tokens, _GATE_SEED)

    def moments(self) -> dict[str, Array]:
        """Second moments of the inputs of the float32 products, on other texts of its own."""
        n_tokens = _CALIBRATION_TOKENS if self._judged else _UNJUDGED_TOKENS
        texts = [
            np.concatenate([self._prompts[text.prompt][0], self._embeddings.lookup(text.token_ids)])
            for text in self._write(n_tokens, _CALIBRATION_SEED)
        ]
        return input_moments(self._source, texts, self._settings)

    def judge(
        self, path: Path, embeddings: Lookup, recipe: Recipe, prompts: Path | None = None
    ) -> Quality:
        """The loss of the decoder in ``path``, and its graph for ``prompts``, by ``recipe``."""
        graphs = [Graph(file, self._settings) for file in (path, prompts) if file]
        try:
            return measure(
                graphs[0],
                embeddings,
                self._config,
                self._prompts,
                self._texts,
                kv_type=recipe.kv_cache,
                reader=graphs[1] if prompts else None,
                judged=self._judged,
            )
        finally:
            for graph in graphs:
                graph.close()

    def _write(self, n_tokens: int, seed: int) -> list[Text]:
        graph = Graph(self._source, self._settings)
        try:
            return continue_prompts(
                graph, self._embeddings, self._config, self._prompts, n_tokens=n_tokens, seed=seed
            )
        finally:
            graph.close()


def continue_prompts(
    graph: Graph,
    embeddings: Lookup,
    config: DecoderConfig,
    prompts: Sequence[Array],
    *,
    n_tokens: int,
    seed: int = 0,
) -> list[Text]:
    """Let the float32 decoder ``graph`` write ``n_tokens`` or some more, spread over ``prompts``.

    Args:
        graph: keeps keys and values in float32.
        embeddings: of its tokens.
        config: its sizes.
        prompts: rows ``(1, T, D)`` of each.
        n_tokens: tokens in all; fewer if the model keeps ending its answers at once.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    readers = [_Reader(graph, embeddings, config, prompt, "fp32") for prompt in prompts]
    texts: list[Text] = []
    n_left = n_tokens
    for turn in range(_ROUNDS * len(prompts)):
        if n_left <= 0:
            break
        index = turn % len(prompts)
        text = readers[index].write(index, rng, min(n_left, _LONGEST), config.stop_token_ids)
        texts.append(text)
        n_left -= len(text.token_ids)
    return texts


def measure(
    graph: Graph,
    embeddings: Lookup,
    config: DecoderConfig,
    prompts: Sequence[Array],
    texts: Sequence[Text],
    *,
    kv_type: KvType = "fp32",
    reader: Graph | None = None,
    judged: bool = True,
) -> Quality:
    """Read ``texts`` behind their ``prompts`` with another decoder of the same model.

    ``reader`` is its graph for prompts, if there is one.
    """
    lost: list[NDArray[np.float64]] = []
    same: list[NDArray[np.bool_]] = []
    for index, prompt in enumerate(prompts):
        decoder = _Reader(graph, embeddings, config, prompt, kv_type, reader)
        for text in (text for text in texts if text.prompt == index):
            found = decoder.read(text.token_ids)
            lost.append(divergence(text.log_probs, found))
            same.append(text.log_probs.argmax(-1) == found.argmax(-1))
    if not lost:
        return Quality(0, float("nan"), float("nan"), judged)
    all_lost, all_same = np.concatenate(lost), np.concatenate(same)
    ratio = float(np.exp(all_lost.mean()))
    return Quality(len(all_lost), ratio, float(all_same.mean()), judged)


class _Reader:
    """One prompt, read once; behind it come texts, one after another."""

    def __init__(
        self,
        graph: Graph,
        embeddings: Lookup,
        config: DecoderConfig,
        prompt: Array,
        kv_type: KvType,
        prompts: Graph | None = None,
    ) -> None:
        self._length = prompt.shape[1]
        capacity = self._length + _LONGEST
        self._decoder = Decoder(
            graph, embeddings, config, capacity, kv_type=kv_type, prompts=prompts
        )
        self._logits = self._decoder.prefill(prompt)

    def write(
        self, index: int, rng: np.random.Generator, n_tokens: int, stop_ids: Collection[int]
    ) -> Text:
        self._decoder.truncate(self._length)
        token_ids: list[int] = []
        rows: list[Array] = []
        logits = self._logits
        while True:
            rows.append(log_softmax(logits))
            weights = np.exp(rows[-1].astype(np.float64))
            token_ids.append(int(rng.choice(len(weights), p=weights / weights.sum())))
            if len(token_ids) == n_tokens or token_ids[-1] in stop_ids:
                return Text(index, tuple(token_ids), np.stack(rows))
            logits = self._decoder.step([token_ids[-1]])[-1]

    def read(self, token_ids: Sequence[int]) -> Array:
        """Log-probabilities of all tokens at the position of each, ``(K, V)``."""
        self._decoder.truncate(self._length)
        rows = [log_softmax(self._logits)]
        rows += [log_softmax(self._decoder.step([token])[-1]) for token in token_ids[:-1]]
        return np.stack(rows)


def divergence(wanted: Array, found: Array) -> NDArray[np.float64]:
    """Kullback-Leibler divergence of log-probabilities ``(K, V)``, in nats, ``(K,)``."""
    result: NDArray[np.float64] = np.einsum(
        "kv,kv->k", np.exp(wanted.astype(np.float64)), wanted.astype(np.float64) - found
    )
    return result


def log_softmax(logits: NDArray[Any]) -> Array:
    """Log-probabilities along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
