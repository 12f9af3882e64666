"""The gain from drafts: structured answers written with and without speculation.

    python -m benchmarks.speculation --bundle bundles/full-int4 --meta data/world/test \\
        --answers runs/nano-int8.jsonl [--count 30] [--save NAME]

The texts are answers that a trained nano gave (``--answers``, a submission of ``benchmarks.mmar``),
in the tokens of the bundle inside the package. The graph is that of ``--bundle``, whatever its
weights say: after each run the logit of the token that comes next in the text is made the largest.
So every step costs what it costs with that model, and what drafts guess right is decided by real
text. Each answer is written twice in turn, without and with drafts, after a prompt of random rows;
drafts come from the question, the answer so far and the answers before, as in the runtime.

What it leaves out: near ties, at which drafted tokens are computed again. How often they occur, and
what they cost, is part of every other measurement of a trained model. The last line printed is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.predictions import read_items, read_predictions
from benchmarks.report import command_line, write_result
from tinygiant.runtime import Bundle, TinyGiantError
from tinygiant.runtime.bundle import default_bundle_path
from tinygiant.runtime.config import DecoderConfig, KvType
from tinygiant.runtime.drafting import make_decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import SessionSettings
from tinygiant.runtime.prompt import build_prompt
from tinygiant.runtime.speculation import Speculation
from tinygiant.runtime.tokenizer import Tokenizer

__all__ = ["Script", "Scripted", "main", "measure", "read_scripts"]


@dataclass(frozen=True)
class Script:
    """One text to be written, and the question that it answers, as tokens."""

    instruction_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]


class Scripted:
    """A decoder graph that runs as it is, and then prefers the next token of a text.

    The text follows ``n_prompt`` positions of prompt.
    """

    def __init__(self, graph: Any, n_prompt: int, text: Sequence[int]) -> None:
        self._graph = graph
        self._n_prompt = n_prompt
        self._text = text

    def bind(self) -> Any:
        """A binding of the graph."""
        return _ScriptedBinding(self._graph.bind(), self._n_prompt, self._text)


class _ScriptedBinding:
    def __init__(self, binding: Any, n_prompt: int, text: Sequence[int]) -> None:
        self._binding = binding
        self._n_prompt = n_prompt
        self._text = text
        self._inputs: dict[str, NDArray[Any]] = {}
        self._logits = np.zeros((0,), np.float32)
        self.shared = binding.shared

    def input(self, name: str, array: NDArray[Any]) -> None:
        self._inputs[name] = array
        self._binding.input(name, array)

    def output(self, name: str, array: NDArray[np.float32]) -> None:
        self._logits = array
        self._binding.output(name, array)

    def run(self) -> None:
        self._binding.run()
        length = int(self._inputs["total_sequence_length"])
        start = length - self._inputs["inputs_embeds"].shape[1]
        for row, position in enumerate(self._inputs["logits_positions"]):
            # After the prompt's last position comes token 0 of the text.
            index = start + int(position) + 1 - self._n_prompt
            if 0 <= index < len(self._text):
                logits = self._logits[0, row]
                logits[self._text[index]] = logits.max() + 10 * logits.std()


def read_scripts(meta: Path, answers: Path, count: int, tokenizer: Tokenizer) -> list[Script]:
    """The first ``count`` answered questions.

    Raises:
        UsageError: the files cannot be read, or hold fewer.
    """
    bundle = Bundle.open(default_bundle_path())
    _, thoughts = read_predictions(answers)
    scripts = []
    for item in read_items(meta):
        if item.id in thoughts and len(scripts) < count:
            prompt = build_prompt(item.question, item.choices, tokenizer, bundle.config.prompt)
            text = f"<think>\n{thoughts[item.id]}\n</think>"
            ids = tuple(tokenizer.encode_markup(text))
            scripts.append(Script(tuple(prompt.instruction_ids), ids))
    if len(scripts) < count:
        raise UsageError(f"{answers} holds {len(scripts)} answers to {meta}, asked for {count}")
    return scripts


def measure(
    graph: Any,
    embeddings: TokenEmbeddings,
    config: DecoderConfig,
    kv_type: KvType,
    scripts: Sequence[Script],
    n_prompt: int,
) -> list[dict[str, float]]:
    """One row an answer: tokens, and seconds without and with drafts.

    Raises:
        UsageError: an answer came out otherwise than its text.
    """
    rows = []
    speculation = Speculation()
    prompt = 0.02 * np.random.default_rng(0).standard_normal((1, n_prompt, config.hidden_size))
    for number, script in enumerate(scripts):
        n_tokens = len(script.answer_ids)
        row: dict[str, float] = {"tokens": n_tokens}
        for drafted in (number % 2 == 0, number % 2 == 1):  # each kind goes first half of the time
            drafter = speculation.start([script.instruction_ids], ()) if drafted else None
            scripted = Scripted(graph, n_prompt, script.answer_ids)
            capacity = n_prompt + n_tokens
            decoder = make_decoder(scripted, embeddings, config, capacity, drafter, kv_type=kv_type)
            logits = decoder.prefill(prompt.astype(np.float32))
            start_s = time.perf_counter()
            tokens = list(decoder.generate(logits, max_new_tokens=n_tokens, stop_ids=()))
            row["drafted_s" if drafted else "plain_s"] = time.perf_counter() - start_s
            if tuple(tokens) != script.answer_ids:
                raise UsageError(f"answer {number}: other tokens than those of the text came out")
            if drafter is not None:
                row |= {"drafted": drafter.n_drafted, "accepted": drafter.n_accepted}
        speculation.remember(script.answer_ids, row["drafted_s"], drafted=True)
        rows.append(row)
    return rows


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        "answers": len(rows),
        "tokens": statistics.mean(row["tokens"] for row in rows),
        "plain_tokens_per_s": statistics.median(row["tokens"] / row["plain_s"] for row in rows),
        "drafted_tokens_per_s": statistics.median(row["tokens"] / row["drafted_s"] for row in rows),
        "ratio": statistics.median(row["plain_s"] / row["drafted_s"] for row in rows),
        "accepted_share": sum(row["accepted"] for row in rows) / sum(row["tokens"] for row in rows),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="default: the built-in one")
    parser.add_argument("--meta", type=Path, required=True, help="the questions")
    parser.add_argument(
        "--answers", type=Path, required=True, help="a submission of benchmarks.mmar"
    )
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        writer = Bundle.open(default_bundle_path())
        tokenizer = Tokenizer.from_file(writer.file(writer.manifest.tokenizer))
        scripts = read_scripts(options.meta, options.answers, options.count, tokenizer)
        bundle = Bundle.open(options.bundle or default_bundle_path())
        pool = GraphPool(bundle, SessionSettings(threads=options.threads))
        with pool.use(bundle.config.decoder.graph) as graph:
            embeddings = TokenEmbeddings.open(bundle)
            config, kv_type = bundle.config.decoder, bundle.manifest.kv_cache
            rows = measure(graph, embeddings, config, kv_type, scripts, options.prompt_tokens)
        parts = {"first 5 answers": rows[:5], "later answers": rows[5:]}
        data = {
            "model": bundle.config.name,
            "recipe": bundle.manifest.recipe.name,
            "threads": options.threads,
            "prompt_tokens": options.prompt_tokens,
            "parts": {name: _summary(part) for name, part in parts.items() if part},
            "rows": rows,
        }
        print(_table(data))
        if options.save:
            command = command_line("benchmarks.speculation", given)
            write_result(options.save, "speculation", command, data)
    except TinyGiantError as error:
        print(f"benchmarks.speculation: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data))
    return 0


def _table(data: dict[str, Any]) -> str:
    lines = [
        f"{data['model']} {data['recipe']}, {data['threads']} threads, after "
        f"{data['prompt_tokens']} tokens of prompt",
        "",
        "| answers | tokens each | without drafts | with drafts | faster | drafted right |",
        "|---" * 6 + "|",
    ]
    for name, part in data["parts"].items():
        lines.append(
            f"| {name} | {part['tokens']:.0f} | {part['plain_tokens_per_s']:.1f} tokens/s "
            f"| {part['drafted_tokens_per_s']:.1f} tokens/s | {part['ratio']:.2f} x "
            f"| {part['accepted_share']:.0%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
