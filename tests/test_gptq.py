"""GPTQ, the moments it is calibrated with, rotated decoders, and scales of rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from tests.model_stub import disturb, small_qwen3
from tests.test_decoder_graph import CONFIG, Runner
from tinygiant.export.decoder import build_decoder, read_tensors
from tinygiant.export.rotation import Rotation, block_rotation, random_rotation, rotated
from tinygiant.quantize import Scheme, quantize_graph
from tinygiant.quantize.calibration import input_moments
from tinygiant.quantize.gptq import gptq_blocks
from tinygiant.quantize.weight_only import dequantize_blocks, quantize_blocks
from tinygiant.runtime.ort.sessions import SessionSettings

Array = NDArray[np.float32]


def correlated_rows(n_rows: int, n_channels: int, seed: int = 0) -> Array:
    """Activations as a language model has them: few directions, channels of different size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n_rows, 12)) @ rng.standard_normal((12, n_channels))
    noise = 0.3 * rng.standard_normal((n_rows, n_channels))
    rows: Array = ((mixed + noise) * rng.lognormal(0, 1, n_channels)).astype(np.float32)
    return rows


def optimal_brain_quantizer(weight: Array, moments: Array, scales: Array, block: int) -> Array:
    """The rule that GPTQ speeds up, as Optimal Brain Quantization has it, channel by channel.

    Fix one channel to its rounded value, move those that are left to where the product's error is
    least, strike the channel from the inverse by a step of Gaussian elimination.
    """
    damped = moments.astype(np.float64) + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    inverse, left = np.linalg.inv(damped), weight.astype(np.float64)
    result = np.empty_like(left)
    for channel in range(len(weight)):
        scale = scales[:, channel // block].astype(np.float64)
        result[channel] = np.clip(np.rint(left[channel] / scale), -8, 7) * scale
        error = (left[channel] - result[channel]) / inverse[channel, channel]
        left -= np.outer(inverse[:, channel], error)
        column = inverse[:, channel : channel + 1]
        inverse = inverse - column @ column.T / inverse[channel, channel]
    return result.astype(np.float32)


def test_gptq_is_optimal_brain_quantization_of_its_scales() -> None:
    rows = correlated_rows(400, 48)
    moments = rows.T @ rows / len(rows)
    weight = np.random.default_rng(1).standard_normal((48, 20)).astype(np.float32)
    packed, scales = gptq_blocks(weight, moments, 4, 16)
    found = dequantize_blocks(packed, scales, 4, 48)
    wanted = optimal_brain_quantizer(weight, moments, scales, 16)
    # A weight that lies half way between two steps may go either way, and moves those after it.
    assert np.isclose(found, wanted, atol=1e-5).all(axis=0).mean() >= 0.9


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n_in", "block_size"), [(96, 32), (80, 32), (128, 128)])
def test_gptq_loses_less_of_the_product_than_rounding(
    bits: int, n_in: int, block_size: int
) -> None:
    rows, held_out = np.split(correlated_rows(2_000, n_in), 2)
    weight = np.random.default_rng(2).standard_normal((n_in, 24)).astype(np.float32)
    nearest = quantize_blocks(weight, bits, Scheme("weight_only", block_size=block_size))
    fitted = gptq_blocks(weight, rows.T @ rows / len(rows), bits, block_size)

    def lost(packed: NDArray[np.uint8], scales: Array) -> float:
        again = dequantize_blocks(packed, scales, bits, n_in)
        return float(np.square(held_out @ (again - weight)).sum())

    assert lost(*fitted) <= 0.5 * lost(*nearest[:2])


def test_without_correlation_gptq_rounds_to_the_nearest() -> None:
    """Nothing can be made up for; and a channel that is always zero harms nobody."""
    weight = np.random.default_rng(3).standard_normal((64, 7)).astype(np.float32)
    packed, scales = gptq_blocks(weight, np.diag(np.arange(64, dtype=np.float32)), 4, 32)
    wanted = quantize_blocks(weight, 4, Scheme("weight_only", bits=4))
    np.testing.assert_array_equal(packed, wanted[0])
    np.testing.assert_array_equal(scales, wanted[1])


def decoder_graph(tmp_path: Path, *, rotate: bool) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = small_qwen3(CONFIG)
    with torch.no_grad():  # large weights, or every RMS scale at 1 would hide a norm left out
        disturb(model)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    path = tmp_path / "decoder_model.onnx"
    if rotate:
        rotation = Rotation.random(CONFIG.hidden_size, CONFIG.head_dim, CONFIG.ffn_size)
        build_decoder(CONFIG, rotated(state, CONFIG.n_layers, rotation), path, rotation)
    else:
        build_decoder(CONFIG, state, path)
    return model, path


def test_moments_are_those_of_pytorchs_inputs(tmp_path: Path) -> None:
    model, path = decoder_graph(tmp_path, rotate=False)
    rng = np.random.default_rng(4)
    texts = [rng.standard_normal((n, CONFIG.hidden_size)).astype(np.float32) for n in (5, 1, 17)]
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0][0])
            )
    with torch.no_grad():
        for text in texts:
            model(inputs_embeds=torch.from_numpy(text)[None], use_cache=False)
    found = input_moments(path, texts, SessionSettings(threads=1))
    sources = {node.name: node.input[0] for node in onnx.load(path).graph.node}
    assert len(found) == 4 * CONFIG.n_layers == len(seen)
    for name, rows in seen.items():
        wanted = sum(row.T @ row for row in rows) / 23
        np.testing.assert_allclose(found[sources[name]], wanted, rtol=1e-3, atol=1e-4)
    assert [file.name for file in tmp_path.glob("*.onnx")] == [path.name]


def test_a_rotated_decoder_is_the_same_function(tmp_path: Path) -> None:
    model, path = decoder_graph(tmp_path, rotate=True)
    embeds = np.random.default_rng(5).standard_normal((1, 9, CONFIG.hidden_size)).astype(np.float32)
    with torch.no_grad():
        wanted = model(inputs_embeds=torch.from_numpy(embeds), use_cache=False).logits.numpy()
    found = Runner(path).step(embeds, list(range(9)))
    assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted)


def test_a_graph_gives_its_tensors_back(tmp_path: Path) -> None:
    """To the bit, so that a decoder rotated from its graph is the one rotated from its source."""
    model, path = decoder_graph(tmp_path, rotate=False)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = read_tensors(path)
    assert found.keys() == state.keys() - {"model.embed_tokens.weight"}
    for name, source in found.items():
        assert callable(source)
        np.testing.assert_array_equal(source(), state[name])
    rotation = Rotation.random(CONFIG.hidden_size, CONFIG.head_dim, CONFIG.ffn_size)
    for name, tensors in (("a", found), ("b", state)):
        (tmp_path / name).mkdir()
        target = tmp_path / name / "decoder_model.onnx"
        build_decoder(CONFIG, rotated(tensors, CONFIG.n_layers, rotation), target, rotation)
    for one, other in zip(*(sorted((tmp_path / n).iterdir()) for n in "ab"), strict=True):
        assert one.name == other.name and one.read_bytes() == other.read_bytes()


def test_rotations_are_orthogonal_and_spread_a_channel() -> None:
    rotation = random_rotation(64, seed=7)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(64), atol=1e-12)
    np.testing.assert_array_equal(rotation, random_rotation(64, seed=7))
    assert np.abs(rotation).max() <= 0.6  # one channel's size goes into many


@pytest.mark.parametrize(("size", "block"), [(1536, 128), (3072, 128), (96, 32), (7, 1)])
def test_blocks_of_an_mlp_are_spread_evenly(size: int, block: int) -> None:
    rotation = block_rotation(size)
    assert rotation.shape == (block, block)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(block), atol=1e-12)
    np.testing.assert_allclose(np.abs(rotation), block**-0.5)


def one_product(path: Path, weight: Array) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.0.mlp.down_proj")],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "T", len(weight)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "T", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)


def test_a_huge_row_does_not_blur_the_others(tmp_path: Path) -> None:
    """With one scale for a whole prompt, the first token's row left nothing of the others.

    On a real model of 135 M weights that made prompts of 480 tokens lose half of their perplexity.
    """
    rng = np.random.default_rng(6)
    weight = rng.standard_normal((64, 32)).astype(np.float32)
    rows = rng.standard_normal((1, 9, 64)).astype(np.float32)
    rows[0, 0] *= 1_000.0
    rows[0, 4] = 0.0
    one_product(tmp_path / "product.onnx", weight)
    wanted = rows @ weight
    errors = {}
    for patterns in ((), ("*.down_proj",)):
        scheme = Scheme("dynamic_int8", reduce_range=False, row_scaled=patterns)
        target = tmp_path / "quantized.onnx"
        quantize_graph(tmp_path / "product.onnx", target, scheme)
        (found,) = ort.InferenceSession(target).run(None, {"x": rows})
        assert (found[0, 4] == 0).all()
        others = [1, 2, 3, 5, 6, 7, 8]
        off = np.linalg.norm((found - wanted)[0, others], axis=1)
        errors[patterns] = (off / np.linalg.norm(wanted[0, others], axis=1)).max()
    assert errors[()] >= 0.5
    assert errors["*.down_proj",] <= 0.02
