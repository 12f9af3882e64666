"""PyTorch's outputs on the verification set, which an exported bundle has to reproduce.

The contract: components come one at a time, in the order in which they run, and nothing of them is
kept but their inputs and outputs, so a full-size model is verified without ever being whole in
memory. Audio is synthesised, so that nothing has to be shipped or downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from tinygiant.models.family import Part
from tinygiant.models.generate import greedy_tokens
from tinygiant.quantize.kv_cache import KvPeaks, kv_peaks
from tinygiant.runtime.audio import Audio, read_audio
from tinygiant.runtime.config import ModelConfig
from tinygiant.runtime.encode import combine
from tinygiant.runtime.preprocess import preprocess
from tinygiant.runtime.prompt import build_prompt, compose
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
    """Gathers cases: every encoder, then the projector, then the decoder."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        """Prepare the clips' features and the questions' prompts."""
        self._config = config
        self.clips = [synthetic_clip(duration_s) for duration_s in CLIP_DURATIONS_S]
        self._chunks = [preprocess(clip, config) for clip in self.clips]
        self._prompts = [
            build_prompt(question, choices, tokenizer, config.prompt)
            for question, choices in QUESTIONS
        ]
        self._embeds: list[tuple[int, int, Array]] = []
        self.cases: dict[str, list[Case]] = {}
        self.token_ids: tuple[int, ...] = ()
        self.embedding_rows: Array = np.zeros((0, 0), np.float32)
        self.dialogues: list[Dialogue] = []
        self.kv_peaks: list[KvPeaks] = []

    def run_encoder(self, graph: str, part: Part) -> None:
        """One case a window of each chunk."""
        encoder = next(e for e in self._config.encoders if e.graph == graph)
        self.cases[graph] = [
            _run(part, {encoder.input: window})
            for chunks in self._chunks
            for chunk in chunks
            for window in chunk.windows[graph]
        ]

    def run_projector(self, part: Part, embeddings: nn.Module) -> None:
        """One case a chunk of each dialogue. Needs the encoders' cases."""
        lookup = _lookup(embeddings)
        ids = {token for prompt in self._prompts for part in prompt.parts for token in part or ()}
        self.token_ids = tuple(sorted(ids))
        self.embedding_rows = lookup(self.token_ids)
        inputs = self._projector_inputs()
        cases = []
        for clip, question in DIALOGUES:
            prompt = self._prompts[question]
            instruction: dict[str, NDArray[Any]] = {}
            if self._config.projector.reads_question:
                rows = lookup(prompt.instruction_ids)[None]
                mask = np.ones(rows.shape[:2], np.int64)
                instruction = {"instruction_embeds": rows, "instruction_mask": mask}
            of_clip = [_run(part, {**chunk, **instruction}) for chunk in inputs[clip]]
            cases += of_clip
            audio_rows = [case.outputs["audio_embeds"] for case in of_clip]
            embeds = np.concatenate(compose(prompt, [audio_rows], lookup), axis=1)
            self._embeds.append((clip, question, embeds))
        self.cases[self._config.projector.graph] = cases

    @torch.no_grad()
    def run_decoder(self, decoder: PreTrainedModel) -> None:
        """The answers. Needs :meth:`run_projector`."""
        lookup = _lookup(decoder.get_input_embeddings())
        for clip, question, embeds in self._embeds:
            prompt = torch.from_numpy(embeds)
            stop_ids = self._config.decoder.stop_token_ids
            token_ids = greedy_tokens(decoder, prompt, NEW_TOKENS, stop_ids)
            token_embeds = lookup(token_ids)
            output = decoder(
                inputs_embeds=torch.cat((prompt, torch.from_numpy(token_embeds)[None]), dim=1),
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
                    embeds=embeds,
                    token_ids=tuple(token_ids),
                    token_embeds=token_embeds,
                    logits=output.logits[0].numpy(),
                )
            )
        self._embeds.clear()

    def _keep_peaks(self, cache: Cache) -> None:
        """The largest keys and values of each layer, over all dialogues."""
        found = []
        for layer in cache.layers:
            assert layer.keys is not None and layer.values is not None
            found.append(kv_peaks(layer.keys[0].numpy(), layer.values[0].numpy()))
        known = self.kv_peaks or found
        self.kv_peaks = [a | b for a, b in zip(known, found, strict=True)]

    def _projector_inputs(self) -> list[list[dict[str, Array]]]:
        """The projector's inputs for every chunk of every clip, from the encoder outputs."""
        runs = {graph: iter(cases) for graph, cases in self.cases.items()}
        clips = []
        for chunks in self._chunks:
            inputs = []
            for chunk in chunks:
                outputs: dict[str, list[Array]] = {}
                for encoder in self._config.encoders:
                    found = [
                        next(runs[encoder.graph]).outputs for _ in chunk.windows[encoder.graph]
                    ]
                    for output in encoder.outputs:
                        name = f"{encoder.graph}.{output.name}"
                        outputs[name] = [run[output.name][0] for run in found]
                inputs.append(dict(combine(outputs, chunk.n_rows, self._config).inputs))
            clips.append(inputs)
        return clips


@torch.no_grad()
def _run(part: Part, inputs: dict[str, NDArray[Any]]) -> Case:
    """What PyTorch gives for one run of a graph."""
    found = part.module(**{name: torch.from_numpy(inputs[name]) for name in part.inputs})
    tensors = (found,) if isinstance(found, Tensor) else found
    outputs = {name: tensor.numpy() for name, tensor in zip(part.outputs, tensors, strict=True)}
    return Case(inputs, outputs)


def _lookup(embeddings: nn.Module) -> Callable[[Sequence[int]], Array]:
    """Token embeddings as PyTorch has them, ``n`` ids -> ``(n, D)``."""

    @torch.no_grad()
    def lookup(token_ids: Sequence[int]) -> Array:
        rows: Array = embeddings(torch.tensor(list(token_ids), dtype=torch.long)).numpy()
        return rows

    return lookup


def synthetic_clip(duration_s: float) -> Audio:
    """A gliding tone, bursts of noise and a pause: something for every encoder to react to."""
    rng = np.random.default_rng(20)
    t = np.arange(round(duration_s * _CLIP_RATE_HZ)) / _CLIP_RATE_HZ
    glide = np.sin(2 * np.pi * (300.0 * t + 900.0 * np.sin(0.4 * np.pi * t)))
    bursts = rng.standard_normal(t.size) * (np.modf(t * 1.7)[0] < 0.15)
    samples = (0.3 * glide + 0.2 * bursts) * (np.modf(t / 2.5)[0] < 0.8)
    return read_audio((samples.astype(np.float32), _CLIP_RATE_HZ))
