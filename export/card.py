"""The model card: ``README.md`` of a bundle, with Hugging Face metadata, made from the manifest."""

from __future__ import annotations

from collections.abc import Sequence

from tinygiant.quantize.report import GraphReport
from tinygiant.runtime.bundle import Manifest

from .verify import EMBEDDINGS, Verification

__all__ = ["graph_table", "model_card"]

_WEIGHTS = {
    "trained": "Weights: from the checkpoint `{checkpoint}` (sha256 `{sha256:.12}`).",
    "seeded-random": (
        "Weights: **random** (seed {seed}). Use the bundle only to measure speed and memory: its "
        "answers mean nothing."
    ),
}


def model_card(
    manifest: Manifest, reports: Sequence[GraphReport], verification: Verification, notes: str = ""
) -> str:
    """The card's text, Markdown below YAML; ``notes`` are the sections the model's makers wrote."""
    source, model = manifest.source, manifest.model
    tokens = verification.end_to_end
    licence = "other" if source.licence else "apache-2.0"
    lines = [
        "---",
        f"license: {licence}",
        "pipeline_tag: audio-text-to-text",
        "tags: [audio, onnx, onnxruntime, audio-question-answering, cpu]",
        "language: [en]",
        "---",
        "",
        f"# {model.name} ({manifest.recipe.name})",
        "",
        *_description(manifest),
        "folder runs on a CPU with the `tinygiant` package, without PyTorch:",
        "",
        "```",
        'tg-run CLIP.wav "What is heard?" --bundle THIS_FOLDER',
        "```",
        "",
        *_implementation(manifest),
        "",
        _WEIGHTS[source.weights].format(
            checkpoint=source.checkpoint, sha256=source.sha256, seed=source.seed
        ),
        *(["", notes.strip()] if notes else []),
        "",
        "## Exactness",
        "",
        "Measured on these files, against the PyTorch model, before the folder was written;",
        "`verification.json` has every number.",
        "",
        graph_table(reports, verification),
    ]
    if tokens is not None:
        lines += [
            "",
            f"End to end, {tokens.n_steps} decoding steps given PyTorch's tokens so far: "
            f"{tokens.agreement:.1%} choose PyTorch's token; of the {tokens.n_decided} with "
            f"a clear logit margin in PyTorch, {tokens.decided_agreement:.1%}.",
        ]
    lines += _quality(verification)
    lines += [
        "",
        "## Limits",
        "",
        f"Audio is heard in chunks of {model.chunk_s:g} s, {model.rows_per_chunk} audio rows",
        "each. Answers may be wrong, and thoughts may not describe what is heard; do not rely on",
        "them where a mistake does harm.",
    ]
    return "\n".join(lines) + "\n"


def _description(manifest: Manifest) -> tuple[str, ...]:
    """What the model does; the sentence that follows begins with "folder"."""
    if manifest.source.origin:
        return (
            f"The audio-language model published at <{manifest.source.origin}>, as graphs. This",
        )
    return (
        "An audio-language model after TinyGiantALM (Interspeech 2026): it hears a clip, thinks in",
        "four parts (plan, audio analysis, logic, summary) and answers a question about it. This",
    )


def _implementation(manifest: Manifest) -> tuple[str, ...]:
    if manifest.source.licence:
        return (f"Licence: {manifest.source.licence}.",)
    return (
        "It is an independent implementation: the paper's authors have released neither code nor",
        "weights.",
    )


def _quality(verification: Verification) -> list[str]:
    """What quantizing the decoder cost, and what was not chosen for costing more."""
    quality = verification.quality
    if quality is None:
        return []
    lines = ["", f"Quantized decoder against its float32 one: {quality.line}."]
    if not quality.judged:
        lines.append("The weights are random, so this proves nothing about quality.")
    for name, why in quality.refused.items():
        lines.append(f"Not `{name}`: {why}.")
    return lines


def graph_table(reports: Sequence[GraphReport], verification: Verification) -> str:
    """Sizes and errors of every graph as a Markdown table, readable as plain text too."""
    rows = [("graph", "weights", "MB", "MB fp32", "products", "fp32 left", "rel. error")]
    for report in reports:
        rows.append(
            (
                report.graph,
                report.scheme,
                f"{report.size_after_bytes / 1e6:.1f}",
                f"{report.size_before_bytes / 1e6:.1f}",
                str(len(report.quantized) + len(report.kept)),
                str(len(report.kept)),
                _error(verification, report.graph),
            )
        )
    embeddings = verification.recipe.embeddings
    rows.append((EMBEDDINGS, embeddings, "", "", "", "", _error(verification, EMBEDDINGS)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in (rows[0], rule, *rows[1:])
    )


def _error(verification: Verification, graph: str) -> str:
    worst = verification.worst(graph)
    return f"{worst.relative_error:.1e}" if worst else ""
