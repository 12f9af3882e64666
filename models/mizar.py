"""Mizar-159M: CED-Small, a mapper to 126 rows, SmolLM2-135M.

The public model ``KaiyangLi/Mizar-159M``. Parameters carry the names of its checkpoint. Written
from published facts, not from the original code; see docs/public-models.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tinygiant.runtime.features import mel_filter_bank, periodic_hann
from tinygiant.runtime.resampling import sinc_kernel

from .ced import Ced, CedConfig
from .public import Names, PublicModel
from .smollm2 import smollm2_135m

__all__ = ["Mapper", "Mizar", "MizarConfig"]


@dataclass(frozen=True)
class MizarConfig:
    """Sizes of the parts; the defaults are the published model's."""

    ced: CedConfig = field(default_factory=CedConfig)
    decoder: LlamaConfig = field(default_factory=smollm2_135m)
    n_fft: int = 512
    max_rows: int = 512


class Mizar(PublicModel):
    """The whole model."""

    def __init__(self, config: MizarConfig) -> None:
        super().__init__()
        self.config = config
        bank = torch.zeros(config.n_fft // 2 + 1, config.ced.n_mels)
        self.audio_encoder = Names(
            base=Names(
                ced=Ced(config.ced),
                mapper=Mapper(config),
                resample=Names(kernel=torch.zeros(1, 1, 28)),
                mel_spectrogram=Names(
                    spectrogram=Names(window=torch.zeros(config.n_fft)), mel_scale=Names(fb=bank)
                ),
            )
        )
        self.caption_decoder = Names(lm=LlamaForCausalLM(config.decoder))

    @property
    def ced(self) -> Ced:
        """The encoder."""
        return cast(Ced, self.get_submodule("audio_encoder.base.ced"))

    @property
    def mapper(self) -> Mapper:
        """The projector."""
        return cast(Mapper, self.get_submodule("audio_encoder.base.mapper"))

    @property
    def decoder(self) -> LlamaForCausalLM:
        """The decoder."""
        return cast(LlamaForCausalLM, self.get_submodule("caption_decoder.lm"))

    def encode(self, log_mel: Tensor) -> dict[str, Tensor]:
        """``(1, n_frames, n_mels)`` -> ``rows (1, N, bands * C)``, frequency outermost."""
        return {"rows": self.ced(log_mel).flatten(2)}

    def project(self, **outputs: Tensor) -> Tensor:
        """``rows`` -> ``(1, N, D)``."""
        return cast(Tensor, self.mapper(outputs["rows"]))

    def constants(self) -> dict[str, tuple[Tensor, NDArray[Any]]]:
        """Resampling kernel of 32 to 16 kHz, window and filter bank of the log-mel."""
        n_fft, n_mels = self.config.n_fft, self.config.ced.n_mels
        base, mel = "audio_encoder.base.", "audio_encoder.base.mel_spectrogram."
        ours: dict[str, NDArray[Any]] = {
            f"{base}resample.kernel": sinc_kernel(32_000, 16_000)[:, None],
            f"{mel}spectrogram.window": periodic_hann(n_fft),
            f"{mel}mel_scale.fb": mel_filter_bank(
                n_fft, n_mels, 0.0, 8_000.0, 16_000, scale="htk", norm="none"
            ),
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

    def forward(self, rows: Tensor) -> Tensor:
        """``(1, N, bands * C)``, frequency outermost -> ``(1, N, D)``."""
        n_rows = rows.shape[1]
        mean = rows.unflatten(2, (self.bands, -1)).mean(dim=(1, 2))
        h = self.freq_merger.get_submodule("net")(rows) + self.global_proj(mean)[:, None]
        h = h + self.pos_in[:, :n_rows] + self.pos_out[:, :n_rows] + self.audio_type
        return cast(Tensor, h + self.refine_mlp(self.refine_ln(h)))
