"""The contract between exporter, bundle and runtime: a model as a composition, all of it data.

A model is a tuple of encoders, a projector, a decoder, a prompt and the form of its answers, with a
clock of its own. The exporter writes a :class:`ModelConfig` into a bundle's ``manifest.json``; the
runtime takes every constant from there and knows no model by name. What happens inside a graph is
the exporter's business and is not here.

Growing the contract: a new field needs a default that means what files without it mean
(:func:`config_from_dict`).

Sizes in docstrings: ``N`` audio rows of a chunk, ``D`` decoder hidden size, ``T`` sequence length.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from .errors import BundleError

__all__ = [
    "AnswerForm",
    "AudioContext",
    "DecoderConfig",
    "EncoderConfig",
    "EncoderOutput",
    "Features",
    "KvType",
    "LogMel",
    "MelNorm",
    "MelScale",
    "ModelConfig",
    "ProjectorConfig",
    "ProjectorInput",
    "PromptConfig",
    "PromptPart",
    "QuestionKind",
    "Role",
    "Scope",
    "ThoughtForm",
    "Waveform",
    "config_from_dict",
    "config_to_dict",
]

AudioContext = Literal["full", "clip"]
KvType = Literal["fp32", "int8"]
MelNorm = Literal["slaney", "none"]
MelScale = Literal["slaney", "htk"]
Role = Literal["encoder", "projector", "decoder"]


@dataclass(frozen=True)
class LogMel:
    """Log-mel features of one encoder; :func:`~tinygiant.runtime.features.log_mel` computes them.

    Attributes:
        sampling_rate_hz: rate of the samples that are transformed.
        n_fft: samples of one frame, all of them under a periodic Hann window.
        hop_length: samples from one frame to the next.
        n_mels: mel bands.
        f_min_hz: lower edge of the lowest band.
        f_max_hz: upper edge of the highest band.
        mel_scale: ``slaney`` or ``htk``.
        mel_norm: ``slaney``, each band has area 1, or ``none``, each has peak 1.
        log: ``whisper``, (log10 + 4) / 4, or ``db``, 10 log10; the power is at least 1e-10.
        dynamic_range: how far below the loudest value the lowest may lie, before ``whisper``
            scales it: 8 (decades) for Whisper, top_db for ``db``; None for no limit.
        last_frame: whether the frame centred on the end of the window belongs to the features.
        padding: what fills a window: ``zeros``; ``repeat``, the clip as often as it fits whole,
            then zeros; ``tile``, the clip again and again, cut at the end.
        layout: ``mels_frames``, the graph takes ``(1, n_mels, n_frames)``; ``image``,
            ``(1, 1, n_frames, n_mels)``.
        resampler: ``soxr``, or ``sinc``, torchaudio's windowed sinc.
        through_hz: rates on the way to ``sampling_rate_hz``. The clip as a whole is resampled to
            the first rate and cut into windows; the rest of the way is gone window by window.
        computed_of: a ``window``, or the whole ``clip``, which is then cut into windows: its
            loudest value counts in all of them, and their edges are no edges of the sound.
    """

    kind: Literal["log_mel"] = "log_mel"
    sampling_rate_hz: int = 16_000
    n_fft: int = 400
    hop_length: int = 160
    n_mels: int = 128
    f_min_hz: float = 0.0
    f_max_hz: float = 8_000.0
    mel_scale: MelScale = "slaney"
    mel_norm: MelNorm = "slaney"
    log: Literal["whisper", "db"] = "whisper"
    dynamic_range: float | None = 8.0
    last_frame: bool = False
    padding: Literal["zeros", "repeat", "tile"] = "zeros"
    layout: Literal["mels_frames", "image"] = "mels_frames"
    resampler: Literal["soxr", "sinc"] = "soxr"
    through_hz: tuple[int, ...] = ()
    computed_of: Literal["window", "clip"] = "window"

    def n_frames(self, duration_s: float) -> int:
        """Frames of ``duration_s`` seconds."""
        return round(duration_s * self.sampling_rate_hz) // self.hop_length + self.last_frame

    def frames_that_hold(self, duration_s: float) -> int:
        """The fewest whole frames with all of ``duration_s`` seconds, and enough to transform."""
        fewest = self.n_fft // 2 // self.hop_length + 1  # so many let the edges be mirrored
        return max(_ceil(duration_s * self.sampling_rate_hz / self.hop_length), fewest)


@dataclass(frozen=True)
class Waveform:
    """Samples as they are, for encoders that begin with convolutions of their own.

    :func:`~tinygiant.runtime.features.waveform` computes them: ``(1, n_samples)``, zeros behind a
    shorter clip. A *frame* is one sample.

    Attributes:
        sampling_rate_hz: rate of the samples.
        normalize: scaled to mean 0 and variance 1 over the samples that there are
            (``Wav2Vec2FeatureExtractor``'s ``do_normalize``).
        resampler: as for :class:`LogMel`.
        through_hz: as for :class:`LogMel`.
    """

    kind: Literal["waveform"] = "waveform"
    sampling_rate_hz: int = 16_000
    normalize: bool = True
    resampler: Literal["soxr", "sinc"] = "soxr"
    through_hz: tuple[int, ...] = ()

    def n_frames(self, duration_s: float) -> int:
        """Samples of ``duration_s`` seconds."""
        return round(duration_s * self.sampling_rate_hz)


Features: TypeAlias = LogMel | Waveform
"""The features of an encoder, distinguished by ``kind``."""


@dataclass(frozen=True)
class EncoderOutput:
    """One output of an encoder graph.

    Attributes:
        name: as the graph calls it.
        kind: ``rows``, ``(1, rows, size)`` over time, or ``vector``, ``(1, size)``.
        size: features.
        rows: rows of a whole window; None for a vector.
    """

    name: str
    kind: Literal["rows", "vector"]
    size: int
    rows: int | None = None


@dataclass(frozen=True)
class EncoderConfig:
    """One encoder: a graph from the features of a window of sound to ``outputs``.

    Windows of ``window_s`` seconds tile a chunk; those without sound are not run. Where
    ``variable_length``, the graph takes fewer frames too and gives as many rows as they hold; with
    ``partial_rows`` it takes any number, and its last row stands for the frames that are left.
    """

    graph: str
    features: Features
    window_s: float
    outputs: tuple[EncoderOutput, ...]
    variable_length: bool = False
    input: str = "input_features"
    partial_rows: bool = False

    @property
    def n_frames(self) -> int:
        """Feature frames of a whole window."""
        return self.features.n_frames(self.window_s)


@dataclass(frozen=True)
class ProjectorInput:
    """One input of the projector: encoder outputs, their features side by side.

    ``parts`` are outputs as ``graph.output``, all rows or all vectors. Rows of a chunk's windows
    follow one another, zeros where there is no sound, and are averaged to ``rows`` rows a chunk;
    vectors are averaged over the windows with sound.
    """

    name: str
    parts: tuple[str, ...]
    rows: int | None = None


@dataclass(frozen=True)
class ProjectorConfig:
    """The graph from encoder outputs to rows of the decoder's input.

    It takes ``inputs`` and, where it ``reads_question``, ``instruction_embeds (1, L, D)`` and
    ``instruction_mask (1, L) int64``. It gives ``audio_embeds (1, N, D)`` and the other names in
    ``outputs``: ``intent_attention (1, N)``, ``gate (1, D)``.
    """

    inputs: tuple[ProjectorInput, ...]
    reads_question: bool = False
    outputs: tuple[str, ...] = ("audio_embeds",)
    graph: str = "projector"


@dataclass(frozen=True)
class DecoderConfig:
    """The language model: sizes that the runtime works with.

    Its graph takes ``inputs_embeds (B, T, D)``, ``seqlens_k (B,) int32`` (positions valid after
    this step, minus one), ``total_sequence_length () int32``, ``logits_positions (K,) int64``
    (which of the T positions get logits), ``past_key_values.{i}.{key,value}
    (B, n_kv_heads, capacity, head_dim)``; it gives ``logits (B, K, vocab_size)`` and
    ``present.{i}.{key,value}``, which share the past's buffers. These are float32, or int8
    where the bundle's ``kv_cache`` says so; the graph then holds their scales. More than one
    sequence (B) is for T = 1.

    A graph that reads prompts takes the same but ``logits_positions``, and gives no logits. Where
    it reads rows in blocks, ``present.{i}.{key,value}.{block}`` share the past's buffers too. It
    reads :data:`LEAST_PROMPT` positions or more.

    ``stop_token_ids`` end a text; the first is the one that a whole text ends with.
    """

    vocab_size: int
    hidden_size: int
    n_layers: int
    n_kv_heads: int
    head_dim: int
    max_positions: int
    stop_token_ids: tuple[int, ...]
    graph: str = "decoder_model"

    @property
    def kv_values_per_token(self) -> int:
        """Numbers the KV cache holds for one position: 57,344 for Qwen3-0.6B."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim

    def kv_token_bytes(self, kv_type: KvType) -> int:
        """Bytes of the keys and values of one position: 224 or 56 KiB for Qwen3-0.6B."""
        return self.kv_values_per_token * {"fp32": 4, "int8": 1}[kv_type]


@dataclass(frozen=True)
class PromptPart:
    """A piece of the prompt.

    Attributes:
        kind: ``text``, fixed text with control tokens in it; ``tokens``, fixed ids; ``audio``, the
            audio rows of the clip; ``question``, the user's text. Several ``audio`` parts all hold
            the clip.
        text: of ``text``.
        token_ids: of ``tokens``.
    """

    kind: Literal["text", "tokens", "audio", "question"]
    text: str = ""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PromptConfig:
    """The template of the prompt, and how the user's text is written into it.

    Attributes:
        parts: the template; at least one audio part and exactly one question.
        choices_header: the text between question and choices.
        choice_format: each choice, with ``{choice}`` and, if wanted, ``{letter}`` (a, b, ...).
        lower_case: the user's text is lower-cased.
        max_tokens: longest text of a user.
        too_long: a longer one is ``refused`` or ``cut`` at its end.
        padding_id: a shorter one is filled up to ``max_tokens`` with this token, which the decoder
            reads like any other; None: it is not filled up.
    """

    parts: tuple[PromptPart, ...]
    choices_header: str = "\nChoices:"
    choice_format: str = "\n- {choice}"
    lower_case: bool = False
    max_tokens: int = 2_048
    too_long: Literal["refused", "cut"] = "refused"
    padding_id: int | None = None


@dataclass(frozen=True)
class ThoughtForm:
    """A thought before the answer.

    Attributes:
        close: the control token that ends it.
        close_id: its id.
        empty: ends the prompt where the model is not to think.
        empty_end: follows ``empty`` where the answer is written freely. A choice brings its own
            beginning, as in training.
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
    written as an answer, lower-cased where ``lower_case``; ``hidden_token_ids`` are tokens that are
    no text of the answer.
    """

    thought: ThoughtForm | None = None
    response_open: str = ""
    response_close: str = ""
    choice_format: str = "{choice}"
    hidden_token_ids: tuple[int, ...] = ()
    lower_case: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the whole text is the answer."""
        return self.thought is None and not self.response_open


QuestionKind = Literal["choices", "open", "choices-at-once", "open-at-once"]
"""With or without choices; ``at-once``: without a thought."""


@dataclass(frozen=True)
class Scope:
    """The training data of a model. None or empty: not known.

    Attributes:
        shortest_s: seconds of the shortest clips.
        longest_s: seconds of the longest clips.
        questions: the kinds of questions.
        languages: the languages of the questions, as ISO 639-1 codes.
    """

    shortest_s: float | None = None
    longest_s: float | None = None
    questions: tuple[QuestionKind, ...] = ()
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A whole model.

    Its clock: ``rows_per_chunk`` rows of the decoder's input stand for ``chunk_s`` seconds. What a
    clip has beyond them becomes further ``chunks``, or is ``dropped`` and reported. With
    ``audio_context`` ``full``, every chunk has all its rows; with ``clip``, encoders of variable
    length see the clip plus ``clip_margin_s`` of silence (those of partial rows the clip alone),
    and only rows that hold sound reach the decoder. Log-likelihoods of choices are divided by
    ``choice_temperature``, fitted so that their probabilities are as often right as they say.
    """

    name: str
    chunk_s: float
    rows_per_chunk: int
    encoders: tuple[EncoderConfig, ...]
    projector: ProjectorConfig
    decoder: DecoderConfig
    prompt: PromptConfig
    answer: AnswerForm = AnswerForm()
    beyond_chunk: Literal["chunks", "dropped"] = "chunks"
    audio_context: AudioContext = "full"
    clip_margin_s: float = 1.0
    scope: Scope = Scope()
    choice_temperature: float = 1.0

    def __post_init__(self) -> None:
        problems = list(_number_problems(self, ""))
        if not problems:  # the checks below divide by these numbers
            problems = list(_composition_problems(self))
        if problems:
            raise BundleError(f"model config of {self.name!r:.80}: " + "; ".join(problems[:5]))

    @property
    def graphs(self) -> dict[str, Role]:
        """Every graph of the model and its role, in the order in which they run."""
        roles: dict[str, Role] = {encoder.graph: "encoder" for encoder in self.encoders}
        return roles | {self.projector.graph: "projector", self.decoder.graph: "decoder"}

    @property
    def outputs(self) -> dict[str, tuple[EncoderConfig, EncoderOutput]]:
        """Every encoder output by the name that projector inputs use, ``graph.output``."""
        return {
            f"{encoder.graph}.{output.name}": (encoder, output)
            for encoder in self.encoders
            for output in encoder.outputs
        }

    @property
    def distinct_encoders(self) -> tuple[EncoderConfig, ...]:
        """The first encoder of each kind of features and window: what there is to see or time."""
        found = {(e.features, e.window_s): e for e in reversed(self.encoders)}
        return tuple(reversed(found.values()))

    @property
    def n_clips(self) -> int:
        """How many clips the model hears at once; a prompt holds the audio rows of each."""
        return sum(part.kind == "audio" for part in self.prompt.parts)

    @property
    def row_s(self) -> float:
        """Seconds of sound that one audio row stands for; the last row of a chunk may hold less."""
        for encoder in self.encoders:
            if encoder.partial_rows:
                frame_s = encoder.window_s / encoder.n_frames
                return self._frames_per_row(encoder) * frame_s
        return self.chunk_s / self.rows_per_chunk

    def audio_rows(self, duration_s: float) -> int:
        """Audio rows of a chunk that holds ``duration_s`` seconds (at most ``chunk_s``)."""
        if self.audio_context == "full":
            return self.rows_per_chunk
        return min(max(self._rows_above(duration_s), 1), self.rows_per_chunk)

    def frames(self, encoder: EncoderConfig, duration_s: float) -> int:
        """Feature frames that ``encoder`` sees of a window in a chunk of ``duration_s`` seconds."""
        if self.audio_context == "full" or not encoder.variable_length:
            return encoder.n_frames
        if encoder.partial_rows:
            assert isinstance(encoder.features, LogMel)
            return min(encoder.features.frames_that_hold(duration_s), encoder.n_frames)
        n_rows = self.audio_rows(duration_s) + self._rows_above(self.clip_margin_s)
        return min(n_rows, self.rows_per_chunk) * (encoder.n_frames // self.rows_per_chunk)

    def _rows_above(self, duration_s: float) -> int:
        return _ceil(duration_s / self.row_s)

    def _frames_per_row(self, encoder: EncoderConfig) -> int:
        return -(-encoder.n_frames // self.rows_per_chunk)


def _ceil(count: float) -> int:
    # Rounded first: a chunk's remainder in floating point, 30.1 - 30 = 0.1000000000000014,
    # would have a row too many.
    return math.ceil(round(count, 6))


def _composition_problems(config: ModelConfig) -> Iterator[str]:
    """Parts that do not fit together."""
    if len(config.graphs) != len(config.encoders) + 2:
        yield "two graphs have the same name"
    for encoder in config.encoders:
        if not encoder.outputs:
            yield f"{encoder.graph} has no outputs"
        windows = config.chunk_s / encoder.window_s
        if abs(windows - round(windows)) > 1e-9 or windows < 1:
            yield f"the window of {encoder.graph} does not divide a chunk"
        for output in encoder.outputs:
            if (output.kind == "rows") != (output.rows is not None):
                yield f"{encoder.graph}.{output.name}: rows have a number, vectors have none"
            elif encoder.variable_length and output.rows not in (None, config.rows_per_chunk):
                yield f"{encoder.graph}.{output.name}: variable length needs one row an audio row"
        if isinstance(encoder.features, LogMel) and encoder.features.computed_of == "clip":
            yield from _whole_clip_problems(encoder, windows)
        if encoder.partial_rows:
            yield from _partial_row_problems(encoder, config.rows_per_chunk, windows)
        elif encoder.variable_length and (
            windows != 1
            or encoder.n_frames % config.rows_per_chunk
            or (isinstance(encoder.features, LogMel) and encoder.features.last_frame)
        ):
            yield (
                f"{config.rows_per_chunk} audio rows do not divide the {encoder.n_frames} frames "
                f"of {encoder.graph}"
            )
    for wanted in config.projector.inputs:
        kinds = {config.outputs[part][1].kind for part in wanted.parts if part in config.outputs}
        if unknown := sorted(set(wanted.parts) - set(config.outputs)):
            yield f"projector input {wanted.name!r:.40} reads {unknown!r:.80}, which no encoder has"
        elif len(kinds) != 1:
            yield f"projector input {wanted.name!r:.40} needs outputs of one kind"
        elif (kinds == {"rows"}) != (wanted.rows is not None):
            yield f"projector input {wanted.name!r:.40}: rows have a number, vectors have none"
    if "audio_embeds" not in config.projector.outputs:
        yield "the projector has no output audio_embeds"
    kinds_of_parts = [part.kind for part in config.prompt.parts]
    if kinds_of_parts.count("question") != 1 or "audio" not in kinds_of_parts:
        yield "the prompt needs one question and at least one audio part"
    for text in (config.prompt.choice_format, config.answer.choice_format):
        if "{choice}" not in text:
            yield f"{text!r:.40} has no {{choice}}"
    if not config.decoder.stop_token_ids:
        yield "the decoder has no stop token"


def _partial_row_problems(encoder: EncoderConfig, n_rows: int, windows: float) -> Iterator[str]:
    """``n_rows`` are those of a whole window; ``windows`` those of a chunk."""
    if not encoder.variable_length or windows != 1:
        yield f"{encoder.graph}: partial rows need variable length and one window a chunk"
    if not isinstance(encoder.features, LogMel) or encoder.features.last_frame:
        yield f"{encoder.graph}: partial rows need log-mel features without a last frame"
    per_row = -(-encoder.n_frames // n_rows)
    if -(-encoder.n_frames // per_row) != n_rows:
        yield f"{encoder.n_frames} frames of {encoder.graph} do not fill {n_rows} audio rows"


def _whole_clip_problems(encoder: EncoderConfig, windows: float) -> Iterator[str]:
    features = encoder.features
    assert isinstance(features, LogMel)
    if windows != 1 or not encoder.partial_rows:
        yield f"{encoder.graph}: features of the whole clip need partial rows"
    if features.through_hz or features.layout != "mels_frames" or features.padding != "zeros":
        yield f"{encoder.graph}: features of the whole clip need one rate, zeros behind, mels first"


_TOKENS = ("stop_token_ids", "token_ids", "close_id", "padding_id", "hidden_token_ids")
_MAY_BE_ZERO = frozenset(("f_min_hz", "clip_margin_s", *_TOKENS))
_SMALLEST, _LARGEST = 1e-12, 2**31 - 1


def _number_problems(config: Any, where: str) -> Iterator[str]:
    """Every number of a config that cannot be meant: zero, negative, enormous, NaN."""
    for item in dataclasses.fields(config):
        found, name = getattr(config, item.name), where + item.name
        least = 0 if item.name in _MAY_BE_ZERO else _SMALLEST
        for value in found if isinstance(found, tuple) else (found,):
            if dataclasses.is_dataclass(value):
                yield from _number_problems(value, f"{name}.")
            elif isinstance(value, bool) or not isinstance(value, int | float):
                continue
            elif not least <= value <= _LARGEST:
                yield f"{name} is {value!r:.40}, expected a positive number"


def _tagged(kinds: Sequence[Any], value: Any) -> Any:
    """Which of several dataclasses ``value`` is, by its ``kind``; the first if it has none."""
    tag = value.get("kind") if isinstance(value, dict) else None
    fitting = (k for k in kinds if dataclasses.is_dataclass(k) and getattr(k, "kind", None) == tag)
    return next(fitting, kinds[0])


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
        return _convert(_tagged(inner, value), value, where)
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
