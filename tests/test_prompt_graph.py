"""A second graph of the decoder, for prompts: what it leaves behind, when it reads, its bundles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache

from tests.model_stub import MemorySource, disturb, small_qwen3, use_traced_graphs
from tests.test_kv_quantization import CONFIG
from tinygiant.export import exporter
from tinygiant.export.cli import main
from tinygiant.export.decoder import PROMPT_BLOCKS, build_decoder
from tinygiant.export.rotation import Rotation, rotated
from tinygiant.models.tinygiant import TinyGiantALM
from tinygiant.quantize import RECIPES, KvPeaks, Scheme, quantize_graph
from tinygiant.quantize.kv_cache import kv_scales
from tinygiant.quantize.recipes import with_prompts
from tinygiant.runtime.batch import Batch
from tinygiant.runtime.bundle import Bundle, Manifest
from tinygiant.runtime.decoder import LEAST_PROMPT, PREFILL_TOKENS, Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import BundleError, UsageError
from tinygiant.runtime.loading import load
from tinygiant.runtime.ort.memory import least_bytes
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

Array = NDArray[np.float32]
SETTINGS = SessionSettings(threads=1, spin=False)
SPEC = dataclasses.replace(CONFIG, max_positions=2_048)


class Counted:
    """A graph for prompts that notes how many positions it reads, and how many there were."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.runs = graph, list[tuple[int, int]]()

    def bind(self) -> Any:
        binding, runs, embeds = self.graph.bind(), self.runs, []
        take = binding.input

        def noted(name: str, array: NDArray[Any]) -> None:
            if name == "inputs_embeds":
                embeds[:] = [array.shape[1]]
            if name == "total_sequence_length":
                runs.append((embeds[0], int(array)))
            take(name, array)

        binding.input = noted  # type: ignore[method-assign]
        return binding


@dataclasses.dataclass
class Model:
    """A decoder in PyTorch, its float32 graph and its embeddings."""

    module: nn.Module
    tensors: dict[str, Array]
    path: Path
    embeddings: TokenEmbeddings

    def keys_and_values(self, embeds: Array) -> list[tuple[Array, Array]]:
        """As transformers computes them, by layer."""
        cache = DynamicCache()
        with torch.no_grad():
            self.module(
                inputs_embeds=torch.from_numpy(embeds), past_key_values=cache, use_cache=True
            )
        return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]

    def logits(self, embeds: Array) -> Array:
        with torch.no_grad():
            found: Array = self.module(inputs_embeds=torch.from_numpy(embeds)).logits[0].numpy()
        return found

    def reader(self, path: Path, scheme: Scheme, blocks: int, peaks: Any = None) -> Graph:
        """A graph for prompts, quantized so."""
        source = path.with_suffix(".fp32.onnx")
        if scheme.rotated:
            rotation = Rotation.of_prompts(SPEC.hidden_size, SPEC.ffn_size)
            turned = rotated(self.tensors, SPEC.n_layers, rotation)
            build_decoder(SPEC, turned, source, rotation, prompt_blocks=blocks)
        else:
            build_decoder(SPEC, self.tensors, source, prompt_blocks=blocks)
        quantize_graph(source, path, scheme, peaks, only_prompts=True)
        return Graph(path, SETTINGS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        module = small_qwen3(SPEC)
        with torch.no_grad():  # large weights, or every RMS scale at 1 would hide a norm left out
            disturb(module)
    tensors = {k: v.numpy() for k, v in module.state_dict().items()}
    path = tmp_path_factory.mktemp("model") / "decoder.onnx"
    build_decoder(SPEC, tensors, path)
    table = tensors["model.embed_tokens.weight"]
    return Model(module.eval(), tensors, path, TokenEmbeddings(table))


@pytest.fixture(scope="module")
def exact(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = tmp_path_factory.mktemp("exact") / "prompts.onnx"
    return model.reader(path, Scheme(), PROMPT_BLOCKS)


@pytest.fixture(scope="module")
def decoder_graph(model: Model) -> Graph:
    return Graph(model.path, SETTINGS)


def rows(n_rows: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((1, n_rows, SPEC.hidden_size)).astype(np.float32)


def relative_error(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def held(decoder: Decoder) -> list[tuple[Array, Array]]:
    length = decoder.cache.length
    return [(k[0, :, :length], v[0, :, :length]) for _, k, v in decoder.cache.buffers()]


@pytest.mark.parametrize("lengths", [(32,), (33, 47), (50, 3, 90), (1, 35)])
def test_keys_and_values_are_those_of_transformers(
    model: Model, exact: Graph, decoder_graph: Graph, lengths: tuple[int, ...]
) -> None:
    """Whatever number of rows its blocks have, and whatever was read before, by either graph."""
    embeds = rows(sum(lengths))
    decoder = Decoder(decoder_graph, model.embeddings, SPEC, 200, prompts=exact)
    start = 0
    for length in lengths:
        decoder.feed(embeds[:, start : start + length])
        start += length
    for found, wanted in zip(held(decoder), model.keys_and_values(embeds), strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            assert relative_error(ours, theirs) < 1e-5
    last = rows(1, seed=1)
    logits = decoder.prefill(last)
    wanted_logits = model.logits(np.concatenate([embeds, last], axis=1))[-1]
    assert relative_error(logits, wanted_logits) < 1e-5


def test_it_reads_prompts_but_the_last_position_and_nothing_that_is_short(
    model: Model, exact: Graph, decoder_graph: Graph
) -> None:
    counted = Counted(exact)
    decoder = Decoder(decoder_graph, model.embeddings, SPEC, 1_700, prompts=counted)

    def newly_read(read: Callable[[], object]) -> list[tuple[int, int]]:
        counted.runs.clear()
        read()
        return list(counted.runs)

    assert newly_read(lambda: decoder.prefill(rows(LEAST_PROMPT))) == []
    assert newly_read(lambda: decoder.prefill(rows(LEAST_PROMPT + 1))) == [(32, 64)]
    assert decoder.cache.length == 65
    assert newly_read(lambda: decoder.feed(rows(LEAST_PROMPT - 1))) == []
    assert newly_read(lambda: decoder.feed(rows(LEAST_PROMPT))) == [(32, 128)]
    assert newly_read(lambda: decoder.step([3])) == []
    # A remainder of 12 positions by itself would leave blocks empty: parts are of one size.
    read = newly_read(lambda: decoder.feed(rows(2 * PREFILL_TOKENS + 12)))
    assert [n for n, _ in read] == [346, 345, 345]
    assert read[-1][1] == decoder.cache.length == 1_165


def test_the_last_layer_ends_with_its_keys_and_values(exact: Graph, model: Model) -> None:
    names = {"decoder": model.path, "prompts": model.path.parent / "prompts.onnx"}
    build_decoder(SPEC, model.tensors, names["prompts"], prompt_blocks=PROMPT_BLOCKS)
    nodes = {k: {n.name for n in onnx.load(p).graph.node} for k, p in names.items()}
    last = f"model.layers.{SPEC.n_layers - 1}"
    only_logits = {n for n in nodes["decoder"] - nodes["prompts"] if "proj" in n}
    assert only_logits == {
        f"{last}.{n}" for n in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    assert "logits" not in exact.output_names


def test_over_int8_it_stores_what_the_other_graph_reads(model: Model, tmp_path: Path) -> None:
    """Both have the same scales; one that rotated values would leave another's behind."""
    embeds = rows(60)
    peaks = []
    for keys, values in model.keys_and_values(embeds):
        peaks.append(KvPeaks(np.abs(keys).max(1), np.abs(values).max(1)))
    path = tmp_path / "decoder.onnx"
    quantize_graph(model.path, path, Scheme(), peaks)
    prompts_scheme = with_prompts(RECIPES["int8"]).prompts
    assert prompts_scheme is not None
    reader = model.reader(tmp_path / "prompts.onnx", prompts_scheme, PROMPT_BLOCKS, peaks)
    decoder = Decoder(
        Graph(path, SETTINGS), model.embeddings, SPEC, 100, kv_type="int8", prompts=reader
    )
    for part in (embeds[:, :23], embeds[:, 23:]):  # the second part begins behind a past
        decoder.feed(part)
    wanted = model.keys_and_values(embeds)
    for found, (keys, values), peak in zip(held(decoder), wanted, peaks, strict=True):
        for ours, theirs, scale in zip(
            found, (keys, values), (kv_scales(peak.keys), kv_scales(peak.values)), strict=True
        ):
            assert ours.dtype == np.int8
            assert relative_error(ours * scale[0], theirs) < 0.08


def test_the_rotated_graph_computes_the_same(model: Model, tmp_path: Path) -> None:
    scheme = Scheme("none", rotated=True)
    reader = model.reader(tmp_path / "prompts.onnx", scheme, PROMPT_BLOCKS)
    embeds = rows(70)
    decoder = Decoder(Graph(model.path, SETTINGS), model.embeddings, SPEC, 100, prompts=reader)
    decoder.feed(embeds)
    for found, wanted in zip(held(decoder), model.keys_and_values(embeds), strict=True):
        for ours, theirs in zip(found, wanted, strict=True):
            assert relative_error(ours, theirs) < 1e-4


def test_answers_of_a_batch_read_their_prompts_with_it(
    model: Model, exact: Graph, decoder_graph: Graph
) -> None:
    """A slot that moves takes both graphs along."""
    counted = Counted(exact)
    prompts = [rows(n, seed=n) for n in (40, 45)]
    wanted = []
    for prompt in prompts:
        decoder = Decoder(decoder_graph, model.embeddings, SPEC, 400, prompts=exact)
        wanted.append(decoder.prefill(prompt))
    batch = Batch(decoder_graph, model.embeddings, SPEC, 2, prompts=counted)
    first = batch.join(60)
    np.testing.assert_array_equal(first.prefill(prompts[0]), wanted[0])
    second = batch.join(300)  # room for it moves the first one
    np.testing.assert_array_equal(second.prefill(prompts[1]), wanted[1])
    first.truncate(0)
    np.testing.assert_array_equal(first.prefill(prompts[0]), wanted[0])
    assert [n for n, _ in counted.runs] == [39, 44, 39]


@pytest.fixture(scope="module")
def bundle(
    tiny_model: TinyGiantALM,
    tokenizer_file: Path,
    tiny_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        use_traced_graphs(patch, tiny_bundle, [exporter])
        source = MemorySource(tiny_model, tokenizer_file)
        exporter.export_bundle(source, path, RECIPES["int8"], prompts=True, threads=1)
    return path


def test_a_bundle_has_it_verified_and_answers_with_and_without(
    bundle: Path, tone: Callable[..., Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Bundle.open(bundle).manifest
    name = manifest.prompt_graph
    assert name == "decoder_model_prompts"
    assert manifest.recipe.details["prompts"]["kind"] == "dynamic_int8"
    report = json.loads((bundle / "verification.json").read_text(encoding="utf-8"))
    assert 1e-4 < report["graphs"][name]["logits"]["relative_error"] < 0.1
    assert f"| {name} " in (bundle / "README.md").read_text(encoding="utf-8")

    loaded: list[str] = []
    start = Graph.__init__

    def noted(self: Graph, path: Path, *arguments: Any, **others: Any) -> None:
        loaded.append(path.stem)
        start(self, path, *arguments, **others)

    monkeypatch.setattr(Graph, "__init__", noted)
    texts = {}
    for memory in ("default", "low"):
        loaded.clear()
        model = load(bundle, threads=1, memory=memory)
        texts[memory] = model.ask((tone(1.0), 16_000), "What is heard?", max_new_tokens=12).text
        assert (name in loaded) == (memory == "default")
        assert texts[memory]


def test_memory_is_asked_for_it_only_where_it_is_used(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    without = dataclasses.replace(
        opened, manifest=Manifest.from_dict(json.loads(_without_prompts(opened.manifest)))
    )
    size = sum(p.stat().st_size for p in (bundle / "onnx").glob("decoder_model_prompts*"))
    assert least_bytes(opened, keep=True)[0] == least_bytes(without, keep=True)[0] + size
    assert least_bytes(opened, keep=False) == least_bytes(without, keep=False)


def _without_prompts(manifest: Manifest) -> str:
    data = json.loads(manifest.to_json())
    del data["graphs"][data.pop("prompt_graph")]
    return json.dumps(data)


def test_a_manifest_names_a_graph_that_is_there_and_is_not_the_model_s_own(bundle: Path) -> None:
    data = json.loads(Bundle.open(bundle).manifest.to_json())
    with pytest.raises(BundleError, match=r"graphs .*'other'.* are missing"):
        Manifest.from_dict(data | {"prompt_graph": "other"})
    with pytest.raises(BundleError, match=r"graphs .*_prompts.* are unknown"):
        Manifest.from_dict(data | {"prompt_graph": ""})
    with pytest.raises(BundleError, match="prompt_graph 'projector' is a graph of the model"):
        Manifest.from_dict(data | {"prompt_graph": "projector"})


@pytest.mark.parametrize("recipe", ["fp32", "int8-rows"])
def test_recipes_that_take_none_say_so_before_anything_is_done(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match=f"recipe {recipe} has no graph for prompts"):
        with_prompts(RECIPES[recipe])
    options = ["--preset", "nano", "--random-weights", "0", "--recipe", recipe]
    code = main([*options, "--prompts", "int8", "-o", str(tmp_path / "bundle")])
    assert code == UsageError.exit_code
    line = capsys.readouterr().err.splitlines()[-1]
    assert "those that may: int8, int8-b128, int4, int4-b32, int4-gptq" in line
    assert not [*tmp_path.iterdir()]
