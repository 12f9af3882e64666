"""Quantization: arithmetic, structure, reports, recipes."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from onnxruntime.quantization import QuantType, quantize_dynamic

from tinygiant.models.config import TinyGiantConfig
from tinygiant.quantize import RECIPES, Scheme, quantize_graph, quantize_rows, recipe
from tinygiant.quantize.weight_only import dequantize_blocks, quantize_blocks
from tinygiant.runtime.config import Role
from tinygiant.runtime.errors import UsageError

ROLES: dict[str, Role] = {
    "whisper_encoder": "encoder",
    "htsat_encoder": "encoder",
    "projector": "projector",
    "decoder_model": "decoder",
}
GRAPHS = tuple(ROLES)


def source(bundle: Path, name: str) -> Path:
    return bundle / "onnx" / f"{name}.onnx"


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def nodes(path: Path, kind: str) -> list[Any]:
    graph = onnx.load(path, load_external_data=False).graph
    return [node for node in graph.node if node.op_type == kind]


def attribute(node: Any, name: str) -> Any:
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


@settings(deadline=None, max_examples=30)
@given(
    n_in=st.integers(1, 90),
    n_out=st.integers(1, 9),
    bits=st.sampled_from([4, 8]),
    block_size=st.sampled_from([16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_blocks_are_off_by_less_than_a_step(
    n_in: int, n_out: int, bits: int, block_size: int, symmetric: bool, seed: int
) -> None:
    scheme = Scheme("weight_only", block_size=block_size, symmetric=symmetric)
    weight = np.random.default_rng(seed).standard_normal((n_in, n_out)).astype(np.float32)
    packed, scales, zero_points = quantize_blocks(weight, bits, scheme)
    again = dequantize_blocks(packed, scales, bits, n_in, None if symmetric else zero_points)
    assert again.shape == weight.shape
    if bits == 4 and symmetric:
        return  # single weights may be clipped: see the next test
    steps = np.repeat(np.abs(scales), block_size, axis=1)[:, :n_in].T
    # Half a step of rounding, and as much again where the range's end is clipped.
    assert (np.abs(again - weight) <= 1.01 * steps + 1e-6).all()


@settings(deadline=None, max_examples=30)
@given(
    n_in=st.integers(1, 300),
    n_out=st.integers(1, 9),
    block_size=st.sampled_from([16, 32, 128]),
    heavy_tails=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_searched_scales_are_never_worse_than_onnxruntime_s(
    n_in: int, n_out: int, block_size: int, heavy_tails: bool, seed: int
) -> None:
    """Of each block, in squared error; onnxruntime's quantizer takes the largest weight's scale."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_t(2, (n_in, n_out)) if heavy_tails else rng.standard_normal((n_in, n_out))
    weight = draw.astype(np.float32)
    weight[:, 0] = 0.0
    scheme = Scheme("weight_only", bits=4, block_size=block_size)
    packed, scales, _ = quantize_blocks(weight, 4, scheme)
    n_blocks = -(-n_in // block_size)
    padded = np.pad(weight, ((0, n_blocks * block_size - n_in), (0, 0)))
    theirs = np.zeros_like(packed), np.zeros_like(scales)
    unused = np.zeros((n_out, -(-n_blocks // 2)), np.uint8)
    quantize_matmul_4bits(theirs[0], padded, theirs[1], unused, block_size, n_out, n_in, True)

    def errors(packed: Any, scales: Any) -> Any:
        off = np.zeros_like(padded)
        off[:n_in] = dequantize_blocks(packed, scales, 4, n_in) - weight
        return np.square(off).reshape(n_blocks, block_size, n_out).sum(1)

    ours = errors(packed, scales)
    assert (ours <= errors(*theirs) * 1.001 + 1e-9).all()
    assert (ours[:, 0] == 0).all() and np.isfinite(scales).all()


@pytest.mark.parametrize(("block_size", "gain"), [(32, 0.93), (128, 0.90)])
def test_searching_scales_pays(block_size: int, gain: float) -> None:
    """On normal weights, squared error against the scale of the largest weight of each block."""
    weight = np.random.default_rng(9).standard_normal((1024, 64)).astype(np.float32)
    packed, scales, _ = quantize_blocks(weight, 4, Scheme("weight_only", 4, block_size=block_size))
    ours = np.square(dequantize_blocks(packed, scales, 4, 1024) - weight).sum()
    blocks = weight.T.reshape(64, -1, block_size)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)
    step = largest / -8
    theirs = np.square(np.clip(np.rint(blocks / step), -8, 7) * step - blocks).sum()
    assert ours <= gain * theirs


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_mean_what_the_kernel_computes(bits: int, symmetric: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    weight = rng.standard_normal((48, 10)).astype(np.float32)
    x = rng.standard_normal((1, 3, 48)).astype(np.float32)
    float_path = tmp_path / "float.onnx"
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")],
        "one_layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "n", 48])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "n", 10])],
        [numpy_helper.from_array(weight, "w")],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), float_path)
    scheme = Scheme("weight_only", bits=bits, block_size=16, symmetric=symmetric, accuracy_level=0)
    quantize_graph(float_path, tmp_path / "quantized.onnx", scheme)
    (found,) = ort.InferenceSession(tmp_path / "quantized.onnx").run(None, {"x": x})
    packed, scales, zero_points = quantize_blocks(weight, bits, scheme)
    meant = dequantize_blocks(packed, scales, bits, 48, None if symmetric else zero_points)
    np.testing.assert_allclose(found, x @ meant, rtol=1e-4, atol=1e-4)
    # And that is the layer, as far as so many bits can tell.
    assert np.linalg.norm(found - x @ weight) <= {4: 0.15, 8: 0.01}[bits] * np.linalg.norm(found)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("recipe_name", ["fp32", "int8", "int4", "int4-b32"])
def test_report_accounts_for_every_product(
    tiny_bundle: Path, tmp_path: Path, name: str, recipe_name: str
) -> None:
    scheme = RECIPES[recipe_name].graphs[ROLES[name]]
    report = quantize_graph(source(tiny_bundle, name), tmp_path / f"{name}.onnx", scheme)
    products = [
        node.name
        for kind in ("MatMul", "Conv", "MultiHeadAttention", "GroupQueryAttention")
        for node in nodes(source(tiny_bundle, name), kind)
    ]
    assert sorted([*report.quantized, *report.kept]) == sorted(products)
    assert all(report.kept.values())
    assert report.graph == name
    if scheme.kind == "none":
        assert not report.quantized
    else:
        assert report.size_after_bytes < report.size_before_bytes


@pytest.mark.parametrize("recipe_name", ["int8", "int4", "int4-b32"])
def test_decoder_structure(
    tiny_bundle: Path, tiny_config: TinyGiantConfig, tmp_path: Path, recipe_name: str
) -> None:
    scheme = RECIPES[recipe_name].graphs["decoder"]
    target = tmp_path / "decoder_model.onnx"
    quantize_graph(source(tiny_bundle, "decoder_model"), target, scheme)
    quantized = {node.name: node for node in nodes(target, "MatMulNBits")}
    assert len(quantized) == 4 * tiny_config.runtime.decoder.n_layers + 1  # of 7, some are one
    assert not nodes(target, "MatMul")
    for name, node in quantized.items():
        head = name == "lm_head"
        assert attribute(node, "bits") == (8 if head or recipe_name == "int8" else 4)
        assert attribute(node, "accuracy_level") == 4


@pytest.mark.parametrize(("reduce_range", "limit"), [(True, 64), (False, 127)])
def test_encoder_weights_keep_to_their_range(
    tiny_bundle: Path, tmp_path: Path, reduce_range: bool, limit: int
) -> None:
    scheme = Scheme("dynamic_int8", reduce_range=reduce_range)
    target = tmp_path / "whisper_encoder.onnx"
    quantize_graph(source(tiny_bundle, "whisper_encoder"), target, scheme)
    stored = initializers(target)
    weights = [stored[node.input[1]] for node in nodes(target, "MatMulInteger")]
    assert weights
    for weight in weights:
        assert weight.dtype == np.int8
        assert limit - 2 <= np.abs(weight.astype(int)).max() <= limit
        if scheme.per_channel:  # each column uses the whole range
            assert np.abs(weight.astype(int)).max(axis=0).min() >= limit - 2


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("reduce_range", [True, False])
def test_dynamic_int8_is_onnxruntimes_own(
    tiny_bundle: Path, tmp_path: Path, per_channel: bool, reduce_range: bool
) -> None:
    """The same bytes, and the same outputs to the last bit, as ``quantize_dynamic`` gives."""
    name = "htsat_encoder"
    scheme = Scheme("dynamic_int8", per_channel=per_channel, reduce_range=reduce_range)
    ours, theirs = tmp_path / "ours.onnx", tmp_path / "theirs.onnx"
    quantize_graph(source(tiny_bundle, name), ours, scheme)
    quantize_dynamic(
        onnx.load(source(tiny_bundle, name)),
        theirs,
        op_types_to_quantize=["MatMul"],
        per_channel=per_channel,
        reduce_range=reduce_range,
        weight_type=QuantType.QInt8,
        extra_options={"WeightSymmetric": True, "MatMulConstBOnly": True},
    )
    stored, expected = initializers(ours), initializers(theirs)
    weights = [key for key in expected if key.endswith("_quantized")]
    assert weights
    for key in weights:
        np.testing.assert_array_equal(stored[key], expected[key])
    kinds = [collections.Counter(node.op_type for node in onnx.load(path).graph.node)
             for path in (ours, theirs)]  # fmt: skip
    assert kinds[0] == kinds[1]
    features = np.random.default_rng(1).standard_normal((1, 1, 1001, 64)).astype(np.float32)
    found, wanted = (
        ort.InferenceSession(path).run(None, {"input_features": features})
        for path in (ours, theirs)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_excluded_nodes_stay_in_float32(tiny_bundle: Path, tmp_path: Path) -> None:
    scheme = Scheme("dynamic_int8", excluded=("*.fc1", "*.fc2"))
    target = tmp_path / "whisper_encoder.onnx"
    report = quantize_graph(source(tiny_bundle, "whisper_encoder"), target, scheme)
    excluded = {name for name, reason in report.kept.items() if reason == "excluded by the scheme"}
    assert {name.rsplit(".", 1)[1] for name in excluded} == {"fc1", "fc2"}
    assert {node.name for node in nodes(target, "MatMul")} == excluded


def test_rows_of_embeddings() -> None:
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((50, 16)) * rng.lognormal(0, 3, (50, 1))).astype(np.float32)
    table[7] = 0
    rows, scales = quantize_rows(table)
    assert rows.dtype == np.int8
    assert scales.shape == (50,)
    assert (np.abs(rows * scales[:, None] - table) <= scales[:, None] * 0.5001).all()
    assert not rows[7].any()
    assert (np.abs(rows.astype(int)).max(axis=1)[np.arange(50) != 7] == 127).all()


def test_recipes_are_complete_and_frozen() -> None:
    for name, found in RECIPES.items():
        assert found.name == name
        assert set(found.graphs) == {"encoder", "projector", "decoder"}
        assert set(found.relative_errors) == {"encoder", "projector", "decoder", "embed_tokens"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["int4"].embeddings = "fp32"  # type: ignore[misc]
    with pytest.raises(
        UsageError,
        match="'int5' is unknown; expected one of fp32, int8, int8-b128, int8-rows, int4",
    ):
        recipe("int5")
