"""The gate: what a quantized decoder loses on its own model's text, and who may be written."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import kl_div

from tests.model_stub import MemorySource, disturb, small_qwen3, use_traced_graphs
from tests.test_decoder_graph import CONFIG as SHORT
from tinygiant.export import exporter
from tinygiant.export.decoder import build_decoder
from tinygiant.export.quality import Quality, continue_prompts, measure
from tinygiant.models.tinygiant import TinyGiantALM
from tinygiant.quantize import RECIPES, Recipe
from tinygiant.quantize.recipes import CLOSER, QualityLimits, candidates, closer
from tinygiant.runtime.bundle import SourceEntry
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import VerificationError
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

Array = NDArray[np.float32]
CONFIG = dataclasses.replace(SHORT, max_positions=200)
SETTINGS = SessionSettings(threads=1)


def decoder(folder: Path, noise: float) -> tuple[nn.Module, Graph]:
    """A decoder that is decided enough to be wrong, its weights off by ``noise``."""
    torch.manual_seed(0)
    model = small_qwen3(CONFIG)
    with torch.no_grad():
        disturb(model)
        for parameter in model.model.layers.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    path = folder / f"decoder-{noise}.onnx"
    build_decoder(CONFIG, tensors, path)
    return model, Graph(path, SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gate")


@torch.no_grad()
def log_probs(model: nn.Module, prompt: Array, token_ids: Sequence[int]) -> Array:
    """transformers' log-probabilities at each of the tokens, ``(K, V)``."""
    rows = model.get_input_embeddings()(torch.tensor([token_ids]))
    embeds = torch.cat((torch.from_numpy(prompt), rows), dim=1)
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    found: Array = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1).numpy()
    return found


def test_the_loss_is_what_transformers_computes(folder: Path) -> None:
    model, graph = decoder(folder, 0.0)
    other, other_graph = decoder(folder, 0.05)
    table = model.get_input_embeddings().weight.detach().numpy()
    embeddings = TokenEmbeddings(table)
    rng = np.random.default_rng(1)
    prompts = [rng.standard_normal((1, n, CONFIG.hidden_size)).astype("f4") for n in (3, 11)]
    texts = continue_prompts(graph, embeddings, CONFIG, prompts, n_tokens=120)
    assert sum(len(text.token_ids) for text in texts) == 120
    assert {text.prompt for text in texts} == {0, 1}

    lost, same = [], []
    for text in texts:
        ours = log_probs(model, prompts[text.prompt], text.token_ids)
        theirs = log_probs(other, prompts[text.prompt], text.token_ids)
        np.testing.assert_allclose(text.log_probs, ours, atol=1e-3)
        both = (torch.from_numpy(rows) for rows in (theirs, ours))
        lost.append(kl_div(*both, reduction="none", log_target=True).sum(-1).numpy())
        same.append(ours.argmax(1) == theirs.argmax(1))
    found = measure(other_graph, embeddings, CONFIG, prompts, texts)
    assert found.n_tokens == 120
    assert found.perplexity_ratio == pytest.approx(np.exp(np.concatenate(lost).mean()), rel=1e-3)
    assert found.same_choice == np.concatenate(same).mean()
    assert found.perplexity_ratio > 1.02 and found.same_choice < 1.0  # this noise is seen

    nothing = measure(graph, embeddings, CONFIG, prompts, texts)
    assert nothing.perplexity_ratio == pytest.approx(1.0, abs=1e-5)
    assert nothing.same_choice == 1.0


def test_texts_are_drawn_not_the_most_likely(folder: Path) -> None:
    """Greedy text would be judged where the model is surest, which flatters."""
    model, graph = decoder(folder, 0.0)
    embeddings = TokenEmbeddings(model.get_input_embeddings().weight.detach().numpy())
    prompt = np.random.default_rng(2).standard_normal((1, 5, CONFIG.hidden_size)).astype("f4")
    texts = continue_prompts(graph, embeddings, CONFIG, [prompt], n_tokens=300)
    drawn = np.concatenate([text.token_ids for text in texts])
    log_probs = np.concatenate([text.log_probs for text in texts])
    assert 0.02 < (drawn == log_probs.argmax(-1)).mean() < 0.98
    assert np.exp(log_probs[np.arange(len(drawn)), drawn]).mean() < 0.98


def test_the_figure_hardly_depends_on_what_was_drawn(folder: Path) -> None:
    """A real model's export was refused and passed by chance: only drawn tokens counted.

    Of 256 tokens, the mean of ``log p - log q`` of the drawn ones is off by a point and more, as
    much as the limit of 8 bits allows in all.
    """
    model, graph = decoder(folder, 0.0)
    noisy, other = decoder(folder, 0.05)
    embeddings = TokenEmbeddings(model.get_input_embeddings().weight.detach().numpy())
    prompt = np.random.default_rng(3).standard_normal((1, 5, CONFIG.hidden_size)).astype("f4")
    lost, drawn = [], []
    for seed in range(8):
        texts = continue_prompts(graph, embeddings, CONFIG, [prompt], n_tokens=128, seed=seed)
        lost.append(np.log(measure(other, embeddings, CONFIG, [prompt], texts).perplexity_ratio))
        ours = np.concatenate([log_probs(model, prompt, text.token_ids) for text in texts])
        theirs = np.concatenate([log_probs(noisy, prompt, text.token_ids) for text in texts])
        tokens = np.concatenate([text.token_ids for text in texts])
        here = np.arange(len(tokens))
        drawn.append((ours - theirs)[here, tokens].mean())
    assert np.mean(lost) == pytest.approx(np.mean(drawn), rel=0.5)
    assert np.std(lost) < 0.5 * np.std(drawn)


def test_limits_refuse_what_is_not_a_number_and_spare_random_weights() -> None:
    limits = QualityLimits(perplexity_ratio=1.02, same_choice=0.92)
    assert Quality(256, 1.01, 0.95).missed(limits) is None
    assert "1.900 times" in str(Quality(256, 1.9, 0.95).missed(limits))
    assert "50.0% of first choices" in str(Quality(256, 1.0, 0.5).missed(limits))
    assert Quality(0, float("nan"), float("nan")).missed(limits) is not None
    assert Quality(256, 1.9, 0.5, judged=False).missed(limits) is None


def test_recipes_by_closeness() -> None:
    assert {*CLOSER} == {*RECIPES} - {"fp32", "int8-rows"}  # which not every processor can run
    assert [recipe.name for recipe in closer("int4-gptq")] == ["int8-b128", "int8"]
    assert closer("int8") == ()
    small, large = candidates(135_000_000), candidates(596_000_000)
    assert small[0].name == "int8-b128"
    assert large[0].name == "int4-gptq"
    # The last resort is what loses least of all that is quantized.
    assert small[-1].name == large[-1].name == "int8"


class Trained(MemorySource):
    """The tiny model, whose weights are random, as if somebody had trained it."""

    def entry(self) -> SourceEntry:
        return SourceEntry("tiny", "0" * 64, "trained", None)


def strict(name: str) -> Recipe:
    """A recipe that nothing quantized can keep."""
    return dataclasses.replace(
        RECIPES[name], quality=QualityLimits(perplexity_ratio=0.5, same_choice=1.0)
    )


@pytest.fixture
def trained(
    tiny_model: TinyGiantALM,
    tokenizer_file: Path,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> MemorySource:
    use_traced_graphs(monkeypatch, tiny_bundle, [exporter])
    return Trained(tiny_model, tokenizer_file)


def test_a_damaged_decoder_is_not_written_and_the_line_names_a_recipe(
    trained: MemorySource, tmp_path: Path
) -> None:
    """Round-to-nearest int4 nearly doubled a real model's perplexity; the export said all is well.

    Limits relative to PyTorch's logits were kept, for random weights decide clearly.
    """
    with pytest.raises(VerificationError) as caught:
        exporter.export_bundle(trained, tmp_path / "bundle", strict("int4"), threads=1)
    line = str(caught.value)
    assert line.startswith("the int4 bundle was not written: decoder_model: on 256 tokens that")
    assert "at most 0.5 times" in line
    assert re.search(r"--recipe (int4-b32|int4-gptq|int8-b128) passes \(on 256 tokens", line)
    assert not [*tmp_path.iterdir()]


def test_auto_takes_the_first_that_passes_and_says_what_it_refused(
    trained: MemorySource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = (strict("int4-gptq"), RECIPES["int8-b128"], RECIPES["int8"])
    monkeypatch.setattr(exporter, "candidates", lambda n_weights: tried)
    lines: list[str] = []
    done = exporter.export_bundle(
        trained, tmp_path / "bundle", None, threads=1, progress=lines.append
    )
    assert done.manifest.recipe.name == "int8-b128"
    assert done.manifest.kv_cache == "int8"
    assert done.manifest.graphs["decoder_model"].scheme == "int8-b128-kv8"
    assert any("not int4-gptq" in line for line in lines)
    report = json.loads((tmp_path / "bundle/verification.json").read_text(encoding="utf-8"))
    quality = report["quality"]
    assert quality["judged"] is True and quality["n_tokens"] == 256
    assert [*quality["refused"]] == ["int4-gptq"]
    assert quality["perplexity_ratio"] <= report["quality_limits"]["perplexity_ratio"] == 1.02
    assert done.manifest.verification["quality"] == quality
    card = (tmp_path / "bundle/README.md").read_text(encoding="utf-8")
    assert "Quantized decoder against its float32 one: on 256 tokens" in card
    assert "Not `int4-gptq`" in card


def test_random_weights_prove_nothing_and_the_card_says_so(
    tiny_model: TinyGiantALM,
    tokenizer_file: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_traced_graphs(monkeypatch, tiny_bundle, [exporter])
    source = MemorySource(tiny_model, tokenizer_file)
    done = exporter.export_bundle(source, tmp_path / "bundle", strict("int8"), threads=1)
    assert done.verification.quality is not None and not done.verification.quality.judged
    card = (tmp_path / "bundle/README.md").read_text(encoding="utf-8")
    assert "random, so this proves nothing about quality" in card
