"""The choice of recipes: figures by hand, graphs that are what their variants say, the lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import soundfile as sf
from onnx import helper, numpy_helper

from benchmarks import recipes, turns
from benchmarks.report import read_results, write_result
from benchmarks.scoring import wilson_interval
from tests.model_stub import use_traced_graphs
from tinygiant.export import exporter
from tinygiant.models import TinyGiantALM, save
from tinygiant.models.sources import CheckpointSource
from tinygiant.quantize import RECIPES, quantize_graph
from tinygiant.runtime.errors import CheckpointError, StorageError, UsageError
from tinygiant.runtime.ort.sessions import SessionSettings

Run = Callable[..., tuple[str, dict[str, Any]]]
SETTINGS = SessionSettings(threads=1, spin=False)


@pytest.fixture(scope="module")
def checkpoint(
    tiny_model: TinyGiantALM, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save(tiny_model, path, tokenizer=tokenizer_file)
    return path


@pytest.fixture
def traced(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders and projector are traced once for all tests: the tiny bundle holds their graphs."""
    use_traced_graphs(monkeypatch, tiny_bundle, [exporter, recipes])


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], onnx.GraphProto]:
    """Every graph that is quantized, weights included, by its name and its variant's."""
    seen = {}

    def quantize(source: Path, target: Path, *options: Any) -> Any:
        report = quantize_graph(source, target, *options)
        seen[target.stem, target.parent.name] = onnx.load(target).graph
        return report

    monkeypatch.setattr(recipes, "quantize_graph", quantize)
    return seen


@pytest.fixture
def run(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Run:
    """Runs the command on the tiny checkpoint; gives what it printed, and its last line."""
    monkeypatch.setattr(turns, "SETTLE_S", 0)
    monkeypatch.setattr(recipes, "_TOKENS", {"prefill": 40, "decode": 8})

    def measure(task: str, *options: str) -> tuple[str, dict[str, Any]]:
        common = ["--checkpoint", str(checkpoint), "--rounds", "2", "--threads", "1"]
        assert recipes.main([task, *common, "--work", str(tmp_path), *options]) == 0
        output = capsys.readouterr().out
        data: dict[str, Any] = json.loads(output.splitlines()[-1])
        return output, data

    return measure


def attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def cells(output: str, first: str) -> list[list[str]]:
    """The cells of a table's rows, its head first, whose head begins with ``first``."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


# Variants.


def test_today_s_variants_are_what_the_recipes_ship() -> None:
    decoders, encoders = recipes.VARIANTS["decoder"], recipes.VARIANTS["encoder"]
    int4 = RECIPES["int4"]
    today = recipes.TODAY["decoder"]
    assert decoders[today] == recipes.Variant(int4.graphs["decoder"], int4.kv_cache)
    assert decoders["int8-b32"].scheme == RECIPES["int8"].graphs["decoder"]
    assert encoders[recipes.TODAY["encoder"]].scheme == int4.graphs["encoder"]
    for of_task in recipes.VARIANTS.values():
        assert of_task["fp32"].scheme == RECIPES["fp32"].graphs["projector"]
        assert len(set(of_task.values())) == len(of_task)


@pytest.mark.parametrize("name", recipes.VARIANTS["decoder"])
def test_a_decoder_s_name_says_its_scheme(name: str) -> None:
    variant = recipes.VARIANTS["decoder"][name]
    # A head of as many bits as the rest is not in a label.
    assert name.removesuffix("-kv8").replace("-head4", "") == variant.scheme.label
    assert name.endswith("-kv8") == (variant.kv_cache == "int8")


def test_a_bundle_s_recipe_has_the_variant_where_it_belongs() -> None:
    int8 = RECIPES["int8"]
    decoder = recipes.recipe_of("decoder", "int4-b128-head8-kv8")
    changed = {g for g in int8.graphs if decoder.graphs[g] != int8.graphs[g]}
    assert (changed, decoder.kv_cache) == ({"decoder"}, "int8")
    assert decoder.graphs["decoder"].block_size == 128
    encoder = recipes.recipe_of("encoder", "int8-8bit-tensor")
    changed = {g for g in int8.graphs if encoder.graphs[g] != int8.graphs[g]}
    assert changed == {"encoder"}
    assert (encoder.embeddings, encoder.kv_cache) == ("int8", "fp32")


# Figures.


def test_speed_is_the_median_of_the_rounds_ratios() -> None:
    # The machine was twice as slow in the second round, and the third was odd.
    rounds = {
        "new": [
            {"prefill": 1.0, "decode": 4.0},
            {"prefill": 2.0, "decode": 8.0},
            {"prefill": 9.0, "decode": 1.0},
        ],
        "now": [
            {"prefill": 2.0, "decode": 2.0},
            {"prefill": 4.0, "decode": 4.0},
            {"prefill": 2.0, "decode": 2.0},
        ],
    }
    found = recipes.summarize(rounds, "now")
    assert found["new"]["prefill_of_today"] == 2.0
    assert found["new"]["decode_of_today"] == 0.5
    assert found["new"]["prefill_s"] == 2.0
    assert found["new"]["prefill_range_s"] == [1.0, 9.0]
    assert found["new"]["prefill_tokens_per_s"] == 400 / 2.0
    assert found["new"]["decode_tokens_per_s"] == 64 / 4.0
    assert found["now"]["prefill_of_today"] == found["now"]["decode_of_today"] == 1.0
    assert recipes.summarize(rounds, "none")["new"]["decode_of_today"] is None
    encoder = recipes.summarize({"now": [{"encode": 3.0}]}, "now")["now"]
    assert encoder == {"encode_s": 3.0, "encode_range_s": [3.0, 3.0], "encode_of_today": 1.0}


def test_the_decoder_is_asked_what_pytorch_was_asked(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "decoder_model.onnx"
    trial = recipes.DecoderTrial(CheckpointSource(checkpoint), path, SETTINGS)
    for found, dialogue in zip(trial._wanted, trial._dialogues, strict=True):
        np.testing.assert_allclose(found, dialogue.logits, rtol=1e-3, atol=1e-3)
    assert len(trial.kv_peaks) == 2


def test_near_ties_do_not_count_and_the_worst_dialogue_does() -> None:
    first = np.array([[9, 0, 0, 0], [1, 0.99, 0, 0]], np.float32)  # decided, and nearly tied
    second = np.array([[0, 4, 0, 0]], np.float32)
    trial = object.__new__(recipes.DecoderTrial)
    trial._wanted = [first, second]
    found = [first[:, [1, 0, 2, 3]], np.array([[0, 4, 3, 0]], np.float32)]
    trial._logits = lambda graph, kv_cache: found  # type: ignore[method-assign]
    errors = trial.errors(None, "fp32")  # type: ignore[arg-type]
    assert (errors["agreement"], errors["n_decided"]) == (0.5, 2)
    far = np.sqrt((9**2 + 9**2 + 0.01**2 + 0.01**2) / (9**2 + 1 + 0.99**2))
    assert errors["relative_error"] == pytest.approx(far, rel=1e-6)
    assert far > 3 / 4  # the other's


def test_the_encoders_hear_a_window_full_of_sound(
    traced: None, checkpoint: Path, tmp_path: Path
) -> None:
    model = CheckpointSource(checkpoint)
    whisper = recipes.EncoderTrial(model, tmp_path / "whisper_encoder.onnx", SETTINGS)
    htsat = recipes.EncoderTrial(model, tmp_path / "htsat_encoder.onnx", SETTINGS)
    assert (whisper.pack, htsat.pack) == (True, False)  # as the runtime loads them
    *others, features = (inputs["input_features"] for inputs in whisper._inputs)
    assert len(others) == 3  # the examples in the order of their names, the tiger last
    assert features.shape == (1, 128, 3_000)
    assert [inputs["input_features"].shape for inputs in htsat._inputs] == 12 * [(1, 1, 1_001, 64)]
    # The clip is heard again after 377.775 frames, which is no whole number of them.
    again = np.abs(features[..., 10:300] - features[..., 388:678])
    other = np.abs(features[..., 10:300] - features[..., 110:400])
    assert again.mean() < 0.1 * other.mean()
    assert features[..., -378:].max() > 1


# The command.


@pytest.mark.usefixtures("traced")
def test_decoders_from_end_to_end(
    run: Run, graphs: dict[tuple[str, str], onnx.GraphProto], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def write(name: str, benchmark: str, command: str, data: Any) -> Path:
        return write_result(name, benchmark, command, data, tmp_path / "results")

    monkeypatch.setattr(recipes, "write_result", write)
    asked = ["fp32", "int8-b32", "int4-b32-head8", "int4-b32-zp-head8"]
    asked += ["int4-b128-head8-kv8", "int4-b128-head4-kv8"]
    output, data = run("decoder", "--only", *asked, "--save", "tiny")
    rows = {row["name"]: row for row in data["rows"]}
    assert [*rows] == asked
    for name, row in rows.items():
        variant = recipes.VARIANTS["decoder"][name]
        graph = graphs["decoder_model", name]
        products = {n.name: n for n in graph.node if n.op_type == "MatMulNBits"}
        assert len(products) == (0 if name == "fp32" else 2 * 4 + 1)
        for node_name, node in products.items():
            head_bits = 8 if "head8" in name or name == "int8-b32" else 4
            bits = head_bits if node_name == "lm_head" else int(name[3])
            assert attribute(node, "bits") == bits
            assert attribute(node, "block_size") == (128 if "b128" in name else 32)
            assert len(node.input) == (4 if "zp" in name else 3)
        caches = {v.type.tensor_type.elem_type for v in graph.input if "past" in v.name}
        kinds = {"fp32": onnx.TensorProto.FLOAT, "int8": onnx.TensorProto.INT8}
        assert caches == {kinds[variant.kv_cache]}
        assert row["prefill_tokens_per_s"] == pytest.approx(40 / row["prefill_s"])
        assert row["n_decided"] <= 100 and 0 <= row["agreement"] <= 1
    error = {name: row["relative_error"] for name, row in rows.items()}
    assert error["fp32"] == 0.0 and rows["fp32"]["agreement"] == 1.0
    assert 0 < error["int8-b32"] < error["int4-b32-head8"] < error["int4-b128-head4-kv8"]
    assert rows["int8-b32"]["size_bytes"] < rows["fp32"]["size_bytes"]
    assert rows[recipes.TODAY["decoder"]]["prefill_of_today"] == 1.0
    assert (data["weights"], data["prefill"], data["decode"]) == ("trained", 40, 8)

    head, *table = cells(output, "graph")
    assert head[1:3] == ["variant", "MB"] and head[-1] == "tokens as fp32's"
    assert all(len(row) == len(head) for row in table)
    assert [row[1] for row in table] == [
        f"{n}{'*' * (n == recipes.TODAY['decoder'])}" for n in asked
    ]
    assert not list(tmp_path.glob("recipes-*"))  # nothing is left behind
    (result,) = read_results([tmp_path / "results" / "tiny.json"], "recipes")
    assert result["rows"] == data["rows"] and "--save tiny" in result["command"]


@pytest.mark.usefixtures("traced")
def test_encoders_from_end_to_end(run: Run, graphs: dict[tuple[str, str], onnx.GraphProto]) -> None:
    asked = ["fp32", "int8-7bit-channel", "int8-8bit-tensor", "int8-b32"]
    output, data = run("encoder", "--only", *asked)
    rows = {(row["graph"], row["name"]): row for row in data["rows"]}
    assert [*rows] == [(g, n) for g in ("whisper_encoder", "htsat_encoder") for n in asked]
    for (graph, name), row in rows.items():
        stored = {t.name: numpy_helper.to_array(t) for t in graphs[graph, name].initializer}
        nodes = [n for n in graphs[graph, name].node if n.op_type == "MatMulInteger"]
        assert bool(nodes) == (name.startswith("int8-") and name != "int8-b32")
        for node in nodes:
            weight, zero_point = stored[node.input[1]], stored[node.input[3]]
            limit = 64 if "7bit" in name else 127
            assert np.abs(weight).max() == limit
            assert zero_point.shape == (weight.shape[1:] if "channel" in name else ())
        assert row["encode_s"] > 0
        assert (row["relative_error"] == 0) == (name == "fp32")
    for graph in ("whisper_encoder", "htsat_encoder"):
        assert rows[graph, "int8-b32"]["relative_error"] < 0.1
        assert rows[graph, "int8-7bit-channel"]["encode_of_today"] == 1.0
    head, *table = cells(output, "graph")
    assert head == ["graph", "variant", "MB", "window", "x today's", "error"]
    assert [(row[0], row[1].strip("*")) for row in table] == [*rows]


@pytest.mark.usefixtures("traced")
def test_answers_are_compared_with_those_of_float32(run: Run, tone: Any, tmp_path: Path) -> None:
    folder = tmp_path / "test"
    folder.mkdir()
    sf.write(folder / "a.wav", tone(1.3), 16_000)
    record = {"audio_path": "a.wav", "answer": "a dog", "modality": "sound", "category": "c"}
    record |= {"sub-category": "s"}
    texts = ("What is heard?", "Which sound comes first?", "Who speaks?")
    lines = [
        record | {"id": str(n), "question": text, "choices": ["a dog", "a siren"]}
        for n, text in enumerate(texts)
    ]
    (folder / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name = recipes.TODAY["decoder"]
    output, data = run("decoder", "--only", name, "--meta", str(folder), "--questions", "2")
    reference, row = data["answers"]
    assert (reference["name"], row["name"]) == ("fp32", name)
    for one in (reference, row):
        assert (one["n"], one["failed"]) == (2, 0)
        assert one["ci95"] == list(wilson_interval(one["correct"], 2))
    assert (reference["differing"], reference["compared"]["p_value"]) == (0, 1.0)
    discordant = row["compared"]["only_a"] + row["compared"]["only_b"]
    assert discordant == row["differing"]  # of two choices, another answer is another score
    assert [cell[0] for cell in cells(output, "variant")] == ["variant", "fp32", f"{name}*"]
    assert [one["name"] for one in data["rows"]] == [name]


RANDOM = "decoder --preset nano --random-weights 0"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("decoder", UsageError, "name one model"),
        ("decoder --preset nano", UsageError, "name one model"),
        ("decoder --checkpoint x --preset nano", UsageError, "name one model"),
        ("encoder --preset x --random-weights 0", UsageError, "preset 'x'"),
        ("decoder --checkpoint nowhere", CheckpointError, "no such folder"),
        ("encoder --checkpoint x --only int4-b32-head8", UsageError, "no variant of this task"),
        ("encoder --checkpoint x --rounds 0", UsageError, "from 1"),
        ("encoder --checkpoint x --questions 3", UsageError, "needs --meta"),
        ("vocoder --checkpoint x", UsageError, "invalid choice"),
        (f"{RANDOM} --meta x", UsageError, "random weights know no answers"),
        (f"{RANDOM} --threads 0", UsageError, "threads"),
        (f"{RANDOM} --work nowhere", StorageError, "nowhere"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(
    options: str, code: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipes.main(options.split()) == code.exit_code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_questions_that_cannot_be_read_are_told_before_any_work(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", str(checkpoint), "--meta", str(tmp_path / "none")]
    assert recipes.main(["decoder", *options]) == UsageError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
