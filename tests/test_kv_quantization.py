"""Keys and values in int8: what the graph stores, what it computes, and which scales it gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper

from tinygiant.export.decoder import _layer_shapes, build_decoder
from tinygiant.quantize import KvPeaks, Scheme, kv_peaks, quantize_graph
from tinygiant.quantize.kv_cache import HEADROOM, kv_scales
from tinygiant.runtime.config import DecoderConfig
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.sessions import Graph, SessionSettings

Array = NDArray[np.float32]

CONFIG = DecoderConfig(
    vocab_size=61,
    hidden_size=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    ffn_size=80,
    max_positions=256,
    eos_token_ids=(1,),
    think_end_token_id=2,
)
CAPACITY = 100
SETTINGS = SessionSettings(threads=1, spin=False)


class Pair:
    """One decoder twice: ``plain`` keeps float32, ``int8`` is calibrated on a text of its own."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(3)

        def matrix(name: str, shape: tuple[int, ...]) -> Array:
            if len(shape) == 2:
                return np.asarray(0.3 * rng.standard_normal(shape), np.float32)
            # Channels of keys that are far larger than others, as Qwen3 has them.
            spread = 1.0 if "k_norm" in name else 0.1
            return np.asarray(rng.lognormal(0.0, spread, shape), np.float32)

        tensors = {
            f"model.layers.{layer}.{name}": matrix(name, shape)
            for layer in range(CONFIG.n_layers)
            for name, shape in _layer_shapes(CONFIG).items()
        }
        tensors["model.norm.weight"] = np.ones(CONFIG.hidden_size, np.float32)
        table = np.asarray(rng.standard_normal((CONFIG.vocab_size, CONFIG.hidden_size)), np.float32)
        tensors["model.embed_tokens.weight"] = table
        self.embeddings = TokenEmbeddings(table)
        self.paths = folder / "plain.onnx", folder / "int8.onnx"
        build_decoder(CONFIG, tensors, self.paths[0])
        self.plain = Graph(self.paths[0], SETTINGS)
        reader = self.decoder("fp32")
        reader.read(text(0, 60))
        self.peaks = [
            kv_peaks(key[0, :, :60], value[0, :, :60]) for _, key, value in reader.cache.buffers()
        ]
        self.report = quantize_graph(*self.paths, Scheme(), self.peaks)
        self.int8 = Graph(self.paths[1], SETTINGS)

    def decoder(self, kv_type: Any) -> Decoder:
        graph = self.int8 if kv_type == "int8" else self.plain
        return Decoder(graph, self.embeddings, CONFIG, CAPACITY, kv_type=kv_type)

    def scales(self) -> list[tuple[Array, Array]]:
        """Of each layer's keys and values, as the file has them."""
        graph = onnx.load(self.paths[1]).graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
        return [(stored[node.input[12]], stored[node.input[13]]) for node in nodes]


def text(seed: int, n_tokens: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, CONFIG.vocab_size, n_tokens)]


def relative_error(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def test_what_is_stored_is_the_float_cache_to_half_a_step(pair: Pair) -> None:
    """Exactly so in the first layer, whose keys and values depend on no quantized ones."""
    plain, int8 = pair.decoder("fp32"), pair.decoder("int8")
    for decoder in (plain, int8):
        decoder.read(text(1, 80))
        decoder.step(text(2, 1))
        decoder.step(text(3, 4))
    pairs = zip(plain.cache.buffers(), int8.cache.buffers(), pair.scales(), strict=True)
    for (layer, *floats), (_, *stored), scales in pairs:
        for wanted, found, scale in zip(floats, stored, scales, strict=True):
            assert found.dtype == np.int8
            wanted, again = wanted[:, :, :85], found[:, :, :85] * scale
            assert relative_error(again, wanted) < 0.05
            if layer == 0:
                inside = np.abs(wanted) <= 127 * scale
                assert inside.mean() > 0.99  # the calibration text was another
                assert (np.abs(again - wanted) <= 0.501 * scale)[inside].all()


def test_logits_are_close_in_any_steps(pair: Pair) -> None:
    plain, int8 = pair.decoder("fp32"), pair.decoder("int8")
    pairs = []
    for decoder in (plain, int8):
        first = decoder.read(text(4, 50))[None]
        rest = [decoder.step(text(5, 1)), decoder.step(text(6, 7)), decoder.step(text(7, 1))]
        pairs.append(np.concatenate([first, *rest]))
    assert 1e-5 < relative_error(pairs[1], pairs[0]) < 0.1  # it is another cache
    assert int8.cache.n_bytes * 4 == plain.cache.n_bytes


def test_attention_reads_the_stored_times_the_scale(pair: Pair) -> None:
    """The float32 graph, given the dequantized cache, goes on as the int8 graph does."""
    int8, plain = pair.decoder("int8"), pair.decoder("fp32")
    int8.read(text(9, 60))
    stored = zip(int8.cache.snapshot(), pair.scales(), strict=True)
    plain.cache.restore(tuple((k * k_scale, v * v_scale) for (k, v), (k_scale, v_scale) in stored))
    found, wanted = int8.step([7]), plain.step([7])
    assert relative_error(found, wanted) < 0.01  # its own key and value are not rounded there
    untouched = pair.decoder("fp32")
    untouched.read(text(9, 60))
    assert relative_error(found, wanted) < 0.5 * relative_error(untouched.step([7]), wanted)


def test_going_back_is_exact(pair: Pair) -> None:
    decoder = pair.decoder("int8")
    decoder.read(text(8, 20))
    continued = decoder.step([5])
    decoder.truncate(20)
    decoder.step([9, 10, 11])
    decoder.truncate(20)
    np.testing.assert_array_equal(decoder.step([5]), continued)
    decoder.truncate(20)
    other = pair.decoder("int8")
    other.cache.restore(decoder.cache.snapshot())
    np.testing.assert_array_equal(other.step([5]), continued)


def test_the_report_and_the_file_say_so(pair: Pair) -> None:
    assert pair.report.scheme == "fp32-kv8"
    graph = onnx.load(pair.paths[1], load_external_data=False).graph
    caches = [v for v in (*graph.input, *graph.output) if v.name.startswith(("past", "present"))]
    assert len(caches) == 4 * CONFIG.n_layers
    assert {v.type.tensor_type.elem_type for v in caches} == {onnx.TensorProto.INT8}


def test_a_layer_too_many_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer"):
        quantize_graph(pair.paths[0], tmp_path / "x.onnx", Scheme(), [*pair.peaks, pair.peaks[0]])


@given(seed=st.integers(0, 2**16), position=st.integers(0, 40_000))
def test_the_peaks_of_keys_hold_at_every_position(seed: int, position: int) -> None:
    """Turned on by rotary embeddings, no key is larger than its peak, and the peak stays."""
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 2, 5, 8)).astype(np.float32)
    angles = position / 1e6 ** (np.arange(4) / 4)
    first, second = keys[..., :4], keys[..., 4:]
    turned = np.concatenate(
        [
            first * np.cos(angles) - second * np.sin(angles),
            second * np.cos(angles) + first * np.sin(angles),
        ],
        axis=-1,
    )
    here, there = kv_peaks(keys, values), kv_peaks(turned.astype(np.float32), values)
    np.testing.assert_allclose(there.keys, here.keys, rtol=1e-4)
    assert (np.abs(turned) <= here.keys[:, None] * 1.0001).all()
    np.testing.assert_array_equal(here.values, np.abs(values).max(axis=1))


def test_peaks_of_two_texts() -> None:
    one, other = (KvPeaks(*np.array(x, np.float32)) for x in ([[1, 4], [0, 2]], [[3, 2], [1, 1]]))
    both = one | other
    np.testing.assert_array_equal(both.keys, [3, 4])
    np.testing.assert_array_equal(both.values, [1, 2])


def test_scales_have_headroom_and_are_never_zero() -> None:
    peaks = np.array([[4.0, 0.0], [1.0, 2.0]], np.float32)
    scales = kv_scales(peaks)
    assert scales.shape == (1, 2, 1, 2)
    assert scales.dtype == np.float32
    np.testing.assert_allclose(scales[0, :, 0] * 127 / HEADROOM, [[4.0, 0.004], [1.0, 2.0]])
    assert (kv_scales(np.zeros((2, 2), np.float32)) > 0).all()
