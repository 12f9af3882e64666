"""Mellow: HTS-AT with its AudioSet head, a mapper to 129 rows, SmolLM2-135M.

The public model ``soham97/mellow``. The tower is transformers' ``ClapAudioEncoder``; the other
parameters carry the names of the checkpoint. Written from published facts, not from the original
code; see docs/public-models.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import ClapAudioConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.clap.modeling_clap import ClapAudioEncoder

from tinygiant.runtime.features import mel_filter_bank, periodic_hann

from .parts import htsat_to_clap
from .public import Names, PublicModel
from .smollm2 import smollm2_135m

__all__ = ["Mellow", "MellowConfig", "MellowMapper"]

_TOWER = "audio_encoder.base.htsat."
# What the file keeps beside the tower itself; the AudioSet classifier `head` is not computed.
_BESIDE = ("tscam_conv.", "head.", "spectrogram_extractor.", "logmel_extractor.")


@dataclass(frozen=True)
class MellowConfig:
    """Sizes of the parts; the defaults are the published model's."""

    htsat: ClapAudioConfig = field(
        default_factory=lambda: ClapAudioConfig(
            patch_embeds_hidden_size=96, depths=[2, 2, 6, 2], num_attention_heads=[4, 8, 16, 32]
        )
    )
    decoder: LlamaConfig = field(default_factory=smollm2_135m)
    n_fft: int = 1_024
    n_classes: int = 527  # of AudioSet


class Mellow(PublicModel):
    """The whole model."""

    def __init__(self, config: MellowConfig) -> None:
        super().__init__()
        self.config = config
        n_bins, n_mels = config.n_fft // 2 + 1, config.htsat.num_mel_bins
        kernel = (n_bins, 1, config.n_fft)
        stft = {name: Names(weight=torch.zeros(kernel)) for name in ("conv_real", "conv_imag")}
        classes = config.n_classes
        self.audio_encoder = Names(
            base=Names(
                htsat=Names(
                    tower=ClapAudioEncoder(config.htsat),
                    tscam_conv=nn.Conv2d(config.htsat.hidden_size, classes, (2, 3), padding=(0, 1)),
                    head=nn.Linear(classes, classes),
                    spectrogram_extractor=Names(stft=Names(**stft)),
                    logmel_extractor=Names(melW=torch.zeros(n_bins, n_mels)),
                ),
                c2l=nn.Linear(classes, config.htsat.hidden_size),
            ),
            projection=_Projection(config.htsat.hidden_size, config.decoder.hidden_size),
        )
        self.caption_decoder = Names(lm=LlamaForCausalLM(config.decoder))

    @staticmethod
    def renamed(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """HTS-AT's own names become those of transformers' ``ClapAudioEncoder``."""
        tower, others = {}, {}
        for name, tensor in tensors.items():
            short = name.removeprefix(_TOWER)
            if short == name or short.startswith(_BESIDE):
                others[name] = tensor
            else:
                tower[short] = tensor
        return others | {
            f"{_TOWER}tower.{name}": tensor for name, tensor in htsat_to_clap(tower).items()
        }

    @property
    def decoder(self) -> LlamaForCausalLM:
        """The decoder."""
        return cast(LlamaForCausalLM, self.get_submodule("caption_decoder.lm"))

    def encode(self, log_mel: Tensor) -> dict[str, Tensor]:
        """``(1, n_frames, n_mels)`` -> ``rows (1, steps, n_classes)``, ``vector (1, C)``.

        Rows are the probabilities of the AudioSet classes at each of the tower's steps.
        """
        out = self.get_submodule(_TOWER + "tower")(log_mel[:, None])
        scores = self.get_submodule(_TOWER + "tscam_conv")(out.last_hidden_state)
        return {
            "rows": torch.sigmoid(scores[:, :, 0]).transpose(1, 2),
            "vector": out.pooler_output,
        }

    def project(self, **outputs: Tensor) -> Tensor:
        """``rows`` and ``vector`` -> ``(1, 1 + 4 * steps, D)``: the whole clip, then its course.

        The original repeats each step 32 times, projects, and averages 8 at a time, which repeats
        each projected step 4 times.
        """
        return cast(Tensor, self.mapper(outputs["rows"], outputs["vector"]))

    @property
    def mapper(self) -> MellowMapper:
        """The projector."""
        base = self.get_submodule("audio_encoder.base.c2l")
        return MellowMapper(base, self.get_submodule("audio_encoder.projection"))

    def constants(self) -> dict[str, tuple[Tensor, NDArray[Any]]]:
        """The filter bank, and the short-time Fourier transform as the convolution that it was."""
        n_fft, n_mels = self.config.n_fft, self.config.htsat.num_mel_bins
        stft = _TOWER + "spectrogram_extractor.stft."
        turns = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft * (2 * np.pi / n_fft)
        window = periodic_hann(n_fft)
        ours = {
            f"{stft}conv_real.weight": (np.cos(turns) * window)[:, None],
            f"{stft}conv_imag.weight": (-np.sin(turns) * window)[:, None],
            f"{_TOWER}logmel_extractor.melW": mel_filter_bank(
                n_fft, n_mels, 50.0, 14_000.0, 32_000
            ),
        }
        return {name: (self.get_buffer(name), array) for name, array in ours.items()}


class MellowMapper(nn.Module):
    """Class probabilities and the clip's vector to rows of the decoder."""

    def __init__(self, c2l: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.c2l, self.projection = c2l, projection

    def forward(self, rows: Tensor, vector: Tensor) -> Tensor:
        """``(1, steps, n_classes)``, ``(1, C)`` -> ``(1, 1 + 4 * steps, D)``."""
        whole = vector[:, None]
        projected = self.projection(torch.cat((whole, self.c2l(rows)), dim=1))
        course = projected[:, 1:, None].expand(-1, -1, 4, -1).flatten(1, 2)
        return torch.cat((projected[:, :1], course), dim=1)


class _Projection(nn.Module):
    """``norm(l1(x) + l2(gelu(l1(x))))``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, outputs, bias=False)
        self.linear2 = nn.Linear(outputs, outputs, bias=False)
        self.layer_norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        first = self.linear1(x)
        return cast(Tensor, self.layer_norm(first + self.linear2(nnf.gelu(first))))
