"""Ultravox v0.5 1B: Whisper's encoder, a projector over stacked steps, Llama-3.2-1B-Instruct.

The public model ``fixie-ai/ultravox-v0_5-llama-3_2-1b``, which answers questions about speech. Its
file holds encoder and projector; the language model is the unchanged one of ``meta-llama``, in a
folder of its own. Parameters carry the names of the checkpoints. Written from published facts, not
from the original code; see docs/public-models.md.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tinygiant.runtime.bundle import SourceEntry
from tinygiant.runtime.config import (
    EncoderConfig,
    EncoderOutput,
    ModelConfig,
    ProjectorConfig,
    ProjectorInput,
    PromptConfig,
    PromptPart,
)
from tinygiant.runtime.errors import CheckpointError, UsageError
from tinygiant.runtime.files import sha256
from tinygiant.runtime.text import one_line

from .config import decoder_config, preset
from .family import Part
from .features import WHISPER
from .hub import HubFile, locate
from .parts import config_fields
from .sources import weight_files
from .tensors import PrefixedTensors, load_into, open_tensors, undrawn_weights
from .tinygiant import whisper_steps

__all__ = ["UltravoxConfig", "UltravoxProjector", "UltravoxSource", "open_checkpoint"]

_CHECKPOINT = HubFile("fixie-ai/ultravox-v0_5-llama-3_2-1b", "model.safetensors")
_LICENCE = "MIT (Ultravox, Whisper), Llama 3.2 Community License (Llama-3.2-1B-Instruct)"
_WHISPER = "whisper_encoder"
_TOWER, _PROJECTOR = "audio_tower", "multi_modal_projector"
_NORM_EPS = 1e-6
# The graph holds a cosine and a sine for every position; 131,072 of them would be 34 MB.
_MAX_POSITIONS = 8_192
_BEGIN, _TURN_ENDS, _TEXT_ENDS = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
_HEADER, _HEADER_ENDS = "<|start_header_id|>", "<|end_header_id|>"


def _turn(role: str) -> str:
    return f"{_HEADER}{role}{_HEADER_ENDS}\n\n"


# Llama 3.2's chat template writes both dates, this "today" where it knows no other.
_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_PROMPT = PromptConfig(
    parts=(
        PromptPart("text", f"{_BEGIN}{_turn('system')}{_SYSTEM}{_TURN_ENDS}{_turn('user')}"),
        PromptPart("audio"),
        PromptPart("text", "\n"),
        PromptPart("question"),
        PromptPart("text", f"{_TURN_ENDS}{_turn('assistant')}"),
    )
)

_NOTES = """\
## Origin and limits

Weights of [Ultravox v0.5 1B](https://huggingface.co/fixie-ai/ultravox-v0_5-llama-3_2-1b), MIT, on
Whisper large-v3-turbo (MIT) and Llama-3.2-1B-Instruct. Built with Llama: Llama 3.2 is licensed
under the Llama 3.2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved. That
licence wants a copy of itself with every copy of this bundle.

It answers questions about what is said in a clip, and obeys what is asked in it. It was made for
speech; whether it knows other sounds is not published.
"""


@dataclass(frozen=True)
class UltravoxConfig:
    """Sizes of encoder and projector; the defaults are the published model's.

    Attributes:
        whisper: the encoder.
        projector_size: features between the projector's layers, before they are gated.
        stack: encoder steps, of 20 ms, in a row.
    """

    whisper: WhisperConfig = field(default_factory=lambda: preset("full").whisper_config)
    projector_size: int = 4_096
    stack: int = 8

    @property
    def row_size(self) -> int:
        """Features of a row of stacked steps."""
        return int(self.whisper.d_model) * self.stack

    @property
    def max_rows(self) -> int:
        """Rows of a whole window; the last may have fewer steps, and zeros in their place."""
        return -(-int(self.whisper.max_source_positions) // self.stack)


class UltravoxSource:
    """A :class:`~tinygiant.models.family.Model` from Ultravox's file and Llama's folder."""

    def __init__(
        self, sizes: UltravoxConfig, checkpoint: Path, llama: Path, tokenizer: Path
    ) -> None:
        """Raises CheckpointError if something is not what it should be; reads the projector."""
        self._sizes, self._checkpoint, self._folder = sizes, checkpoint, llama
        self._llama = _llama_config(llama)
        self._tokenizer, self._stop_ids = _read_tokenizer(tokenizer, self._llama)
        self._tensors = open_tensors(checkpoint)
        self._check_names()
        self._projector()

    @cached_property
    def config(self) -> ModelConfig:
        """See :class:`~tinygiant.models.family.Model`: rows of 0.16 s, as many as the clip has."""
        sizes = self._sizes
        stacked = EncoderOutput("stacked", "rows", sizes.row_size, sizes.max_rows)
        window_s = sizes.whisper.max_source_positions / 50
        encoder = EncoderConfig(
            graph=_WHISPER,
            features=dataclasses.replace(
                WHISPER, n_mels=sizes.whisper.num_mel_bins, computed_of="clip"
            ),
            window_s=window_s,
            outputs=(stacked,),
            variable_length=True,
            partial_rows=True,
        )
        decoder = decoder_config(self._llama, self._stop_ids)
        return ModelConfig(
            name="ultravox-0.5-1b",
            chunk_s=window_s,
            rows_per_chunk=sizes.max_rows,
            encoders=(encoder,),
            projector=ProjectorConfig(
                (ProjectorInput("stacked", (f"{_WHISPER}.stacked",), sizes.max_rows),)
            ),
            decoder=dataclasses.replace(
                decoder, max_positions=min(decoder.max_positions, _MAX_POSITIONS)
            ),
            prompt=_PROMPT,
            audio_context="clip",
        )

    def part(self, graph: str) -> Part:
        """See :class:`~tinygiant.models.family.Model`."""
        sizes = self._sizes
        if graph != _WHISPER:
            n_rows = torch.export.Dim("n_rows", min=1, max=sizes.max_rows)
            example = {"stacked": torch.zeros(1, 3, sizes.row_size)}
            return Part(self._projector(), example, ("audio_embeds",), {"stacked": {1: n_rows}})
        with undrawn_weights():
            encoder = _Stacked(WhisperEncoder(sizes.whisper), sizes.stack)
        load_into(encoder.get_submodule(_TOWER), self._of(_TOWER), where=str(self._checkpoint))
        features = torch.zeros(1, sizes.whisper.num_mel_bins, 6 * sizes.stack + 5)
        # A named size would be taken for one that the convolutions' strides divide.
        dynamic = {"input_features": {2: torch.export.Dim.DYNAMIC}}
        return Part(encoder.eval(), {"input_features": features}, ("stacked",), dynamic)

    def decoder(self) -> nn.Module:
        """See :class:`~tinygiant.models.family.Model`."""
        with undrawn_weights():
            module: nn.Module = LlamaForCausalLM(self._llama)
        load_into(module, open_tensors(self._folder), where=str(self._folder))
        return module.eval()

    def tokenizer(self) -> str:
        """See :class:`~tinygiant.models.family.Model`."""
        return self._tokenizer

    def entry(self) -> SourceEntry:
        """See :class:`~tinygiant.models.family.Model`; reads every weights file."""
        digest = sha256([self._checkpoint, *weight_files(self._folder)])
        return SourceEntry(
            self._checkpoint.name,
            digest,
            "trained",
            None,
            origin=f"https://huggingface.co/{_CHECKPOINT.repo}",
            licence=_LICENCE,
        )

    def notes(self) -> str:
        """See :class:`~tinygiant.models.family.Model`."""
        return _NOTES

    def _projector(self) -> nn.Module:
        with undrawn_weights():
            module = UltravoxProjector(self._sizes, self._llama.hidden_size)
        load_into(module, self._of(_PROJECTOR), where=str(self._checkpoint))
        return module.eval()

    def _of(self, part: str) -> PrefixedTensors:
        return PrefixedTensors(self._tensors, f"{part}.")

    def _check_names(self) -> None:
        """Refuse another model's file, and another version's, before a gigabyte is read."""
        path, found = self._checkpoint, ", ".join(sorted(self._tensors)[:3]) or "no tensors"
        if not self._of(_PROJECTOR):
            raise CheckpointError(
                f"{path}: another model's checkpoint: expected tensors named {_PROJECTOR}.*, "
                f"found {found}"
            )
        if not self._of(_TOWER) or f"{_PROJECTOR}.ln_mid.weight" not in self._tensors:
            raise CheckpointError(
                f"{path}: another version of Ultravox: expected tensors named {_TOWER}.* and "
                f"{_PROJECTOR}.ln_mid.weight, as in {_CHECKPOINT.repo}"
            )
        with torch.device("meta"):
            parts = {
                _TOWER: WhisperEncoder(self._sizes.whisper),
                _PROJECTOR: UltravoxProjector(self._sizes, self._llama.hidden_size),
            }
        own = {f"{part}.{name}" for part, module in parts.items() for name in module.state_dict()}
        problems = [f"missing {name}" for name in sorted(own - set(self._tensors))]
        problems += [f"unknown {name}" for name in sorted(set(self._tensors) - own)]
        if problems:
            raise CheckpointError(
                f"{path}: its tensors are not those of {_CHECKPOINT.repo}: " + "; ".join(problems)
            )


class _Stacked(nn.Module):
    def __init__(self, audio_tower: WhisperEncoder, stack: int) -> None:
        super().__init__()
        self.audio_tower, self.stack = audio_tower, stack

    def forward(self, input_features: Tensor) -> Tensor:
        """``(1, n_mels, F)`` -> ``(1, ceil(F / 2 / stack), stack * C)``, its end zeros."""
        steps = whisper_steps(self.audio_tower, input_features)
        n_rows = (steps.shape[1] + self.stack - 1) // self.stack
        longer = nnf.pad(steps, (0, 0, 0, self.stack - 1))
        return longer[:, : n_rows * self.stack].reshape(1, n_rows, self.stack * steps.shape[2])


class UltravoxProjector(nn.Module):
    """Norm, layer, one half gated by the other, norm, layer."""

    def __init__(self, sizes: UltravoxConfig, hidden_size: int) -> None:
        super().__init__()
        gated = sizes.projector_size // 2
        self.ln_pre = LlamaRMSNorm(sizes.row_size, eps=_NORM_EPS)
        self.linear_1 = nn.Linear(sizes.row_size, sizes.projector_size, bias=False)
        self.ln_mid = LlamaRMSNorm(gated, eps=_NORM_EPS)
        self.linear_2 = nn.Linear(gated, hidden_size, bias=False)

    def forward(self, stacked: Tensor) -> Tensor:
        """``(1, N, stack * C)`` -> ``(1, N, D)``."""
        values, gates = self.linear_1(self.ln_pre(stacked)).chunk(2, dim=-1)
        return cast(Tensor, self.linear_2(self.ln_mid(values * nnf.silu(gates))))


def open_checkpoint(
    checkpoint: Path,
    tokenizer: Path | None = None,
    language_model: Path | None = None,
    *,
    allow_download: bool = False,
    sizes: UltravoxConfig | None = None,
) -> UltravoxSource:
    """Ultravox from files on this disk; its own file may come from the Hugging Face Hub.

    Args:
        checkpoint: the published file, or a name as :func:`~tinygiant.models.hub.locate` takes it.
        tokenizer: ``tokenizer.json`` or its folder; None for the language model's.
        language_model: the folder of Llama-3.2-1B-Instruct.
        allow_download: whether a missing checkpoint may be fetched.
        sizes: of encoder and projector; None for the published model's.

    Raises:
        UsageError: no language model.
        CheckpointError: a file is missing, or is not what it should be.
    """
    if language_model is None:
        raise UsageError(
            "the language model is missing: name the folder of Llama-3.2-1B-Instruct with --llama "
            "(its repository wants its licence accepted first, so it is not fetched)"
        )
    path = locate(str(checkpoint), _CHECKPOINT, allow_download=allow_download)
    if path.is_dir():
        path = path / _CHECKPOINT.file
    return UltravoxSource(
        sizes or UltravoxConfig(), path, language_model, tokenizer or language_model
    )


def _llama_config(folder: Path) -> LlamaConfig:
    """The language model's configuration; the rest of the file says how it was saved."""
    config = LlamaConfig(**config_fields(folder, "llama"), attn_implementation="sdpa")
    if not config.tie_word_embeddings:
        raise CheckpointError(
            f"{folder}: another Llama: its head is not tied to its embeddings; the folder of "
            "Llama-3.2-1B-Instruct is expected"
        )
    return config


def _read_tokenizer(path: Path, llama: LlamaConfig) -> tuple[str, tuple[int, ...]]:
    """The content of ``tokenizer.json``, and the ids that end a text.

    Raises:
        CheckpointError: there is none, or it is not that of the language model, or this model was
            not trained on turns of a conversation.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    expected = "the tokenizer.json of Llama-3.2-1B-Instruct is expected"
    try:
        text = file.read_text(encoding="utf-8")
        added: Mapping[str, int] = {
            token["content"]: token["id"] for token in json.loads(text)["added_tokens"]
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a tokenizer ({one_line(error)}); {expected}") from error
    wanted = (_BEGIN, _HEADER, _HEADER_ENDS, _TURN_ENDS, _TEXT_ENDS)
    if missing := [token for token in wanted if token not in added]:
        raise CheckpointError(f"{file}: no control tokens {', '.join(missing)}; {expected}")
    if max(added.values()) >= llama.vocab_size:
        raise CheckpointError(
            f"{file}: has more tokens than the language model's {llama.vocab_size}; {expected}"
        )
    ends: Any = llama.eos_token_id
    if added[_TURN_ENDS] not in (ends if isinstance(ends, list) else [ends]):
        raise CheckpointError(
            f"{file}: {_TURN_ENDS} is {added[_TURN_ENDS]}, which ends no text of this language "
            f"model ({ends}); Llama-3.2-1B-Instruct is expected, with its own tokenizer.json"
        )
    return text, (added[_TURN_ENDS], added[_TEXT_ENDS])
