"""Mizar-159M: CED-Small, a mapper to 126 rows, SmolLM2-135M.

The public model ``KaiyangLi/Mizar-159M``. Parameters carry the names of its checkpoint. Written
from published facts, not from the original code; see docs/public-models.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

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
from tinygiant.runtime.features import filter_bank, periodic_hann
from tinygiant.runtime.resampling import sinc_kernel

from .ced import Ced, CedConfig
from .config import decoder_config
from .hub import HubFile
from .public import Names, PublicKind, PublicModel, open_public
from .smollm2 import END_ID, PADDING_ID, smollm2_135m

__all__ = ["MIZAR", "Mapper", "Mizar", "MizarConfig", "open_checkpoint"]

_CED = "ced_encoder"
_FEATURES = LogMel(
    sampling_rate_hz=16_000,
    n_fft=512,
    hop_length=160,
    n_mels=64,
    f_min_hz=0.0,
    f_max_hz=8_000.0,
    mel_scale="htk",
    mel_norm="none",
    log="db",
    dynamic_range=120.0,
    last_frame=True,
    layout="image",
    resampler="sinc",
    through_hz=(32_000,),
)
_WINDOW_S = 20.0


@dataclass(frozen=True)
class MizarConfig:
    """Sizes of the parts; the defaults are the published model's."""

    ced: CedConfig = field(default_factory=CedConfig)
    decoder: LlamaConfig = field(default_factory=smollm2_135m)
    max_rows: int = 512


class Mizar(PublicModel):
    """The whole model."""

    def __init__(self, config: MizarConfig) -> None:
        super().__init__()
        self.config = config
        n_fft = _FEATURES.n_fft
        bank = torch.zeros(n_fft // 2 + 1, _FEATURES.n_mels)
        self.audio_encoder = Names(
            base=Names(
                ced=Ced(config.ced),
                mapper=Mapper(config),
                resample=Names(kernel=torch.zeros(1, 1, 28)),
                mel_spectrogram=Names(
                    spectrogram=Names(window=torch.zeros(n_fft)), mel_scale=Names(fb=bank)
                ),
            )
        )
        self.caption_decoder = Names(lm=LlamaForCausalLM(config.decoder))

    @property
    def composition(self) -> ModelConfig:
        """The model as the runtime knows it."""
        ced = self.config.ced
        n_rows = ced.steps(_FEATURES.n_frames(_WINDOW_S))
        grid = EncoderOutput("grid", "rows", ced.bands * ced.hidden_size, n_rows)
        return ModelConfig(
            name="mizar-159m",
            chunk_s=_WINDOW_S,
            rows_per_chunk=n_rows,
            encoders=(EncoderConfig(_CED, _FEATURES, _WINDOW_S, (grid,)),),
            projector=ProjectorConfig((ProjectorInput("grid", (f"{_CED}.grid",), n_rows),)),
            decoder=decoder_config(self.config.decoder, (END_ID,)),
            prompt=PromptConfig(
                parts=(
                    PromptPart("audio"),
                    PromptPart("tokens", token_ids=(END_ID,)),
                    PromptPart("question"),
                ),
                choices_header="",
                choice_format=" {letter}) {choice}",
                lower_case=True,
                max_tokens=256,
                padding_id=PADDING_ID,
            ),
            # It was trained on "b) text of the choice " in lower case.
            answer=AnswerForm(
                choice_format="{letter}) {choice} ",
                lower_case=True,
                hidden_token_ids=(PADDING_ID,),
            ),
            beyond_chunk="dropped",
        )

    @property
    def encoder(self) -> Ced:
        """CED; its output is ``grid (1, N, bands * C)``."""
        return cast(Ced, self.get_submodule("audio_encoder.base.ced"))

    @property
    def mapper(self) -> Mapper:
        """``grid`` -> ``(1, N, D)``."""
        return cast(Mapper, self.get_submodule("audio_encoder.base.mapper"))

    @property
    def decoder(self) -> LlamaForCausalLM:
        """The language model."""
        return cast(LlamaForCausalLM, self.get_submodule("caption_decoder.lm"))

    def constants(self) -> dict[str, tuple[Tensor, NDArray[Any]]]:
        """Resampling kernel of 32 to 16 kHz, window and filter bank of the log-mel."""
        base, mel = "audio_encoder.base.", "audio_encoder.base.mel_spectrogram."
        ours: dict[str, NDArray[Any]] = {
            f"{base}resample.kernel": sinc_kernel(32_000, 16_000)[:, None],
            f"{mel}spectrogram.window": periodic_hann(_FEATURES.n_fft),
            f"{mel}mel_scale.fb": filter_bank(_FEATURES),
        }
        return {name: (self.get_buffer(name), array) for name, array in ours.items()}


class Mapper(nn.Module):
    """The encoder's grid to rows of the decoder: frequency merged, a global summary added."""

    def __init__(self, config: MizarConfig) -> None:
        super().__init__()
        size, self.bands = config.ced.hidden_size, config.ced.bands
        row: int = config.decoder.hidden_size
        merger = nn.Sequential(
            nn.LayerNorm(self.bands * size),
            nn.Linear(self.bands * size, row),
            nn.GELU(),
            nn.Dropout(),
            nn.Linear(row, row),
            nn.LayerNorm(row),
        )
        self.freq_merger = Names(net=merger)
        self.global_proj = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, row), nn.LayerNorm(row)
        )
        self.pos_in = nn.Parameter(torch.zeros(1, config.max_rows, row))
        self.pos_out = nn.Parameter(torch.zeros(1, config.max_rows, row))
        self.audio_type = nn.Parameter(torch.zeros(1, 1, row))
        self.refine_ln = nn.LayerNorm(row)
        self.refine_mlp = nn.Sequential(
            nn.Linear(row, 2 * row), nn.GELU(), nn.Dropout(), nn.Linear(2 * row, row)
        )

    def forward(self, grid: Tensor) -> Tensor:
        """``(1, N, bands * C)``, frequency outermost -> ``(1, N, D)``."""
        n_rows = grid.shape[1]
        mean = grid.unflatten(2, (self.bands, -1)).mean(dim=(1, 2))
        h = self.freq_merger.get_submodule("net")(grid) + self.global_proj(mean)[:, None]
        h = h + self.pos_in[:, :n_rows] + self.pos_out[:, :n_rows] + self.audio_type
        return cast(Tensor, h + self.refine_mlp(self.refine_ln(h)))


MIZAR = PublicKind(
    build=lambda: Mizar(MizarConfig()),
    mark="audio_encoder.base.ced.",
    checkpoint=HubFile(
        "KaiyangLi/Mizar-159M",
        "checkpoints/final/stage3_q4_seed20260905.ckpt",
        "0c542f63e11ed55d360feb0d66e7be0e8c6a878f44cffd302a92388f915388a2",
    ),
    licence=(
        "BSD-3-Clause-Clear (Mizar), Apache-2.0 (CED-Small, SmolLM2), MIT (parts after Mellow)"
    ),
    notes="""\
## Origin and limits

Weights of [Mizar-159M](https://huggingface.co/KaiyangLi/Mizar-159M) (arXiv 2609.28344), BSD
3-Clause Clear: the licence grants no patent rights. Encoder CED-Small and language model
SmolLM2-135M are Apache-2.0; parts of the original code derive from Mellow (MIT).

It answers questions about sounds and music, in English, about the first 20 s of a clip; it writes
down no speech. Its authors report 53.1 % on MMAU (full test), 42.7 % on MMAR and 36.0 % on
ADQA-clean, all multiple choice. They warn that the model was developed after exposure to the tests,
and list 4 clips of MMAU and 14 of ADQA among its training audio. How good open answers are is not
published.
""",
)

open_checkpoint = partial(open_public, MIZAR)
