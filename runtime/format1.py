"""Bundle format 1, which described one model: TinyGiantALM, with its parts as mandatory fields.

:func:`upgrade` turns the ``model`` of such a manifest into today's composition; constants that were
then in the code, not in the manifest, are here as data. Frozen: a change here changes the meaning
of existing bundles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .config import (
    AnswerForm,
    AudioContext,
    DecoderConfig,
    EncoderConfig,
    EncoderOutput,
    LogMel,
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

__all__ = ["upgrade"]


@dataclass(frozen=True)
class _Whisper:
    sampling_rate_hz: int = 16_000
    n_fft: int = 400
    hop_length: int = 160
    n_mels: int = 128
    f_min_hz: float = 0.0
    f_max_hz: float = 8_000.0
    window_s: float = 30.0


@dataclass(frozen=True)
class _Clap:
    sampling_rate_hz: int = 48_000
    n_fft: int = 1_024
    hop_length: int = 480
    n_mels: int = 64
    f_min_hz: float = 50.0
    f_max_hz: float = 14_000.0
    window_s: float = 10.0


@dataclass(frozen=True)
class _Temporal:
    features: _Whisper = field(default_factory=_Whisper)
    hidden_size: int = 1_280
    frames_per_step: int = 2


@dataclass(frozen=True)
class _Event:
    features: _Clap = field(default_factory=_Clap)
    anchor_features: _Clap = field(default_factory=_Clap)
    hidden_size: int = 768
    steps_per_window: int = 32
    anchor_size: int = 1_024
    shared_tower: bool = False


@dataclass(frozen=True)
class _Projector:
    hidden_size: int = 1_024
    n_layers: int = 2
    n_heads: int = 16
    cgmlp_size: int = 4_096
    kernel_size: int = 17
    intent_query: bool = True
    semantic_gate: bool = True


@dataclass(frozen=True)
class _Decoder:
    vocab_size: int = 151_936
    hidden_size: int = 1_024
    n_layers: int = 28
    n_heads: int = 16
    n_kv_heads: int = 8
    head_dim: int = 128
    ffn_size: int = 3_072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_positions: int = 40_960
    eos_token_ids: tuple[int, ...] = (151_645, 151_643)
    think_end_token_id: int = 151_668


@dataclass(frozen=True)
class _Prompt:
    system: str = (
        "You are an audio assistant. Listen to the audio, think step by step, then answer."
    )
    audio_marker: str = "<audio>"
    choices_header: str = "Choices:"
    choice_prefix: str = "- "


@dataclass(frozen=True)
class _Model:
    name: str = "tinygiant-full"
    tokens_per_chunk: int = 300
    audio_context: AudioContext = "full"
    clip_margin_s: float = 1.0
    temporal: _Temporal = field(default_factory=_Temporal)
    event: _Event = field(default_factory=_Event)
    projector: _Projector = field(default_factory=_Projector)
    decoder: _Decoder = field(default_factory=_Decoder)
    prompt: _Prompt = field(default_factory=_Prompt)


_SYSTEM = "<|im_start|>system\n{}<|im_end|>\n"
_USER = "<|im_start|>user\n"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"
_RESPONSE = ("\n<RESPONSE>\n", "</RESPONSE>")
# All models of the format that see clips alone were trained on this project's world of the time.
_CLIPS = Scope(3.0, 8.0, ("choices",), ("en",))
_TAGS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")


def upgrade(model: Any, *, where: str) -> dict[str, Any]:
    """The model of a format-1 manifest as :class:`ModelConfig` would be written today.

    Raises:
        BundleError: a field that is unknown, of another type, or makes no sense.
    """
    old = config_from_dict(_Model, model, where=where)
    temporal, event, decoder = old.temporal, old.event, old.decoder
    inputs = [
        ProjectorInput(
            "streams", ("whisper_encoder.temporal", "htsat_encoder.events"), old.tokens_per_chunk
        )
    ]
    anchor = EncoderOutput("anchor", "vector", event.anchor_size)
    events = EncoderOutput("events", "rows", event.hidden_size, event.steps_per_window)
    encoders = [
        EncoderConfig(
            "whisper_encoder",
            _log_mel(temporal.features, "whisper"),
            temporal.features.window_s,
            (EncoderOutput("temporal", "rows", temporal.hidden_size, old.tokens_per_chunk),),
            variable_length=True,
        ),
        EncoderConfig(
            "htsat_encoder",
            _log_mel(event.features, "db"),
            event.features.window_s,
            (events, anchor) if event.shared_tower else (events,),
        ),
    ]
    if old.projector.semantic_gate:
        tower = "htsat_encoder" if event.shared_tower else "clap_encoder"
        inputs.append(ProjectorInput("anchor", (f"{tower}.anchor",)))
        if not event.shared_tower:
            features = event.anchor_features
            encoders.append(
                EncoderConfig(tower, _log_mel(features, "db"), features.window_s, (anchor,))
            )
    outputs = (
        "audio_embeds",
        *("intent_attention",) * old.projector.intent_query,
        *("gate",) * old.projector.semantic_gate,
    )
    thought = ThoughtForm(
        open="<think>\n",
        close="</think>",
        close_id=decoder.think_end_token_id,
        empty="<think>\n\n</think>",
        empty_end="\n\n",
        tags=_TAGS,
    )
    system = _SYSTEM.format(old.prompt.system) if old.prompt.system else ""
    found = ModelConfig(
        name=old.name,
        chunk_s=temporal.features.window_s,
        rows_per_chunk=old.tokens_per_chunk,
        audio_context=old.audio_context,
        clip_margin_s=old.clip_margin_s,
        encoders=tuple(encoders),
        projector=ProjectorConfig(tuple(inputs), old.projector.intent_query, outputs),
        decoder=DecoderConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            n_layers=decoder.n_layers,
            n_kv_heads=decoder.n_kv_heads,
            head_dim=decoder.head_dim,
            max_positions=decoder.max_positions,
            stop_token_ids=decoder.eos_token_ids,
        ),
        prompt=PromptConfig(
            parts=(
                PromptPart("text", system + _USER),
                PromptPart("audio"),
                PromptPart("text", "\n"),
                PromptPart("question"),
                PromptPart("text", _ASSISTANT),
            ),
            choices_header=f"\n{old.prompt.choices_header}",
            choice_format=f"\n{old.prompt.choice_prefix}{{choice}}",
        ),
        answer=AnswerForm(thought, *_RESPONSE),
        scope=_CLIPS if old.audio_context == "clip" else Scope(),
    )
    return config_to_dict(found)


def _log_mel(old: _Whisper | _Clap, log: Literal["whisper", "db"]) -> LogMel:
    whisper = log == "whisper"
    return LogMel(
        sampling_rate_hz=old.sampling_rate_hz,
        n_fft=old.n_fft,
        hop_length=old.hop_length,
        n_mels=old.n_mels,
        f_min_hz=old.f_min_hz,
        f_max_hz=old.f_max_hz,
        log=log,
        dynamic_range=8.0 if whisper else None,
        last_frame=not whisper,
        padding="zeros" if whisper else "repeat",
        layout="mels_frames" if whisper else "image",
    )
