"""The measure on a real language model: figures, texts, copies; and the gate on that model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

from benchmarks import figures, quality, quality_speed, rounding
from benchmarks.quality_models import heads_apart, heads_interleaved
from tinygiant.export.decoder import DecoderSpec, build_decoder
from tinygiant.export.quality import Gate
from tinygiant.quantize import RECIPES, KvPeaks, kv_peaks, quantize_graph, quantize_rows
from tinygiant.quantize.recipes import Recipe, candidates, matches
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.ort.sessions import Graph, SessionSettings


def test_heads_are_reordered_as_llama_cpp_rotates_them() -> None:
    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    apart = heads_apart(weight, 8)
    # Of a head's rows 0 .. 7, llama.cpp rotates 0 with 1; transformers row 0 with row 4.
    for head in (0, 8):
        for pair in range(4):
            assert (apart[head + pair] == weight[head + 2 * pair]).all()
            assert (apart[head + 4 + pair] == weight[head + 2 * pair + 1]).all()
    np.testing.assert_array_equal(heads_interleaved(apart, 8), weight)


def texts_and_logits(seed: int) -> tuple[Any, Any, Any]:
    """Three texts of 20 tokens, logits of both decoders."""
    rng = np.random.default_rng(seed)
    texts = rng.integers(0, 50, (3, 20)).astype(np.int32)
    ours = rng.standard_normal((3, 20, 50)).astype(np.float32)
    theirs = ours + 0.3 * rng.standard_normal((3, 20, 50)).astype(np.float32)
    return texts, ours, theirs


def test_figures_are_pytorchs() -> None:
    texts, ours, theirs = texts_and_logits(0)
    row = quality.compare(texts, ours, iter(theirs), 15)
    a, b, targets = torch.tensor(ours), torch.tensor(theirs), torch.tensor(texts).long()
    for part, positions in (
        ("all", slice(0, 19)), ("prompt", slice(0, 15)), ("steps", slice(15, 19))
    ):  # fmt: skip
        wanted = targets[:, 1:][:, positions].reshape(-1)
        p, q = (x[:, :-1][:, positions].reshape(-1, 50) for x in (a, b))
        losses = [torch.nn.functional.cross_entropy(x, wanted) for x in (p, q)]
        divergence = torch.nn.functional.kl_div(
            q.log_softmax(-1), p.log_softmax(-1), reduction="batchmean", log_target=True
        )
        found = row[part]
        assert found["perplexity"] == pytest.approx(losses[1].exp().item(), rel=1e-5)
        loss = 100 * (losses[1] - losses[0]).expm1().item()
        assert found["loss_percent"] == pytest.approx(loss, rel=1e-3)
        assert found["divergence"] == pytest.approx(divergence.item(), rel=1e-4)
        assert found["same_choice"] == (p.argmax(-1) == q.argmax(-1)).double().mean().item()


def test_positions_without_logits_are_left_out() -> None:
    """A graph for prompts gives none; what is compared is what was written behind them."""
    texts, ours, theirs = texts_and_logits(1)
    wanted = quality.compare(texts, ours, iter(theirs), 15)
    theirs[:, :15] = np.nan
    row = quality.compare(texts, ours, iter(theirs), 15)
    assert row == {"all": wanted["steps"], "prompt": None, "steps": wanted["steps"]}


def test_pages_are_long_enough_and_always_the_same() -> None:
    texts = quality.pages(lambda page: [*page.encode()], 5)
    assert texts.shape == (5, 512)
    np.testing.assert_array_equal(texts, quality.pages(lambda page: [*page.encode()], 5))
    assert len({text.tobytes() for text in texts}) == 5


def test_a_rotated_copy_is_the_same_model(tmp_path: Path) -> None:
    """Of random weights, through transformers' Llama, which shares no code with the rotation."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=48, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # norms that are not 1
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path / "original"
    (folder / "tensors").mkdir(parents=True)
    size = {"hidden_size": 32, "n_layers": 2}
    (folder / "model.json").write_text(json.dumps({"size": size}))
    (folder / "tokenizer.json").write_text("{}")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            np.save(folder / "tensors" / f"{name}.npy", tensor.numpy())
    quality.rotated_copy(folder, tmp_path / "rotated")
    config.tie_word_embeddings = False
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(
        {
            path.stem: torch.from_numpy(np.load(path))
            for path in (tmp_path / "rotated/tensors").glob("*.npy")
        }
    )
    ids = torch.arange(11)[None] * 3
    with torch.no_grad():
        wanted, found = model(ids).logits, other(ids).logits
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    weight = np.load(tmp_path / "rotated/tensors/model.layers.0.mlp.up_proj.weight.npy")
    assert not np.allclose(
        weight, np.load(folder / "tensors/model.layers.0.mlp.up_proj.weight.npy")
    )


def test_trials_of_int8_rows_leave_out_what_their_names_say() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16,
        "ffn_size": 48, "vocab_size": 40, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "max_positions": 64,
    }  # fmt: skip
    spec = DecoderSpec(**sizes, stop_token_ids=(1,), qk_norm=False)
    nodes = ("lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj")
    for name, variant in {**quality.TRIALS, "int8-rows": quality.VARIANTS["int8-rows"]}.items():
        kept = [matches(node, variant.scheme.excluded) for node in nodes]
        both = name.endswith("both-fp32")
        assert kept == [both or "head" in name, both or "down" in name, False]
        rotation = quality.rotation_of(variant, spec)
        assert len(rotation.stream) == 32
        turned = "stream" not in name and not variant.for_prompts
        assert len(rotation.values) == (16 if turned else 1)
        assert len(rotation.gated) == (1 if "stream" in name and "gated" not in name else 16)


@pytest.mark.parametrize("method", ["hqq", "k-quant"])
def test_other_ways_to_round_have_sixteen_values_a_block(method: rounding.Method) -> None:
    weight = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
    found = rounding.rounded(weight, method, 32)
    for block in found.T.reshape(-1, 32):
        assert len(np.unique(block.round(5))) <= 16
    assert 0.05 < np.linalg.norm(found - weight) / np.linalg.norm(weight) < 0.09
    # What lies on a grid of 16 steps is found again.
    np.testing.assert_allclose(rounding.rounded(found, method, 32), found, atol=0.02)


def test_speeds_are_ratios_of_one_round_and_the_better_llama_cpp_counts() -> None:
    def rounds(prefill: list[float], decode: list[float]) -> list[dict[str, float]]:
        pairs = zip(prefill, decode, strict=True)
        return [{"prefill_s": 400 / a, "decode_s": 64 / b} for a, b in pairs]

    found = quality_speed.summarize(
        {
            "int8": rounds([300.0, 100.0, 500.0], [20.0, 10.0, 90.0]),
            "llama.cpp-Q8_0": rounds([100.0, 50.0, 200.0], [10.0, 10.0, 30.0]),
            "llama.cpp-Q8_0-flash": rounds([150.0, 50.0, 200.0], [5.0, 5.0, 15.0]),
        }
    )
    assert set(found) == {"int8", "llama.cpp-Q8_0"}
    assert found["int8"]["prefill_tokens_per_s"] == pytest.approx(300)
    assert found["int8"]["prefill_of_q8_0"] == pytest.approx(2.0)  # flash: 2, 2, 2.5
    assert found["int8"]["decode_of_q8_0"] == pytest.approx(2.0)  # without: 2, 1, 3
    assert found["llama.cpp-Q8_0"]["prefill_tokens_per_s"] == pytest.approx(150)
    assert found["llama.cpp-Q8_0"]["decode_tokens_per_s"] == pytest.approx(10)


@pytest.mark.skipif(
    "QUALITY_MODEL" not in os.environ,
    reason="two minutes and a package: python -m benchmarks.quality_models extract FOLDER, then "
    "QUALITY_MODEL=FOLDER",
)
def test_the_gate_refuses_int4_of_a_real_model_and_passes_what_auto_takes(tmp_path: Path) -> None:
    """Round-to-nearest int4 of SmolLM2-135M used to be written as if all were well."""
    folder = Path(os.environ["QUALITY_MODEL"])
    size = json.loads((folder / "model.json").read_text(encoding="utf-8"))["size"]
    stop_ids = tuple(size.pop("eos_token_ids"))
    spec = DecoderSpec(**size, stop_token_ids=stop_ids, qk_norm=False)
    tensors = {path.stem: np.load(path) for path in (folder / "tensors").glob("*.npy")}
    source = tmp_path / "decoder_model.onnx"
    build_decoder(spec, tensors, source)
    table = tensors["model.embed_tokens.weight"]
    starts = [[0], [0, 504, 253], [1, 9690, 198]]
    prompts = [table[ids][None] for ids in starts]
    gate = Gate(source, TokenEmbeddings(table), spec, prompts, SessionSettings())
    peaks = peaks_of(source, TokenEmbeddings(table), spec, starts)
    rows = TokenEmbeddings(*quantize_rows(table))

    def missed(recipe: Recipe) -> str | None:
        target = tmp_path / recipe.name / "decoder_model.onnx"
        target.parent.mkdir()
        kept = peaks if recipe.kv_cache == "int8" else None
        quantize_graph(source, target, recipe.graphs["decoder"], kept)
        found = gate.judge(target, rows, recipe)
        print(f"{recipe.name}: {found.line}")
        assert recipe.name != "int4" or found.perplexity_ratio > 1.2
        return found.missed(recipe.quality)

    assert missed(RECIPES["int4"]) is not None
    n_weights = sum(tensor.size for tensor in tensors.values())
    taken = next(recipe for recipe in candidates(n_weights) if missed(recipe) is None)
    # The recommendation of README's table: the first that loses less than 1 % there.
    assert taken.name == "int8"


def peaks_of(
    source: Path, embeddings: TokenEmbeddings, spec: DecoderSpec, starts: list[list[int]]
) -> list[KvPeaks]:
    """Largest keys and values of greedy texts of 64 tokens."""
    graph, peaks = Graph(source, SessionSettings()), []
    for ids in starts:
        decoder = Decoder(graph, embeddings, spec, 70)
        for _ in decoder.generate(decoder.read(ids), max_new_tokens=64, stop_ids=()):
            pass
        found = [kv_peaks(key[0], value[0]) for _, key, value in decoder.cache.buffers()]
        peaks = [a | b for a, b in zip(peaks or found, found, strict=True)]
    graph.close()
    return peaks


def test_the_front_joins_what_nothing_beats_in_both() -> None:
    points = {"a": (1.0, 1.0), "b": (2.0, 2.0), "c": (2.0, 3.0), "d": (3.0, 2.5), "e": (0.5, 1.5)}
    assert figures.front(points) == ["a", "b", "d"]


def test_the_picture_of_quality_names_every_decoder_that_was_timed(tmp_path: Path) -> None:
    rows = [
        {"copy": copy, "name": name, "all": {"divergence": divergence}}
        | ({} if copy == "original" else {"prefill_tokens_per_s": 9.0, "decode_tokens_per_s": 2.0})
        for copy in ("original", "rotated")
        for name, divergence in (("int8", 0.01), ("int4", 1.0), ("llama.cpp-F32", 1e-7))
    ]
    data = {"model": "a model", "threads": 2, "rows": rows}
    path = figures.draw_quality(data, tmp_path / "new" / "quality.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="--speed"):
        figures.draw_quality(data | {"rows": rows[:3]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_picture_is_drawn_from_a_result_as_it_is_saved(tmp_path: Path) -> None:
    result = Path(__file__).parents[1] / "benchmarks" / "results" / "quality-prompts.json"
    picture = tmp_path / "quality.png"
    assert figures.main(["quality", str(result), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
