"""What PyTorch computes on the verification set: the numbers an exported bundle has to reproduce.

The contract: components come one at a time, in the order of the methods, and nothing of them is
kept but their inputs and outputs, so a full-size model is verified without ever being whole in
memory. Audio is synthesised, so that nothing has to be shipped or downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, Qwen3ForCausalLM
from transformers.models.clap.modeling_clap import ClapAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tinygiant.models.config import TinyGiantConfig
from tinygiant.models.generate import greedy
from tinygiant.models.projector import Projector
from tinygiant.models.tinygiant import TinyGiantALM, encode_event, encode_temporal
from tinygiant.quantize.kv_cache import KvPeaks, kv_peaks
from tinygiant.runtime.audio import Audio, read_audio
from tinygiant.runtime.chunks import Chunk, event_rows, join_streams, mean_anchor, split_chunks
from tinygiant.runtime.prompt import Prompt, build_prompt
from tinygiant.runtime.tokenizer import Tokenizer

__all__ = ["CLIP_DURATIONS_S", "NEW_TOKENS", "Case", "Dialogue", "Reference", "synthetic_clip"]

Array = NDArray[np.float32]

CLIP_DURATIONS_S = (1.3, 10.6, 30.7)
"""One event window, two of them, and a second chunk."""

NEW_TOKENS = 24
"""Tokens written in answer to each question."""

QUESTIONS: tuple[tuple[str, tuple[str, ...] | None], ...] = (
    ("What is heard, and in which order?", None),
    ("Which sound is the loudest?", ("a whistle", "a drum", "the wind")),
)

DIALOGUES = ((0, 0), (0, 1), (1, 1), (2, 0))
"""Which question is asked about which clip."""

_CLIP_RATE_HZ = 22_050


@dataclass(frozen=True, eq=False)
class Case:
    """One run of one graph: named inputs, and the outputs PyTorch gives for them."""

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Dialogue:
    """One question about one clip, as PyTorch answers it.

    Attributes:
        clip: index of the clip.
        question: what is asked.
        choices: the choices listed in the prompt, or None.
        embeds: the decoder's input, ``(1, T, D)``.
        token_ids: the greedy answer, K tokens.
        token_embeds: their embeddings, ``(K, D)``.
        logits: after the prompt and after each token, ``(K + 1, V)``.
    """

    clip: int
    question: str
    choices: tuple[str, ...] | None
    embeds: Array
    token_ids: tuple[int, ...]
    token_embeds: Array
    logits: Array


class Reference:
    """Gathers cases: call the methods in order, each with its component."""

    def __init__(self, config: TinyGiantConfig, tokenizer: Tokenizer) -> None:
        """Prepare the clips' features and the questions' prompts."""
        self._config = config
        self._runtime = config.runtime
        self.clips = [synthetic_clip(duration_s) for duration_s in CLIP_DURATIONS_S]
        self._chunks = [split_chunks(clip, self._runtime) for clip in self.clips]
        self._prompts = [
            build_prompt(question, choices, tokenizer, config.prompt)
            for question, choices in QUESTIONS
        ]
        self._anchors: list[list[Array]] = []
        self._embeds: list[tuple[int, int, Tensor]] = []
        self.cases: dict[str, list[Case]] = {}
        self.token_ids: tuple[int, ...] = ()
        self.embedding_rows: Array = np.zeros((0, 0), np.float32)
        self.dialogues: list[Dialogue] = []
        self.kv_peaks: list[KvPeaks] = []

    @torch.no_grad()
    def run_temporal(self, whisper: WhisperEncoder) -> None:
        """Graph ``whisper_encoder``: one case a chunk."""
        runtime = self._runtime
        steps_per_token = runtime.frames_per_token // runtime.temporal.frames_per_step
        cases = []
        for chunk in self._all_chunks():
            features = chunk.temporal_features[None]
            rows = encode_temporal(whisper, torch.from_numpy(features), steps_per_token)
            cases.append(Case({"input_features": features}, {"temporal": rows.numpy()}))
        self.cases["whisper_encoder"] = cases

    @torch.no_grad()
    def run_events(self, htsat: ClapAudioEncoder) -> None:
        """Graph ``htsat_encoder``: one case a window of each chunk."""
        cases = []
        for chunk in self._all_chunks():
            for window in chunk.event_features:
                events, anchor = encode_event(htsat, torch.from_numpy(window)[None, None])
                outputs = {"events": events.numpy()}
                if self._runtime.event.shared_tower:
                    outputs["anchor"] = anchor.numpy()
                cases.append(Case({"input_features": window[None, None]}, outputs))
        self.cases["htsat_encoder"] = cases

    @torch.no_grad()
    def run_anchors(self, clap: ClapAudioEncoder) -> None:
        """Graph ``clap_encoder``, where the anchor has a tower of its own."""
        cases = []
        for chunk in self._all_chunks():
            for window in chunk.anchor_features or chunk.event_features:
                anchor = encode_event(clap, torch.from_numpy(window)[None, None])[1]
                cases.append(
                    Case({"input_features": window[None, None]}, {"anchor": anchor.numpy()})
                )
        self.cases["clap_encoder"] = cases

    @torch.no_grad()
    def run_projector(self, projector: Projector, embeddings: nn.Module) -> None:
        """Graph ``projector``: one case a chunk of each dialogue. Needs the encoders' cases."""
        self._keep_rows(embeddings)
        streams = self._streams()
        cases = []
        for clip, question in DIALOGUES:
            prompt = self._prompts[question]
            instruction = embeddings(torch.tensor([prompt.instruction_ids]))
            rows = []
            for inputs in streams[clip]:
                case = _project(projector, inputs, instruction)
                rows.append(torch.from_numpy(case.outputs["audio_embeds"]))
                cases.append(case)
            self._embeds.append((clip, question, _compose(prompt, rows, embeddings)))
        self.cases["projector"] = cases

    @torch.no_grad()
    def run_decoder(self, decoder: Qwen3ForCausalLM) -> None:
        """The answers. Needs :meth:`run_projector`."""
        with torch.device("meta"):
            model = TinyGiantALM(self._config)
        model.decoder = decoder
        for clip, question, embeds in self._embeds:
            token_ids = greedy(model, embeds, NEW_TOKENS)
            token_embeds = model.embed_tokens(torch.tensor([token_ids], dtype=torch.long))
            output = decoder(
                inputs_embeds=torch.cat((embeds, token_embeds), dim=1),
                use_cache=True,
                logits_to_keep=len(token_ids) + 1,
            )
            self._keep_peaks(output.past_key_values)
            text, choices = QUESTIONS[question]
            self.dialogues.append(
                Dialogue(
                    clip=clip,
                    question=text,
                    choices=choices,
                    embeds=embeds.numpy(),
                    token_ids=tuple(token_ids),
                    token_embeds=token_embeds[0].numpy(),
                    logits=output.logits[0].numpy(),
                )
            )
        self._embeds.clear()

    def _all_chunks(self) -> list[Chunk]:
        return [chunk for chunks in self._chunks for chunk in chunks]

    def _keep_rows(self, embeddings: nn.Module) -> None:
        """The embeddings of every token of the prompts."""
        ids = sorted({i for prompt in self._prompts for i in prompt.prefix_ids + prompt.suffix_ids})
        self.token_ids = tuple(ids)
        self.embedding_rows = embeddings(torch.tensor(ids)).numpy()

    def _keep_peaks(self, cache: Cache) -> None:
        """The largest keys and values of each layer, over all dialogues."""
        found = []
        for layer in cache.layers:
            assert layer.keys is not None and layer.values is not None
            found.append(kv_peaks(layer.keys[0].numpy(), layer.values[0].numpy()))
        known = self.kv_peaks or found
        self.kv_peaks = [a | b for a, b in zip(known, found, strict=True)]

    def _streams(self) -> list[list[dict[str, Array]]]:
        """Streams and anchor of every chunk of every clip, from the encoders' outputs."""
        temporal = iter(self.cases["whisper_encoder"])
        windows = iter(self.cases["htsat_encoder"])
        anchors = iter(self.cases.get("clap_encoder", []))
        clips = []
        for chunks in self._chunks:
            inputs = []
            for chunk in chunks:
                outputs = [next(windows).outputs for _ in chunk.event_features]
                events = [output["events"][0] for output in outputs]
                rows = event_rows(events, chunk.n_tokens, self._runtime)
                found = {"streams": join_streams(next(temporal).outputs["temporal"][0], rows)}
                if "clap_encoder" in self.cases:
                    n_windows = len(chunk.anchor_features or chunk.event_features)
                    outputs = [next(anchors).outputs for _ in range(n_windows)]
                if "anchor" in outputs[0]:
                    found["anchor"] = mean_anchor([output["anchor"][0] for output in outputs])[None]
                inputs.append(found)
            clips.append(inputs)
        return clips


def _project(projector: Projector, inputs: dict[str, Array], instruction: Tensor) -> Case:
    mask = torch.ones(instruction.shape[:2], dtype=torch.int64)
    anchor = inputs.get("anchor")
    output = projector(
        torch.from_numpy(inputs["streams"]),
        cast(Tensor, None if anchor is None else torch.from_numpy(anchor)),
        instruction,
        mask,
    )
    available = inputs | {
        "instruction_embeds": instruction.numpy(),
        "instruction_mask": mask.numpy(),
    }
    outputs = {name: value for name, value in output._asdict().items() if value is not None}
    return Case(available, {name: value.numpy() for name, value in outputs.items()})


def _compose(prompt: Prompt, rows: Sequence[Tensor], embeddings: nn.Module) -> Tensor:
    """The decoder's input ``(1, T, D)``."""
    prefix = embeddings(torch.tensor([prompt.prefix_ids]))
    suffix = embeddings(torch.tensor([prompt.suffix_ids]))
    return torch.cat((prefix, *rows, suffix), dim=1)


def synthetic_clip(duration_s: float) -> Audio:
    """A gliding tone, bursts of noise and a pause: something for every stream to react to."""
    rng = np.random.default_rng(20)
    t = np.arange(round(duration_s * _CLIP_RATE_HZ)) / _CLIP_RATE_HZ
    glide = np.sin(2 * np.pi * (300.0 * t + 900.0 * np.sin(0.4 * np.pi * t)))
    bursts = rng.standard_normal(t.size) * (np.modf(t * 1.7)[0] < 0.15)
    samples = (0.3 * glide + 0.2 * bursts) * (np.modf(t / 2.5)[0] < 0.8)
    return read_audio((samples.astype(np.float32), _CLIP_RATE_HZ))
