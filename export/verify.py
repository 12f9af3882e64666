"""Proof that a bundle reproduces its model: measured on the quantized files, through the runtime.

Three checks, all of them made before anything is raised: every graph on the inputs that PyTorch saw
(so that one graph's error is not another's); the whole chain from audio to logits, given PyTorch's
tokens so far; and free-running answers through ``tinygiant.runtime.load`` as users get them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygiant.quantize.recipes import Recipe
from tinygiant.runtime.bundle import Bundle
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import TinyGiantError, VerificationError
from tinygiant.runtime.loading import Memory, load
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import Graph, SessionSettings
from tinygiant.runtime.pipeline import TinyGiant
from tinygiant.runtime.text import one_line
from tinygiant.runtime.tokenizer import Tokenizer

from .quality import Quality
from .reference import NEW_TOKENS, Case, Dialogue, Reference

__all__ = [
    "EMBEDDINGS",
    "Agreement",
    "OutputError",
    "Verification",
    "output_error",
    "verify_bundle",
]

Array = NDArray[np.float32]

EMBEDDINGS = "embed_tokens"
"""The name under which the token embeddings are checked, in addition to the graphs."""


@dataclass(frozen=True)
class OutputError:
    """How far one output is from PyTorch's, the worst over all cases.

    ``relative_error`` is ``||a - b|| / ||b||``; errors of outputs that hold no number are NaN.
    """

    shapes: tuple[tuple[int, ...], ...]
    max_abs_error: float
    relative_error: float


@dataclass(frozen=True)
class Agreement:
    """Tokens of the whole chain against PyTorch's.

    Attributes:
        n_steps: decoding steps compared, each given PyTorch's tokens so far.
        agreement: share of steps with the same arg-max.
        n_decided: steps at which PyTorch's best logit leads by more than the recipe's tie margin.
        decided_agreement: share of those with the same arg-max; 1 if there are none.
        logits: error of the logits.
        free_running: share of PyTorch's answers' characters that the bundle, left alone, writes
            before it differs for the first time.
    """

    n_steps: int
    agreement: float
    n_decided: int
    decided_agreement: float
    logits: OutputError
    free_running: float


@dataclass
class Verification:
    """Everything that was measured, and every limit that was missed."""

    recipe: Recipe
    outputs: dict[str, dict[str, OutputError]] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    end_to_end: Agreement | None = None
    quality: Quality | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no limit was missed."""
        return not self.failures

    def worst(self, graph: str) -> OutputError | None:
        """The output of ``graph`` with the largest relative error."""
        errors = self.outputs.get(graph)
        return max(errors.values(), key=lambda e: e.relative_error) if errors else None

    def require(self) -> None:
        """Raise one error that names every missed limit.

        Raises:
            VerificationError: at least one limit was missed.
        """
        if self.failures:
            raise VerificationError(
                f"the {self.recipe.name} bundle does not reproduce its model and was not written: "
                + "; ".join(self.failures)
            )

    def summary(self) -> dict[str, Any]:
        """For the manifest: the worst error of each graph, and the tokens."""
        graphs = {name: self.worst(name) for name in self.outputs}
        return {
            "passed": self.passed,
            "relative_error": {name: e.relative_error for name, e in graphs.items() if e},
            "token_agreement": self.end_to_end.agreement if self.end_to_end else None,
            "decided_token_agreement": (
                self.end_to_end.decided_agreement if self.end_to_end else None
            ),
            "quality": dataclasses.asdict(self.quality) if self.quality else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for ``verification.json``."""
        return {
            "recipe": self.recipe.name,
            "passed": self.passed,
            "graphs": {
                graph: {name: dataclasses.asdict(error) for name, error in errors.items()}
                for graph, errors in self.outputs.items()
            },
            "limits": {graph: {"relative_error": limit} for graph, limit in self.limits.items()},
            "end_to_end": dataclasses.asdict(self.end_to_end) if self.end_to_end else None,
            "end_to_end_limits": {
                "decided_agreement": self.recipe.token_agreement,
                "tie_margin": self.recipe.tie_margin,
            },
            "quality": dataclasses.asdict(self.quality) if self.quality else None,
            "quality_limits": dataclasses.asdict(self.recipe.quality),
        }


def verify_bundle(
    path: Path, reference: Reference, recipe: Recipe, *, threads: int | None = None
) -> Verification:
    """Measure the bundle in folder ``path``; raises nothing that a bad graph could cause.

    One graph is loaded at a time.
    """
    result = Verification(recipe)
    bundle = Bundle.open(path)
    pool = GraphPool(bundle, SessionSettings(threads=threads, arena=False), keep=False)
    for name, role in bundle.manifest.roles.items():
        with _gathering(result, name), pool.use(name) as graph:
            if name == bundle.config.decoder.graph:
                errors = _decoder_errors(graph, reference.dialogues, bundle)
            elif role == "decoder":
                with pool.use(bundle.config.decoder.graph) as writer:
                    errors = _decoder_errors(writer, reference.dialogues, bundle, graph)
            else:
                errors = _graph_errors(graph, reference.cases[name])
            _record(result, name, errors, role)
    with _gathering(result, EMBEDDINGS):
        rows = TokenEmbeddings.open(bundle).lookup(reference.token_ids)
        error = output_error([(rows, reference.embedding_rows)])
        _record(result, EMBEDDINGS, {"rows": error}, EMBEDDINGS)
    with _gathering(result, "end to end"):
        result.end_to_end = _end_to_end(path, reference, recipe, threads)
        _judge_tokens(result, result.end_to_end)
    return result


def output_error(pairs: Iterable[tuple[Array, Array]]) -> OutputError:
    """The worst errors over ``(found, wanted)`` pairs of one output."""
    shapes: list[tuple[int, ...]] = []
    worst_abs = worst_relative = 0.0
    for found, wanted in pairs:
        if found.shape != wanted.shape:
            raise ValueError(f"shape {found.shape}, PyTorch gives {wanted.shape}")
        shapes.append(found.shape)
        a, b = found.astype(np.float64).ravel(), wanted.astype(np.float64).ravel()
        distance, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
        # np.maximum keeps a NaN, which max may lose.
        worst_abs = float(np.maximum(worst_abs, np.abs(a - b).max()))
        relative = distance / norm if norm else (0.0 if distance == 0.0 else float("inf"))
        worst_relative = float(np.maximum(worst_relative, relative))
    return OutputError(tuple(sorted(set(shapes))), worst_abs, worst_relative)


@contextmanager
def _gathering(result: Verification, what: str) -> Iterator[None]:
    """Turn an error into a line of the failures, so that the other checks are still made."""
    try:
        yield
    except (TinyGiantError, ValueError, KeyError) as error:
        result.failures.append(f"{what}: {one_line(error)}")


def _record(result: Verification, name: str, errors: dict[str, OutputError], role: str) -> None:
    """Keep the errors of graph ``name`` and compare them with the limits of its role."""
    result.outputs[name] = errors
    limit = result.limits[name] = result.recipe.relative_errors[role]
    for output, error in errors.items():
        # Written so that NaN fails.
        if not error.relative_error <= limit:
            result.failures.append(
                f"{name}.{output}: relative error {error.relative_error:.2e}, "
                f"at most {limit:.0e} is allowed"
            )


def _graph_errors(graph: Graph, cases: Sequence[Case]) -> dict[str, OutputError]:
    """Errors of every output of a graph that is a function of its inputs."""
    pairs: dict[str, list[tuple[Array, Array]]] = {name: [] for name in graph.output_names}
    for case in cases:
        found = graph.run({name: case.inputs[name] for name in graph.input_names})
        for name in graph.output_names:
            pairs[name].append((found[name], case.outputs[name]))
    return {name: output_error(of_output) for name, of_output in pairs.items()}


class _KnownRows:
    """Token embeddings as PyTorch has them, so that the decoder's error is its own."""

    def __init__(self, dialogue: Dialogue) -> None:
        self._rows = dict(zip(dialogue.token_ids, dialogue.token_embeds, strict=True))

    def lookup(self, token_ids: Sequence[int]) -> Array:
        return np.stack([self._rows[token_id] for token_id in token_ids])


def _decoder_errors(
    graph: Graph, dialogues: Sequence[Dialogue], bundle: Bundle, prompts: Graph | None = None
) -> dict[str, OutputError]:
    """Errors of the logits, over prefill, steps of one token and a step of many."""
    pairs = []
    for dialogue in dialogues:
        decoder = Decoder(
            graph,
            _KnownRows(dialogue),
            bundle.config.decoder,
            dialogue.embeds.shape[1] + NEW_TOKENS,
            kv_type=bundle.manifest.kv_cache,
            prompts=prompts,
        )
        pairs.append((_teacher_forced(decoder, dialogue.embeds, dialogue), dialogue.logits))
    return {"logits": output_error(pairs)}


def _teacher_forced(decoder: Decoder, embeds: Array, dialogue: Dialogue) -> Array:
    """Logits after the prompt and after each of PyTorch's tokens, ``(K + 1, V)``."""
    middle = len(dialogue.token_ids) // 2
    rows = [decoder.prefill(embeds)[None]]
    rows += [decoder.step([token_id]) for token_id in dialogue.token_ids[:middle]]
    if rest := dialogue.token_ids[middle:]:
        rows.append(decoder.step(rest))
    return np.concatenate(rows)


def _end_to_end(path: Path, reference: Reference, recipe: Recipe, threads: int | None) -> Agreement:
    """Tokens of the whole chain, through the model as users load it."""
    # A graph for prompts is only used beside the other.
    memory: Memory = "default" if recipe.prompts else "low"
    model = load(path, threads=threads, memory=memory, verify=False)
    logits = []
    for dialogue in reference.dialogues:
        clip = reference.clips[dialogue.clip]
        embeds = model.prepare(clip, dialogue.question, dialogue.choices).embeds
        with model.decoder(embeds.shape[1] + NEW_TOKENS) as decoder:
            logits.append(_teacher_forced(decoder, embeds, dialogue))
            del decoder
    wanted = [dialogue.logits for dialogue in reference.dialogues]
    agree = np.concatenate(
        [a.argmax(1) == b.argmax(1) for a, b in zip(logits, wanted, strict=True)]
    )
    decided = np.concatenate([_decided(rows, recipe.tie_margin) for rows in wanted])
    return Agreement(
        n_steps=agree.size,
        agreement=float(agree.mean()),
        n_decided=int(decided.sum()),
        decided_agreement=float(agree[decided].mean()) if decided.any() else 1.0,
        logits=output_error(zip(logits, wanted, strict=True)),
        free_running=_free_running(model, reference),
    )


def _decided(logits: Array, tie_margin: float) -> NDArray[np.bool_]:
    """Which rows of ``(K, V)`` have a best logit that leads by more than the margin."""
    second, best = np.partition(logits, -2, axis=1)[:, -2:].T
    decided: NDArray[np.bool_] = best - second > tie_margin * logits.std(axis=1)
    return decided


def _free_running(model: TinyGiant, reference: Reference) -> float:
    """Share of PyTorch's text that the public API writes before it first differs.

    Only of dialogues without choices: with choices the runtime constrains the answer.
    """
    bundle = model.bundle
    tokenizer = Tokenizer.from_file(bundle.file(bundle.manifest.tokenizer))
    hidden = bundle.config.answer.hidden_token_ids
    n_same = n_wanted = 0
    for dialogue in reference.dialogues:
        if dialogue.choices is not None:
            continue
        clip = reference.clips[dialogue.clip]
        found = model.ask(clip, dialogue.question, max_new_tokens=NEW_TOKENS, raw=True).raw_text
        wanted = tokenizer.decode(token for token in dialogue.token_ids if token not in hidden)
        n_wanted += len(wanted)
        n_same += _common_prefix(found, wanted)
    return n_same / n_wanted if n_wanted else 1.0


def _common_prefix(a: str, b: str) -> int:
    """Characters that two texts share from their start."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def _judge_tokens(result: Verification, tokens: Agreement) -> None:
    recipe = result.recipe
    if not tokens.decided_agreement >= recipe.token_agreement:
        result.failures.append(
            f"end to end: {tokens.decided_agreement:.1%} of {tokens.n_decided} decided tokens are "
            f"PyTorch's, at least {recipe.token_agreement:.1%} is needed"
        )
    # Whoever agrees at every step, given PyTorch's tokens, must write the same text alone.
    all_decided = tokens.n_decided == tokens.n_steps
    if all_decided and tokens.agreement == 1.0 and tokens.free_running < 1.0:
        result.failures.append(
            f"end to end: the runtime left alone writes {tokens.free_running:.1%} of PyTorch's "
            "text, though it agrees at every step"
        )
