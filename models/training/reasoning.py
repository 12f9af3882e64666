"""Second stage: the projector and the decoder learn to think about audio (paper, section 3).

Next-token loss on the assistant's response only; the encoders are frozen. One training sample is
one chunk of audio, one question and one response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..tinygiant import TinyGiantALM
from .batching import LengthBatches
from .loop import LoopConfig, ParameterGroup, autocast, train

__all__ = ["ReasoningSet", "ReasoningTask", "Sample", "collate", "response_loss", "train_reasoning"]

_IGNORED = -100


@dataclass(frozen=True, eq=False)
class Sample:
    """One question about one chunk of audio.

    ``streams (N, stream_size)``, ``anchor (anchor_size,)``; token ids before and after the audio,
    of the user's text (the instruction), and of the response with its end token. ``given`` are the
    positions of the response, first and behind the last, that are read but not learnt.
    """

    streams: NDArray[np.float32]
    anchor: NDArray[np.float32]
    prefix_ids: Sequence[int]
    suffix_ids: Sequence[int]
    instruction_ids: Sequence[int]
    response_ids: Sequence[int]
    given: tuple[int, int] = (0, 0)

    @property
    def length(self) -> int:
        """Positions in the decoder."""
        rows = len(self.streams)
        return len(self.prefix_ids) + rows + len(self.suffix_ids) + len(self.response_ids)


class ReasoningSet(Protocol):
    """Where samples come from."""

    def lengths(self) -> Sequence[int]:
        """Approximate length of each sample, in any unit."""

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample ``index``; ``rng`` decides what may vary from epoch to epoch."""


@dataclass(frozen=True)
class ReasoningTask:
    """Hyper-parameters of the stage; the paper: 1e-4 and 5e-5, effective batch 32.

    ``draw_ahead`` batches are drawn at once and their samples sorted by their true length, where a
    set whose questions are drawn anew knows only roughly how long they will be.
    """

    loop: LoopConfig
    batch_size: int = 16
    projector_learning_rate: float = 1e-4
    decoder_learning_rate: float = 5e-5
    draw_ahead: int = 1


@dataclass(frozen=True, eq=False)
class ReasoningBatch:
    """Samples padded to one shape; ``T`` is the longest sequence, prompt, audio and response."""

    streams: Tensor  # (B, N, stream_size)
    token_mask: Tensor  # (B, N) bool
    anchor: Tensor  # (B, anchor_size)
    instruction_ids: Tensor  # (B, L)
    instruction_mask: Tensor  # (B, L)
    input_ids: Tensor  # (B, T), 0 where audio goes and behind the end
    audio_positions: Tensor  # (B, N) position in T of each audio row
    labels: Tensor  # (B, T), -100 outside the response and where it is given


def collate(samples: Sequence[Sample], device: torch.device) -> ReasoningBatch:
    """Pad samples on the right; causal attention never looks there, so no mask is needed."""
    n_batch = len(samples)
    n_rows = max(len(s.streams) for s in samples)
    n_instruction = max(len(s.instruction_ids) for s in samples)
    length = max(s.length for s in samples)
    streams = torch.zeros(n_batch, n_rows, samples[0].streams.shape[1])
    token_mask = torch.zeros(n_batch, n_rows, dtype=torch.bool)
    instruction_ids = torch.zeros(n_batch, n_instruction, dtype=torch.long)
    instruction_mask = torch.zeros(n_batch, n_instruction)
    input_ids = torch.zeros(n_batch, length, dtype=torch.long)
    audio_positions = torch.zeros(n_batch, n_rows, dtype=torch.long)
    labels = torch.full((n_batch, length), _IGNORED)
    for b, s in enumerate(samples):
        streams[b, : len(s.streams)] = torch.from_numpy(s.streams)
        token_mask[b, : len(s.streams)] = True
        instruction_ids[b, : len(s.instruction_ids)] = torch.tensor(s.instruction_ids)
        instruction_mask[b, : len(s.instruction_ids)] = 1
        audio_start = len(s.prefix_ids)
        audio_stop = audio_start + len(s.streams)
        response_start = audio_stop + len(s.suffix_ids)
        stop = response_start + len(s.response_ids)
        input_ids[b, :audio_start] = torch.tensor(s.prefix_ids)
        input_ids[b, audio_stop:response_start] = torch.tensor(s.suffix_ids)
        input_ids[b, response_start:stop] = torch.tensor(s.response_ids)
        audio_positions[b, : len(s.streams)] = torch.arange(audio_start, audio_stop)
        labels[b, response_start:stop] = torch.tensor(s.response_ids)
        given_start, given_stop = s.given
        labels[b, response_start + given_start : response_start + given_stop] = _IGNORED
    return ReasoningBatch(
        streams.to(device),
        token_mask.to(device),
        torch.from_numpy(np.stack([s.anchor for s in samples])).to(device),
        instruction_ids.to(device),
        instruction_mask.to(device),
        input_ids.to(device),
        audio_positions.to(device),
        labels.to(device),
    )


def response_loss(model: TinyGiantALM, batch: ReasoningBatch) -> tuple[Tensor, Tensor]:
    """Mean next-token loss over all response tokens, and the share of them predicted right."""
    audio = model.projector(
        batch.streams,
        batch.anchor,
        model.embed_tokens(batch.instruction_ids),
        batch.instruction_mask,
        batch.token_mask,
    ).audio_embeds
    embeds = model.embed_tokens(batch.input_ids)
    rows, columns = batch.token_mask.nonzero(as_tuple=True)
    positions = batch.audio_positions[rows, columns]
    embeds = embeds.index_put((rows, positions), audio[rows, columns].to(embeds.dtype))
    hidden = model.decoder.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    # Only positions that predict a response token go through the LM head.
    targets = batch.labels[:, 1:]
    wanted = targets != _IGNORED
    logits = model.decoder.lm_head(hidden[:, :-1][wanted]).float()
    loss = F.cross_entropy(logits, targets[wanted])
    return loss, (logits.argmax(-1) == targets[wanted]).float().mean()


class DrawnBatches:
    """The samples of every batch, a pure function of the task's seed and the batch's number."""

    def __init__(self, train_set: ReasoningSet, task: ReasoningTask) -> None:
        self._set = train_set
        self._task = task
        self._indices = LengthBatches(train_set.lengths(), task.batch_size, task.loop.seed)
        self._block = -1
        self._batches: list[list[Sample]] = []

    def __getitem__(self, number: int) -> list[Sample]:
        """Samples of batch ``number``, counted from 0 over all epochs."""
        block, position = divmod(number, self._task.draw_ahead)
        if block != self._block:
            self._batches = self._draw(block)
            self._block = block
        return self._batches[position]

    def _draw(self, block: int) -> list[list[Sample]]:
        ahead = self._task.draw_ahead
        rng = np.random.default_rng((self._task.loop.seed, 2, block))
        numbers = range(block * ahead, (block + 1) * ahead)
        samples = [self._set.sample(i, rng) for n in numbers for i in self._indices[n]]
        if ahead == 1:
            return [samples]
        samples.sort(key=lambda sample: sample.length)
        # An epoch's last batch may be a smaller one: the samples are shared out evenly.
        cuts = np.linspace(0, len(samples), ahead + 1).round().astype(int)
        return [samples[cuts[k] : cuts[k + 1]] for k in rng.permutation(ahead)]


def train_reasoning(
    model: TinyGiantALM,
    task: ReasoningTask,
    train_set: ReasoningSet,
    validation_set: ReasoningSet,
    folder: Path,
    device: torch.device,
) -> None:
    """Train projector and decoder in place; the run's state and log stay in ``folder``."""
    batches = DrawnBatches(train_set, task)
    model.to(device)
    for name in ("whisper", "htsat", "clap"):
        part = getattr(model, name)
        if part is not None:
            part.requires_grad_(False)
    model.projector.train()
    model.decoder.train()
    # On a CPU the fused kernel's backward pass costs three times what plain products do.
    fused = model.decoder.config._attn_implementation
    if device.type == "cpu":
        model.decoder.set_attn_implementation("eager")

    def loss_of(batch: ReasoningBatch) -> tuple[Tensor, dict[str, float]]:
        loss, accuracy = response_loss(model, batch)
        return loss, {"token_accuracy": float(accuracy)}

    train(
        task.loop,
        modules={"projector": model.projector, "decoder": model.decoder},
        groups=[
            ParameterGroup(
                "projector", list(model.projector.parameters()), task.projector_learning_rate
            ),
            ParameterGroup("decoder", list(model.decoder.parameters()), task.decoder_learning_rate),
        ],
        batch_at=lambda number: collate(batches[number], device),
        loss_of=loss_of,
        folder=folder,
        device=device,
        evaluate=_validation(model, task, validation_set, device),
        title="reasoning",
    )
    model.decoder.set_attn_implementation(fused)
    model.eval()


def _validation(
    model: TinyGiantALM, task: ReasoningTask, dataset: ReasoningSet, device: torch.device
) -> Callable[[], dict[str, float]]:
    """Loss and token accuracy on the validation set, batches in a fixed order."""
    order = np.argsort(dataset.lengths(), kind="stable")

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        model.eval()
        totals = np.zeros(3)
        for start in range(0, len(order), task.batch_size):
            rng = np.random.default_rng(start)
            samples = [dataset.sample(int(i), rng) for i in order[start : start + task.batch_size]]
            with autocast(task.loop.precision, device):
                loss, accuracy = response_loss(model, collate(samples, device))
            totals += len(samples) * np.array([1.0, float(loss), float(accuracy)])
        model.projector.train()
        model.decoder.train()
        return {
            "validation_loss": totals[1] / totals[0],
            "validation_token_accuracy": totals[2] / totals[0],
        }

    return evaluate
