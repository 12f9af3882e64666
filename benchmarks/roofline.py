"""How near each stage comes to what this machine can do.

    python -m benchmarks.roofline [--bundle DIR] [--threads 2] [--rounds 5] [--save NAME]

Three ceilings: how fast memory is read (each thread looks for the largest number of its part of a
buffer much larger than the caches; numpy), and how fast onnxruntime multiplies matrices of the size
that Whisper-large-v3-turbo's feed-forward layers have, in float32 (MatMul) and in int8 (uint8 by
int8 to int32, MatMulInteger). Three stages of a bundle through the runtime: the temporal encoder on
a whole window, prefill, and decode at that context. Work is counted in the bundle's own graphs:

- encoder: two operations a weight and row, its convolutions, and attention;
- prefill: two operations a weight and token, the LM head for the last one only; not attention;
- decode: bytes of every weight with its scales, and of the keys and values, read once a token.

Ceilings are the best of the rounds, stages the median. Above 1 of a ceiling means that the kernel
is of another kind than the ceiling's. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks.report import command_line, write_result
from tinygiant.runtime import TinyGiantError
from tinygiant.runtime.bundle import Bundle, default_bundle_path
from tinygiant.runtime.decoder import Decoder, greedy
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import SessionSettings

import onnxruntime  # isort: skip  (after the module that turns its telemetry off)

__all__ = ["GraphWork", "graph_work", "main", "product_graph", "read_bandwidth"]

_ROWS, _INNER, _COLUMNS = 1_500, 1_280, 5_120
_PRODUCTS = ("MatMul", "MatMulInteger", "MatMulNBits", "DynamicQuantizeMatMul", "Gemm")
_ATTENTION = "MultiHeadAttention"


@dataclass(frozen=True)
class GraphWork:
    """What a graph has to compute and to read.

    Attributes:
        weights: number of weights in matrix products.
        head_weights: those of them that make logits.
        weight_bytes: bytes of all of them, with what belongs to them (scales, zero points).
        convolutions: weights of convolutions, in the graph's order.
        n_attentions: nodes of fused attention.
    """

    weights: int
    head_weights: int
    weight_bytes: int
    convolutions: tuple[int, ...]
    n_attentions: int

    def encoder_operations(self, n_steps: int, size: int) -> int:
        """Operations on ``n_steps`` rows; the last convolution halves the frames, so has as many.

        Attention multiplies every row with every row twice, at ``size`` features.
        """
        *first, last = self.convolutions or (0,)
        products = 2 * n_steps * (self.weights + last + 2 * sum(first))
        return products + self.n_attentions * 4 * n_steps**2 * size

    def prefill_operations(self, n_tokens: int) -> int:
        """Operations in products of weights over ``n_tokens``."""
        return 2 * ((self.weights - self.head_weights) * n_tokens + self.head_weights)


def graph_work(model: onnx.ModelProto, vocab_size: int = 0) -> GraphWork:
    """Count the constant weights of products; those with ``vocab_size`` columns are the head's."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = head_weights = weight_bytes = 0
    for node in model.graph.node:
        used = [constants[name] for name in node.input if name in constants]
        # Of a product of two activations nothing is constant, or a scale.
        if node.op_type not in _PRODUCTS or not any(len(tensor.dims) > 1 for tensor in used):
            continue
        found = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            n_columns, n_weights = found["N"], found["K"] * found["N"]
        else:
            matrix = max(used, key=lambda tensor: math.prod(tensor.dims))
            n_columns, n_weights = matrix.dims[-1], math.prod(matrix.dims)
        weights += n_weights
        head_weights += n_weights if n_columns == vocab_size else 0
        weight_bytes += sum(map(_n_bytes, used))
    convolutions = tuple(
        math.prod(constants[node.input[1]].dims)
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1] in constants
    )
    n_attentions = sum(node.op_type == _ATTENTION for node in model.graph.node)
    return GraphWork(weights, head_weights, weight_bytes, convolutions, n_attentions)


def _n_bytes(tensor: onnx.TensorProto) -> int:
    item_bytes: int = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return math.prod(tensor.dims) * item_bytes


def product_graph(kind: str, inner: int, columns: int) -> bytes:
    """A graph of one product with seeded constant weights: ``float32`` or ``int8``."""
    generator = np.random.default_rng(0)
    if kind == "float32":
        weights = generator.standard_normal((inner, columns), np.float32)
        types = TensorProto.FLOAT, TensorProto.FLOAT
    else:
        # 7 bits: no processor's kernel saturates.
        weights = generator.integers(-63, 64, (inner, columns), np.int8)
        types = TensorProto.UINT8, TensorProto.INT32
    operator = "MatMul" if kind == "float32" else "MatMulInteger"
    graph = helper.make_graph(
        [helper.make_node(operator, ["rows", "weights"], ["products"])],
        kind,
        [helper.make_tensor_value_info("rows", types[0], ["n", inner])],
        [helper.make_tensor_value_info("products", types[1], ["n", columns])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def read_bandwidth(buffer: NDArray[np.float32], executor: ThreadPoolExecutor, parts: int) -> float:
    """Bytes a second at which ``parts`` threads read the whole buffer once."""
    pieces = np.array_split(buffer, parts)
    return buffer.nbytes / _seconds(lambda: list(executor.map(np.max, pieces)))


def _seconds(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def _product(kind: str, threads: int) -> Callable[[], float]:
    """A function that measures operations a second of one product."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        product_graph(kind, _INNER, _COLUMNS), options, providers=["CPUExecutionProvider"]
    )
    generator = np.random.default_rng(1)
    if kind == "float32":
        rows: NDArray[Any] = generator.standard_normal((_ROWS, _INNER), np.float32)
    else:
        rows = generator.integers(0, 256, (_ROWS, _INNER), np.uint8)
    operations = 2 * _ROWS * _INNER * _COLUMNS
    return lambda: operations / _seconds(lambda: session.run(None, {"rows": rows}))


class _Stages:
    """The stages of a bundle: how long they take, and what work they are."""

    def __init__(self, bundle: Bundle, threads: int, prompt_tokens: int, steps: int) -> None:
        self._config, self._steps = bundle.config, steps
        self._kv_type = bundle.manifest.kv_cache
        self._pool = GraphPool(bundle, SessionSettings(threads=threads))
        self._embeddings = TokenEmbeddings.open(bundle)
        self._prompt_tokens = prompt_tokens
        self._generator = np.random.default_rng(0)
        decoder, self._encoder = bundle.config.decoder, bundle.config.encoders[0]
        n_frames = self._encoder.n_frames
        self._features = self._generator.standard_normal(
            (1, self._encoder.features.n_mels, n_frames), np.float32
        )
        whisper, qwen3 = (
            graph_work(onnx.load(bundle.graph(name), load_external_data=False), decoder.vocab_size)
            for name in (self._encoder.graph, decoder.graph)
        )
        n_steps = n_frames // 2  # the second convolution's stride
        self.encoder_operations = whisper.encoder_operations(n_steps, self._encoder.outputs[0].size)
        self.prefill_operations = qwen3.prefill_operations(prompt_tokens)
        self.weight_bytes = qwen3.weight_bytes
        self.kv_bytes = 0.0  # known once there is a cache

    def run(self) -> dict[str, float]:
        """Seconds of the encoder, of prefill, and of one step of decode."""
        with self._pool.use(self._encoder.graph) as whisper:
            encoder_s = _seconds(lambda: whisper.run({self._encoder.input: self._features}))
        vocab_size = self._config.decoder.vocab_size
        token_ids = self._generator.integers(0, vocab_size, self._prompt_tokens).tolist()
        with self._pool.use(self._config.decoder.graph) as graph:
            capacity = self._prompt_tokens + self._steps
            start_s = time.perf_counter()
            decoder = Decoder(
                graph, self._embeddings, self._config.decoder, capacity, kv_type=self._kv_type
            )
            token = greedy(decoder.read(token_ids))
            read_s = time.perf_counter()
            for _ in range(self._steps):
                token = greedy(decoder.step([token])[-1])
            end_s = time.perf_counter()
            context = self._prompt_tokens + (self._steps + 1) / 2
            self.kv_bytes = decoder.cache.n_bytes / capacity * context
            del decoder
        return {
            "encoder": encoder_s,
            "prefill": read_s - start_s,
            "decode": (end_s - read_s) / self._steps,
        }


def measure(
    bundle: Bundle, *, threads: int, rounds: int, prompt_tokens: int, steps: int, buffer_mib: int
) -> dict[str, Any]:
    """Ceilings and stages, in turn in every round after one that is not counted."""
    stages = _Stages(bundle, threads, prompt_tokens, steps)
    products = {kind: _product(kind, threads) for kind in ("float32", "int8")}
    buffer = np.ones(buffer_mib * 2**20 // 4, np.float32)
    bandwidths: list[float] = []
    rates: dict[str, list[float]] = {kind: [] for kind in products}
    times: dict[str, list[float]] = {"encoder": [], "prefill": [], "decode": []}
    with ThreadPoolExecutor(threads) as executor:
        for number in range(rounds + 1):
            found = read_bandwidth(buffer, executor, threads)
            speeds = {kind: product() for kind, product in products.items()}
            seconds = stages.run()
            if number:
                bandwidths.append(found)
                for kind, rate in speeds.items():
                    rates[kind].append(rate)
                for stage, value in seconds.items():
                    times[stage].append(value)
    ceilings = {
        "read_bytes_per_s": max(bandwidths),
        "float32_per_s": max(rates["float32"]),
        "int8_per_s": max(rates["int8"]),
    }
    work: dict[str, dict[str, float]] = {
        "encoder": {"operations": stages.encoder_operations},
        "prefill": {"operations": stages.prefill_operations},
        "decode": {"bytes": stages.weight_bytes + stages.kv_bytes},
    }
    rows = []
    for stage, of in times.items():
        row: dict[str, Any] = {"stage": stage, "seconds": statistics.median(of)} | work[stage]
        if "operations" in row:
            rate = row["operations"] / row["seconds"]
            row |= {"operations_per_s": rate}
            row |= {f"of_{k}": rate / ceilings[f"{k}_per_s"] for k in ("float32", "int8")}
        else:
            rate = row["bytes"] / row["seconds"]
            row |= {"bytes_per_s": rate, "of_bandwidth": rate / ceilings["read_bytes_per_s"]}
            row |= {"weight_bytes": stages.weight_bytes, "kv_bytes": stages.kv_bytes}
        rows.append(row)
    return {
        "ceilings": ceilings,
        "product": [_ROWS, _INNER, _COLUMNS],
        "buffer_bytes": buffer.nbytes,
        "rows": rows,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", metavar="DIR", help="default: the built-in one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=400)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--buffer-mib", type=int, default=1024, help="larger than the caches")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    try:
        bundle = Bundle.open(options.bundle or default_bundle_path())
        data = {
            "model": bundle.config.name,
            "recipe": bundle.manifest.recipe.name,
            "weights": bundle.manifest.source.weights,
            "threads": options.threads,
            "prompt_tokens": options.prompt_tokens,
            "steps": options.steps,
            **measure(
                bundle,
                threads=options.threads,
                rounds=options.rounds,
                prompt_tokens=options.prompt_tokens,
                steps=options.steps,
                buffer_mib=options.buffer_mib,
            ),
        }
        print(_table(data))
        if options.save:
            write_result(options.save, "roofline", command_line("benchmarks.roofline", given), data)
    except TinyGiantError as error:
        print(f"benchmarks.roofline: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(data))
    return 0


def _table(data: dict[str, Any]) -> str:
    ceilings = data["ceilings"]
    shape = " x ".join(map(str, data["product"]))
    names = {
        "encoder": "encoder, a whole window",
        "prefill": f"prefill of {data['prompt_tokens']} tokens",
        "decode": f"decode of a token, {data['prompt_tokens']} tokens of context",
    }
    lines = [
        f"{data['model']} {data['recipe']} ({data['weights']}), {data['threads']} threads: memory "
        f"read at {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s (numpy), products of {shape} at "
        f"{ceilings['float32_per_s'] / 1e9:.0f} GFLOP/s in float32 and "
        f"{ceilings['int8_per_s'] / 1e9:.0f} GOP/s in int8 (onnxruntime)",
        "",
        "| stage | work | time | rate | of float32 | of int8 | of bandwidth |",
        "|---" * 7 + "|",
    ]
    for row in data["rows"]:
        if "operations" in row:
            cells = [f"{row['operations'] / 1e9:.3g} GOP", f"{row['seconds']:.3f} s"]
            cells += [f"{row['operations_per_s'] / 1e9:.0f} GOP/s"]
            cells += [f"{row['of_float32']:.2f}", f"{row['of_int8']:.2f}", "–"]
        else:
            cells = [f"{row['bytes'] / 1e6:.0f} MB", f"{1e3 * row['seconds']:.2f} ms"]
            cells += [f"{row['bytes_per_s'] / 1e9:.1f} GB/s", "–", "–"]
            cells += [f"{row['of_bandwidth']:.2f}"]
        lines.append(f"| {names[row['stage']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
