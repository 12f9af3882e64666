"""Products of one input as one product: the same numbers to the bit, fewer nodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from tests.test_kv_quantization import CONFIG
from tinygiant.export.decoder import PROMPT_BLOCKS, DecoderSpec, build_decoder
from tinygiant.quantize import RECIPES, KvPeaks, Scheme, quantize_graph, quantizer
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

Array = NDArray[np.float32]
LLAMA = dataclasses.replace(CONFIG, qk_norm=False)
ROWS = dataclasses.replace(RECIPES["int8-rows"].graphs["decoder"], rotated=False)
SCHEMES = {name: RECIPES[name].graphs["decoder"] for name in ("int8", "int8-b128", "int4-b32")}
SCHEMES |= {"int8-rows": ROWS}


def tensors_of(spec: DecoderSpec) -> dict[str, Array]:
    """Weights by transformers' names."""
    rng = np.random.default_rng(0)
    hidden, head = spec.hidden_size, spec.head_dim
    n_q, n_kv = spec.n_heads * head, spec.n_kv_heads * head
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    products = {
        "self_attn.q_proj": (n_q, hidden), "self_attn.k_proj": (n_kv, hidden),
        "self_attn.v_proj": (n_kv, hidden), "self_attn.o_proj": (hidden, n_q),
        "mlp.gate_proj": (spec.ffn_size, hidden), "mlp.up_proj": (spec.ffn_size, hidden),
        "mlp.down_proj": (hidden, spec.ffn_size),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{name}.weight": shape if isinstance(shape, tuple) else (shape,)
        for layer in range(spec.n_layers)
        for name, shape in (norms | products).items()
    }
    shapes |= {"model.norm.weight": (hidden,)}
    shapes |= {"model.embed_tokens.weight": (spec.vocab_size, hidden)}
    return {
        name: rng.standard_normal(s, np.float32) / 2 + (len(s) == 1) for name, s in shapes.items()
    }


def both(
    spec: DecoderSpec,
    scheme: Scheme,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    **settings: Any,
) -> tuple[Path, Path]:
    """The decoder quantized with its products apart, and with products merged."""
    source = folder / "source.onnx"
    blocks = PROMPT_BLOCKS if settings.get("only_prompts") else 0
    build_decoder(spec, tensors_of(spec), source, prompt_blocks=blocks)
    paths = folder / "apart" / "decoder.onnx", folder / "merged" / "decoder.onnx"
    for path in paths:
        path.parent.mkdir()
        with monkeypatch.context() as patch:
            if path.parent.name == "apart":
                patch.setattr(quantizer, "merge_products", lambda *given: given[2])
            quantize_graph(source, path, scheme, **settings)
    return paths


def run(path: Path, spec: DecoderSpec, kv_type: Any, prompts: Path | None = None) -> list[Array]:
    """Logits of a prompt and of single tokens behind it, then all keys and values."""
    table = tensors_of(spec)["model.embed_tokens.weight"]
    settings = SessionSettings(threads=1, spin=False)
    reader = Graph(prompts, settings) if prompts else None
    graph = Graph(path, settings)
    decoder = Decoder(graph, TokenEmbeddings(table), spec, 96, kv_type=kv_type, prompts=reader)
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, 70).tolist()
    found = [decoder.read(ids), *(decoder.step([token]) for token in ids[:8])]
    return found + [array for _, *arrays in decoder.cache.buffers() for array in arrays]


def products(path: Path, layer: int = 0) -> dict[str, onnx.NodeProto]:
    start = f"model.layers.{layer}."
    kinds = ("MatMulNBits", "MatMulInteger")
    nodes = onnx.load(path, load_external_data=False).graph.node
    return {n.name.removeprefix(start): n for n in nodes if n.op_type in kinds and start in n.name}


def peaks(spec: DecoderSpec) -> list[KvPeaks]:
    ones = np.full((spec.n_kv_heads, spec.head_dim), 4.0, np.float32)
    return [KvPeaks(ones, ones)] * spec.n_layers


@pytest.mark.parametrize("kv_type", ["fp32", "int8"])
@pytest.mark.parametrize("spec", [CONFIG, LLAMA], ids=["norms", "llama"])
@pytest.mark.parametrize("name", SCHEMES)
def test_nothing_changes_but_the_number_of_products(
    name: str, spec: DecoderSpec, kv_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"kv_peaks": peaks(spec)} if kv_type == "int8" else {}
    apart, merged = both(spec, SCHEMES[name], tmp_path, monkeypatch, **kept)
    for a, b in zip(run(apart, spec, kv_type), run(merged, spec, kv_type), strict=True):
        np.testing.assert_array_equal(a, b)
    together, alone = {"self_attn.q_k_v_proj", "mlp.gate_up_proj"}, set[str]()
    if name == "int8-rows":  # reads prompts: what must be split again stays apart
        together.remove("mlp.gate_up_proj")
        alone |= {"mlp.gate_proj", "mlp.up_proj"}
        if spec.qk_norm:
            together.clear()
            alone |= {f"self_attn.{x}_proj" for x in "qkv"}
    assert set(products(merged)) == {"self_attn.o_proj", "mlp.down_proj"} | together | alone
    assert len(products(apart)) == 7


@pytest.mark.parametrize("spec", [CONFIG, LLAMA], ids=["norms", "llama"])
def test_a_graph_for_prompts_cuts_the_one_product_into_blocks(
    spec: DecoderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.onnx"
    build_decoder(spec, tensors_of(spec), whole)
    apart, merged = both(spec, ROWS, tmp_path, monkeypatch, only_prompts=True)
    found = [run(whole, spec, "fp32", prompts=path) for path in (apart, merged)]
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert ("self_attn.q_k_v_proj" in products(merged)) != spec.qk_norm
    assert "mlp.gate_up_proj" not in products(merged)
    nodes = onnx.load(merged, load_external_data=False).graph.node
    per_layer = 3 if spec.qk_norm else 1
    assert sum(node.op_type == "Split" for node in nodes) == per_layer * spec.n_layers


@pytest.mark.parametrize(
    ("wide", "together"),
    [
        (("*.v_proj",), {"self_attn.q_k_proj", "mlp.gate_up_proj"}),
        (("*.up_proj", "*.k_proj"), {"self_attn.q_v_proj"}),
        (tuple(f"*.{x}_proj" for x in "qkv"), {"mlp.gate_up_proj"}),
    ],
)
def test_what_a_scheme_tells_apart_stays_apart(
    wide: tuple[str, ...], together: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different bits, or with a name for all that the scheme would treat otherwise."""
    scheme = Scheme("weight_only", bits=4, wide=wide)
    apart, merged = both(LLAMA, scheme, tmp_path, monkeypatch)
    assert set(products(merged)) - set(products(apart)) == together
    for a, b in zip(run(apart, LLAMA, "fp32"), run(merged, LLAMA, "fp32"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_report_names_the_products_of_the_model(tmp_path: Path) -> None:
    """And not those that they became: whoever reads it looks for the checkpoint's names."""
    source = tmp_path / "source.onnx"
    build_decoder(LLAMA, tensors_of(LLAMA), source)
    report = quantize_graph(source, tmp_path / "decoder.onnx", SCHEMES["int8"])
    assert {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"} < set(report.quantized)
    assert len(report.quantized) == 7 * LLAMA.n_layers + 1
