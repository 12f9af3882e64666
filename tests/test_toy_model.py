"""The proof that models compose: one of another shape goes through the unchanged runtime."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.toy_model import Toy
from tinygiant.export import export_bundle
from tinygiant.quantize import recipe
from tinygiant.runtime import Bundle, TinyGiant, load, read_audio
from tinygiant.runtime.audio import Audio
from tinygiant.runtime.features import log_mel
from tinygiant.runtime.resampling import sinc_resample
from tinygiant.runtime.tokenizer import Tokenizer

Tone = Callable[[float, int], NDArray[np.float32]]
CHOICES = ["a Dog", "a dog barks", "a siren"]
N_TOKENS = 12


@pytest.fixture(scope="module")
def toy(tokenizer_file: Path, tokenizer: Tokenizer) -> Toy:
    stop_id = tokenizer.token_id("<|im_end|>")
    [padding_id] = tokenizer.encode("!")
    return Toy(tokenizer_file.read_text(encoding="utf-8"), stop_id, padding_id)


@pytest.fixture(scope="module")
def bundle(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("toy") / "fp32"
    export_bundle(toy, target, recipe("fp32"), threads=1)
    return target


@pytest.fixture(scope="module")
def model(bundle: Path) -> TinyGiant:
    return load(bundle, threads=1)


@torch.no_grad()
def by_hand(toy: Toy, audio: Audio, question_ids: list[int], n_tokens: int) -> list[int]:
    """What PyTorch writes, from the definition: no code of the path between sound and token."""
    features = toy.config.encoders[0].features
    at_32k = sinc_resample(audio.samples, audio.sampling_rate_hz, 32_000)[: 4 * 32_000]
    heard = log_mel(sinc_resample(at_32k, 32_000, 16_000), features, 401)
    rows = toy.mapper(*toy.ear(torch.from_numpy(heard)[None]))
    lookup = toy.language.get_input_embeddings()
    [stop_id], padding_id = toy.config.decoder.stop_token_ids, toy.config.prompt.padding_id
    ids = [stop_id, *question_ids, *[padding_id] * (48 - len(question_ids))]
    embeds = torch.cat((rows, lookup(torch.tensor([ids]))), dim=1)
    written: list[int] = []
    while len(written) < n_tokens:
        token = int(toy.language(inputs_embeds=embeds).logits[0, -1].argmax())
        if token == stop_id:
            break
        written.append(token)
        embeds = torch.cat((embeds, lookup(torch.tensor([[token]]))), dim=1)
    return written


def test_its_definition_is_short() -> None:
    lines = (Path(__file__).parent / "toy_model.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150


@pytest.mark.parametrize("seconds", [0.7, 4.0, 9.5])
def test_it_answers_as_pytorch_does(
    toy: Toy, model: TinyGiant, tokenizer: Tokenizer, tone: Tone, seconds: float
) -> None:
    audio = read_audio((tone(seconds, 44_100), 44_100))
    question = "What is HEARD? Summary: <RESPONSE>"
    answer = model.ask(audio, question, max_new_tokens=N_TOKENS, raw=True)
    question_ids = tokenizer.encode("what is heard? summary: <response>")
    wanted = tokenizer.decode(by_hand(toy, audio, question_ids, N_TOKENS))
    assert answer.raw_text == wanted
    assert answer.text == wanted.strip()  # plain text is an answer as a whole, whatever it spells
    assert (answer.plan, answer.summary, answer.unparsed) == ("", "", "")
    assert (answer.tokens.prompt, answer.tokens.audio) == (21 + 1 + 48, 21)


def test_what_it_does_not_hear_is_reported(model: TinyGiant, tone: Tone) -> None:
    """Its clock: one chunk of 4 s; the rest is left out, and the listener is told."""
    heard = read_audio((tone(4.0, 16_000), 16_000))
    longer = read_audio((np.r_[tone(4.0, 16_000), tone(3.0, 16_000)], 16_000))
    one, other = (model.ask(clip, "What?", max_new_tokens=4) for clip in (heard, longer))
    assert one.raw_text == other.raw_text
    assert (other.audio.n_chunks, other.audio.used_s) == (1, 4.0)
    assert other.audio.dropped_s == pytest.approx(3.0)
    assert any("first 4 s" in note for note in other.audio.notes)
    assert one.audio.dropped_s == 0.0


@torch.no_grad()
def test_choices_are_scored_in_its_own_form(
    toy: Toy, model: TinyGiant, tokenizer: Tokenizer, tone: Tone
) -> None:
    """`b) a dog barks` and the stop token: no thought to write first, no tags to write it in."""
    audio = read_audio((tone(2.0, 16_000), 16_000))
    answer = model.ask(audio, "What?", CHOICES)
    assert answer.choice_index is not None
    assert answer.text == CHOICES[answer.choice_index]
    assert answer.choice_probabilities is not None
    embeds = torch.from_numpy(model.prepare(audio, "What?", CHOICES).embeds)
    lookup = toy.language.get_input_embeddings()
    scores = []
    for letter, choice in zip("abc", CHOICES, strict=True):
        ids = [*tokenizer.encode(f"{letter}) {choice}"), *toy.config.decoder.stop_token_ids]
        whole = torch.cat((embeds, lookup(torch.tensor([ids]))), dim=1)
        logits = toy.language(inputs_embeds=whole).logits[0, -len(ids) - 1 : -1]
        chosen = logits.double().log_softmax(-1)[torch.arange(len(ids)), ids]
        scores.append(float(chosen.sum()))
    wanted = torch.tensor(scores).softmax(0).tolist()
    assert answer.choice_probabilities == pytest.approx(wanted, rel=1e-3)


def test_it_is_verified_and_quantized_like_any_other(
    toy: Toy, bundle: Path, tmp_path: Path
) -> None:
    report = json.loads((bundle / "verification.json").read_text(encoding="utf-8"))
    assert report["passed"] is True
    assert {*report["graphs"]} == {"ear", "projector", "decoder_model", "embed_tokens"}
    assert report["end_to_end"]["agreement"] == 1.0
    assert report["end_to_end"]["free_running"] == 1.0
    # Random weights decide less clearly than trained ones.
    int8 = dataclasses.replace(recipe("int8"), token_agreement=0.8)
    export_bundle(toy, tmp_path / "int8", int8, threads=1)
    graphs = Bundle.open(tmp_path / "int8").manifest.graphs
    assert graphs["projector"].scheme.startswith("dynamic-int8")
    assert graphs["decoder_model"].scheme == "int8-b32"
