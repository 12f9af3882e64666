"""Recipes chosen by measurement: speed beside accuracy of ways to quantize decoder and encoders.

    python -m benchmarks.recipes decoder --preset full --random-weights 0 [--only NAME ...]
    python -m benchmarks.recipes encoder --checkpoint DIR [--meta DIR --questions N] [--save NAME]

A graph is made in float32 as an export makes it, every variant from that graph as an export
quantizes it, and all are held as the runtime holds them. Round after round each does the work once
while the others wait, in an order that is rotated, after a round that is not counted. Seconds are
medians of the rounds; speed as a multiple of today's recipe is the median of the rounds' ratios.

- **decoder**: a prompt of 400 seeded tokens, then 64 greedy steps, without drafts. The error is
  that of the logits, ``||a - b|| / ||b||`` in the worst of an export's four dialogues, against the
  float32 graph's: after the prompt and each of the tokens that PyTorch answered. (On random tokens
  a trained model's error says nothing: nano's is up to four times as large there.) Agreement is the
  share of these steps with the same arg-max, but for those at which float32's best logit leads by
  less than int4's tie margin. Scales of int8 keys and values are an export's: of these dialogues.
- **encoder**: Whisper's on a window of 30 s, HTS-AT's on one of 10 s, of the repeated sound of
  ``examples/*.flac``. The error is that of the worst output.
- answers, with ``--meta``: the questions of ``benchmarks.mmar``, asked of a bundle that has the
  variant and else is recipe ``int8``; for ``encoder``, all its encoders have it. McNemar's test
  compares them with those of float32.

Left out are unsigned weights of dynamic int8 and heads with blocks of another size: schemes have no
such choice. Which variant is fast depends on the processor, so its features are told; and so is
what other programs compute meanwhile. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.answering import RuntimeAnswerer
from benchmarks.mmar import MAX_NEW_TOKENS, answer_items
from benchmarks.predictions import RunLog, meta_file, read_items
from benchmarks.report import command_line, write_result
from benchmarks.scoring import Item, compare, tally
from benchmarks.turns import Here, joined, median_ratio, race, surroundings, surroundings_lines
from tinygiant.export.decoder import DecoderSpec, build_decoder
from tinygiant.export.exporter import export_bundle
from tinygiant.export.reference import Reference
from tinygiant.export.tracing import trace
from tinygiant.export.verify import output_error
from tinygiant.models.family import Model
from tinygiant.models.sources import CheckpointSource, RandomSource
from tinygiant.quantize import RECIPES, KvPeaks, Recipe, Scheme, quantize_graph, save_graph
from tinygiant.quantize.recipes import QualityLimits
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.cli.options import OneLineParser
from tinygiant.runtime.config import KvType, ModelConfig
from tinygiant.runtime.decoder import Decoder, greedy
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import StorageError, TinyGiantError, UsageError
from tinygiant.runtime.ort.machine import Machine
from tinygiant.runtime.ort.pool import not_packed
from tinygiant.runtime.ort.sessions import Graph, SessionSettings
from tinygiant.runtime.preprocess import preprocess
from tinygiant.runtime.speculation import logit_margin
from tinygiant.runtime.text import one_line
from tinygiant.runtime.tokenizer import Tokenizer

__all__ = ["TODAY", "VARIANTS", "Variant", "main", "recipe_of", "summarize"]

Array = NDArray[np.float32]
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """How a graph is quantized, and how a decoder keeps its keys and values."""

    scheme: Scheme
    kv_cache: KvType = "fp32"


_INT4 = Scheme("weight_only", bits=4, wide=("lm_head",))
_INT4_B128 = dataclasses.replace(_INT4, block_size=128)
_INT4_B128_HEAD4 = dataclasses.replace(_INT4_B128, wide=())
VARIANTS: Mapping[str, Mapping[str, Variant]] = {
    "decoder": {
        "fp32": Variant(Scheme()),
        "int8-b32": Variant(Scheme("weight_only", bits=8)),
        "int4-b32-head8": Variant(_INT4),
        "int4-b32-head4": Variant(dataclasses.replace(_INT4, wide=())),
        "int4-b32-zp-head8": Variant(dataclasses.replace(_INT4, symmetric=False)),
        "int4-b128-head8": Variant(_INT4_B128),
        "int4-b128-head4": Variant(_INT4_B128_HEAD4),
        "int4-b32-head8-kv8": Variant(_INT4, "int8"),
        "int4-b128-head8-kv8": Variant(_INT4_B128, "int8"),
        "int4-b128-head4-kv8": Variant(_INT4_B128_HEAD4, "int8"),
    },
    "encoder": {
        "fp32": Variant(Scheme()),
        "int8-7bit-channel": Variant(Scheme("dynamic_int8")),
        "int8-7bit-channel-rows": Variant(Scheme("dynamic_int8", row_scaled=("*",))),
        "int8-8bit-channel": Variant(Scheme("dynamic_int8", reduce_range=False)),
        "int8-7bit-tensor": Variant(Scheme("dynamic_int8", per_channel=False)),
        "int8-8bit-tensor": Variant(Scheme("dynamic_int8", per_channel=False, reduce_range=False)),
        "int8-b32": Variant(Scheme("weight_only", bits=8)),
    },
}
"""What is measured, by task and name; ``fp32`` is what the others are compared with."""

TODAY = {"decoder": "int4-b128-head8-kv8", "encoder": "int8-7bit-channel"}
"""What recipe ``int4`` ships."""

_TOKENS = {"prefill": 400, "decode": 64}  # those that a round reads, and then writes
_FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "asimddp", "i8mm")
_EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


class DecoderTrial:
    """An export's dialogues, and what the float32 graph makes of them."""

    def __init__(self, model: Model, path: Path, settings: SessionSettings) -> None:
        """Write the float32 graph to ``path`` and run it."""
        self.path = path
        self.pack = path.stem not in not_packed(model.config)  # as the runtime loads it
        self._config = model.config.decoder
        reference, table = _write_decoder(model, path)
        gc.collect()  # modules refer to themselves
        self.kv_peaks, self._dialogues = reference.kv_peaks, reference.dialogues
        self._embeddings = TokenEmbeddings(table)
        graph = Graph(path, settings, pack=self.pack)
        self._wanted = self._logits(graph, "fp32")
        graph.close()

    def errors(self, graph: Graph, kv_cache: KvType) -> Row:
        """Of the logits, and the share of float32's decided tokens that are chosen too."""
        found = self._logits(graph, kv_cache)
        error = output_error(zip(found, self._wanted, strict=True))
        pairs = zip(np.concatenate(found), np.concatenate(self._wanted), strict=True)
        margin = RECIPES["int4"].tie_margin
        same = [greedy(a) == greedy(b) for a, b in pairs if logit_margin(b, greedy(b)) > margin]
        return {
            "relative_error": error.relative_error,
            "agreement": sum(same) / len(same) if same else None,
            "n_decided": len(same),
        }

    def round(self, graph: Graph, kv_cache: KvType, seed: int) -> dict[str, float]:
        """Seconds of a prompt of seeded tokens, and of the greedy steps after it."""
        n_prompt, n_steps = _TOKENS["prefill"], _TOKENS["decode"]
        ids = np.random.default_rng(seed).integers(0, self._config.vocab_size, n_prompt).tolist()
        start_s = time.perf_counter()
        decoder = self._decoder(graph, kv_cache, n_prompt + n_steps)
        token = greedy(decoder.read(ids))
        read_s = time.perf_counter()
        for _ in range(n_steps):
            token = greedy(decoder.step([token])[-1])
        return {"prefill": read_s - start_s, "decode": time.perf_counter() - read_s}

    def _logits(self, graph: Graph, kv_cache: KvType) -> list[Array]:
        """Of each dialogue, after its prompt and each of the K tokens: ``(1 + K, V)``."""
        found = []
        for dialogue in self._dialogues:
            capacity = dialogue.embeds.shape[1] + len(dialogue.token_ids)
            decoder = self._decoder(graph, kv_cache, capacity)
            rows = [decoder.prefill(dialogue.embeds)]
            rows += [decoder.step([token_id])[-1] for token_id in dialogue.token_ids]
            found.append(np.stack(rows))
        return found

    def _decoder(self, graph: Graph, kv_cache: KvType, capacity: int) -> Decoder:
        return Decoder(graph, self._embeddings, self._config, capacity, kv_type=kv_cache)


class EncoderTrial:
    """Windows of the examples' sound, and what the float32 graph makes of them."""

    def __init__(self, model: Model, path: Path, settings: SessionSettings) -> None:
        """Write to ``path`` the float32 graph of its name, and run it."""
        self.path = path
        self.pack = path.stem not in not_packed(model.config)  # as the runtime loads it
        self.kv_peaks: list[KvPeaks] = []
        config = model.config
        encoder = next(e for e in config.encoders if e.graph == path.stem)
        _say(f"{path.stem}: PyTorch")
        save_graph(trace(model.part(path.stem)), path)
        gc.collect()
        self._inputs: list[dict[str, Array]] = []
        for file in sorted(_EXAMPLES.glob("*.flac")):
            clip = read_audio(file)
            samples = np.resize(clip.samples, round(config.chunk_s * clip.sampling_rate_hz))
            (chunk,) = preprocess(read_audio((samples, clip.sampling_rate_hz)), config)
            self._inputs += [{encoder.input: window} for window in chunk.windows[encoder.graph]]
        graph = Graph(path, settings, pack=self.pack)
        self._wanted = [graph.run(inputs) for inputs in self._inputs]
        graph.close()

    def errors(self, graph: Graph, kv_cache: KvType) -> Row:
        """Of the worst output."""
        pairs = [(graph.run(x), y) for x, y in zip(self._inputs, self._wanted, strict=True)]
        errors = [output_error((a[o], b[o]) for a, b in pairs) for o in graph.output_names]
        worst = max(errors, key=lambda error: error.relative_error)
        return {"relative_error": worst.relative_error}

    def round(self, graph: Graph, kv_cache: KvType, seed: int) -> dict[str, float]:
        """Seconds of one window."""
        inputs = self._inputs[seed % len(self._inputs)]
        start_s = time.perf_counter()
        graph.run(inputs)
        return {"encode": time.perf_counter() - start_s}


def _graphs(task: str, config: ModelConfig) -> list[str]:
    """The graphs that are timed: the decoder's, or one encoder's of each kind."""
    if task == "decoder":
        return [config.decoder.graph]
    return [encoder.graph for encoder in config.distinct_encoders]


def _write_decoder(model: Model, path: Path) -> tuple[Reference, Array]:
    """Write the float32 graph; what PyTorch says in an export, token embeddings ``(V, D)``."""
    tokenizer, config = path.with_name("tokenizer.json"), model.config
    tokenizer.write_text(model.tokenizer(), encoding="utf-8")
    reference = Reference(config, Tokenizer.from_file(tokenizer))
    for encoder in config.encoders:
        _say(f"{encoder.graph}: PyTorch")
        reference.run_encoder(encoder.graph, model.part(encoder.graph))
        gc.collect()  # one component is in memory at a time
    _say(f"{path.stem}: PyTorch")
    decoder = cast(PreTrainedModel, model.decoder())
    reference.run_projector(model.part(config.projector.graph), decoder.get_input_embeddings())
    reference.run_decoder(decoder)
    tensors = {name: tensor.numpy() for name, tensor in decoder.state_dict().items()}
    if decoder.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    build_decoder(DecoderSpec.of(config.decoder, decoder.config), tensors, path)
    table = path.with_name("embed_tokens.npy")
    np.save(table, tensors["model.embed_tokens.weight"].astype(np.float32, copy=False))
    return reference, np.load(table, mmap_mode="r")


def measure(
    trial: DecoderTrial | EncoderTrial,
    variants: Mapping[str, Variant],
    today: str,
    settings: SessionSettings,
    rounds: int,
) -> tuple[list[Row], Row]:
    """A row a variant, and what else the machine did."""
    name_of_graph = trial.path.stem
    rows: dict[str, Row] = {}
    graphs: dict[str, Graph] = {}
    for name, variant in variants.items():
        _say(f"{name_of_graph}: {name}")
        target = trial.path.parent / name / trial.path.name
        target.parent.mkdir(exist_ok=True)
        peaks = trial.kv_peaks if variant.kv_cache == "int8" else None
        report = quantize_graph(trial.path, target, variant.scheme, peaks)
        graph = graphs[name] = Graph(target, settings, pack=trial.pack)
        rows[name] = {"name": name, "graph": name_of_graph, "scheme": report.scheme}
        rows[name]["size_bytes"] = report.size_after_bytes
        rows[name] |= trial.errors(graph, variant.kv_cache)

    def engine(name: str) -> Here:
        graph, kv_cache = graphs[name], variants[name].kv_cache
        return Here(lambda request: trial.round(graph, kv_cache, request["seed"]))

    engines = {name: engine(name) for name in variants}
    seconds = race(engines, rounds, tell=lambda line: _say(f"{name_of_graph}: {line}"))
    for graph in graphs.values():
        graph.close()
    found = summarize(seconds, today)
    return [row | found[name] for name, row in rows.items()], surroundings(engines.values())


def summarize(rounds: Mapping[str, Sequence[Mapping[str, float]]], today: str) -> dict[str, Row]:
    """By variant: a stage's seconds, their range, and its speed as a multiple of today's.

    ``rounds`` are seconds by stage. Without the rounds of ``today`` multiples are None.
    """
    rows: dict[str, Row] = {}
    for name, of in rounds.items():
        rows[name] = {}
        for stage in of[0]:
            values, todays = ([r[stage] for r in rs] for rs in (of, rounds.get(today, ())))
            rows[name][f"{stage}_s"] = statistics.median(values)
            rows[name][f"{stage}_range_s"] = [min(values), max(values)]
            rows[name][f"{stage}_of_today"] = median_ratio(todays, values) if todays else None
            if stage in _TOKENS:
                rows[name][f"{stage}_tokens_per_s"] = _TOKENS[stage] / rows[name][f"{stage}_s"]
    return rows


def recipe_of(task: str, name: str) -> Recipe:
    """Recipe ``int8`` with a variant in it, and limits that nothing misses."""
    int8, variant = RECIPES["int8"], VARIANTS[task][name]
    return dataclasses.replace(
        int8,
        name=name,
        graphs={r: variant.scheme if r == task else scheme for r, scheme in int8.graphs.items()},
        relative_errors=dict.fromkeys(int8.relative_errors, 1e9),
        quality=QualityLimits(perplexity_ratio=1e9, same_choice=0.0),
        token_agreement=0.0,
        kv_cache=variant.kv_cache,
    )


def ask(
    model: Model, options: argparse.Namespace, items: Sequence[Item], folder: Path
) -> list[Row]:
    """Right answers, a row a variant: float32 first, which the others are compared with."""
    answers: dict[str, Mapping[str, str]] = {}
    rows = []
    for name in dict.fromkeys(["fp32", *(options.only or VARIANTS[options.task])]):
        _say(f"answers: {name}")
        bundle = folder / f"bundle-{name}"
        export_bundle(model, bundle, recipe_of(options.task, name), threads=options.threads)
        answerer = RuntimeAnswerer(bundle, max_new_tokens=MAX_NEW_TOKENS, threads=options.threads)
        log = RunLog(folder / f"answers-{name}.jsonl", {"model": answerer.identity})
        answer_items(items, meta_file(options.meta).parent, answerer, log)
        answers[name] = log.answers
        row: Row = {"name": name} | tally(items, log.answers).to_dict()
        row["failed"] = sum(details["error"] is not None for details in log.details.values())
        row["differing"] = sum(log.answers[i.id] != answers["fp32"][i.id] for i in items)
        rows.append(row | {"compared": compare(items, answers["fp32"], log.answers).to_dict()})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        options = _parser().parse_args(given)
        model = _model(options)
        with tempfile.TemporaryDirectory(prefix="recipes-", dir=options.work) as folder:
            data = _run(model, options, Path(folder))
        print(_tables(data))
        if options.save:
            write_result(options.save, "recipes", command_line("benchmarks.recipes", given), data)
    except (TinyGiantError, OSError) as error:
        print(f"benchmarks.recipes: {one_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, TinyGiantError) else StorageError.exit_code
    print(json.dumps(data))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=[*VARIANTS])
    parser.add_argument("--checkpoint", type=Path, metavar="DIR")
    parser.add_argument("--preset", metavar="NAME", help="full or nano, with --random-weights")
    parser.add_argument("--random-weights", type=int, metavar="SEED")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="default: all; ratios need today's"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, metavar="DIR", help="where graphs lie meanwhile")
    parser.add_argument("--meta", type=Path, help="questions, as benchmarks.mmar takes them")
    parser.add_argument("--questions", type=int, metavar="N", help="the first N; default: all")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    return parser


def _model(options: argparse.Namespace) -> Model:
    """The model that the options name; refuses options that do not fit together."""
    unknown = sorted({*options.only} - {*VARIANTS[options.task]})
    if unknown:
        known = ", ".join(VARIANTS[options.task])
        raise UsageError(f"--only {unknown[0]}: no variant of this task; there are {known}")
    if any(number is not None and number < 1 for number in (options.rounds, options.questions)):
        raise UsageError("--rounds and --questions are numbers from 1")
    if options.meta is None and options.questions is not None:
        raise UsageError("--questions needs --meta, which says what they are")
    random = (options.preset, options.random_weights)
    if options.checkpoint is not None and random == (None, None):
        return CheckpointSource(options.checkpoint)
    if options.checkpoint is not None or None in random:
        raise UsageError("name one model: --checkpoint DIR, or --preset with --random-weights SEED")
    if options.meta is not None:
        raise UsageError("--meta needs a --checkpoint: random weights know no answers")
    return RandomSource(*random)


def _run(model: Model, options: argparse.Namespace, folder: Path) -> Row:
    task, settings = options.task, SessionSettings(threads=options.threads)
    variants = {n: v for n, v in VARIANTS[task].items() if not options.only or n in options.only}
    items = [] if options.meta is None else read_items(options.meta)[: options.questions]
    # First, for it tells at once where the audio is missing.
    answers = ask(model, options, items, folder) if items else []
    rows: list[Row] = []
    around: Row = {}
    for graph in _graphs(task, model.config):
        path = folder / f"{graph}.onnx"
        kind = DecoderTrial if task == "decoder" else EncoderTrial
        trial: DecoderTrial | EncoderTrial = kind(model, path, settings)
        found, seen = measure(trial, variants, TODAY[task], settings, options.rounds)
        rows += found
        around = joined(around, seen)
    return {
        "task": task,
        "model": model.config.name,
        "weights": model.entry().weights,
        "features": [name for name in _FEATURES if name in Machine().cpu()[1]],
        "threads": options.threads,
        "rounds": options.rounds,
        "today": TODAY[task],
        **around,
        "rows": rows,
        "answers": answers,
    } | (_TOKENS if task == "decoder" else {})


def _tables(data: Row) -> str:
    lines = [
        f"{data['task']} of {data['model']} ({data['weights']}), {data['threads']} threads of "
        f"{' '.join(data['features']) or 'an unknown processor'}; medians of {data['rounds']} "
        "rounds; * is today's",
    ]
    lines += surroundings_lines(data)
    prompt = f"prefill of {_TOKENS['prefill']}, tokens/s | x today's | decode, tokens/s"
    stages, last = (prompt, " tokens as fp32's |") if data["task"] == "decoder" else ("window", "")
    head = f"| graph | variant | MB | {stages} | x today's | error |{last}"
    lines += ["", head, "|---" * (head.count("|") - 1) + "|"]
    for row in data["rows"]:
        cells = [row["graph"], _starred(row["name"], data), f"{row['size_bytes'] / 1e6:.1f}"]
        for stage in ("prefill", "decode", "encode"):
            if f"{stage}_s" in row:
                rate = row.get(f"{stage}_tokens_per_s")
                cells.append(f"{row[f'{stage}_s']:.3f} s" if rate is None else f"{rate:.1f}")
                ratio = row[f"{stage}_of_today"]
                cells.append("–" if ratio is None else f"{ratio:.2f}")
        cells.append(f"{row['relative_error']:.1e}")
        if last:
            share = "–" if row["agreement"] is None else f"{row['agreement']:.1%}"
            cells.append(f"{share} of {row['n_decided']}")
        lines.append(f"| {' | '.join(cells)} |")
    if data["answers"]:
        head = "| variant | questions | right | 95 % | differ from fp32's | only fp32's right "
        lines += ["", f"{head}| only its right | McNemar p |", "|---" * 8 + "|"]
    for row in data["answers"]:
        (low, high), compared = row["ci95"], row["compared"]
        lines.append(
            f"| {_starred(row['name'], data)} | {row['n']} | {row['accuracy']:.1%} "
            f"| {low:.1%}–{high:.1%} | {row['differing']} | {compared['only_a']} "
            f"| {compared['only_b']} | {compared['p_value']:.2f} |"
        )
    return "\n".join(lines)


def _starred(name: str, data: Row) -> str:
    return f"{name}{'*' * (name == data['today'])}"


def _say(line: str) -> None:
    print(f"benchmarks.recipes: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
