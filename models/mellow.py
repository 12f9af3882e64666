"""Mellow: HTS-AT with its AudioSet head, a mapper to 129 rows, SmolLM2-135M.

The public model ``soham97/mellow``. The tower is transformers' ``ClapAudioEncoder``; the other
parameters carry the names of the checkpoint. Written from published facts, not from the original
code; see docs/public-models.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import ClapAudioConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.clap.modeling_clap import ClapAudioEncoder

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

from .config import decoder_config
from .hub import HubFile
from .parts import htsat_to_clap
from .public import Names, PublicKind, PublicModel, open_public
from .smollm2 import END_ID, PADDING_ID, smollm2_135m

__all__ = ["MELLOW", "Mellow", "MellowConfig", "MellowMapper", "open_checkpoint"]

_FEATURES = LogMel(
    sampling_rate_hz=32_000,
    n_fft=1_024,
    hop_length=320,
    n_mels=64,
    f_min_hz=50.0,
    f_max_hz=14_000.0,
    log="db",
    dynamic_range=None,
    last_frame=True,
    padding="tile",
    layout="image",
    resampler="sinc",
)
_WINDOW_S = 10.0
_STEPS = 32  # of the tower in a window
_ROWS_PER_STEP = 4
_HTSAT = "htsat_encoder"
_TOWER = "audio_encoder.base.htsat."
# What the file keeps besides the tower itself; the AudioSet classifier `head` is not computed.
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
    n_classes: int = 527  # of AudioSet


class Mellow(PublicModel):
    """The whole model."""

    def __init__(self, config: MellowConfig) -> None:
        super().__init__()
        self.config = config
        classes = config.n_classes
        self.audio_encoder = Names(
            base=Names(htsat=_Tower(config), c2l=nn.Linear(classes, config.htsat.hidden_size)),
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
    def composition(self) -> ModelConfig:
        """The model as the runtime knows it; without a second clip it hears the first twice."""
        n_rows = 1 + _ROWS_PER_STEP * _STEPS
        course = EncoderOutput("course", "rows", self.config.n_classes, _STEPS)
        whole = EncoderOutput("whole", "vector", self.config.htsat.hidden_size)
        clip = (PromptPart("audio"), PromptPart("tokens", token_ids=(END_ID,)))
        return ModelConfig(
            name="mellow-167m",
            chunk_s=_WINDOW_S,
            rows_per_chunk=n_rows,
            encoders=(EncoderConfig(_HTSAT, _FEATURES, _WINDOW_S, (course, whole)),),
            projector=ProjectorConfig(
                (
                    ProjectorInput("course", (f"{_HTSAT}.course",), _STEPS),
                    ProjectorInput("whole", (f"{_HTSAT}.whole",)),
                )
            ),
            decoder=decoder_config(self.config.decoder, (END_ID,)),
            prompt=PromptConfig(
                parts=(*clip, *clip, PromptPart("question")),
                choices_header="",
                choice_format=" {letter}) {choice}",
                max_tokens=129,
                padding_id=PADDING_ID,
            ),
            # It was trained on "b) text of the choice " in lower case.
            answer=AnswerForm(choice_format="{letter}) {choice} ", lower_case=True),
            beyond_chunk="dropped",
        )

    @property
    def encoder(self) -> nn.Module:
        """HTS-AT; its outputs are ``course (1, steps, n_classes)`` and ``whole (1, C)``."""
        return self.get_submodule(_TOWER.removesuffix("."))

    @property
    def mapper(self) -> MellowMapper:
        """``course`` and ``whole`` -> ``(1, 1 + 4 * steps, D)``."""
        c2l = self.get_submodule("audio_encoder.base.c2l")
        return MellowMapper(c2l, self.get_submodule("audio_encoder.projection"))

    @property
    def decoder(self) -> LlamaForCausalLM:
        """The language model."""
        return cast(LlamaForCausalLM, self.get_submodule("caption_decoder.lm"))

    def constants(self) -> dict[str, tuple[Tensor, NDArray[Any]]]:
        """The filter bank, and the short-time Fourier transform as the convolution that it was."""
        n_fft = _FEATURES.n_fft
        stft = _TOWER + "spectrogram_extractor.stft."
        turns = np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) % n_fft * (2 * np.pi / n_fft)
        window = periodic_hann(n_fft)
        ours: dict[str, NDArray[Any]] = {
            f"{stft}conv_real.weight": (np.cos(turns) * window)[:, None],
            f"{stft}conv_imag.weight": (-np.sin(turns) * window)[:, None],
            f"{_TOWER}logmel_extractor.melW": filter_bank(_FEATURES),
        }
        return {name: (self.get_buffer(name), array) for name, array in ours.items()}


class _Tower(nn.Module):
    """HTS-AT, its frame-wise AudioSet scores, and its other parameters in the file."""

    def __init__(self, config: MellowConfig) -> None:
        super().__init__()
        classes, n_bins = config.n_classes, _FEATURES.n_fft // 2 + 1
        kernel = (n_bins, 1, _FEATURES.n_fft)
        stft = {name: Names(weight=torch.zeros(kernel)) for name in ("conv_real", "conv_imag")}
        self.tower = ClapAudioEncoder(config.htsat)
        self.tscam_conv = nn.Conv2d(config.htsat.hidden_size, classes, (2, 3), padding=(0, 1))
        self.head = nn.Linear(classes, classes)
        self.spectrogram_extractor = Names(stft=Names(**stft))
        self.logmel_extractor = Names(melW=torch.zeros(n_bins, _FEATURES.n_mels))

    def forward(self, input_features: Tensor) -> tuple[Tensor, Tensor]:
        """``(1, 1, n_frames, n_mels)`` -> ``(1, steps, n_classes)`` and ``(1, C)``.

        Rows are the probabilities of the AudioSet classes at each of the tower's steps, the vector
        is the mean of the tower's last layer.
        """
        out = self.tower(input_features)
        scores = self.tscam_conv(out.last_hidden_state)  # (1, n_classes, 1, steps)
        return torch.sigmoid(scores[:, :, 0]).transpose(1, 2), out.pooler_output


class MellowMapper(nn.Module):
    """The whole clip as one row, then its course.

    The original repeats each of the tower's steps 32 times, projects, and averages 8 at a time: so
    each projected step comes 4 times.
    """

    def __init__(self, c2l: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.c2l, self.projection = c2l, projection

    def forward(self, course: Tensor, whole: Tensor) -> Tensor:
        """``(1, steps, n_classes)``, ``(1, C)`` -> ``(1, 1 + 4 * steps, D)``."""
        x = self.projection(torch.cat((whole[:, None], self.c2l(course)), dim=1))
        repeated = x[:, 1:, None].expand(-1, -1, _ROWS_PER_STEP, -1).flatten(1, 2)
        return torch.cat((x[:, :1], repeated), dim=1)


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


MELLOW = PublicKind(
    build=lambda: Mellow(MellowConfig()),
    mark=_TOWER,
    checkpoint=HubFile("soham97/mellow", "v0.ckpt"),
    licence="MIT (Mellow), Apache-2.0 (SmolLM2)",
    notes="""\
## Origin and limits

Weights of [Mellow](https://huggingface.co/soham97/mellow) (NeurIPS 2025, arXiv 2503.08540), MIT;
its language model SmolLM2-135M is Apache-2.0.

It answers questions about sounds and music, in English, and tells what differs between two clips.
Of each clip it hears the first 10 s (the original takes 10 s at random); a shorter one is repeated
until 10 s are full; without a second clip it hears the first one twice. It writes down no speech.
Its authors report 52.1 % on MMAU (29 % on its speech part) and call it a research prototype.
""",
)

open_checkpoint = partial(open_public, MELLOW)
