"""How fast other engines do the same work: encoder, decoder, and a whole question, side by side.

    python -m benchmarks.peers --bundle DIR [--clip-bundle DIR] [--peers-python PATH] [--rounds 5]
        [--only encoder decoder ...] [--tiny] [--save NAME] [--plot FILE]

Three tasks, each one interleaved run. Every contender is a process of its own
(``benchmarks.peer_workers``), loaded once; then each does the task by turns, after a round that is
not counted (``benchmarks.turns``). Figures are medians of the rounds, ratios the
median of the rounds' ratios. An engine is taken from this Python or from the one that
``--peers-python`` names (default: ``.venv-peers``, if it is there); one that neither has is left
out, and both table and JSON say so. Models have random weights and are made once, in ``--models``.

- **encoder**: Whisper-large-v3-turbo's, a window of 30 s, features given. Ours also on a clip of
  10 s as ``clip`` audio context cuts it, which those of a fixed window cannot do.
- **decoder**: Qwen3-0.6B, a prompt of 400 tokens, then 64 greedy steps. Ours without drafts.
- **question**: ours about a clip of 10 s, 128 tokens written without drafts, against the best parts
  of the peers: the fastest encoder, prefill of as many tokens as ours reads in full context (what
  all prompts begin with is kept from the first question on, so is not read), and 128 steps. Which
  are best is what the two other tasks found; they are run again here, in the same rounds as ours.

What other programs compute meanwhile is measured and told: a run on a busy machine is no
comparison. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peer_models import MODULES, QWEN3, WHISPER
from benchmarks.report import command_line, write_result
from benchmarks.turns import (
    ROOT,
    WorkerError,
    WorkerProcess,
    environment,
    joined,
    last_line,
    median_ratio,
    race,
    surroundings,
    surroundings_lines,
)
from tinygiant.runtime import TinyGiantError
from tinygiant.runtime.bundle import Bundle, default_bundle_path
from tinygiant.runtime.errors import UsageError

__all__ = [
    "CONTENDERS",
    "Contender",
    "main",
    "pick_python",
    "summarize_decoders",
    "summarize_encoders",
    "summarize_question",
]

_PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
_TASKS = ("encoder", "decoder", "question")
_QUESTION = "What is heard in this recording?"
_PROMPT_TOKENS, _STEPS = 400, 64
_QUESTION_STEPS = 128

Round = dict[str, Any]
Rounds = Mapping[str, Sequence[Round]]


@dataclass(frozen=True)
class Contender:
    """An engine at a task: its worker, the model it runs (None: a bundle, or made in memory)."""

    name: str
    task: str
    worker: str
    modules: tuple[str, ...]
    model: str | None = None

    @property
    def ours(self) -> bool:
        """Whether it is this project's."""
        return self.worker.startswith("our-")


_OURS = ("tinygiant", "onnxruntime")
_TORCH = ("torch", "transformers")
CONTENDERS = (
    Contender("our-encoder", "encoder", "our-encoder", _OURS),
    Contender("our-encoder-10s", "encoder", "our-encoder-clip", _OURS),
    Contender("ctranslate2-int8", "encoder", "ctranslate2", ("ctranslate2",), "whisper-ct2-int8"),
    Contender("whisper.cpp-f16", "encoder", "whisper.cpp", ("pywhispercpp",), "whisper-cpp-f16"),
    Contender(
        "onnxruntime-fp32", "encoder", "onnxruntime-encoder", ("onnxruntime",), "whisper-onnx-fp32"
    ),
    Contender("torch-fp32-encoder", "encoder", "torch-encoder", _TORCH),
    Contender("our-decoder", "decoder", "our-decoder", _OURS),
    Contender("our-decoder-int8", "decoder", "our-decoder", _OURS),
    Contender("our-decoder-prompts", "decoder", "our-decoder", _OURS),
    Contender("llama.cpp-q8_0", "decoder", "llama.cpp", ("llama_cpp",), "qwen3-q8_0"),
    Contender("llama.cpp-q8_0-flash", "decoder", "llama.cpp-flash", ("llama_cpp",), "qwen3-q8_0"),
    Contender("llama.cpp-q4_0", "decoder", "llama.cpp", ("llama_cpp",), "qwen3-q4_0"),
    Contender("llama.cpp-q4_0-flash", "decoder", "llama.cpp-flash", ("llama_cpp",), "qwen3-q4_0"),
    Contender("llama.cpp-q4_k_m", "decoder", "llama.cpp", ("llama_cpp",), "qwen3-q4_k_m"),
    Contender(
        "llama.cpp-q4_k_m-flash", "decoder", "llama.cpp-flash", ("llama_cpp",), "qwen3-q4_k_m"
    ),
    Contender(
        "onnxruntime-genai-int4",
        "decoder",
        "onnxruntime-genai",
        ("onnxruntime_genai",),
        "qwen3-genai-int4",
    ),
    Contender("torch-fp32-decoder", "decoder", "torch-decoder", _TORCH),
    Contender(
        "optimum-fp32",
        "decoder",
        "optimum-decoder",
        ("optimum.onnxruntime", *_TORCH),
        "qwen3-optimum-fp32",
    ),
    Contender("our-question", "question", "our-question", _OURS),
    Contender("our-question-clip", "question", "our-question", _OURS),
)
# Which option gives the bundle, where it is not --bundle.
_OTHER_BUNDLES = {
    "our-question-clip": "clip-bundle",
    "our-decoder-int8": "int8-bundle",
    "our-decoder-prompts": "prompts-bundle",
}
_NAMES = [contender.name for contender in CONTENDERS]
ENCODER_BASELINES = ("ctranslate2-int8",)
DECODER_BASELINES = ("llama.cpp-q4_0", "llama.cpp-q4_0-flash")
# What other decoders are compared with: those of 8 bits, and those of int4-gptq's quality.
_OTHER_BASELINES = {
    "our-decoder-int8": ("llama.cpp-q8_0", "llama.cpp-q8_0-flash"),
    "our-decoder-prompts": ("llama.cpp-q4_k_m", "llama.cpp-q4_k_m-flash"),
}
BASELINES_OF = {name: peers for ours, peers in _OTHER_BASELINES.items() for name in (ours, *peers)}


# Figures: pure functions of what the workers wrote.


def summarize_encoders(rounds: Rounds) -> list[Round]:
    """A row an encoder: median seconds, and their ratios to the baseline's and to ours."""
    seconds = {name: [done["encode_s"] for done in of] for name, of in rounds.items()}
    baseline = _best(seconds, ENCODER_BASELINES, min)
    return [
        {
            "name": name,
            "frames": rounds[name][0]["frames"],
            "encode_s": statistics.median(of),
            "range_s": [min(of), max(of)],
            "of_baseline": _ratio(seconds, name, baseline),
            "of_ours": _ratio(seconds, name, "our-encoder"),
            "baseline": name == baseline,
        }
        for name, of in seconds.items()
    ]


def summarize_decoders(rounds: Rounds, prompt_tokens: int, steps: int) -> list[Round]:
    """A row a decoder: tokens a second, and their ratios to the baseline's and to ours.

    Of the baselines the faster one counts, for prefill and decode separately. Which they are is a
    matter of quality: :data:`BASELINES_OF`.
    """
    rates = {
        "prefill": {n: [prompt_tokens / r["prefill_s"] for r in of] for n, of in rounds.items()},
        "decode": {n: [steps / r["decode_s"] for r in of] for n, of in rounds.items()},
    }
    rows = []
    for name in rounds:
        row: Round = {"name": name}
        for stage, of in rates.items():
            baseline = _best(of, BASELINES_OF.get(name, DECODER_BASELINES), max)
            row[f"{stage}_tokens_per_s"] = statistics.median(of[name])
            row[f"{stage}_range"] = [min(of[name]), max(of[name])]
            row[f"{stage}_of_baseline"] = _ratio(of, name, baseline)
            row[f"{stage}_of_ours"] = _ratio(of, name, "our-decoder")
            row[f"{stage}_baseline"] = name == baseline
        rows.append(row)
    return rows


def summarize_question(rounds: Rounds, parts: Mapping[str, str]) -> list[Round]:
    """A row for each of ours, and one for the peers' ``parts`` (encode_s, ... -> contender)."""
    peers = [
        [rounds[name][number][stage] for stage, name in parts.items()]
        for number in range(len(next(iter(rounds.values()))))
    ]
    sums = [sum(of) for of in peers]
    rows: list[Round] = []
    for name, of in rounds.items():
        if "total_s" in of[0]:
            stages = [key for key in of[0] if key.endswith("_s")]
            row: Round = {stage: statistics.median(done[stage] for done in of) for stage in stages}
            counts = ("audio_context", "prompt_tokens", "read_tokens", "generated")
            row |= {"name": name} | {key: of[-1][key] for key in counts}
            row["of_peers"] = median_ratio([done["total_s"] for done in of], sums)
            rows.append(row)
    medians = [statistics.median(of) for of in zip(*peers, strict=True)]
    best: Round = dict(zip(parts, medians, strict=True))
    rows.append(best | {"name": "peers' best parts", "parts": dict(parts), "of_peers": 1.0})
    rows[-1]["total_s"] = statistics.median(sums)
    return rows


def _best(
    values: Mapping[str, Sequence[float]], names: Sequence[str], choose: Callable[..., str]
) -> str | None:
    there = [name for name in names if name in values]
    return choose(there, key=lambda name: statistics.median(values[name])) if there else None


def _ratio(values: Mapping[str, Sequence[float]], name: str, to: str | None) -> float | None:
    return None if to not in values else median_ratio(values[name], values[to])


# Processes.


def _probe(python: Path) -> dict[str, str]:
    """Modules that a Python has, and their versions."""
    command = [python, "-m", "benchmarks.peer_workers", "probe"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(1), capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise UsageError(f"--peers-python {python}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise UsageError(f"--peers-python {python}: {error.stderr.strip()[-200:]}") from error
    found: dict[str, str] = json.loads(done.stdout)
    return found


def pick_python(
    modules: Sequence[str], pythons: Mapping[Path, Mapping[str, str]]
) -> tuple[Path | None, str]:
    """The first Python that has all ``modules``, or None and which of them are missing."""
    for python, has in pythons.items():
        if all(module in has for module in modules):
            return python, ""
    missing = [m for m in modules if not any(m in has for has in pythons.values())]
    return None, f"no Python here has {', '.join(missing or modules)}"


class _Peers:
    """What is there to run: Pythons, models, bundles; and what had to be left out, and why."""

    def __init__(self, options: argparse.Namespace, bundles: Mapping[str, Bundle]) -> None:
        self._options = options
        self._bundles = bundles
        self._models: Path = options.models.absolute() / ("tiny" if options.tiny else "full")
        candidates = [Path(sys.executable), options.peers_python or _PEERS_PYTHON]
        self.pythons = {p: _probe(p) for p in candidates if p.exists() or p != _PEERS_PYTHON}
        self.skipped: dict[str, str] = {}
        self.facts: dict[str, Round] = {}
        self.around: Round = {}  # what else the machine did, over all races

    def wanted(self, task: str) -> list[Contender]:
        """Contenders of a task that the command line asks for."""
        only = self._options.only
        return [c for c in CONTENDERS if c.task == task and (not only or {c.name, task} & {*only})]

    def race(self, entries: Sequence[tuple[Contender, Round]]) -> dict[str, list[Round]]:
        """Load the contenders, then run the rounds, each with its request."""
        with contextlib.ExitStack() as stack:
            running: dict[str, WorkerProcess] = {}
            for contender, _ in entries:
                with self._told(contender):
                    process = self._start(contender, stack)
                    process.wait_until_loaded()
                    running[contender.name] = process
            requests = {contender.name: request for contender, request in entries}
            found = race(running, self._options.rounds, requests, tell=_say, lost=self._lost)
            for contender, _ in entries:
                if contender.name in found:
                    facts = self._facts(contender, running[contender.name])
                    self.facts.setdefault(contender.name, facts)
            of = [running[name] for name in found]
            self.around = joined(self.around, surroundings(of))
        return found

    def first_answer(self, contender: Contender, request: Round) -> Round | None:
        """One uncounted round of a contender that is loaded for it alone."""
        with contextlib.ExitStack() as stack, self._told(contender):
            process = self._start(contender, stack)
            process.wait_until_loaded()
            return process.ask(request | {"seed": 0})
        return None

    @contextlib.contextmanager
    def _told(self, contender: Contender) -> Any:
        try:
            yield
        except WorkerError as error:
            self._lost(contender.name, error)

    def _lost(self, name: str, error: WorkerError) -> None:
        self.skipped[name] = str(error)
        _say(f"{name} is left out: {error}")

    def _start(self, contender: Contender, stack: contextlib.ExitStack) -> WorkerProcess:
        _say(f"loading {contender.name}")
        python, missing = pick_python(contender.modules, self.pythons)
        if python is None:
            raise WorkerError(missing)
        command = [str(python), "-m", "benchmarks.peer_workers", contender.worker]
        command += ["--threads", str(self._options.threads)]
        command += ["--tiny"] if self._options.tiny else []
        if contender.ours:
            command += ["--model", str(self._bundle(contender).root)]
        elif contender.model is not None:
            command += ["--model", str(self._made(contender.model))]
        log = self._models / "logs" / f"{contender.name}.txt"
        process = WorkerProcess(command, log, self._options.threads, self._options.timeout)
        stack.callback(process.close)
        return process

    def _bundle(self, contender: Contender) -> Bundle:
        name = _OTHER_BUNDLES.get(contender.name, "bundle")
        if name not in self._bundles:
            raise WorkerError(f"no --{name} was given")
        return self._bundles[name]

    def _made(self, model: str) -> Path:
        """The folder of a model, made if it is not there."""
        folder = self._models / model
        if folder.exists():
            return folder
        python, missing = pick_python(MODULES[model], self.pythons)
        if python is None:
            raise WorkerError(f"its model cannot be made: {missing}")
        _say(f"making {model}, once")
        log = self._models / "logs" / f"{model}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(python), "-m", "benchmarks.peer_models", model, str(folder)]
        command += ["--tiny"] if self._options.tiny else []
        with log.open("wb") as output:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=environment(self._options.threads),
            )
        if done.returncode:
            raise WorkerError(f"its model cannot be made: {last_line(log)}")
        return folder

    def _facts(self, contender: Contender, process: WorkerProcess) -> Round:
        python, _ = pick_python(contender.modules, self.pythons)
        assert python is not None
        return {
            "load_s": process.started["load_s"],
            "peak_rss_bytes": process.peak_rss_bytes,
            "disk_bytes": self._disk_bytes(contender),
            "engine": {module: self.pythons[python][module] for module in contender.modules},
            "built_with": process.started.get("built_with"),
        }

    def _disk_bytes(self, contender: Contender) -> int | None:
        if contender.model is not None:
            return sum(f.stat().st_size for f in (self._models / contender.model).rglob("*"))
        if not contender.ours:
            return None
        manifest = self._bundle(contender).manifest
        sizes = {entry.path: entry.size_bytes for entry in manifest.files}
        if contender.task == "question":
            return sum(sizes.values())
        graph = "whisper_encoder" if contender.task == "encoder" else "decoder_model"
        entry, embeddings = manifest.graphs[graph], manifest.embeddings
        used = {entry.file, *entry.external_data}
        if contender.task == "decoder":
            used |= {embeddings.file, embeddings.scale_file or embeddings.file}
        return sum(sizes[path] for path in used)


def _say(line: str) -> None:
    print(f"benchmarks.peers: {line}", file=sys.stderr, flush=True)


def measure(peers: _Peers, new_tokens: int) -> Round:
    """Run the tasks; returns their rows."""
    encoders = peers.race([(c, {}) for c in peers.wanted("encoder")])
    request = {"prompt_tokens": _PROMPT_TOKENS, "steps": _STEPS}
    decoders = peers.race([(c, request) for c in peers.wanted("decoder")])
    data: Round = {
        "encoder": summarize_encoders(encoders),
        "decoder": summarize_decoders(decoders, _PROMPT_TOKENS, _STEPS),
        "question": [],
    }
    if ours := peers.wanted("question"):
        parts = _best_parts(data)
        if parts:
            data["question"] = _measure_question(peers, ours, parts, new_tokens)
        else:
            reason = "needs an encoder and a decoder of the peers in the same run"
            peers.skipped |= {contender.name: reason for contender in ours}
    return data


def _measure_question(
    peers: _Peers, ours: Sequence[Contender], parts: Mapping[str, str], new_tokens: int
) -> list[Round]:
    ask = {"question": _QUESTION, "new_tokens": new_tokens}
    first = peers.first_answer(ours[0], ask)
    if first is None:
        return []
    request = {"prompt_tokens": first["full_read_tokens"], "steps": new_tokens}
    by_name = {contender.name: contender for contender in CONTENDERS}
    rivals = [(by_name[name], request) for name in dict.fromkeys(parts.values())]
    rounds = peers.race([*((contender, ask) for contender in ours), *rivals])
    there = all(name in rounds for name in parts.values())
    return summarize_question(rounds, parts) if there else []


def _best_parts(data: Round) -> dict[str, str]:
    """The peers' fastest encoder, prefill and decode, by stage; empty if one is missing."""
    by_name = {contender.name: contender for contender in CONTENDERS}
    encoders = [row for row in data["encoder"] if not by_name[row["name"]].ours]
    decoders = [row for row in data["decoder"] if not by_name[row["name"]].ours]
    if not encoders or not decoders:
        return {}
    return {
        "encode_s": min(encoders, key=lambda row: row["encode_s"])["name"],
        "prefill_s": max(decoders, key=lambda row: row["prefill_tokens_per_s"])["name"],
        "decode_s": max(decoders, key=lambda row: row["decode_tokens_per_s"])["name"],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="a full-size one; with --tiny any")
    parser.add_argument("--clip-bundle", metavar="DIR", help="another, of audio context clip")
    parser.add_argument("--int8-bundle", metavar="DIR", help="another, of an 8-bit recipe")
    parser.add_argument(
        "--prompts-bundle", metavar="DIR", help="another: int4-gptq with a graph for prompts"
    )
    parser.add_argument("--peers-python", type=Path, metavar="PATH")
    parser.add_argument("--models", type=Path, default=Path(".cache/peers"), metavar="DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=_QUESTION_STEPS)
    parser.add_argument("--only", nargs="+", choices=[*_TASKS, *_NAMES], default=[], metavar="WHAT")
    parser.add_argument("--tiny", action="store_true", help="peers of tiny models: tries the code")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="of one round")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a chart, PNG")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        bundles = {"bundle": Bundle.open(options.bundle or default_bundle_path())}
        for name in {*_OTHER_BUNDLES.values()}:
            if folder := getattr(options, name.replace("-", "_")):
                bundles[name] = Bundle.open(folder)
        if not options.tiny:
            _require_full_size(bundles.values())
        peers = _Peers(options, bundles)
        load_before = os.getloadavg()[0]
        tasks = measure(peers, options.new_tokens)
        for row in (row for task in _TASKS for row in tasks[task]):
            row |= peers.facts.get(row["name"], {})
        data = {
            "recipe": bundles["bundle"].manifest.recipe.name,
            "model": bundles["bundle"].config.name,
            "weights": bundles["bundle"].manifest.source.weights,
            "threads": options.threads,
            "rounds": options.rounds,
            "tiny": options.tiny,
            "prompt_tokens": _PROMPT_TOKENS,
            "steps": _STEPS,
            "load_average_before": load_before,
            **peers.around,
            "skipped": peers.skipped,
            **tasks,
        }
        print(_tables(data))
        if options.plot:
            _plot(data, options.plot)
        if options.save:
            write_result(options.save, "peers", command_line("benchmarks.peers", given), data)
    except TinyGiantError as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data))
    return 0


def _require_full_size(bundles: Any) -> None:
    for bundle in bundles:
        [rows, *_], decoder = bundle.config.encoders[0].outputs, bundle.config.decoder
        found = (rows.size, decoder.hidden_size, decoder.n_layers, decoder.vocab_size)
        wanted = (WHISPER.d_model, QWEN3.hidden_size, QWEN3.n_layers, QWEN3.vocab_size)
        if found != wanted:
            raise UsageError(
                f"bundle {bundle.config.name} has sizes {found}, the peers' models {wanted}: give "
                "--bundle a full-size one, or --tiny to try the code"
            )


def _tables(data: Round) -> str:
    size = "tiny models: the figures mean nothing; " if data["tiny"] else ""
    lines = [
        f"{size}ours {data['model']} {data['recipe']}; {data['threads']} threads, medians of "
        f"{data['rounds']} rounds; * is the baseline",
    ]
    lines += surroundings_lines(data)
    memory = "peak RSS | on disk |"
    if data["encoder"]:
        head = f"| encoder | frames | one window | x baseline's time | x ours | {memory}"
        lines += ["", head, "|---" * 7 + "|"]
    for row in data["encoder"]:
        lines.append(
            f"| {row['name']}{'*' * row['baseline']} | {row['frames']} | {row['encode_s']:.2f} s "
            f"| {_times(row['of_baseline'])} | {_times(row['of_ours'])} | {_memory(row)}"
        )
    if data["decoder"]:
        title = f"decoder, {data['prompt_tokens']} tokens, {data['steps']} steps"
        rates = " | ".join(f"{s} tok/s | x baseline's | x ours" for s in ("prefill", "decode"))
        lines += ["", f"| {title} | {rates} | {memory}", "|---" * 9 + "|"]
    for row in data["decoder"]:
        cells = [
            f"{row[f'{stage}_tokens_per_s']:.1f}{'*' * row[f'{stage}_baseline']} "
            f"| {_times(row[f'{stage}_of_baseline'])} | {_times(row[f'{stage}_of_ours'])}"
            for stage in ("prefill", "decode")
        ]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {_memory(row)}")
    if data["question"]:
        head = "| question, 10 s clip | encoder(s) | prefill | decode | in all | x peers' |"
        lines += ["", f"{head} {memory}", "|---" * 8 + "|"]
    for row in data["question"]:
        cells = [f"{row[f'{stage}_s']:.2f} s" for stage in ("encode", "prefill", "decode", "total")]
        lines.append(
            f"| {_question_name(row)} | {' | '.join(cells)} | {row['of_peers']:.2f} "
            f"| {_memory(row)}"
        )
    if data["skipped"]:
        lines.append("")
    lines += [f"left out: {name}: {reason}" for name, reason in data["skipped"].items()]
    return "\n".join(lines)


def _question_name(row: Round) -> str:
    if "parts" in row:
        return f"{row['name']}: {', '.join(dict.fromkeys(row['parts'].values()))}"
    return (
        f"{row['name']}, context {row['audio_context']}, {row['read_tokens']} tokens read, "
        f"{row['generated']} written"
    )


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _memory(row: Round) -> str:
    cells = [row.get("peak_rss_bytes"), row.get("disk_bytes")]
    return " | ".join("–" if cell is None else f"{cell / 1e6:.0f} MB" for cell in cells) + " |"


def _plot(data: Round, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("Encoder, 30 s window: seconds", data["encoder"], "encode_s"),
        ("Prefill: tokens a second", data["decoder"], "prefill_tokens_per_s"),
        ("Decode: tokens a second", data["decoder"], "decode_tokens_per_s"),
        ("Whole question, 10 s clip: seconds", data["question"], "total_s"),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 7), layout="constrained")
    for axis, (title, rows, key) in zip(axes.flat, panels, strict=True):
        names, values = [row["name"] for row in rows], [row[key] for row in rows]
        colours = ["tab:orange" if name.startswith("our") else "tab:gray" for name in names]
        axis.bar_label(axis.barh(names, values, color=colours), fmt="%.3g", padding=3)
        axis.set_title(title, loc="left", fontsize=10)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
