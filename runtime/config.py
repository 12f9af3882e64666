"""The contract between checkpoint, exporter, bundle and runtime: one tree of frozen dataclasses.

A checkpoint's configuration yields a :class:`ModelConfig`; the exporter writes it into a bundle's
``manifest.json``; the runtime reads every constant from there and defines none of its own. Defaults
are the values of the paper's full-size model (TinyGiantALM, Interspeech 2026) and of the public
encoders it names; whatever the paper leaves open is marked *ours*.

Sizes in docstrings: ``N`` audio tokens a chunk, ``D`` decoder hidden size, ``T`` sequence length.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from .errors import BundleError

__all__ = [
    "AnswerForm",
    "AudioContext",
    "ClapFeatures",
    "DecoderConfig",
    "EventStream",
    "KvType",
    "ModelConfig",
    "ProjectorConfig",
    "PromptConfig",
    "TemporalStream",
    "ThoughtForm",
    "WhisperFeatures",
    "config_from_dict",
    "config_to_dict",
]

AudioContext = Literal["full", "clip"]
KvType = Literal["fp32", "int8"]


@dataclass(frozen=True)
class WhisperFeatures:
    """Log-mel features of the temporal stream (``WhisperFeatureExtractor``, transformers)."""

    sampling_rate_hz: int = 16_000
    n_fft: int = 400  # 25 ms
    hop_length: int = 160  # 10 ms a frame
    n_mels: int = 128
    f_min_hz: float = 0.0
    f_max_hz: float = 8_000.0
    window_s: float = 30.0

    @property
    def n_samples(self) -> int:
        """Samples in a whole window: 480,000."""
        return round(self.window_s * self.sampling_rate_hz)

    @property
    def n_frames(self) -> int:
        """Frames in a whole window: 3,000."""
        return self.n_samples // self.hop_length


@dataclass(frozen=True)
class ClapFeatures:
    """Log-mel features of HTS-AT and CLAP (``ClapFeatureExtractor``: rand_trunc, repeatpad).

    The original HTS-AT checkpoints use 32 kHz and hop 320, which gives the same frame geometry.
    """

    sampling_rate_hz: int = 48_000
    n_fft: int = 1_024
    hop_length: int = 480  # 10 ms a frame
    n_mels: int = 64
    f_min_hz: float = 50.0
    f_max_hz: float = 14_000.0
    window_s: float = 10.0

    @property
    def n_samples(self) -> int:
        """Samples in a whole window: 480,000."""
        return round(self.window_s * self.sampling_rate_hz)

    @property
    def n_frames(self) -> int:
        """Frames in a whole window, both edges included: 1,001."""
        return self.n_samples // self.hop_length + 1


@dataclass(frozen=True)
class TemporalStream:
    """Fine-grained temporal stream: the encoder of a Whisper checkpoint.

    Graph ``whisper_encoder``: ``input_features (1, n_mels, n_frames)`` ->
    ``temporal (1, n_frames / frames_per_token, hidden_size)``, already average-pooled to audio
    tokens.
    """

    features: WhisperFeatures = field(default_factory=WhisperFeatures)
    hidden_size: int = 1_280
    frames_per_step: int = 2  # the second convolution's stride


@dataclass(frozen=True)
class EventStream:
    """Event-level stream (HTS-AT) and global anchor (CLAP).

    Graph ``htsat_encoder``: ``input_features (1, 1, n_frames, n_mels)`` -> ``events
    (1, steps_per_window, hidden_size)``, frequency already averaged. Graph ``clap_encoder``: the
    same features -> ``anchor (1, anchor_size)``. With ``shared_tower`` there is one graph,
    ``htsat_encoder``, with both outputs, run once.
    """

    features: ClapFeatures = field(default_factory=ClapFeatures)
    anchor_features: ClapFeatures = field(default_factory=ClapFeatures)
    hidden_size: int = 768
    steps_per_window: int = 32
    anchor_size: int = 1_024
    shared_tower: bool = False


@dataclass(frozen=True)
class ProjectorConfig:
    """Query-guided E-Branchformer projector (paper, section 2).

    Graph ``projector``: ``streams (1, N, temporal + event)``, ``anchor (1, anchor_size)``,
    ``instruction_embeds (1, L, D)``, ``instruction_mask (1, L)`` -> ``audio_embeds (1, N, D)``,
    ``intent_attention (1, N)`` (mean over heads) and ``gate (1, D)``. Ablated parts leave their
    inputs and outputs out of the graph.
    """

    hidden_size: int = 1_024
    n_layers: int = 2
    n_heads: int = 16  # ours
    cgmlp_size: int = 4_096  # ours; halved by the gate
    kernel_size: int = 17
    intent_query: bool = True
    semantic_gate: bool = True


@dataclass(frozen=True)
class DecoderConfig:
    """Qwen3 decoder.

    Graph ``decoder_model``: ``inputs_embeds (1, T, D)``, ``seqlens_k (1,) int32`` (positions valid
    after this step, minus one), ``total_sequence_length () int32``, ``logits_positions (K,) int64``
    (which of the T positions get logits), ``past_key_values.{i}.{key,value}
    (1, n_kv_heads, capacity, head_dim)`` -> ``logits (1, K, vocab_size)`` and
    ``present.{i}.{key,value}``, which share the past's buffers. These are float32, or int8
    where the bundle's ``kv_cache`` says so; the graph then holds their scales.
    """

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

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache holds for one position: 57,344 at full size."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    def kv_token_bytes(self, kv_type: KvType) -> int:
        """Bytes of the keys and values of one position: 224 or 56 KiB at full size."""
        return self.kv_values_per_token * {"fp32": 4, "int8": 1}[kv_type]


@dataclass(frozen=True)
class PromptConfig:
    """The text around a question (ChatML, as Qwen3 reads it). All of it is *ours*."""

    system: str = (
        "You are an audio assistant. Listen to the audio, think step by step, then answer."
    )
    audio_marker: str = "<audio>"
    choices_header: str = "Choices:"
    choice_prefix: str = "- "


@dataclass(frozen=True)
class ThoughtForm:
    """A thought before the answer.

    Attributes:
        close: the control token that ends it.
        close_id: its id.
        empty: ends the prompt where the model is not to think.
        empty_end: follows ``empty`` where the answer is written freely. A choice brings what it
            begins with itself, as it had it in training.
        tags: of the thought's parts, in their order, as ``<TAG>`` and ``</TAG>`` around each.
        open: what the model writes before a thought.
    """

    close: str
    close_id: int
    empty: str = ""
    empty_end: str = ""
    tags: tuple[str, ...] = ()
    open: str = ""


@dataclass(frozen=True)
class AnswerForm:
    """How a model writes: ``[thought] response_open answer response_close``, then a stop token.

    All empty: the text up to the stop token is the answer. ``choice_format`` is how a choice is
    written as an answer; ``hidden_token_ids`` are tokens that are no text of the answer.
    """

    thought: ThoughtForm | None = None
    response_open: str = ""
    response_close: str = ""
    choice_format: str = "{choice}"
    hidden_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A whole TinyGiantALM.

    ``tokens_per_chunk`` audio tokens stand for ``chunk_s`` seconds. ``audio_context`` says how the
    model was trained to see a clip shorter than a chunk: ``full`` (the paper's), the encoder sees a
    whole window and all N rows reach the decoder; ``clip`` (*ours*), the encoder sees the clip plus
    ``clip_margin_s`` of silence and only the rows that hold audio reach the decoder.
    """

    name: str = "tinygiant-full"
    tokens_per_chunk: int = 300
    audio_context: AudioContext = "full"
    clip_margin_s: float = 1.0
    temporal: TemporalStream = field(default_factory=TemporalStream)
    event: EventStream = field(default_factory=EventStream)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)

    def __post_init__(self) -> None:
        problems = _number_problems(self, "")
        if problems:  # the checks below divide by these numbers
            raise BundleError(f"model config of {self.name!r:.80}: " + "; ".join(problems[:5]))
        features = self.temporal.features
        if self.audio_context not in typing.get_args(AudioContext):
            problems.append(f"audio_context is {self.audio_context!r}, not 'full' or 'clip'")
        if features.n_frames % (self.tokens_per_chunk * self.temporal.frames_per_step):
            problems.append(
                f"{self.tokens_per_chunk} audio tokens do not divide the encoder's "
                f"{features.n_frames // self.temporal.frames_per_step} steps"
            )
        if features.window_s % self.event.features.window_s:
            problems.append("the event window does not divide the temporal window")
        if self.projector.hidden_size != self.decoder.hidden_size:
            problems.append(
                f"the projector gives {self.projector.hidden_size} features, "
                f"the decoder takes {self.decoder.hidden_size}"
            )
        if self.decoder.n_heads % self.decoder.n_kv_heads:
            problems.append("n_heads is not a multiple of n_kv_heads")
        if problems:
            raise BundleError(f"model config of {self.name!r:.80}: " + "; ".join(problems))

    @property
    def chunk_s(self) -> float:
        """Seconds of audio one chunk of audio tokens stands for: 30."""
        return self.temporal.features.window_s

    @property
    def token_s(self) -> float:
        """Seconds of audio one audio token stands for: 0.1."""
        return self.chunk_s / self.tokens_per_chunk

    @property
    def frames_per_token(self) -> int:
        """Temporal feature frames averaged into one audio token: 10."""
        return self.temporal.features.n_frames // self.tokens_per_chunk

    @property
    def event_windows_per_chunk(self) -> int:
        """Event windows that cover a chunk: 3."""
        return round(self.chunk_s / self.event.features.window_s)

    @property
    def stream_size(self) -> int:
        """Features of the concatenated temporal and event streams: 2,048."""
        return self.temporal.hidden_size + self.event.hidden_size

    def audio_tokens(self, duration_s: float) -> int:
        """Audio tokens of a chunk that holds ``duration_s`` seconds (at most ``chunk_s``)."""
        if self.audio_context == "full":
            return self.tokens_per_chunk
        # A clip of 1.2 s is 12 tokens although 1.2 / 0.1 is a hair above 12 in floating point.
        n_tokens = math.ceil(round(duration_s / self.token_s, 6))
        return min(max(n_tokens, 1), self.tokens_per_chunk)

    def temporal_frames(self, duration_s: float) -> int:
        """Feature frames the temporal encoder sees for ``duration_s`` seconds of a chunk."""
        if self.audio_context == "full":
            return self.temporal.features.n_frames
        margin_tokens = math.ceil(round(self.clip_margin_s / self.token_s, 6))
        n_tokens = min(self.audio_tokens(duration_s) + margin_tokens, self.tokens_per_chunk)
        return n_tokens * self.frames_per_token


_MAY_BE_ZERO = ("f_min_hz", "clip_margin_s", "eos_token_ids", "think_end_token_id")
_SMALLEST, _LARGEST = 1e-12, 2**31 - 1


def _number_problems(config: Any, where: str) -> list[str]:
    """Every number of a config that cannot be meant: zero, negative, enormous, NaN."""
    problems = []
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), where + item.name
        if dataclasses.is_dataclass(value):
            problems += _number_problems(value, f"{name}.")
            continue
        least = 0 if item.name in _MAY_BE_ZERO else _SMALLEST
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not least <= number <= _LARGEST:
                problems.append(f"{name} is {number!r:.40}, expected a positive number")
    return problems


_Config = TypeVar("_Config")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-ready nested dictionaries."""
    return dataclasses.asdict(config)


def config_from_dict(kind: type[_Config], data: Any, *, where: str = "config") -> _Config:
    """Rebuild a config dataclass from :func:`config_to_dict`'s output.

    A missing field takes its default, so a default must mean what files written before the field
    existed mean. An unknown field is refused: it may change what the others mean.

    Raises:
        BundleError: a field that is unknown, of another type, or missing without a default; the
            message gives its path.
    """
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(typing.cast(Any, kind))
    unknown = sorted(set(data) - {f.name for f in fields})
    missing = [f.name for f in fields if f.name not in data and not _has_default(f)]
    if unknown or missing:
        raise BundleError(
            f"{where}: unknown fields {unknown or 'none'}, missing fields {missing or 'none'}"
        )
    values = {name: _convert(hints[name], value, f"{where}.{name}") for name, value in data.items()}
    return kind(**values)


def _has_default(item: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return item.default is not missing or item.default_factory is not missing


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return config_from_dict(typing.cast(type[Any], hint), value, where=where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal and value in arguments:
        return value
    if origin in (types.UnionType, typing.Union) and value is None and type(None) in arguments:
        return None
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return _convert(inner[0], value, where)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {str(k): _convert(arguments[1], item, f"{where}.{k}") for k, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float) and not abs(value) > _LARGEST:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise BundleError(f"{where}: expected {hint}, found {value!r}")
