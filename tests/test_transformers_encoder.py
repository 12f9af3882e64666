"""An encoder that only optimum can export as the ear of the toy model: a small, random HuBERT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    ASTConfig,
    ASTModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)

from tests.toy_model import ROWS, SIZE, Toy
from tinygiant.export import export_bundle, verify_bundle
from tinygiant.export.exporter import write_bundle
from tinygiant.models.family import Part
from tinygiant.models.transformers_encoder import transformers_encoder, transformers_part
from tinygiant.quantize import recipe
from tinygiant.runtime import load
from tinygiant.runtime.config import (
    ModelConfig,
    ProjectorConfig,
    ProjectorInput,
    Waveform,
    config_from_dict,
    config_to_dict,
)
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.features import waveform
from tinygiant.runtime.tokenizer import Tokenizer

pytest.importorskip("optimum.exporters.onnx")

Tone = Callable[[float, int], NDArray[np.float32]]
WIDTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HuBERT as Hugging Face's folders hold one."""
    torch.manual_seed(3)
    config = HubertConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        conv_dim=(16,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("hubert")
    HubertModel(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(path)
    return path


class Mapper(nn.Module):
    """HuBERT's rows as the decoder's, their mean as one more row in front."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 96)

    def forward(self, steps: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.layer(torch.cat((steps.mean(1, keepdim=True), steps), dim=1))
        return rows


class Hearing(Toy):
    """The toy with HuBERT as its ear."""

    def __init__(self, folder: Path, tokenizer: str, stop_id: int, padding_id: int) -> None:
        super().__init__(tokenizer, stop_id, padding_id)
        self.encoder, self.hubert = transformers_encoder(folder, "hubert", 4.0)
        self.mapper = Mapper().eval()  # type: ignore[assignment]
        steps = ProjectorInput("steps", ("hubert.last_hidden_state",), rows=ROWS)
        self.config = dataclasses.replace(
            self.config, encoders=(self.encoder,), projector=ProjectorConfig(inputs=(steps,))
        )

    def part(self, graph: str) -> Part:
        if graph == "hubert":
            return transformers_part(self.encoder, self.hubert)
        return Part(self.mapper, {"steps": torch.zeros(1, ROWS, WIDTH)}, ("audio_embeds",))


@pytest.fixture(scope="module")
def hearing(folder: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> Hearing:
    stop_id = tokenizer.token_id("<|im_end|>")
    [padding_id] = tokenizer.encode("!")
    return Hearing(folder, tokenizer_file.read_text(encoding="utf-8"), stop_id, padding_id)


def test_the_contract_says_what_it_reads_and_gives(hearing: Hearing) -> None:
    assert hearing.encoder.features == Waveform(sampling_rate_hz=16_000, normalize=True)
    with torch.no_grad():
        rows = hearing.hubert(torch.zeros(1, 64_000))
    [output] = hearing.encoder.outputs
    assert (1, output.rows, output.size) == tuple(rows.shape) == (1, 199, WIDTH)
    again = config_from_dict(ModelConfig, config_to_dict(hearing.config))
    assert again == hearing.config  # features of two kinds are told apart
    assert SIZE != WIDTH  # else the toy's own ear would pass unnoticed


@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_samples_are_prepared_as_upstream_does(tone: Tone, seconds: float) -> None:
    samples = tone(seconds, 16_000)
    upstream = Wav2Vec2FeatureExtractor(do_normalize=True)
    wanted = upstream(
        samples, sampling_rate=16_000, padding="max_length", max_length=64_000,
        return_attention_mask=True, return_tensors="np",
    )["input_values"][0]  # fmt: skip
    found = waveform(samples, Waveform(), 64_000)
    held = samples.size
    np.testing.assert_allclose(found[:held], wanted[:held], atol=2e-5)
    assert not found[held:].any()


def test_it_is_exported_verified_and_answers(hearing: Hearing, tmp_path: Path, tone: Tone) -> None:
    done = export_bundle(hearing, tmp_path / "fp32", recipe("fp32"), threads=1)
    worst = done.verification.worst("hubert")
    assert worst is not None and worst.relative_error < 1e-5
    model = load(tmp_path / "fp32", threads=1)
    answers = {
        model.ask((tone(seconds, 16_000), 16_000), "What?", max_new_tokens=8).raw_text
        for seconds in (1.0, 3.0)
    }
    assert len(answers) == 2  # it depends on what is heard


def test_its_products_are_quantized(hearing: Hearing, tmp_path: Path) -> None:
    """The graph stays within int8's limit; whether tokens do is not for random weights to say."""
    job = write_bundle(hearing, tmp_path, recipe("int8"))
    report = next(report for report in job.reports if report.graph == "hubert")
    assert len(report.quantized) >= 2 * 6  # two layers: attention's four products and two more
    worst = verify_bundle(tmp_path, job.reference, recipe("int8"), threads=1).worst("hubert")
    assert worst is not None
    assert 1e-4 < worst.relative_error <= recipe("int8").relative_errors["encoder"]


def test_what_cannot_be_used_is_one_line(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no encoder of transformers"):
        transformers_encoder(tmp_path, "ear", 4.0)
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    ASTModel(config).save_pretrained(tmp_path / "ast")
    with pytest.raises(CheckpointError, match="audio-spectrogram-transformer model does not read"):
        transformers_encoder(tmp_path / "ast", "ear", 4.0)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(CheckpointError, match="expected sampling_rate and do_normalize"):
        transformers_encoder(tmp_path, "ear", 4.0)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16_000}))
    with pytest.raises(CheckpointError, match="do_normalize"):
        transformers_encoder(tmp_path, "ear", 4.0)
