"""The whole export: one component after another, then proof, then the bundle.

For each component: load it, record PyTorch's outputs on the verification set, write its graph
in float32, drop the module, quantize the graph from disk. So peak memory is that of one component,
not of the model.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from tinygiant.models.family import Model, Part
from tinygiant.quantize.embeddings import quantize_rows
from tinygiant.quantize.graph import save_graph, weights_path
from tinygiant.quantize.kv_cache import KvPeaks
from tinygiant.quantize.quantizer import quantize_graph
from tinygiant.quantize.recipes import RECIPES, Recipe, candidates, closer, with_prompts
from tinygiant.quantize.report import GraphReport
from tinygiant.runtime.bundle import (
    MANIFEST_NAME,
    EmbeddingsEntry,
    GraphEntry,
    Manifest,
    RecipeEntry,
    describe_file,
)
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import VerificationError
from tinygiant.runtime.operators import graph_contents
from tinygiant.runtime.ort.sessions import SessionSettings
from tinygiant.runtime.tokenizer import Tokenizer

from .bundle import staged_folder
from .card import graph_table, model_card
from .decoder import OPSET, PROMPT_BLOCKS, DecoderSpec, build_decoder, read_tensors
from .optimum_encoder import export_with_optimum
from .quality import Gate, Quality
from .reference import Reference
from .rotation import Rotation, rotated
from .tracing import trace
from .verify import Verification, verify_bundle

__all__ = ["Draft", "Export", "export_bundle", "write_bundle"]

Progress = Callable[[str], None]

GRAPH_FOLDER = "onnx"
TOKENIZER_NAME = "tokenizer.json"
EMBEDDINGS_NAME = "embed_tokens.npy"
SCALES_NAME = "embed_tokens.scales.npy"
VERIFICATION_NAME = "verification.json"
CARD_NAME = "README.md"

_MIN_ONNXRUNTIME = "1.27.0"  # as setup.cfg asks for
_SCRATCH = ".fp32"
_GRAPH_OF = {"torch": trace, "optimum": export_with_optimum}
_TOOLS = ("tinygiant", "torch", "transformers", "onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Export:
    """A finished export: what was written, how it was quantized, and the verification."""

    manifest: Manifest
    reports: tuple[GraphReport, ...]
    verification: Verification


def export_bundle(
    source: Model,
    target: Path,
    recipe: Recipe | None,
    *,
    prompts: bool = False,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = lambda line: None,
) -> Export:
    """Export ``source`` to the folder ``target``; there is no such folder unless all is proven.

    Args:
        source: the model.
        target: the folder to make.
        recipe: how to quantize it, and how good the result must be; None: the first of
            ``quantize.candidates`` that passes.
        prompts: write a second graph of the decoder, which reads prompts with 8-bit products.
        force: replace an existing bundle.
        threads: threads of the verification; the physical cores if None.
        progress: called with a line when a stage begins, and with the lines of the table of errors
            if a limit was missed.

    Raises:
        CheckpointError: the source's tensors do not fit.
        UsageError: the target exists; the recipe takes no second graph.
        StorageError: the target cannot be written.
        VerificationError: the bundle does not reproduce the model, or its decoder loses too much
            quality; every limit missed is named, and a recipe that would pass.
    """
    if prompts and recipe is not None:
        with_prompts(recipe)  # refused before anything is done
    with staged_folder(target, force=force) as root:
        job = write_bundle(
            source, root, recipe, prompts=prompts, threads=threads, progress=progress
        )
        job.stage("verification")
        verification = verify_bundle(root, job.reference, job.recipe, threads=threads)
        verification.quality = job.quality
        if not verification.passed:
            for line in graph_table(job.reports, verification).splitlines():
                progress(line)
        verification.require()
        manifest = job.finish(verification)
        return Export(manifest, tuple(job.reports), verification)


def write_bundle(
    source: Model,
    root: Path,
    recipe: Recipe | None,
    *,
    prompts: bool = False,
    threads: int | None = None,
    progress: Progress = lambda line: None,
) -> Draft:
    """Write everything but the proof into the empty folder ``root``: a bundle that opens.

    Raises:
        VerificationError: the decoder loses too much quality.
    """
    # Quantized recipes differ in the decoder only, which is the last graph to be written.
    job = Draft(source, root, recipe or RECIPES["int8"], progress, recipe is None, prompts, threads)
    job.write_components()
    (root / MANIFEST_NAME).write_text(job.manifest({}).to_json(), encoding="utf-8")
    return job


@dataclass
class Draft:
    """A bundle that is being written into the folder ``root``, and PyTorch's outputs for it."""

    source: Model
    root: Path
    recipe: Recipe
    progress: Progress
    auto: bool = False
    prompts: bool = False
    threads: int | None = None
    reports: list[GraphReport] = field(default_factory=list)
    quality: Quality | None = None

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        self.config = self.source.config
        self.stage("source")
        self._entry = self.source.entry()
        self._scratch = self.root / _SCRATCH
        self._scratch.mkdir()
        (self.root / GRAPH_FOLDER).mkdir()
        tokenizer = self.root / TOKENIZER_NAME
        tokenizer.write_text(self.source.tokenizer(), encoding="utf-8")
        self.reference = Reference(self.config, Tokenizer.from_file(tokenizer))

    def write_components(self) -> None:
        """All graphs and the embeddings, one component in memory at a time."""
        for encoder in self.config.encoders:
            self._write_encoder(encoder.graph)
            self._quantize(encoder.graph)
        # The projector reads the decoder's token embeddings, the decoder what it projects.
        self._write_projector_and_decoder()
        self._quantize(self.config.projector.graph)
        self._quantize_decoder()
        shutil.rmtree(self._scratch)

    def manifest(self, verification: dict[str, Any]) -> Manifest:
        """The manifest of the present content of the folder."""
        files = sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob("*")
            if path.is_file() and path.name != MANIFEST_NAME
        )
        int8 = self.recipe.embeddings == "int8"
        return Manifest(
            model=self.config,
            graphs={report.graph: self._graph_entry(report) for report in self.reports},
            embeddings=EmbeddingsEntry(
                EMBEDDINGS_NAME, self.recipe.embeddings, SCALES_NAME if int8 else None
            ),
            tokenizer=TOKENIZER_NAME,
            recipe=RecipeEntry(self.recipe.name, _recipe_details(self.recipe)),
            opset=OPSET,
            min_onnxruntime=_MIN_ONNXRUNTIME,
            source=self._entry,
            created=_tool_versions(),
            verification=verification,
            files=tuple(describe_file(self.root, file) for file in files),
            kv_cache=self.recipe.kv_cache,
            prompt_graph=self._prompt_graph if self.recipe.prompts else "",
        )

    def finish(self, verification: Verification) -> Manifest:
        """Write the report, the model card and the final manifest."""
        self.stage("manifest")
        report = verification.to_dict()
        report["quantization"] = [dataclasses.asdict(report) for report in self.reports]
        text = json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n"
        (self.root / VERIFICATION_NAME).write_text(text, encoding="utf-8")
        draft = self.manifest(verification.summary())
        card = model_card(draft, self.reports, verification, self.source.notes())
        (self.root / CARD_NAME).write_text(card, encoding="utf-8")
        manifest = self.manifest(verification.summary())
        (self.root / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        return manifest

    def stage(self, name: str) -> None:
        """Report the current stage."""
        self.progress(f"[{time.perf_counter() - self._start:6.1f} s] {name}")

    def _write_encoder(self, graph: str) -> None:
        part = self._part(graph)
        self.stage(f"{graph}: PyTorch")
        self.reference.run_encoder(graph, part)
        self.stage(f"{graph}: graph")
        save_graph(_GRAPH_OF[part.exporter](part), self._fp32(graph))

    def _write_projector_and_decoder(self) -> None:
        graph, name = self.config.projector.graph, self.config.decoder.graph
        self.stage(f"{name}: load")
        decoder = cast(PreTrainedModel, self.source.decoder())
        part = self._part(graph)
        self.stage(f"{graph}: PyTorch")
        self.reference.run_projector(part, decoder.get_input_embeddings())
        self.stage(f"{graph}: graph")
        save_graph(_GRAPH_OF[part.exporter](part), self._fp32(graph))
        del part
        self.stage(f"{name}: PyTorch")
        self.reference.run_decoder(decoder)
        self._spec = DecoderSpec.of(self.config.decoder, decoder.config)
        tensors = {key: tensor.numpy() for key, tensor in decoder.state_dict().items()}
        if decoder.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        self._n_weights = sum(tensor.size for tensor in tensors.values())
        self.stage(f"{name}: graph")
        build_decoder(self._spec, tensors, self._fp32(name))
        self.stage("embed_tokens")
        self._write_embeddings(tensors["model.embed_tokens.weight"])

    def _write_rotated_decoder(self, source: Path, path: Path, prompt_blocks: int = 0) -> None:
        """The decoder's float32 graph ``source`` in a rotated basis.

        With ``prompt_blocks`` the one that reads prompts, so; its keys and values are as they were.
        """
        spec = self._spec
        if prompt_blocks:
            rotation = Rotation.of_prompts(spec.hidden_size, spec.ffn_size)
        else:
            rotation = Rotation.random(spec.hidden_size, spec.head_dim, spec.ffn_size)
        tensors = rotated(read_tensors(source), spec.n_layers, rotation)
        build_decoder(spec, tensors, path, rotation, prompt_blocks=prompt_blocks)

    @property
    def _prompt_graph(self) -> str:
        return f"{self.config.decoder.graph}_prompts"

    def _write_prompt_graph(
        self, source: Path, tried: Recipe, peaks: Sequence[KvPeaks] | None
    ) -> GraphReport:
        """The decoder's graph for prompts, from its float32 graph ``source``."""
        assert tried.prompts is not None
        plain = self._fp32(self._prompt_graph)
        self.stage(f"{self._prompt_graph}: {tried.prompts.label}")
        self._write_rotated_decoder(source, plain, PROMPT_BLOCKS)
        target = self._graph_file(self._prompt_graph)
        return quantize_graph(plain, target, tried.prompts, peaks, only_prompts=True)

    def _part(self, graph: str) -> Part:
        self.stage(f"{graph}: load")
        return self.source.part(graph)

    def _write_embeddings(self, table: NDArray[np.float32]) -> None:
        table = table.astype(np.float32, copy=False)
        np.save(self._scratch / EMBEDDINGS_NAME, table)
        if self.recipe.embeddings == "fp32":
            np.save(self.root / EMBEDDINGS_NAME, table)
            return
        rows, scales = quantize_rows(table)
        np.save(self.root / EMBEDDINGS_NAME, rows)
        np.save(self.root / SCALES_NAME, scales)

    def _fp32(self, graph: str) -> Path:
        return self._scratch / f"{graph}.onnx"

    def _quantize(self, graph: str) -> None:
        """Scratch to bundle; the float32 graph is deleted at once, it may be gigabytes."""
        gc.collect()  # modules and traced programs refer to themselves
        source, scheme = self._fp32(graph), self.recipe.graphs[self.config.graphs[graph]]
        self.stage(f"{graph}: {scheme.label}")
        self.reports.append(quantize_graph(source, self._graph_file(graph), scheme))
        source.unlink()
        weights_path(source).unlink(missing_ok=True)

    def _quantize_decoder(self) -> None:
        """The decoder, by the first recipe whose loss of quality is within its limits.

        Raises:
            VerificationError: there is none.
        """
        gc.collect()
        name, asked = self.config.decoder.graph, self.recipe
        source, target = self._fp32(name), self._graph_file(name)
        if asked.graphs["decoder"].kind == "none":
            self.reports.append(quantize_graph(source, target, asked.graphs["decoder"]))
            return
        self.stage(f"{name}: text of its own")
        gate = Gate(
            source,
            TokenEmbeddings(np.load(self._scratch / EMBEDDINGS_NAME, mmap_mode="r")),
            self.config.decoder,
            [dialogue.embeds for dialogue in self.reference.dialogues],
            SessionSettings(threads=self.threads, arena=False),
            judged=self._entry.weights == "trained",
        )
        rows = np.load(self.root / EMBEDDINGS_NAME, mmap_mode="r")
        embeddings = TokenEmbeddings(rows, np.load(self.root / SCALES_NAME))
        moments: dict[str, NDArray[np.float32]] = {}
        refused: dict[str, str] = {}
        # Recipes behind the one that was asked for are tried to name one that passes.
        for tried in candidates(self._n_weights) if self.auto else (asked, *closer(asked.name)):
            if self.prompts:
                tried = with_prompts(tried)
            scheme = tried.graphs["decoder"]
            self.stage(f"{name}: {scheme.label}")
            if scheme.calibrated and not moments:
                moments = gate.moments()
            peaks = self.reference.kv_peaks if tried.kv_cache == "int8" else None
            plain = source
            if scheme.rotated:
                plain = self._scratch / "rotated.onnx"
                self._write_rotated_decoder(source, plain)
            reports = [quantize_graph(plain, target, scheme, peaks, moments)]
            if tried.prompts:
                reports.append(self._write_prompt_graph(source, tried, peaks))
            prompts = self._graph_file(self._prompt_graph) if tried.prompts else None
            quality = gate.judge(target, embeddings, tried, prompts)
            missed = quality.missed(tried.quality)
            if missed is None:
                if refused and not self.auto:
                    raise VerificationError(
                        f"the {asked.name} bundle was not written: {name}: {refused[asked.name]}; "
                        f"--recipe {tried.name} passes ({quality.line})"
                    )
                self.recipe = tried
                self.quality = dataclasses.replace(quality, refused=refused)
                self.reports += reports
                if self.auto:
                    self.stage(f"{name}: recipe {tried.name}: {quality.line}")
                return
            refused[tried.name] = missed
            self.stage(f"{name}: not {tried.name}: {missed}")
        first, why = next(iter(refused.items()))
        raise VerificationError(
            f"the {first} bundle was not written: {name}: {why}; no recipe but fp32 passes "
            f"(tried: {', '.join(refused)})"
        )

    def _graph_file(self, graph: str) -> Path:
        return self.root / GRAPH_FOLDER / f"{graph}.onnx"

    def _graph_entry(self, report: GraphReport) -> GraphEntry:
        file = self._graph_file(report.graph)
        weights = weights_path(file)
        external = (f"{GRAPH_FOLDER}/{weights.name}",) if weights.exists() else ()
        operators = tuple(sorted(graph_contents(file.read_bytes()).operators))
        return GraphEntry(f"{GRAPH_FOLDER}/{file.name}", external, report.scheme, operators)


def _recipe_details(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON holds it, without its name."""
    details = dataclasses.asdict(
        dataclasses.replace(
            recipe, graphs=dict(recipe.graphs), relative_errors=dict(recipe.relative_errors)
        )
    )
    del details["name"]
    plain: dict[str, Any] = json.loads(json.dumps(details))
    return plain


def _tool_versions() -> dict[str, str]:
    return {tool: importlib.metadata.version(tool) for tool in _TOOLS}
