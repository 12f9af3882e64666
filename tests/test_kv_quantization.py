"""Keys and values in int8: what the graph stores, what it computes, and which scales it gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import numpy_helper
from transformers import DynamicCache

from tests.model_stub import small_qwen3
from tinygiant.export.decoder import DecoderSpec, _layer_shapes, build_decoder
from tinygiant.quantize import KvPeaks, Scheme, kv_peaks, quantize_graph
from tinygiant.quantize.kv_cache import HEADROOM, LONGEST_STEP, kv_scales
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.operators import graph_contents
from tinygiant.runtime.ort import sessions
from tinygiant.runtime.ort.sessions import Graph, SessionSettings
from tinygiant.runtime.speculation import MAX_DRAFT_TOKENS

Array = NDArray[np.float32]

CONFIG = DecoderSpec(
    vocab_size=61,
    hidden_size=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    ffn_size=80,
    max_positions=256,
    stop_token_ids=(1,),
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
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
        self.tensors = tensors
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
        found = []
        for layer in range(CONFIG.n_layers):
            names = (f"model.layers.{layer}.self_attn.{kind}_scale" for kind in ("key", "value"))
            key_scale, value_scale = (stored[name] for name in names)
            found.append((key_scale, value_scale))
        return found


def text(seed: int, n_tokens: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, CONFIG.vocab_size, n_tokens)]


def relative_error(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_stored(found: NDArray[np.int8], floats: Array, scale: Array) -> None:
    """``found`` is ``floats`` in steps of ``scale``, but for ties that rounding decides."""
    steps = floats / scale
    wanted = np.clip(np.rint(steps), -128, 127)
    differs = found != wanted
    assert differs.mean() < 0.001
    assert (np.abs(found - wanted) <= 1).all()
    assert (np.abs(np.abs(steps - np.trunc(steps)) - 0.5) < 1e-3)[differs].all()


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


def restore_dequantized(plain: Decoder, int8: Decoder, pair: Pair) -> None:
    """Let ``plain`` hold what ``int8`` has stored."""
    stored = zip(int8.cache.snapshot(), pair.scales(), strict=True)
    plain.cache.restore(tuple((k * k_scale, v * v_scale) for (k, v), (k_scale, v_scale) in stored))


def test_attention_reads_the_stored_times_the_scale(pair: Pair) -> None:
    """The float32 graph, given the dequantized cache, goes on as the int8 graph does."""
    int8, plain = pair.decoder("int8"), pair.decoder("fp32")
    int8.read(text(9, 60))
    restore_dequantized(plain, int8, pair)
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


# --- prompts: float32 attention over more than LONGEST_STEP tokens


@pytest.mark.parametrize(
    ("n_tokens", "branch"),
    [
        (1, "short"),
        (MAX_DRAFT_TOKENS + 1, "short"),  # the longest step with drafts
        (LONGEST_STEP, "short"),
        (LONGEST_STEP + 1, "long"),
    ],
)
@pytest.mark.parametrize("n_past", [0, 40])
def test_steps_are_read_in_int8_and_prompts_in_float32(
    pair: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    n_tokens: int,
    branch: str,
    n_past: int,
) -> None:
    usual = sessions._session_options

    def profiled(*arguments: Any) -> Any:
        options = usual(*arguments)
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")
        return options

    monkeypatch.setattr(sessions, "_session_options", profiled)
    graph = Graph(pair.paths[1], SETTINGS)
    decoder = Decoder(graph, pair.embeddings, CONFIG, CAPACITY, kv_type="int8")
    decoder.cache.advance(n_past)
    decoder.read(text(1, n_tokens))
    events = json.loads(Path(graph._session.end_profiling()).read_text())
    ran = [e["name"] for e in events if e.get("args", {}).get("op_name") == "GroupQueryAttention"]
    layers = range(CONFIG.n_layers)
    assert ran == [f"model.layers.{layer}.self_attn.{branch}_kernel_time" for layer in layers]


def test_a_prompt_is_stored_as_pytorch_computes_it(pair: Pair) -> None:
    """Exactly so in the first layer, and all of it: a prompt attends to itself in float32."""
    reference = small_qwen3(CONFIG)
    state = {name: torch.from_numpy(tensor) for name, tensor in pair.tensors.items()}
    reference.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    prompt, cache = text(10, 90), DynamicCache()
    with torch.no_grad():
        logits = reference(torch.tensor([prompt]), past_key_values=cache).logits[0, -1].numpy()
    decoder = pair.decoder("int8")
    assert relative_error(decoder.read(prompt), logits) < 1e-4
    pairs = zip(cache.layers, decoder.cache.snapshot(), pair.scales(), strict=True)
    for of_layer, stored, scales in pairs:
        for floats, found, scale in zip(
            (of_layer.keys.numpy(), of_layer.values.numpy()), stored, scales, strict=True
        ):
            assert_stored(found, floats, scale)


@pytest.mark.parametrize("n_past", [0, 1, LONGEST_STEP, 60])
@pytest.mark.parametrize("n_new", [LONGEST_STEP + 1, 40])
def test_a_prompt_is_read_as_the_float32_graph_reads_it(
    pair: Pair, n_past: int, n_new: int
) -> None:
    """Whatever lies before it: from the stored past times its scale, all else is the same."""
    int8, plain = pair.decoder("int8"), pair.decoder("fp32")
    if n_past:
        int8.read(text(11, n_past))
        restore_dequantized(plain, int8, pair)
    tokens = text(12, n_new)
    assert relative_error(int8.read(tokens), plain.read(tokens)) < 1e-5
    caches = zip(plain.cache.buffers(), int8.cache.buffers(), pair.scales(), strict=True)
    for (_, *floats), (_, *stored), scales in caches:
        for wanted, found, scale in zip(floats, stored, scales, strict=True):
            new = np.s_[:, :, n_past : n_past + n_new]
            assert_stored(found[new], wanted[new], scale)


@pytest.mark.parametrize(
    "sizes",
    [
        [LONGEST_STEP + 1, LONGEST_STEP, LONGEST_STEP + 1],
        [LONGEST_STEP, LONGEST_STEP + 1, LONGEST_STEP + 1],
        [LONGEST_STEP] * 3 + [2],
        [1, 48, 1, 48],
    ],
)
def test_a_prompt_in_pieces_is_nearly_the_prompt_at_once(pair: Pair, sizes: list[int]) -> None:
    tokens = text(13, sum(sizes))
    whole, pieces = pair.decoder("int8"), pair.decoder("int8")
    wanted = whole.read(tokens)
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        logits = pieces.read(tokens[start : start + size])
    assert relative_error(logits, wanted) < 0.1
    first, *_ = zip(whole.cache.snapshot(), pieces.cache.snapshot(), strict=True)
    for a, b in zip(*first, strict=True):
        # The first layer's depend on nothing quantized: they are the same but for rounding.
        assert (a != b).mean() < 0.001
        assert np.abs(a.astype(int) - b).max() <= 1


def test_a_long_read_writes_its_own_rows_alone(pair: Pair) -> None:
    """In the buffer that was given: the past keeps its bits, and so does what lies behind."""
    decoder = pair.decoder("int8")
    decoder.read(text(14, 37))
    rng = np.random.default_rng(15)
    before = []
    for _, *buffers in decoder.cache.buffers():
        for buffer in buffers:
            # Rubbish behind the last row that is held.
            buffer[:, :, 37:] = rng.integers(-128, 128, buffer[:, :, 37:].shape, np.int8)
            before.append(buffer.copy())
    decoder.read(text(16, 50))
    after = [buffer for _, *buffers in decoder.cache.buffers() for buffer in buffers]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(new[:, :, :37], old[:, :, :37])
        np.testing.assert_array_equal(new[:, :, 87:], old[:, :, 87:])
        assert (new[:, :, 37:87] != old[:, :, 37:87]).any(axis=(1, 3)).all()
    clean = pair.decoder("int8")
    clean.read(text(14, 37))
    clean.read(text(16, 50))
    for (_, *a), (_, *b) in zip(decoder.cache.buffers(), clean.cache.buffers(), strict=True):
        for found, wanted in zip(a, b, strict=True):
            np.testing.assert_array_equal(found[:, :, :87], wanted[:, :, :87])


def test_both_branches_quantize_to_the_same_bit(pair: Pair, tmp_path: Path) -> None:
    """What is clipped, and what lies within a bit of a tie: one value of each channel.

    In the first layer: later ones depend on how the past was read.
    """
    plain = pair.decoder("fp32")
    plain.read(text(17, 50))
    rng = np.random.default_rng(19)
    shape = (CONFIG.n_kv_heads, CONFIG.head_dim)
    steps = np.asarray(rng.integers(10, 120, shape) + 0.5, np.float32)
    peaks = [
        KvPeaks(*(np.abs(floats[0, :, 30]) / steps * 127 / HEADROOM for floats in of_layer))
        for _, *of_layer in plain.cache.buffers()
    ]
    paths = tmp_path / "long.onnx", tmp_path / "short.onnx"
    quantize_graph(pair.paths[0], paths[0], Scheme(), peaks)
    model = onnx.load(paths[0])
    threshold = next(t for t in model.graph.initializer if t.name == "kv.longest_step")
    threshold.CopyFrom(numpy_helper.from_array(np.array(CAPACITY), threshold.name))
    onnx.save(model, paths[1])
    found = []
    for path in paths:
        decoder = Decoder(Graph(path, SETTINGS), pair.embeddings, CONFIG, CAPACITY, kv_type="int8")
        decoder.read(text(17, 50))
        decoder.read(text(18, 45))
        found.append(decoder.cache.snapshot()[0])
    for by_long, by_short in zip(*found, strict=True):
        np.testing.assert_array_equal(by_long, by_short)
        assert (by_short.min(), by_short.max()) == (-128, 127)


def test_structure(pair: Pair) -> None:
    """What all layers need is computed once; branches hold no weights, as the runtime asks."""
    content = pair.paths[1].read_bytes()
    nodes = onnx.load_from_string(content).graph.node
    shared = [node.name for node in nodes if node.name.startswith("kv.")]
    assert len(shared) == len(set(shared)) <= 10
    choices = [node for node in nodes if node.op_type == "If"]
    assert [node.name for node in choices] == [
        f"model.layers.{layer}.self_attn" for layer in range(CONFIG.n_layers)
    ]
    for node in choices:
        branches = {attribute.name: attribute.g for attribute in node.attribute}
        for name, branch in (("long", "then_branch"), ("short", "else_branch")):
            kinds = {inner.name: inner.op_type for inner in branches[branch].node}
            assert kinds[f"{node.name}.{name}"] == "GroupQueryAttention"
            assert list(kinds.values()).count("GroupQueryAttention") == 1
    assert {"ai.onnx:If", "ai.onnx:ScatterND"} < graph_contents(content).operators


def test_layers_with_different_numbers_of_heads_are_refused(pair: Pair, tmp_path: Path) -> None:
    model = onnx.load(pair.paths[0])
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    next(a for a in node.attribute if a.name == "kv_num_heads").i = 1
    onnx.save(model, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="unpack"):
        quantize_graph(tmp_path / "x.onnx", tmp_path / "y.onnx", Scheme(), pair.peaks)


# --- scales


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
