"""An imported public model beside its PyTorch path: first token, speed and memory.

    python -m benchmarks.public_models graft CHECKPOINT LANGUAGE_MODEL OUT
    python -m benchmarks.public_models compare FAMILY CHECKPOINT --tokenizer FILE
        --bundle DIR [DIR ...] [--original CLONE [--original-python PYTHON]]
        [--seconds 10] [--rounds 5] [--new-tokens 64] [--save NAME]

``compare`` asks each bundle, and the checkpoint in PyTorch, the same question about clips of noise,
by turns, each in a process of its own. PyTorch's path is the best that its users could write:
float32, encoder and mapper as modules, a clip heard once, transformers' Llama with a cache of keys
and values and the logits of one position; features are ours for both. With ``--original``, Mellow's
own code takes part too (:mod:`benchmarks.original_mellow`). A second question about the same clip
follows each. Figures are medians, ratios those of the rounds. The last line printed is JSON.

``graft`` puts the real language model that ``benchmarks.quality_models extract`` wrote in place of
a checkpoint's decoder. A checkpoint of seeded random weights then has a decoder that a gate on
quality can judge. What such a model says of a sound means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.original_mellow import OriginalMellow
from benchmarks.peer_workers import serve
from benchmarks.report import command_line, write_result
from benchmarks.turns import (
    WorkerError,
    WorkerProcess,
    median_ratio,
    race,
    surroundings,
    surroundings_lines,
)
from tinygiant.runtime.errors import TinyGiantError, UsageError

if TYPE_CHECKING:
    from tinygiant.models.family import Model, Part
    from tinygiant.runtime.ort.pool import GraphPool

__all__ = ["graft", "main", "summarize"]

Array = NDArray[np.float32]
Round = dict[str, Any]

_RATE_HZ = 44_100
_QUESTIONS = ("What can be heard in this recording?", "Is there music?")
_TORCH = "PyTorch"
_ORIGINAL = "original code"


def graft(checkpoint: Path, language_model: Path, target: Path) -> None:
    """Write ``checkpoint`` to ``target`` with the decoder of ``language_model``.

    Raises:
        UsageError: a tensor of the language model has no place of its shape in the checkpoint.
    """
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    head = next((name for name in state if name.endswith("lm_head.weight")), None)
    if head is None:
        raise UsageError(f"{checkpoint}: no tensor is called lm_head.weight: not such a model")
    prefix = head.removesuffix("lm_head.weight")
    for path in sorted((language_model / "tensors").glob("*.npy")):
        name, tensor = f"{prefix}{path.stem}", torch.from_numpy(np.load(path))
        if name not in state or state[name].shape != tensor.shape:
            raise UsageError(f"{checkpoint}: no place for {path.stem} {tuple(tensor.shape)}")
        state[name] = tensor
    state[head] = state[f"{prefix}model.embed_tokens.weight"]  # tied
    torch.save(state, target)


class _TorchGraph:
    """A part with the interface of a graph."""

    def __init__(self, part: Part) -> None:
        self._part = part

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        with torch.inference_mode():
            tensors = {name: torch.from_numpy(inputs[name]) for name in self._part.inputs}
            found = self._part.module(**tensors)
        outputs = found if isinstance(found, tuple) else (found,)
        arrays = [output.numpy() for output in outputs]
        return dict(zip(self._part.outputs, arrays, strict=True))


class _TorchPool:
    """Parts of a model with the interface of a bundle's graphs."""

    def __init__(self, model: Model) -> None:
        self._graphs = {
            name: _TorchGraph(model.part(name))
            for name in model.config.graphs
            if name != model.config.decoder.graph
        }

    @contextmanager
    def use(self, name: str) -> Iterator[_TorchGraph]:
        """The part called ``name``."""
        yield self._graphs[name]


class _TorchModel:
    """A public checkpoint in PyTorch, without end: exactly as many tokens as are asked for."""

    def __init__(self, options: argparse.Namespace) -> None:
        import tokenizers
        import torch

        from tinygiant.models.family import family
        from tinygiant.runtime.tokenizer import Tokenizer

        torch.set_num_threads(options.threads)
        model = family(options.family).open(options.checkpoint, tokenizer=options.tokenizer)
        self._config, self._decoder = model.config, cast(Any, model.decoder()).eval()
        self._pool = cast("GraphPool", _TorchPool(model))
        self._tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(model.tokenizer()))
        self._torch, self._encoded = torch, ()

    def ask(self, clip: Any, question: str, n_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and of the others. ``clip`` is None for the last one."""
        from tinygiant.runtime.audio import read_audio
        from tinygiant.runtime.encode import encode, project
        from tinygiant.runtime.preprocess import preprocess
        from tinygiant.runtime.prompt import build_prompt, compose

        start_s = time.perf_counter()
        torch, lookup = self._torch, self._lookup
        if clip is not None:
            chunks = preprocess(read_audio(clip), self._config)
            self._encoded = encode(chunks, self._pool, self._config)
        prompt = build_prompt(question, None, self._tokenizer, self._config.prompt)
        instruction = lookup(prompt.instruction_ids)[None]
        rows = [
            p.audio_embeds for p in project(self._encoded, instruction, self._pool, self._config)
        ]
        n_clips = sum(part is None for part in prompt.parts)
        embeds = np.concatenate(compose(prompt, [rows] * n_clips, lookup), axis=1)
        with torch.inference_mode():
            found = self._decoder(
                inputs_embeds=torch.from_numpy(embeds), use_cache=True, logits_to_keep=1
            )
            first_s = time.perf_counter()
            for _ in range(n_tokens - 1):
                token = found.logits[:, -1].argmax(-1, keepdim=True)
                found = self._decoder(
                    input_ids=token, past_key_values=found.past_key_values, use_cache=True
                )
        return first_s - start_s, time.perf_counter() - first_s

    def _lookup(self, token_ids: Sequence[int]) -> Array:
        with self._torch.inference_mode():
            ids = self._torch.tensor(list(token_ids), dtype=self._torch.long)
            return cast(Array, self._decoder.get_input_embeddings()(ids).numpy())


class _BundleModel:
    """A bundle through the runtime."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tinygiant.runtime import load

        self._model = load(
            options.bundle[0], threads=options.threads, verify=False, speculate=False
        )
        self._clip: Any = None

    def ask(self, clip: Any, question: str, n_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and of each other one times their number."""
        self._clip = self._clip if clip is None else clip
        answer = self._model.ask(self._clip, question, max_new_tokens=n_tokens, raw=True)
        times, n_written = answer.timings, answer.tokens.generated
        if n_written < 2:
            raise RuntimeError(f"the model wrote {n_written} tokens: nothing to time")
        each_s = (times.total_s - times.first_token_s) / (n_written - 1)
        return times.first_token_s, each_s * (n_tokens - 1)


class _Asked(Protocol):
    """What a worker asks."""

    def ask(self, clip: Any, question: str, n_tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and of the others. ``clip`` is None for the last one."""


class _Worker:
    """One round: a new clip and a question, then another question about it."""

    def __init__(self, model: _Asked, options: argparse.Namespace) -> None:
        self._model, self._options = model, options

    def round(self, request: Round) -> Round:
        n_samples = round(self._options.seconds * _RATE_HZ)
        noise = np.random.default_rng(request["seed"]).standard_normal(n_samples)
        clip = ((0.1 * noise).astype(np.float32), _RATE_HZ)
        first_s, rest_s = self._model.ask(clip, _QUESTIONS[0], self._options.new_tokens)
        again_s, _ = self._model.ask(None, _QUESTIONS[1], 2)
        return {"first_token_s": first_s, "rest_s": rest_s, "second_question_s": again_s}


def summarize(
    rounds: Mapping[str, Sequence[Round]], new_tokens: int, memory: Mapping[str, int]
) -> list[Round]:
    """A row an engine: medians, and ratios to PyTorch's (below 1 is sooner, or smaller).

    Where the original's code took part, also the ratio of the first token to that one's.
    """
    rows = []
    for name, of in rounds.items():
        row: Round = {"name": name, "peak_rss_bytes": memory[name]}
        for key in ("first_token_s", "second_question_s"):
            times = [one[key] for one in of]
            row[key] = statistics.median(times)
            row[f"{key.removesuffix('_s')}_of_torch"] = median_ratio(
                times, [one[key] for one in rounds[_TORCH]]
            )
        if _ORIGINAL in rounds:
            row["first_token_of_original"] = median_ratio(
                [one["first_token_s"] for one in of],
                [one["first_token_s"] for one in rounds[_ORIGINAL]],
            )
        row["tokens_per_s"] = statistics.median((new_tokens - 1) / one["rest_s"] for one in of)
        row["tokens_per_s_of_torch"] = median_ratio(
            [one["rest_s"] for one in rounds[_TORCH]], [one["rest_s"] for one in of]
        )
        row["peak_rss_of_torch"] = memory[name] / memory[_TORCH]
        rows.append(row)
    return rows


def _compare(options: argparse.Namespace) -> Round:
    if options.original and options.family != "mellow":
        raise UsageError(f"--original: only Mellow's code is known here, not {options.family}'s")
    # An engine's name, its Python, and what its worker is told besides.
    engines: dict[str, tuple[str, list[str]]] = {_TORCH: (sys.executable, [])}
    if options.original:
        engines[_ORIGINAL] = (options.original_python, ["--original", str(options.original)])
    for bundle in options.bundle:
        engines[Path(bundle).name] = (sys.executable, ["--bundle", bundle])
    common = ["--tokenizer", str(options.tokenizer), "--threads", str(options.threads)]
    common += ["--seconds", str(options.seconds), "--new-tokens", str(options.new_tokens)]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        workers = {}
        for name, (python, more) in engines.items():
            command = [python, "-m", "benchmarks.public_models", "worker", options.family]
            command += [str(options.checkpoint), *common, *more]
            log = Path(scratch) / f"{name}.txt"
            workers[name] = WorkerProcess(command, log, options.threads, timeout_s=600)
            stack.callback(workers[name].close)
            workers[name].wait_until_loaded()
        rounds = race(workers, options.rounds)
        memory = {name: worker.peak_rss_bytes for name, worker in workers.items()}
    sizes = {
        Path(bundle).name: sum(f.stat().st_size for f in Path(bundle).rglob("*") if f.is_file())
        for bundle in options.bundle
    }
    rows = summarize(rounds, options.new_tokens, memory)
    for row in rows:
        row["size_bytes"] = sizes.get(row["name"], options.checkpoint.stat().st_size)
    return {
        "family": options.family,
        "seconds": options.seconds,
        "threads": options.threads,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        **surroundings(workers.values()),
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    try:
        if options.command == "graft":
            graft(options.checkpoint, options.language_model, options.target)
            return 0
        if options.command == "worker":
            kind: Callable[..., _Asked] = _TorchModel
            if options.original:
                kind = OriginalMellow
            elif options.bundle:
                kind = _BundleModel
            serve(lambda: _Worker(kind(options), options), sys.stdin.readline, _write)
            return 0
        data = _compare(options)
        print(_table(data))
        if options.save:
            command = command_line("benchmarks.public_models", given)
            write_result(options.save, "public_models", command, data)
    except (TinyGiantError, WorkerError) as error:
        print(f"benchmarks.public_models: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, TinyGiantError) else 1
    print(json.dumps(data))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.public_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("graft")
    for name in ("checkpoint", "language_model", "target"):
        command.add_argument(name, type=Path)
    for name in ("compare", "worker"):
        command = commands.add_parser(name)
        command.add_argument("family", choices=("mizar", "mellow"))
        command.add_argument("checkpoint", type=Path)
        command.add_argument("--tokenizer", type=Path, required=True)
        command.add_argument("--bundle", nargs="+", default=[])
        command.add_argument("--original", type=Path, metavar="CLONE")
        command.add_argument("--original-python", metavar="PYTHON", default=sys.executable)
        command.add_argument("--seconds", type=float, default=10.0)
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--new-tokens", type=int, default=64)
        command.add_argument("--rounds", type=int, default=5)
        command.add_argument("--save", metavar="NAME")
    return parser


def _write(line: Round) -> None:
    print(json.dumps(line), flush=True)


def _table(data: Round) -> str:
    lines = [
        f"{data['family']}, {data['seconds']:g} s of audio, {data['threads']} threads, "
        f"{data['rounds']} rounds",
        *surroundings_lines(data),
        "",
        "| engine | MB | first token | of PyTorch's | of the original's | second question "
        "| of PyTorch's | tokens/s | x PyTorch's | peak RSS, MB |",
        "|---" * 10 + "|",
    ]
    for row in data["rows"]:
        of_original = row.get("first_token_of_original")
        cells = (
            row["name"],
            f"{row['size_bytes'] / 1e6:.0f}",
            f"{row['first_token_s']:.3f} s",
            f"{row['first_token_of_torch']:.2f}",
            "" if of_original is None else f"{of_original:.2f}",
            f"{row['second_question_s']:.3f} s",
            f"{row['second_question_of_torch']:.2f}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s_of_torch']:.2f}",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
