"""The decoder graph against transformers' Qwen3ForCausalLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
)

from tests.model_stub import disturb, small_qwen3
from tinygiant.export.decoder import DecoderSpec, build_decoder
from tinygiant.runtime.config import DecoderConfig
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.ort.sessions import Graph

CONFIG = DecoderSpec(
    vocab_size=97,
    hidden_size=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    ffn_size=80,
    max_positions=64,
    stop_token_ids=(1,),
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
)
CAPACITY = 40
TOLERANCE = 1e-4


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def reference(request: pytest.FixtureRequest) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    model = small_qwen3(CONFIG, tied=request.param)
    with torch.no_grad():  # large weights, or every RMS scale at 1 would hide a swapped norm
        disturb(model)
    return model


@pytest.fixture(scope="module")
def graph(reference: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decoder") / "decoder_model.onnx"
    state = {k: v.numpy() for k, v in reference.state_dict().items()}
    if reference.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    build_decoder(CONFIG, {k: (lambda v=v: v) for k, v in state.items()}, path)
    return path


class Runner:
    """Runs the graph with one KV buffer bound as both past and present."""

    def __init__(self, path: Path) -> None:
        self.session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        shape = (1, CONFIG.n_kv_heads, CAPACITY, CONFIG.head_dim)
        # Rubbish in unused positions must not matter.
        self.cache = {
            f"{layer}.{kind}": ort.OrtValue.ortvalue_from_numpy(np.full(shape, 7.0, np.float32))
            for layer in range(CONFIG.n_layers)
            for kind in ("key", "value")
        }
        self.length = 0

    def step(self, embeds: np.ndarray, positions: list[int]) -> np.ndarray:
        binding = self.session.io_binding()
        total = self.length + embeds.shape[1]
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds))
        binding.bind_cpu_input("seqlens_k", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total_sequence_length", np.array(total, np.int32))
        binding.bind_cpu_input("logits_positions", np.array(positions, np.int64))
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        self.length = total
        return next(v.numpy() for v in binding.get_outputs() if v.shape()[-1] == CONFIG.vocab_size)


def expected(reference: Qwen3ForCausalLM, embeds: np.ndarray) -> np.ndarray:
    """Logits of every position, computed without a cache."""
    with torch.no_grad():
        out = reference(inputs_embeds=torch.from_numpy(embeds), use_cache=False)
    logits: np.ndarray = out.logits.numpy()
    return logits


def test_prefill_steps_verify_and_truncation(reference: Qwen3ForCausalLM, graph: Path) -> None:
    rng = np.random.default_rng(1)
    embeds = rng.standard_normal((1, 24, CONFIG.hidden_size)).astype(np.float32)
    wanted = expected(reference, embeds)
    runner = Runner(graph)

    prefill = runner.step(embeds[:, :13], [12])
    assert prefill.shape == (1, 1, CONFIG.vocab_size)
    assert relative_error(prefill[0, 0], wanted[0, 12]) <= TOLERANCE

    for position in (13, 14, 15):
        logits = runner.step(embeds[:, position : position + 1], [0])
        assert relative_error(logits[0, 0], wanted[0, position]) <= TOLERANCE

    draft = rng.standard_normal((1, 5, CONFIG.hidden_size)).astype(np.float32)
    draft[:, :2] = embeds[:, 16:18]
    logits = runner.step(draft, [0, 1, 2, 3, 4])
    assert relative_error(logits[0, :2], wanted[0, 16:18]) <= TOLERANCE

    runner.length = 18  # only two drafted tokens are kept
    logits = runner.step(embeds[:, 18:24], [5, 0])
    assert relative_error(logits[0, 0], wanted[0, 23]) <= TOLERANCE
    assert relative_error(logits[0, 1], wanted[0, 18]) <= TOLERANCE

    runner.length = 0  # the same buffers serve another sequence
    again = runner.step(embeds[:, 3:20], list(range(17)))
    assert relative_error(again, expected(reference, embeds[:, 3:20])) <= TOLERANCE


def test_cache_agrees_with_transformers_cache(reference: Qwen3ForCausalLM, graph: Path) -> None:
    """Keys and values themselves, not only what attention makes of them."""
    rng = np.random.default_rng(2)
    embeds = rng.standard_normal((1, 9, CONFIG.hidden_size)).astype(np.float32)
    cache = DynamicCache()
    with torch.no_grad():
        reference(inputs_embeds=torch.from_numpy(embeds), past_key_values=cache, use_cache=True)
    runner = Runner(graph)
    runner.step(embeds, [8])
    for layer in range(CONFIG.n_layers):
        keys = runner.cache[f"{layer}.key"].numpy()[:, :, :9]
        values = runner.cache[f"{layer}.value"].numpy()[:, :, :9]
        assert relative_error(keys, cache.layers[layer].keys.numpy()) <= TOLERANCE
        assert relative_error(values, cache.layers[layer].values.numpy()) <= TOLERANCE


def test_far_positions_use_the_reference_angles(reference: Qwen3ForCausalLM, graph: Path) -> None:
    model = onnx.load(graph)
    caches = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer
              if t.name.startswith("rotary.")}  # fmt: skip
    cos, sin = reference.model.rotary_emb(torch.zeros(1), torch.arange(CONFIG.max_positions)[None])
    half = CONFIG.head_dim // 2
    np.testing.assert_allclose(caches["rotary.cos_cache"], cos[0, :, :half], atol=2e-6)
    np.testing.assert_allclose(caches["rotary.sin_cache"], sin[0, :, :half], atol=2e-6)


def test_structure(graph: Path) -> None:
    model = onnx.load(graph, load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("GroupQueryAttention") == CONFIG.n_layers
    assert kinds.count("MatMul") == 7 * CONFIG.n_layers + 1
    assert "Transpose" not in kinds
    assert graph.stat().st_size < 100_000  # weights lie beside the graph
    names = {t.name for t in model.graph.initializer}
    matmuls = [node for node in model.graph.node if node.op_type == "MatMul"]
    assert all(node.input[1] in names for node in matmuls)


def test_a_llama_of_smollm2s_shape(tmp_path: Path) -> None:
    """Another family: no norms of queries and keys, three query heads to one of keys."""
    torch.manual_seed(3)
    upstream = LlamaConfig(
        vocab_size=97, hidden_size=144, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=9, num_key_value_heads=3, head_dim=16, max_position_embeddings=64,
        rope_theta=100_000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(upstream).eval()
    with torch.no_grad():
        disturb(llama)
    sizes = DecoderConfig(97, 144, 2, 3, 16, 64, (0,))
    spec = DecoderSpec.of(sizes, upstream)
    assert (spec.qk_norm, spec.rope_theta, spec.n_heads) == (False, 100_000.0, 9)
    state = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    del state["lm_head.weight"]
    build_decoder(spec, state, tmp_path / "decoder.onnx")
    embeds = np.random.default_rng(5).standard_normal((1, 12, 144)).astype(np.float32)
    with torch.no_grad():
        wanted = llama(inputs_embeds=torch.from_numpy(embeds)).logits.numpy()
    decoder = Decoder(Graph(tmp_path / "decoder.onnx"), Untouched(), sizes, 12)
    found = [decoder.prefill(embeds[:, :11]), decoder.prefill(embeds[:, 11:])]
    assert relative_error(np.stack(found), wanted[0, [10, 11]]) <= TOLERANCE


class Untouched:
    def lookup(self, token_ids: object) -> np.ndarray:
        raise AssertionError("no token was to be read")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"attention_bias": True}, "attention has biases"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rotary positions are scaled"),
    ],
)
def test_what_the_graph_has_not_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(CheckpointError, match=what):
        DecoderSpec.of(CONFIG, LlamaConfig(**changes))
    with pytest.raises(CheckpointError, match="the family gpt2"):
        DecoderSpec.of(CONFIG, GPT2Config())


def test_missing_and_unknown_tensors_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing model\.embed_tokens.*unknown model\.extra"):
        build_decoder(CONFIG, {"model.extra": np.zeros(1)}, tmp_path / "d.onnx")


@pytest.mark.filterwarnings("ignore")  # optimum traces, and warns of every branch it fixes
def test_agrees_with_optimums_export(
    reference: Qwen3ForCausalLM, graph: Path, tmp_path: Path
) -> None:
    """An exporter that shares no code with ours gives the same logits."""
    exporters = pytest.importorskip("optimum.exporters.onnx")
    exporters.onnx_export_from_model(
        reference, tmp_path, task="text-generation-with-past", do_validation=False
    )
    traced = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    token_ids = np.array([[5, 17, 3, 96, 40, 40, 8]])
    empty = np.zeros((1, CONFIG.n_kv_heads, 0, CONFIG.head_dim), np.float32)
    inputs = {
        "input_ids": token_ids,
        "attention_mask": np.ones_like(token_ids),
        "position_ids": np.arange(token_ids.shape[1])[None],
    }
    past = {v.name: empty for v in traced.get_inputs() if v.name.startswith("past_key_values")}
    (wanted,) = traced.run(["logits"], inputs | past)
    embeds = reference.get_input_embeddings()(torch.from_numpy(token_ids)).detach().numpy()
    found = Runner(graph).step(embeds, list(range(token_ids.shape[1])))
    assert relative_error(found, wanted) <= TOLERANCE
