"""The comparison with other engines: its figures, its files and its lines, without the engines."""

from __future__ import annotations

import ast
import json
import math
import struct
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import cores, gguf_files, peer_models, peer_workers, peers, roofline, turns
from benchmarks.peer_models import QWEN3, TINY_QWEN3, TINY_WHISPER, WHISPER

# Figures.


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # The machine was twice as slow in the second round: each round's ratio is 0.5.
    assert turns.median_ratio([1, 2, 1], [2, 4, 2]) == 0.5
    assert turns.median_ratio([1, 9, 3], [1, 3, 2]) == 1.5


def test_every_contender_begins_a_round() -> None:
    assert [turns.rotated("abc", by)[0] for by in range(4)] == ["a", "b", "c", "a"]
    assert turns.rotated("abc", 2) == ["c", "a", "b"]
    assert turns.rotated([], 3) == []


def test_encoders_are_compared_with_the_baseline_and_with_ours() -> None:
    seconds = {"our-encoder": [2.0, 4.0], "our-encoder-10s": [0.5, 1.0], "ctranslate2-int8": [4, 8]}
    rounds = {n: [{"encode_s": s, "frames": 3_000} for s in of] for n, of in seconds.items()}
    ours, clip, baseline = peers.summarize_encoders(rounds)
    assert (ours["encode_s"], ours["range_s"]) == (3.0, [2.0, 4.0])
    assert (ours["of_baseline"], ours["of_ours"]) == (0.5, 1.0)
    assert (clip["of_baseline"], clip["of_ours"]) == (0.125, 0.25)
    assert [row["baseline"] for row in (ours, clip, baseline)] == [False, False, True]
    del rounds["ctranslate2-int8"]
    assert [row["of_baseline"] for row in peers.summarize_encoders(rounds)] == [None, None]


def test_of_two_baselines_the_faster_counts_stage_by_stage() -> None:
    seconds = {
        "our-decoder": (2.0, 1.0),
        "llama.cpp-q4_0": (4.0, 2.0),
        "llama.cpp-q4_0-flash": (3.0, 4.0),
    }
    rounds = {n: [{"prefill_s": p, "decode_s": d}] * 3 for n, (p, d) in seconds.items()}
    ours, plain, flash = peers.summarize_decoders(rounds, 400, 64)
    assert (ours["prefill_tokens_per_s"], ours["decode_tokens_per_s"]) == (200, 64)
    assert ours["prefill_of_baseline"] == pytest.approx(1.5)
    assert ours["decode_of_baseline"] == pytest.approx(2.0)
    assert (flash["prefill_baseline"], flash["decode_baseline"]) == (True, False)
    assert (plain["prefill_baseline"], plain["decode_baseline"]) == (False, True)
    assert plain["decode_of_ours"] == 0.5


def test_a_question_is_compared_with_the_sum_of_the_peers_parts() -> None:
    ours = {"total_s": 6.0, "encode_s": 3.0, "prefill_s": 2.0, "decode_s": 1.0, "prompt_tokens": 9}
    ours |= {"audio_context": "full", "read_tokens": 9, "generated": 128}
    rounds = {
        "our-question": [ours, ours | {"total_s": 12.0}],
        "ctranslate2-int8": [{"encode_s": 6.0}, {"encode_s": 12.0}],
        "llama.cpp-q4_0": [{"prefill_s": 7.0, "decode_s": 2.0}, {"prefill_s": 14, "decode_s": 4}],
        "llama.cpp-q4_0-flash": [
            {"prefill_s": 4.0, "decode_s": 8},
            {"prefill_s": 8, "decode_s": 8},
        ],
    }
    parts = {
        "encode_s": "ctranslate2-int8",
        "prefill_s": "llama.cpp-q4_0-flash",
        "decode_s": "llama.cpp-q4_0",
    }
    mine, best = peers.summarize_question(rounds, parts)
    assert (mine["total_s"], mine["of_peers"]) == (9.0, 0.5)
    assert (best["total_s"], best["of_peers"]) == ((6 + 4 + 2 + 12 + 8 + 4) / 2, 1.0)
    assert (best["encode_s"], best["prefill_s"], best["decode_s"]) == (9.0, 6.0, 3.0)


def test_what_others_compute_is_read_from_proc() -> None:
    #      user nice system idle iowait irq softirq steal guest guest_nice
    stat = "cpu  100 20 3 5000 600 7 8 9 100 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert turns.busy_jiffies(stat) == 100 + 20 + 3 + 7 + 8 + 9
    process = "42 (a name) with) spaces) S 1 42 42 0 -1 4194304 99 0 0 0 170 30 5 6 20 0 3 0 1"
    assert turns.process_jiffies(process) == 200


# What is there to run.


def test_a_python_is_taken_only_with_all_modules() -> None:
    here, there = Path("here"), Path("there")
    pythons = {here: {"torch": "2"}, there: {"torch": "2", "ctranslate2": "4"}}
    assert peers.pick_python(("torch",), pythons) == (here, "")
    assert peers.pick_python(("torch", "ctranslate2"), pythons) == (there, "")
    assert peers.pick_python(("torch", "gguf"), pythons) == (None, "no Python here has gguf")


def test_contenders_workers_models_and_modules_know_each_other() -> None:
    assert {c.worker for c in peers.CONTENDERS} == set(peer_workers.WORKERS)
    assert {c.model for c in peers.CONTENDERS} - {None} == set(peer_models.MAKERS)
    assert set(peer_models.MODULES) == set(peer_models.MAKERS)
    asked = {m for c in peers.CONTENDERS for m in c.modules}
    asked |= {m for modules in peer_models.MODULES.values() for m in modules}
    assert asked <= set(peer_workers.PACKAGES)
    names = [contender.name for contender in peers.CONTENDERS]
    assert len(set(names)) == len(names)
    assert {*peers.ENCODER_BASELINES, *peers.DECODER_BASELINES} <= set(names)


@pytest.mark.parametrize("module", [gguf_files, peer_models, peer_workers])
def test_what_peers_run_imports_only_numpy_at_once(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    foreign = {name for name in found if name.partition(".")[0] not in sys.stdlib_module_names}
    ours = {"benchmarks.gguf_files", "benchmarks.peer_models"}
    assert foreign <= {"numpy", "numpy.typing", *ours}


# Turns.


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to wait for, and processors that stay where they are."""
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    monkeypatch.setattr(turns, "apart_ns", lambda: 30.0)


def test_engines_take_turns_after_a_round_that_does_not_count(steady: None) -> None:
    asked: list[str] = []

    def engine(name: str) -> turns.Here:
        def answer(request: dict[str, Any]) -> dict[str, Any]:
            asked.append(f"{name}{request['seed']}")
            return {"of": request["of"], "round": request["seed"]}

        return turns.Here(answer)

    engines = {name: engine(name) for name in "abc"}
    found = turns.race(engines, 2, {name: {"of": name} for name in "abc"})
    assert asked == ["a0", "b0", "c0", "b1", "c1", "a1", "c2", "a2", "b2"]
    assert found == {name: [{"of": name, "round": n} for n in (1, 2)] for name in "abc"}
    assert [len(one.others_cores) for one in engines.values()] == [2, 2, 2]
    engines["b"].others_cores[1] = 0.75
    assert turns.surroundings(engines.values())["others_cores"] >= 0.75
    assert turns.surroundings([]) == {}


def test_an_engine_that_fails_is_left_out_or_ends_it(steady: None) -> None:
    def fails(request: dict[str, Any]) -> dict[str, Any]:
        if request["seed"] == 1:
            raise turns.WorkerError("no luck")
        return request

    engines = {"bad": turns.Here(fails), "good": turns.Here(lambda request: request)}
    lost: dict[str, str] = {}
    found = turns.race(engines, 2, lost=lambda name, error: lost.update({name: str(error)}))
    assert found == {"good": [{"seed": 1}, {"seed": 2}]}
    assert lost == {"bad": "no luck"}
    with pytest.raises(turns.WorkerError, match="no luck"):
        turns.race(engines, 2)


def test_a_round_of_processors_that_were_moved_apart_is_run_again(
    steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A prompt took 0.72 or 1.12 s by the minute: the two processors of a virtual machine were on
    # one chiplet or on two, 30 or 160 ns apart.
    # Before and after each round; the first only warms up.
    distances = iter([160.0, 160.0, 30.0, 40.0, 38.0, 160.0, 160.0, 160.0, 30.0, 30.0])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        return request

    monkeypatch.setattr(turns, "apart_ns", lambda: next(distances))
    # The lines are those of the distances: tests that run beside this one are other programs too.
    monkeypatch.setattr(turns, "others_s", lambda pid: 0.0)
    engine = turns.Here(answer)
    assert turns.race({"one": engine}, 2) == {"one": [{"seed": 1}, {"seed": 4}]}
    around = turns.surroundings([engine])
    assert (
        around["cores_apart"]["rounds_not_counted"] == around["cores_apart"]["rounds_counted"] == 2
    )
    assert around["cores_apart"]["most_ns"] == 160.0
    [line] = turns.surroundings_lines(around | {"others_cores": 0.0})
    assert line.startswith("2 rounds did not count, 2 did: processors lay 30 to 160 ns apart")
    assert turns.surroundings_lines(turns.surroundings([])) == []

    # Where they never lay still, all rounds are given, and the line tells.
    restless = iter([30.0, 160.0] * 20)
    monkeypatch.setattr(turns, "apart_ns", lambda: next(restless))
    engine = turns.Here(answer)
    assert len(turns.race({"one": engine}, 2)["one"]) == 6
    [line] = turns.surroundings_lines(turns.surroundings([engine]))
    assert line.startswith("6 rounds are NOT A COMPARISON") and "30 to 160 ns" in line

    # Where they always lie alike, or nothing tells, every round counts.
    for distance in (160.0, None):
        monkeypatch.setattr(turns, "apart_ns", lambda distance=distance: distance)
        engine = turns.Here(answer)
        assert len(turns.race({"one": engine}, 3)["one"]) == 3
        assert turns.surroundings_lines(turns.surroundings([engine])) == []


def test_the_distance_of_two_processors_is_some_nanoseconds() -> None:
    found = cores.apart_ns()
    assert found is None or 20 < found < 1e6


# Lines.


class _Doubling:
    built_with = "AVX2 = 1"

    def round(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"twice": 2 * request["seed"]}


def test_a_worker_answers_line_by_line_until_there_is_none() -> None:
    lines: Iterator[str] = iter(['{"seed": 1}\n', '{"seed": 4}\n'])
    answers: list[dict[str, Any]] = []
    peer_workers.serve(_Doubling, lambda: next(lines, ""), answers.append)
    loaded, first, second = answers
    assert loaded["load_s"] >= 0
    assert loaded["built_with"] == "AVX2 = 1"
    assert (first["twice"], second["twice"]) == (2, 8)
    assert all(answer["peak_rss_bytes"] > 2**20 for answer in answers)


class _Scripted(peer_workers._Decoder):
    """Answers with the number of tokens it holds."""

    vocab_size = 10

    def prefill(self, token_ids: list[int]) -> int:
        self.given = [len(token_ids)]
        assert set(token_ids) <= set(range(10))
        return self.given[0]

    def step(self, token: int) -> int:
        self.given.append(token)
        return token + 1


def test_each_step_reads_the_token_before_it() -> None:
    decoder = _Scripted()
    found = decoder.round({"seed": 1, "prompt_tokens": 5, "steps": 3})
    assert decoder.given == [5, 5, 6, 7]
    assert decoder.capacity >= 5 + 3
    assert set(found) == {"prefill_s", "decode_s"}


def test_nan_is_no_answer() -> None:
    with pytest.raises(ArithmeticError):
        peer_workers._greedy(np.array([1.0, math.nan], np.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    code = "import sys; print('{\"peak_rss_bytes\": 1}', flush=True); input(); sys.exit('no luck')"
    process = turns.WorkerProcess([sys.executable, "-c", code], tmp_path / "log.txt", 1, 30)
    process.wait_until_loaded()
    with pytest.raises(turns.WorkerError, match="no luck"):
        process.ask({"seed": 1})
    process.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_that_a_signal_ends_is_not_blamed_with_its_last_line(tmp_path: Path) -> None:
    """llama.cpp built for AMX died of it, and the table said: left out, load_tensors."""
    code = "import os, sys; print('loaded', file=sys.stderr, flush=True); os.kill(os.getpid(), 4)"
    process = turns.WorkerProcess([sys.executable, "-c", code], tmp_path / "log.txt", 1, 30)
    with pytest.raises(turns.WorkerError, match="SIGILL"):
        process.wait_until_loaded()
    process.close()


def test_decoders_are_compared_with_those_of_their_quality() -> None:
    def rounds(*prefill_s: float) -> list[dict[str, float]]:
        return [{"prefill_s": s, "decode_s": 1.0} for s in prefill_s]

    found = peers.summarize_decoders(
        {
            "our-decoder-int8": rounds(1.0, 2.0, 1.0),
            "llama.cpp-q8_0": rounds(4.0, 4.0, 5.0),
            "llama.cpp-q8_0-flash": rounds(3.0, 4.0, 3.0),
            "llama.cpp-q4_0": rounds(1.0, 1.0, 1.0),
            "our-decoder-prompts": rounds(1.0, 1.0, 1.0),
            "llama.cpp-q4_k_m": rounds(7.0, 7.0, 7.0),
            "llama.cpp-q4_k_m-flash": rounds(8.0, 8.0, 8.0),
        },
        400,
        64,
    )
    rows = {row["name"]: row for row in found}
    assert rows["our-decoder-int8"]["prefill_of_baseline"] == 3.0  # of 3, 2 and 3
    assert rows["llama.cpp-q8_0-flash"]["prefill_baseline"]
    assert rows["llama.cpp-q4_0"]["prefill_of_baseline"] == 1.0
    assert rows["our-decoder-prompts"]["prefill_of_baseline"] == 7.0


def test_a_small_bundle_is_not_compared_with_large_peers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert peers.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


# Models.


def test_the_peers_models_have_the_sizes_of_the_real_ones() -> None:
    encoder = sum(
        math.prod(shape)
        for name, shape, _ in peer_models.whisper_cpp_tensors(WHISPER)
        if name.startswith("encoder.")
    )
    assert encoder == 636_968_960
    decoder = sum(math.prod(shape) for _, shape in peer_models.qwen3_tensors(QWEN3))
    assert decoder == 596_049_920
    assert WHISPER.n_frames == 3_000


def test_whisper_cpp_s_file_is_as_long_as_its_header_says(tmp_path: Path) -> None:
    target = tmp_path / "models" / "whisper"
    assert peer_models.main(["whisper-cpp-f16", str(target), "--tiny"]) == 0
    content = (target / "model.bin").read_bytes()
    header = struct.unpack_from("<12i", content)
    assert header[:6] == (0x67676D6C, 51_866, 100, 64, 2, 4)
    n_mels, n_bins = struct.unpack_from("<2i", content, 48)
    offset = 56 + 4 * n_mels * n_bins
    (n_tokens,) = struct.unpack_from("<i", content, offset)
    offset += 4
    for _ in range(n_tokens):
        offset += 4 + struct.unpack_from("<i", content, offset)[0]
    names = []
    while offset < len(content):
        n_axes, n_letters, kind = struct.unpack_from("<3i", content, offset)
        shape = struct.unpack_from(f"<{n_axes}i", content, offset + 12)
        offset += 12 + 4 * n_axes + n_letters
        names.append(content[offset - n_letters : offset].decode())
        offset += math.prod(shape) * (2 if kind else 4)
    assert offset == len(content)
    assert names == [name for name, _, _ in peer_models.whisper_cpp_tensors(TINY_WHISPER)]
    assert json.loads((target / "made.json").read_text())["size"]["d_model"] == 64
    assert [path.name for path in target.parent.iterdir()] == ["whisper"]


def test_a_gguf_file_says_what_its_decoder_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both writers, as the package gguf is told; llama.cpp was shown the files by hand."""
    told: dict[str, Any] = {}

    class Writer:
        def __init__(self, path: Path, architecture: str) -> None:
            told["architecture"] = architecture

        def __getattr__(self, name: str) -> Any:
            return lambda *values: told.setdefault(name, []).extend(values)

    kinds = types.SimpleNamespace(NORMAL=1, CONTROL=3)
    module = types.SimpleNamespace(GGUFWriter=Writer, TokenType=kinds)
    monkeypatch.setitem(sys.modules, "gguf", module)
    peer_models._gguf(TINY_QWEN3, Path("f16.gguf"))
    assert told["architecture"] == "qwen3"
    assert told["add_head_count"] == [4] and told["add_head_count_kv"] == [2]
    assert told["add_key_length"] == told["add_rope_dimension_count"] == [64]
    assert told["add_context_length"] == [4_096] and told["add_vocab_size"] == [2_048]
    assert told["add_file_type"] == [1]
    names, arrays = told["add_tensor"][::2], told["add_tensor"][1::2]
    found = [(name, array.shape) for name, array in zip(names, arrays, strict=True)]
    assert found == [*peer_models.qwen3_tensors(TINY_QWEN3)]
    assert {array.dtype.name for array in arrays if array.ndim == 2} == {"float16"}
    told.clear()
    size = {"max_positions": 8, "hidden_size": 4, "n_layers": 0, "ffn_size": 4, "n_heads": 2}
    size |= {"n_kv_heads": 1, "head_dim": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    gguf_files.write_gguf(
        Path("f32.gguf"), "llama", size, [], tokenizer="smollm", tokens=["a", "<e>"], merges=[],
        control={1}, end_id=1,
    )  # fmt: skip
    assert told["add_token_types"] == [[1, 3]] and told["add_eos_token_id"] == [1]
    assert told["add_file_type"] == [0] and told["add_tokenizer_pre"] == ["smollm"]


def test_rows_of_a_tiny_decoder_fill_blocks_of_256() -> None:
    shapes = [shape for _, shape in peer_models.qwen3_tensors(TINY_QWEN3) if len(shape) == 2]
    assert all(columns % 256 == 0 for _, columns in shapes)


# The roofline.


def test_work_is_counted_in_the_graph() -> None:
    helper = onnx.helper
    scale = onnx.numpy_helper.from_array(np.ones(1, np.float32), "scale")
    matrix = onnx.numpy_helper.from_array(np.zeros((6, 10), np.int8), "matrix")
    zero = onnx.numpy_helper.from_array(np.zeros((), np.int8), "zero")
    packed = onnx.numpy_helper.from_array(np.zeros((20, 1, 16), np.uint8), "packed")
    scales = onnx.numpy_helper.from_array(np.zeros(20, np.float32), "scales")
    kernel = onnx.numpy_helper.from_array(np.zeros((4, 2, 3), np.float32), "kernel")
    blocks = {"K": 32, "N": 20, "bits": 4, "block_size": 32}
    nodes = [
        helper.make_node("MatMulInteger", ["a", "matrix", "", "zero"], ["b"]),
        helper.make_node("MatMulNBits", ["b", "packed", "scales"], ["c"], **blocks),
        helper.make_node("MatMul", ["a", "c"], ["d"]),  # of two activations
        helper.make_node("MatMul", ["a", "scale"], ["e"]),
        helper.make_node("Conv", ["d", "kernel"], ["f"]),
        helper.make_node("MultiHeadAttention", ["f"], ["g"]),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [scale, matrix, zero, packed, scales, kernel])
    work = roofline.graph_work(helper.make_model(graph), vocab_size=20)
    assert (work.weights, work.head_weights) == (6 * 10 + 32 * 20, 32 * 20)
    assert work.weight_bytes == 60 + 1 + 20 * 16 + 20 * 4
    assert (work.convolutions, work.n_attentions) == ((24,), 1)
    # Half a product a weight and token; the head once.
    assert work.prefill_operations(7) == 2 * (60 * 7 + 640)
    assert work.encoder_operations(5, 8) == 2 * 5 * (700 + 24) + 4 * 25 * 8


def test_the_full_encoder_s_work() -> None:
    weights = 32 * (4 * 1_280**2 + 2 * 1_280 * 5_120)
    convolutions = (1_280 * 128 * 3, 1_280 * 1_280 * 3)
    work = roofline.GraphWork(weights, 0, 0, convolutions, 32)
    # 1.9 TFLOP of products and 0.37 of attention, as measured elsewhere.
    assert work.encoder_operations(1_500, 1_280) == pytest.approx(2.27e12, rel=0.01)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_product_s_graph_multiplies(kind: str) -> None:
    import onnxruntime

    content = roofline.product_graph(kind, 8, 5)
    weights = onnx.numpy_helper.to_array(onnx.load_from_string(content).graph.initializer[0])
    rows = np.arange(24).reshape(3, 8).astype(np.float32 if kind == "float32" else np.uint8)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (products,) = session.run(None, {"rows": rows})
    np.testing.assert_allclose(products, rows.astype(np.float64) @ weights, rtol=1e-5, atol=1e-4)


def test_bandwidth_is_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_seconds", lambda work: (work(), 0.5)[1])
    with ThreadPoolExecutor(2) as executor:
        assert roofline.read_bandwidth(np.ones(1_000, np.float32), executor, 2) == 8_000


def test_the_roofline_s_last_line_holds_every_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "_ROWS", 16)
    options = ["--rounds", "1", "--threads", "1", "--buffer-mib", "1"]
    options += ["--prompt-tokens", "8", "--steps", "2"]
    assert roofline.main(options) == 0
    data = json.loads(capsys.readouterr().out.splitlines()[-1])
    encoder, prefill, decode = data["rows"]
    assert [row["stage"] for row in data["rows"]] == ["encoder", "prefill", "decode"]
    assert encoder["of_float32"] > 0 and prefill["of_int8"] > 0
    assert decode["bytes"] == decode["weight_bytes"] + decode["kv_bytes"]
    assert decode["of_bandwidth"] * data["ceilings"]["read_bytes_per_s"] == pytest.approx(
        decode["bytes"] / decode["seconds"]
    )
