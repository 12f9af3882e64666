"""A model of another shape than TinyGiantALM: the worked example of docs/adding-a-model.md.

One encoder of fixed windows, an MLP as projector, a Llama decoder, no thought tags, a prompt of
fixed length with the audio in front. Everything that a new family needs is in this file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tinygiant.models.config import decoder_config
from tinygiant.models.family import Part
from tinygiant.runtime.bundle import SourceEntry
from tinygiant.runtime.config import (
    AnswerForm,
    EncoderConfig,
    EncoderOutput,
    LogMel,
    ModelConfig,
    ProjectorConfig,
    ProjectorInput,
    PromptConfig,
    PromptPart,
)

N_MELS, ROWS, SIZE, WIDTH = 32, 20, 24, 96  # bands, rows a window, encoder and decoder widths

# What its encoder hears: HTK bands in dB, at most 80 dB below the loudest.
FEATURES = LogMel(
    sampling_rate_hz=16_000,
    n_fft=512,
    hop_length=160,
    n_mels=N_MELS,
    mel_scale="htk",
    mel_norm="none",
    log="db",
    dynamic_range=80.0,
    last_frame=True,  # 401 frames
    padding="tile",
    resampler="sinc",
    through_hz=(32_000,),
)

UPSTREAM = LlamaConfig(
    vocab_size=512, hidden_size=WIDTH, intermediate_size=80, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    rope_theta=100_000.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip


def toy_config(stop_id: int, padding_id: int) -> ModelConfig:
    """The whole contract; ids are those of the tokenizer."""
    return ModelConfig(
        name="toy",
        chunk_s=4.0,
        rows_per_chunk=ROWS + 1,
        beyond_chunk="dropped",
        encoders=(
            EncoderConfig(
                graph="ear",
                features=FEATURES,
                window_s=4.0,
                outputs=(
                    EncoderOutput("steps", "rows", SIZE, ROWS),
                    EncoderOutput("whole", "vector", SIZE),
                ),
            ),
        ),
        projector=ProjectorConfig(
            inputs=(
                ProjectorInput("steps", ("ear.steps",), rows=ROWS),
                ProjectorInput("whole", ("ear.whole",)),
            ),
        ),
        decoder=decoder_config(UPSTREAM, (stop_id,)),
        prompt=PromptConfig(
            parts=(
                PromptPart("audio"),
                PromptPart("tokens", token_ids=(stop_id,)),
                PromptPart("question"),
            ),
            choices_header="",
            choice_format=" {letter}) {choice}",
            lower_case=True,
            max_tokens=48,
            too_long="cut",
            padding_id=padding_id,
        ),
        answer=AnswerForm(choice_format="{letter}) {choice}"),  # plain text up to the stop token
    )


class Ear(nn.Module):
    """Log-mel ``(1, n_mels, 401)`` -> steps ``(1, 20, SIZE)`` and the whole ``(1, SIZE)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(N_MELS, SIZE, kernel_size=20, stride=20)

    def forward(self, input_features: Tensor) -> tuple[Tensor, Tensor]:
        steps = torch.tanh(self.conv(input_features / 40.0)).transpose(1, 2)
        return steps, steps.mean(1)


class Mapper(nn.Module):
    """An MLP on every step, with the whole as one more row in front."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, steps: Tensor, whole: Tensor) -> Tensor:
        rows: Tensor = self.layers(torch.cat((whole[:, None], steps), dim=1))
        return rows


class Toy:
    """A :class:`~tinygiant.models.family.Model` with seeded weights."""

    def __init__(self, tokenizer: str, stop_id: int, padding_id: int) -> None:
        torch.manual_seed(4)
        self.config = toy_config(stop_id, padding_id)
        self.ear, self.mapper = Ear().eval(), Mapper().eval()
        self.language = LlamaForCausalLM(UPSTREAM).eval()
        with torch.no_grad():  # far from ties, so that rounding decides nothing
            for weight in self.language.parameters():
                weight.add_(torch.randn_like(weight) * 0.2)
        self._tokenizer = tokenizer

    def part(self, graph: str) -> Part:
        if graph == "ear":
            example = {"input_features": torch.zeros(1, N_MELS, 401)}
            return Part(self.ear, example, ("steps", "whole"))
        example = {"steps": torch.zeros(1, ROWS, SIZE), "whole": torch.zeros(1, SIZE)}
        return Part(self.mapper, example, ("audio_embeds",))

    def decoder(self) -> nn.Module:
        return self.language

    def tokenizer(self) -> str:
        return self._tokenizer

    def entry(self) -> SourceEntry:
        return SourceEntry("toy", "0" * 64, "seeded-random", 4)

    def notes(self) -> str:
        return ""
