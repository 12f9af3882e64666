"""Exported encoders and projector against the PyTorch modules they come from."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from tinygiant.export.tracing import _cancel_transposes, trace
from tinygiant.models.config import TinyGiantConfig, preset
from tinygiant.models.graphs import projector_part, tower_part
from tinygiant.models.sources import RandomSource, byte_tokenizer
from tinygiant.models.tinygiant import TinyGiantALM, build_component, encode_event
from tinygiant.quantize.graph import save_graph
from tinygiant.runtime.tokenizer import Tokenizer

TOLERANCE = 1e-4
GRAPHS = ("whisper_encoder", "htsat_encoder", "projector", "decoder_model")


def relative_error(a: np.ndarray, b: torch.Tensor) -> float:
    wanted = b.detach().numpy()
    assert a.shape == wanted.shape
    return float(np.linalg.norm(a - wanted) / np.linalg.norm(wanted))


def session(path: Path) -> Any:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def graph_of(bundle: Path, name: str) -> onnx.GraphProto:
    return onnx.load(bundle / "onnx" / f"{name}.onnx", load_external_data=False).graph


def linear_names(module: nn.Module, prefix: str) -> set[str]:
    return {f"{prefix}.{n}" for n, m in module.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("n_tokens", [1, 2, 37, 300])
def test_whisper_at_any_length(tiny_model: TinyGiantALM, tiny_bundle: Path, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(n_tokens)
    features = torch.randn(1, 128, 10 * n_tokens, generator=generator)
    (found,) = session(tiny_bundle / "onnx/whisper_encoder.onnx").run(
        None, {"input_features": features.numpy()}
    )
    assert relative_error(found, tiny_model.encode_temporal(features)) <= TOLERANCE


def test_events_and_anchor_of_a_shared_tower(tiny_model: TinyGiantALM, tiny_bundle: Path) -> None:
    # As unlike noise as log-mel is: levels far from zero, and steps in time.
    features = -40 + 15 * torch.randn(1, 1, 1001, 64, generator=torch.Generator().manual_seed(1))
    features[:, :, 400:] -= 50
    events, anchor = session(tiny_bundle / "onnx/htsat_encoder.onnx").run(
        ["events", "anchor"], {"input_features": features.numpy()}
    )
    wanted_events, wanted_anchor = tiny_model.encode_event(features)
    assert relative_error(events, wanted_events) <= TOLERANCE
    assert relative_error(anchor, wanted_anchor) <= TOLERANCE


@pytest.mark.parametrize(("n_tokens", "n_instruction"), [(1, 1), (13, 30), (300, 5)])
def test_projector_at_any_length(
    tiny_model: TinyGiantALM, tiny_bundle: Path, n_tokens: int, n_instruction: int
) -> None:
    config = tiny_model.config
    torch.manual_seed(n_tokens)
    inputs = {
        "streams": torch.randn(1, n_tokens, config.stream_size),
        "anchor": torch.randn(1, config.anchor_size),
        "instruction_embeds": torch.randn(1, n_instruction, config.projector.hidden_size),
        "instruction_mask": torch.ones(1, n_instruction, dtype=torch.int64),
    }
    inputs["instruction_mask"][:, n_instruction // 2 + 1 :] = 0
    names = ["audio_embeds", "intent_attention", "gate"]
    found = session(tiny_bundle / "onnx/projector.onnx").run(
        names, {name: value.numpy() for name, value in inputs.items()}
    )
    wanted = tiny_model.projector(**inputs)._asdict()
    for name, value in zip(names, found, strict=True):
        assert relative_error(value, wanted[name]) <= TOLERANCE, name


def test_attention_is_fused(tiny_model: TinyGiantALM, tiny_bundle: Path) -> None:
    whisper = [node.op_type for node in graph_of(tiny_bundle, "whisper_encoder").node]
    assert whisper.count("MultiHeadAttention") == len(tiny_model.whisper.layers)
    assert "Softmax" not in whisper
    projector = [node.op_type for node in graph_of(tiny_bundle, "projector").node]
    assert projector.count("MultiHeadAttention") == len(tiny_model.projector.blocks)
    assert projector.count("Softmax") == 1  # the intent query, whose weights are an output
    # Fused attention takes rows of all heads: nothing is left of the way to single heads.
    assert whisper.count("Transpose") == 1  # from the convolutions
    assert whisper.count("Reshape") <= 2  # the slice of positions, and pooling


@pytest.mark.parametrize("name", GRAPHS)
def test_no_weight_is_transposed_at_run_time(tiny_bundle: Path, name: str) -> None:
    graph = graph_of(tiny_bundle, name)
    weights = {tensor.name for tensor in graph.initializer}
    assert not [n.name for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    assert not [node.name for node in graph.node if node.op_type == "Gemm"]


@pytest.mark.parametrize(
    ("name", "component"),
    [("whisper_encoder", "whisper"), ("htsat_encoder", "htsat"), ("projector", "projector")],
)
def test_every_linear_layer_is_a_matmul_by_its_own_name(
    tiny_model: TinyGiantALM, tiny_bundle: Path, name: str, component: str
) -> None:
    graph = graph_of(tiny_bundle, name)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = {
        n.name: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in shapes
    }
    module = getattr(tiny_model, component)
    assert set(found) == linear_names(module, component)
    for node, weight in found.items():
        assert weight == f"{node}.weight"
        linear = module.get_submodule(node.removeprefix(f"{component}."))
        assert shapes[weight] == (linear.in_features, linear.out_features)


def test_separate_towers(tiny_config: TinyGiantConfig, tmp_path: Path) -> None:
    clap = tiny_config.htsat | {"patch_embeds_hidden_size": 24, "hidden_size": 96}
    config = dataclasses.replace(tiny_config, clap=clap)
    towers = {name: build_component(config, name, 3) for name in ("htsat", "clap")}
    features = torch.randn(1, 1, 1001, 64, generator=torch.Generator().manual_seed(2))
    for name, tower in towers.items():
        part = tower_part(tower, config, f"{name}_encoder")
        save_graph(trace(part), tmp_path / f"{name}.onnx")
    with torch.no_grad():
        wanted = {
            "htsat": {"events": encode_event(towers["htsat"], features)[0]},
            "clap": {"anchor": encode_event(towers["clap"], features)[1]},
        }
    for name, outputs in wanted.items():
        graph = session(tmp_path / f"{name}.onnx")
        assert [output.name for output in graph.get_outputs()] == list(outputs)
        (found,) = graph.run(None, {"input_features": features.numpy()})
        assert relative_error(found, *outputs.values()) <= TOLERANCE


def test_an_ablated_projector_has_no_unused_inputs(
    tiny_config: TinyGiantConfig, tmp_path: Path
) -> None:
    sizes = dataclasses.replace(tiny_config.projector, intent_query=False, semantic_gate=False)
    config = dataclasses.replace(tiny_config, projector=sizes)
    projector = build_component(config, "projector", 4)
    save_graph(trace(projector_part(projector, config)), tmp_path / "projector.onnx")
    graph = session(tmp_path / "projector.onnx")
    assert [value.name for value in graph.get_inputs()] == ["streams"]
    assert [value.name for value in graph.get_outputs()] == ["audio_embeds"]
    streams = torch.randn(1, 11, config.stream_size)
    (found,) = graph.run(None, {"streams": streams.numpy()})
    assert relative_error(found, projector(streams, None, None, None).audio_embeds) <= TOLERANCE

    # Nothing may hold on to the weights once the module and its graph are dropped: at full size a
    # second component would not fit beside the first.
    weight = weakref.ref(projector.input_proj.weight)
    del projector, graph
    gc.collect()
    assert weight() is None


@pytest.mark.parametrize("name", ["nano", "full"])
def test_byte_tokenizer_has_the_models_control_tokens(name: str, tmp_path: Path) -> None:
    config = preset(name)
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_tokenizer(config), encoding="utf-8")
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.token_id("<|im_end|>") == config.eos_token_ids[0]
    assert tokenizer.token_id("</think>") == config.think_end_token_id
    assert tokenizer.max_id < config.runtime.decoder.vocab_size
    text = "Ein Geräusch: 音 🎵"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text


def test_random_source_is_reproducible() -> None:
    first, again, other = (RandomSource("nano", seed) for seed in (1, 1, 2))
    assert first.entry() == again.entry()
    assert first.entry().sha256 != other.entry().sha256
    weights = [s.component("projector").input_proj.weight for s in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_transposes_cancel_only_where_they_undo_one_another() -> None:
    """A cycle of three axes twice over is no identity: cancelled, it would swap time and heads."""
    pairs = {"undone": ((0, 2, 1), (0, 2, 1)), "cycled": ((1, 2, 0), (1, 2, 0))}
    nodes = []
    for name, perms in pairs.items():
        middle, end = f"{name}.middle", f"{name}.end"
        nodes.append(helper.make_node("Transpose", ["x"], [middle], perm=perms[0]))
        nodes.append(helper.make_node("Transpose", [middle], [end], perm=perms[1]))
        nodes.append(helper.make_node("Relu", [end], [name]))
    tensor = functools.partial(helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "pairs",
        [tensor("x", shape=[2, 3, 4])],
        [tensor("undone", shape=[2, 3, 4]), tensor("cycled", shape=[4, 2, 3])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))
    _cancel_transposes(model.graph)
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    for array, (first, second) in zip(found, pairs.values(), strict=True):
        np.testing.assert_array_equal(array, np.maximum(x.transpose(first).transpose(second), 0))
    sources = [node.inputs[0] for node in model.graph if node.op_type == "Relu"]
    assert [value is model.graph.inputs[0] for value in sources] == [True, False]
