"""Configuration of the PyTorch reference model, and its presets.

A :class:`TinyGiantConfig` holds the configurations of the public parts in their upstream form
(``WhisperConfig``, ``ClapAudioConfig``, ``Qwen3Config`` of transformers) plus what is this model's
own. The runtime's :class:`~tinygiant.runtime.config.ModelConfig`, the composition, is derived from
it, so that no constant is written twice. Defaults are the values of the paper's full-size model
(TinyGiantALM, Interspeech 2026); whatever the paper leaves open is marked *ours*.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import ClapAudioConfig, PretrainedConfig, Qwen3Config, WhisperConfig

from tinygiant.runtime.config import (
    AnswerForm,
    AudioContext,
    DecoderConfig,
    EncoderConfig,
    EncoderOutput,
    ModelConfig,
    ProjectorConfig,
    ProjectorInput,
    PromptConfig,
    PromptPart,
    Scope,
    ThoughtForm,
    config_from_dict,
    config_to_dict,
)
from tinygiant.runtime.errors import (
    BundleError,
    CheckpointError,
    TinyGiantError,
    UsageError,
)

from .features import WHISPER, ClapFeatures

__all__ = [
    "CLAP",
    "EVENT",
    "PRESETS",
    "TEMPORAL",
    "ChatPrompt",
    "EBranchformerConfig",
    "TinyGiantConfig",
    "decoder_config",
    "preset",
]

TEMPORAL, EVENT, CLAP = "whisper_encoder", "htsat_encoder", "clap_encoder"
"""Graphs of the encoders: fine-grained temporal stream, event stream, global anchor."""


@dataclass(frozen=True)
class EBranchformerConfig:
    """The query-guided E-Branchformer projector (paper, section 2)."""

    hidden_size: int = 1_024
    n_layers: int = 2
    n_heads: int = 16  # ours
    cgmlp_size: int = 4_096  # ours; halved by the gate
    kernel_size: int = 17
    intent_query: bool = True
    semantic_gate: bool = True


@dataclass(frozen=True)
class ChatPrompt:
    """The text around a question (ChatML, as Qwen3 reads it). All of it is *ours*.

    ``audio_marker`` is how CoTA's user texts mark the place of the sound.
    """

    system: str = (
        "You are an audio assistant. Listen to the audio, think step by step, then answer."
    )
    audio_marker: str = "<audio>"
    choices_header: str = "Choices:"
    choice_prefix: str = "- "

    @property
    def template(self) -> PromptConfig:
        """As the runtime fills it."""
        system = f"<|im_start|>system\n{self.system}<|im_end|>\n" if self.system else ""
        return PromptConfig(
            parts=(
                PromptPart("text", f"{system}<|im_start|>user\n"),
                PromptPart("audio"),
                PromptPart("text", "\n"),
                PromptPart("question"),
                PromptPart("text", "<|im_end|>\n<|im_start|>assistant\n"),
            ),
            choices_header=f"\n{self.choices_header}",
            choice_format=f"\n{self.choice_prefix}{{choice}}",
        )


# Only what decides shapes and arithmetic is kept: the rest of an upstream configuration (dropout,
# generation settings, the halves of a model that are not used) says nothing about this model.
_WHISPER_FIELDS = (
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "num_mel_bins",
    "max_source_positions",
    "activation_function",
)
_CLAP_FIELDS = (
    "patch_embeds_hidden_size",
    "depths",
    "num_attention_heads",
    "hidden_size",
    "num_mel_bins",
    "spec_size",
    "window_size",
    "patch_size",
    "patch_stride",
    "mlp_ratio",
    "qkv_bias",
    "enable_fusion",
    "layer_norm_eps",
    "hidden_act",
)
_QWEN3_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "hidden_act",
)


@dataclass(frozen=True)
class TinyGiantConfig:
    """Everything needed to build a TinyGiantALM in PyTorch.

    ``whisper``, ``htsat``, ``clap`` and ``decoder`` are fields of the transformers configurations
    of the same name; ``clap = None`` means that HTS-AT's tower also gives the anchor.
    ``choice_temperature`` can be fitted on a trained model (``benchmarks.calibrate``).
    """

    name: str
    whisper: dict[str, Any]
    htsat: dict[str, Any]
    clap: dict[str, Any] | None
    decoder: dict[str, Any]
    projector: EBranchformerConfig
    eos_token_ids: tuple[int, ...]
    think_end_token_id: int
    tokens_per_chunk: int = 300
    audio_context: AudioContext = "full"
    clip_margin_s: float = 1.0
    event_features: ClapFeatures = field(default_factory=ClapFeatures)
    anchor_features: ClapFeatures = field(default_factory=ClapFeatures)
    prompt: ChatPrompt = field(default_factory=ChatPrompt)
    scope: Scope = field(default_factory=Scope)
    choice_temperature: float = 1.0

    @property
    def whisper_config(self) -> WhisperConfig:
        """The temporal encoder's configuration, as transformers reads it."""
        return WhisperConfig(**self.whisper, attn_implementation="sdpa")

    @property
    def htsat_config(self) -> ClapAudioConfig:
        """The event encoder's configuration, as transformers reads it."""
        return ClapAudioConfig(**self.htsat)

    @property
    def clap_config(self) -> ClapAudioConfig | None:
        """The anchor encoder's configuration; None if the event tower gives the anchor."""
        return None if self.clap is None else ClapAudioConfig(**self.clap)

    @property
    def decoder_config(self) -> Qwen3Config:
        """The decoder's configuration, as transformers reads it."""
        return Qwen3Config(**self.decoder, attn_implementation="sdpa")

    @property
    def stream_size(self) -> int:
        """Features of the joined temporal and event streams: 2,048 at full size."""
        return int(self.whisper_config.d_model + self.htsat_config.hidden_size)

    @property
    def anchor_size(self) -> int:
        """Features of the global anchor: 1,024 at full size."""
        return int((self.clap_config or self.htsat_config).hidden_size)

    @property
    def steps_per_row(self) -> int:
        """Whisper's encoder steps averaged into one audio row: 5."""
        return int(self.whisper_config.max_source_positions) // self.tokens_per_chunk

    @property
    def runtime(self) -> ModelConfig:
        """The contract that the exporter and the runtime work from.

        Raises:
            BundleError: the parts do not fit together.
        """
        qwen3 = self.decoder_config
        anchor = (EncoderOutput("anchor", "vector", self.anchor_size),)
        has_gate, has_clap = self.projector.semantic_gate, self.clap is not None
        encoders = [self._temporal(), self._event(() if has_clap else anchor)]
        streams = (f"{TEMPORAL}.temporal", f"{EVENT}.events")
        inputs = [ProjectorInput("streams", streams, self.tokens_per_chunk)]
        if has_gate:
            inputs.append(ProjectorInput("anchor", (f"{CLAP if has_clap else EVENT}.anchor",)))
            if has_clap:
                features = self.anchor_features
                encoders.append(EncoderConfig(CLAP, features.log_mel, features.window_s, anchor))
        if self.projector.hidden_size != qwen3.hidden_size:
            raise BundleError(
                f"the projector gives {self.projector.hidden_size} features, "
                f"the decoder takes {qwen3.hidden_size}"
            )
        return ModelConfig(
            name=self.name,
            chunk_s=encoders[0].window_s,
            rows_per_chunk=self.tokens_per_chunk,
            encoders=tuple(encoders),
            projector=ProjectorConfig(
                inputs=tuple(inputs),
                reads_question=self.projector.intent_query,
                outputs=(
                    "audio_embeds",
                    *("intent_attention",) * self.projector.intent_query,
                    *("gate",) * has_gate,
                ),
            ),
            decoder=decoder_config(qwen3, self.eos_token_ids),
            prompt=self.prompt.template,
            answer=AnswerForm(
                thought=ThoughtForm(
                    open="<think>\n",
                    close="</think>",
                    close_id=self.think_end_token_id,
                    empty="<think>\n\n</think>",
                    empty_end="\n\n",
                    tags=("PLANNING", "CAPTION", "REASONING", "SUMMARY"),
                ),
                response_open="\n<RESPONSE>\n",
                response_close="</RESPONSE>",
            ),
            audio_context=self.audio_context,
            clip_margin_s=self.clip_margin_s,
            scope=self.scope,
            choice_temperature=self.choice_temperature,
        )

    def _temporal(self) -> EncoderConfig:
        """Whisper's encoder; its graph averages steps to audio rows."""
        whisper = self.whisper_config
        rows = EncoderOutput("temporal", "rows", whisper.d_model, self.tokens_per_chunk)
        return EncoderConfig(
            graph=TEMPORAL,
            features=dataclasses.replace(WHISPER, n_mels=whisper.num_mel_bins),
            window_s=whisper.max_source_positions / 50,
            outputs=(rows,),
            variable_length=True,
        )

    def _event(self, anchor: tuple[EncoderOutput, ...]) -> EncoderConfig:
        """HTS-AT, which gives the anchor too where it has no tower of its own."""
        htsat, features = self.htsat_config, self.event_features
        # Swin halves the patch grid between stages; HTS-AT's folded spectrogram is unfolded again
        # into `spec_size / n_mels` pieces along time (ClapAudioEncoder.forward, transformers).
        patches = htsat.spec_size // htsat.patch_stride[1] // 2 ** (len(htsat.depths) - 1)
        steps = patches * (htsat.spec_size // htsat.num_mel_bins)
        events = EncoderOutput("events", "rows", htsat.hidden_size, steps)
        return EncoderConfig(EVENT, features.log_mel, features.window_s, (events, *anchor))

    def save(self, path: Path) -> None:
        """Write the configuration as JSON."""
        path.write_text(json.dumps(config_to_dict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TinyGiantConfig:
        """Read :meth:`save`'s output.

        Raises:
            CheckpointError: the file is missing, is not JSON, or its fields do not fit.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a readable TinyGiantALM config ({error})"
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
        upstream = {name: data.pop(name, {}) for name in ("whisper", "htsat", "clap", "decoder")}
        try:
            own = config_from_dict(_OwnFields, data, where=str(path))
            return cls(**upstream, **{f.name: getattr(own, f.name) for f in _OWN})
        except TinyGiantError as error:
            raise CheckpointError(str(error)) from error


_OWN = tuple(
    f
    for f in dataclasses.fields(TinyGiantConfig)
    if f.name not in ("whisper", "htsat", "clap", "decoder")
)
# The strict reader of the contract serves these fields too; the upstream dictionaries are checked
# by the transformers classes that take them.
_OwnFields = cast(
    "type[Any]",
    dataclasses.make_dataclass(
        "_OwnFields",
        [
            (f.name, f.type, field(default=f.default, default_factory=f.default_factory))
            for f in _OWN
        ],
        frozen=True,
    ),
)
_OwnFields.__module__ = __name__


def decoder_config(upstream: PretrainedConfig, stop_token_ids: tuple[int, ...]) -> DecoderConfig:
    """The runtime's part of a decoder's configuration in transformers' form."""
    return DecoderConfig(
        vocab_size=upstream.vocab_size,
        hidden_size=upstream.hidden_size,
        n_layers=upstream.num_hidden_layers,
        n_kv_heads=upstream.num_key_value_heads,
        head_dim=upstream.head_dim,
        max_positions=upstream.max_position_embeddings,
        stop_token_ids=stop_token_ids,
    )


def upstream_fields(config: WhisperConfig | ClapAudioConfig | Qwen3Config) -> dict[str, Any]:
    """The fields of a transformers configuration that :class:`TinyGiantConfig` keeps."""
    names = {
        WhisperConfig: _WHISPER_FIELDS,
        ClapAudioConfig: _CLAP_FIELDS,
        Qwen3Config: _QWEN3_FIELDS,
    }[type(config)]
    return {
        name: rope_theta(config) if name == "rope_theta" else getattr(config, name)
        for name in names
    }


def rope_theta(config: PretrainedConfig) -> float:
    """Base of the rotary embedding; transformers 5 keeps it among ``rope_parameters``."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters["rope_theta"] if parameters else getattr(config, "rope_theta"))  # noqa: B009


def _full() -> TinyGiantConfig:
    """The paper's 1.5 B: whisper-large-v3-turbo, two CLAP towers and Qwen3-0.6B."""
    whisper = WhisperConfig(
        d_model=1280,
        encoder_layers=32,
        encoder_attention_heads=20,
        encoder_ffn_dim=5120,
        num_mel_bins=128,
        max_source_positions=1500,
    )
    tiny = ClapAudioConfig(
        patch_embeds_hidden_size=96,
        depths=[2, 2, 6, 2],
        num_attention_heads=[4, 8, 16, 32],
        hidden_size=768,
    )
    base = ClapAudioConfig(
        patch_embeds_hidden_size=128,
        depths=[2, 2, 12, 2],
        num_attention_heads=[4, 8, 16, 32],
        hidden_size=1024,
    )
    qwen3 = Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        rope_theta=1_000_000.0,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
    )
    return TinyGiantConfig(
        name="tinygiant-full",
        whisper=upstream_fields(whisper),
        htsat=upstream_fields(tiny),
        clap=upstream_fields(base),
        decoder=upstream_fields(qwen3),
        projector=EBranchformerConfig(),
        eos_token_ids=(151_645, 151_643),
        think_end_token_id=151_668,
    )


def _nano() -> TinyGiantConfig:
    """The same architecture in a few million parameters, one tower for events and anchor."""
    whisper = WhisperConfig(
        d_model=160,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=480,
        num_mel_bins=128,
        max_source_positions=1500,
    )
    htsat = ClapAudioConfig(
        patch_embeds_hidden_size=48,
        depths=[2, 2, 2],
        num_attention_heads=[2, 4, 8],
        hidden_size=192,
        patch_size=8,
        patch_stride=[8, 8],
    )
    qwen3 = Qwen3Config(
        vocab_size=NANO_VOCAB_SIZE,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=576,
        rope_theta=10_000.0,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return TinyGiantConfig(
        name="tinygiant-nano",
        whisper=upstream_fields(whisper),
        htsat=upstream_fields(htsat),
        clap=None,
        decoder=upstream_fields(qwen3),
        projector=EBranchformerConfig(hidden_size=192, n_layers=2, n_heads=4, cgmlp_size=384),
        eos_token_ids=(NANO_SPECIAL_TOKENS.index("<|im_end|>"), 0),
        think_end_token_id=NANO_SPECIAL_TOKENS.index("</think>"),
        audio_context="clip",
        prompt=ChatPrompt(system="Listen, think, then answer."),
    )


# Nano's own byte-level BPE has Qwen3's control tokens as its first ids.
NANO_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
NANO_VOCAB_SIZE = 1024

PRESETS = {"full": _full, "nano": _nano}


def preset(name: str) -> TinyGiantConfig:
    """The named configuration, ``nano`` or ``full``.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"preset {name!r} is unknown: choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
