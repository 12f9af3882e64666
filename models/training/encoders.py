"""Pre-training of nano's encoders on the synthetic world's dense labels; they are then frozen.

The paper takes its encoders from large public checkpoints. Nano's stand-ins learn the same kind of
thing (what sounds when, what is said, what the clip is as a whole) from frame-level and clip-level
tags, through linear heads that are thrown away afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clap.modeling_clap import ClapAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tinygiant.models.config import TinyGiantConfig
from tinygiant.models.tinygiant import build_component, encode_event, encode_temporal
from tinygiant.models.training.batching import LengthBatches
from tinygiant.models.training.loop import LoopConfig, ParameterGroup, autocast, train
from tinygiant.models.world.dataset import WorldDataset

__all__ = ["EncoderTask", "pretrain_encoder"]


@dataclass(frozen=True)
class EncoderTask:
    """Pre-training of one encoder."""

    component: str  # "whisper" or "htsat"
    loop: LoopConfig
    batch_size: int = 16
    learning_rate: float = 1e-3
    # Masked stripes of the spectrogram (SpecAugment, Park et al., 2019): how many of each kind a
    # clip gets, and how wide they are at most.
    n_masks: int = 2
    mask_frames: int = 12
    mask_mels: int = 8


@dataclass(frozen=True)
class EncoderBatch:
    """Clips of one batch: features, frame tags ``(B, N, n_tags)`` and their mask ``(B, N)``."""

    features: Tensor
    frame_tags: Tensor
    frame_mask: Tensor
    clip_tags: Tensor


class TagHeads(nn.Module):
    """Linear heads for frame-level and clip-level tags."""

    def __init__(self, size: int, n_frame_tags: int, n_clip_tags: int) -> None:
        super().__init__()
        self.frame = nn.Linear(size, n_frame_tags)
        self.clip = nn.Linear(size, n_clip_tags)
        # Tags are rare: start from "absent" instead of learning it from a thousand steps.
        nn.init.constant_(self.frame.bias, -4.0)
        nn.init.constant_(self.clip.bias, -2.0)


def pretrain_encoder(
    config: TinyGiantConfig,
    task: EncoderTask,
    train_set: WorldDataset,
    validation_set: WorldDataset,
    folder: Path,
    device: torch.device,
    seed: int,
) -> nn.Module:
    """Train one encoder on tags and return it; the run's state stays in ``folder``."""
    encoder = build_component(config, task.component, seed)
    assert encoder is not None, "the configuration has this component"
    runtime = config.runtime
    temporal = task.component == "whisper"
    size = runtime.temporal.hidden_size if temporal else runtime.event.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = TagHeads(
            size, train_set.frame_labels(0).shape[1], train_set.clip_labels(0).shape[0]
        )
    encoder.to(device).train()
    heads.to(device)
    steps_per_token = runtime.frames_per_token // runtime.temporal.frames_per_step
    window_tokens = round(runtime.event.features.window_s / runtime.token_s)

    def logits(batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        if temporal:
            rows = encode_temporal(cast(WhisperEncoder, encoder), batch.features, steps_per_token)
            rows = rows[:, : batch.frame_tags.shape[1]]
            weights = batch.frame_mask.to(rows.dtype).unsqueeze(-1)
            pooled = (rows * weights).sum(1) / weights.sum(1)
        else:
            events, pooled = encode_event(cast(ClapAudioEncoder, encoder), batch.features)
            rows = F.adaptive_avg_pool1d(events.transpose(1, 2), window_tokens).transpose(1, 2)
            rows = rows[:, : batch.frame_tags.shape[1]]
        return heads.frame(rows).float(), heads.clip(pooled).float()

    def loss_of(batch: EncoderBatch) -> tuple[Tensor, dict[str, float]]:
        frame, clip = logits(batch)
        frame_loss = F.binary_cross_entropy_with_logits(frame, batch.frame_tags, reduction="none")
        # Summed over tags: a frame is as wrong as all its wrong tags together.
        frame_loss = frame_loss.sum(-1)[batch.frame_mask].mean()
        clip_loss = F.binary_cross_entropy_with_logits(clip, batch.clip_tags, reduction="none")
        clip_loss = clip_loss.sum(-1).mean()
        return frame_loss + 0.3 * clip_loss, {
            "frame_loss": float(frame_loss.detach()),
            "clip_loss": float(clip_loss.detach()),
        }

    batches = LengthBatches(
        [train_set.frame_labels(i).shape[0] for i in range(len(train_set))],
        task.batch_size,
        task.loop.seed,
    )

    def batch_at(number: int) -> EncoderBatch:
        batch = _collate(train_set, batches[number], temporal)
        rng = np.random.default_rng((task.loop.seed, 1, number))
        _mask_stripes(batch.features, rng, task, mel_axis=1 if temporal else 3)
        return _to(batch, device)

    def evaluate() -> dict[str, float]:
        encoder.eval()
        positives = predicted = hits = 0.0
        with torch.no_grad(), autocast(task.loop.precision, device):
            for start in range(0, len(validation_set), task.batch_size):
                indices = list(range(start, min(start + task.batch_size, len(validation_set))))
                batch = _to(_collate(validation_set, indices, temporal), device)
                guess = (logits(batch)[0] > 0)[batch.frame_mask]
                truth = (batch.frame_tags > 0.5)[batch.frame_mask]
                positives += float(truth.sum())
                predicted += float(guess.sum())
                hits += float((guess & truth).sum())
        encoder.train()
        return {"validation_frame_f1": 2 * hits / max(positives + predicted, 1.0)}

    train(
        task.loop,
        modules={"encoder": encoder, "heads": heads},
        groups=[
            ParameterGroup(
                task.component, [*encoder.parameters(), *heads.parameters()], task.learning_rate
            )
        ],
        batch_at=batch_at,
        loss_of=loss_of,
        folder=folder,
        device=device,
        evaluate=evaluate,
        title=f"encoder {task.component}",
    )
    return encoder.eval()


def _collate(dataset: WorldDataset, indices: list[int], temporal: bool) -> EncoderBatch:
    labels = [dataset.frame_labels(i) for i in indices]
    n_rows = max(len(rows) for rows in labels)
    frame_tags = torch.zeros(len(indices), n_rows, labels[0].shape[1])
    frame_mask = torch.zeros(len(indices), n_rows, dtype=torch.bool)
    for b, rows in enumerate(labels):
        frame_tags[b, : len(rows)] = torch.from_numpy(np.asarray(rows, dtype=np.float32))
        frame_mask[b, : len(rows)] = True
    clip_tags = torch.stack(
        [torch.from_numpy(np.asarray(dataset.clip_labels(i), dtype=np.float32)) for i in indices]
    )
    pairs = [dataset.features(i) for i in indices]
    if temporal:
        n_frames = max(whisper.shape[1] for whisper, _ in pairs)
        features = torch.empty(len(indices), pairs[0][0].shape[0], n_frames)
        for b, (whisper, _) in enumerate(pairs):
            # Padding is what silence looks like: the clip's floor, eight below its peak.
            features[b] = float(whisper.min())
            features[b, :, : whisper.shape[1]] = torch.from_numpy(whisper.astype(np.float32))
    else:
        features = torch.from_numpy(
            np.stack([clap.astype(np.float32) for _, clap in pairs])
        ).unsqueeze(1)
    return EncoderBatch(features, frame_tags, frame_mask, clip_tags)


def _mask_stripes(
    features: Tensor, rng: np.random.Generator, task: EncoderTask, mel_axis: int
) -> None:
    """Overwrite a few stripes of each clip with the clip's mean, in place."""
    frame_axis = 2
    for clip in features:
        mean = float(clip.mean())
        for axis, widest in ((frame_axis, task.mask_frames), (mel_axis, task.mask_mels)):
            for _ in range(task.n_masks):
                width = int(rng.integers(0, widest + 1))
                start = int(rng.integers(0, clip.shape[axis - 1] - width + 1))
                clip.narrow(axis - 1, start, width).fill_(mean)


def _to(batch: EncoderBatch, device: torch.device) -> EncoderBatch:
    return EncoderBatch(
        batch.features.to(device),
        batch.frame_tags.to(device),
        batch.frame_mask.to(device),
        batch.clip_tags.to(device),
    )
