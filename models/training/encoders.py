"""Pre-training of nano's encoders on the synthetic world's dense labels; they are then frozen.

The paper takes its encoders from large public checkpoints. Nano's stand-ins learn the same kind of
thing (what sounds when, what is said, what is played, what the clip is as a whole) through linear
heads that are thrown away afterwards. Tags alone teach events and instruments within minutes, but
hardly a word (F1 0.06 after 35,000 clips) and no melody's direction: each word is active in one row
of a hundred. So words are also told apart given their span, and notes by their pitch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clap.modeling_clap import ClapAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from ..config import TinyGiantConfig
from ..tinygiant import encode_event, encode_temporal
from ..world.dataset import WorldDataset
from ..world.labels import ROWS_PER_S
from ..world.scene import Scene
from ..world.vocabulary import WORDS
from .augmentation import Augmentation, augment
from .batching import LengthBatches
from .loop import LoopConfig, ParameterGroup, autocast, train

__all__ = ["EncoderTask", "pretrain_encoder"]


@dataclass(frozen=True)
class EncoderTask:
    """Pre-training of one encoder."""

    component: str  # "whisper" or "htsat"
    loop: LoopConfig
    batch_size: int = 16
    learning_rate: float = 1e-3
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass(frozen=True)
class EncoderBatch:
    """Clips of one batch and what is true of them; ``N`` rows of 100 ms, ``B`` clips.

    Spans are ``(M, 3)``: clip, first row, row behind the last.
    """

    features: Tensor
    frame_tags: Tensor  # (B, N, n_frame_tags)
    frame_mask: Tensor  # (B, N) bool
    clip_tags: Tensor  # (B, n_clip_tags)
    word_spans: Tensor  # (M, 3)
    words: Tensor  # (M,) index into WORDS
    pitches: Tensor  # (B, N) MIDI note of the melody, -100 where there is none
    music_spans: Tensor  # (K, 3)
    music: Tensor  # (K, 4) rising, major, fast, in three

    def to(self, device: torch.device) -> EncoderBatch:
        """The batch on a device."""
        return EncoderBatch(*(getattr(self, f.name).to(device) for f in fields(self)))


class Heads(nn.Module):
    """Linear heads over rows ``(B, N, size)`` and the pooled clip ``(B, size)``."""

    def __init__(self, size: int, n_frame_tags: int, n_clip_tags: int) -> None:
        super().__init__()
        self.frame = nn.Linear(size, n_frame_tags)
        self.clip = nn.Linear(size, n_clip_tags)
        self.word = nn.Linear(size, len(WORDS))
        self.pitch = nn.Linear(size, _N_PITCHES)
        self.music = nn.Linear(size, 4)
        # Tags are rare: start from "absent" instead of learning it from a thousand steps.
        nn.init.constant_(self.frame.bias, -4.0)
        nn.init.constant_(self.clip.bias, -2.0)

    def losses(self, rows: Tensor, pooled: Tensor, batch: EncoderBatch) -> dict[str, Tensor]:
        """The loss of every kind of label; a kind that a batch lacks has none."""
        # Summed over tags: a row is as wrong as all its wrong tags together.
        frame = F.binary_cross_entropy_with_logits(
            self.frame(rows).float(), batch.frame_tags, reduction="none"
        )
        clip = F.binary_cross_entropy_with_logits(
            self.clip(pooled).float(), batch.clip_tags, reduction="none"
        )
        losses = {"frame": frame.sum(-1)[batch.frame_mask].mean(), "clip": clip.sum(-1).mean()}
        if len(batch.words):
            words = self.word(span_means(rows, batch.word_spans)).float()
            losses["word"] = F.cross_entropy(words, batch.words)
        if len(batch.music):
            notes = self.pitch(rows).float().transpose(1, 2)
            losses["pitch"] = F.cross_entropy(notes, batch.pitches, ignore_index=_NO_PITCH)
            music = self.music(span_means(rows, batch.music_spans)).float()
            losses["music"] = F.binary_cross_entropy_with_logits(music, batch.music)
        return losses


# What each kind of label weighs in the loss of an encoder. The temporal encoder's pooled clip is
# thrown away; the event encoder sees 64 mel bands of 48 kHz, too coarse for words and for notes.
_WEIGHTS = {
    "whisper": {"frame": 1.0, "clip": 0.1, "word": 3.0, "pitch": 3.0, "music": 3.0},
    "htsat": {"frame": 1.0, "clip": 0.3, "word": 0.0, "pitch": 0.0, "music": 1.0},
}
_N_PITCHES = 128  # MIDI
_NO_PITCH = -100


def span_means(rows: Tensor, spans: Tensor) -> Tensor:
    """Mean of ``rows (B, N, size)`` over each span ``(M, 3)``: ``(M, size)``."""
    position = torch.arange(rows.shape[1], device=rows.device)
    inside = (position >= spans[:, 1:2]) & (position < spans[:, 2:3])
    weights = inside.to(rows.dtype) / inside.sum(1, keepdim=True).to(rows.dtype)
    return torch.einsum("mn,mnd->md", weights, rows[spans[:, 0]])


def pretrain_encoder(
    encoder: nn.Module,
    config: TinyGiantConfig,
    task: EncoderTask,
    train_set: WorldDataset,
    validation_set: WorldDataset,
    folder: Path,
    device: torch.device,
    seed: int,
) -> nn.Module:
    """Train ``encoder`` on tags, through new heads; the run's state stays in ``folder``."""
    weights = _WEIGHTS[task.component]
    temporal = task.component == "whisper"
    size = config.whisper_config.d_model if temporal else config.htsat_config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = Heads(size, train_set.frame_labels(0).shape[1], train_set.clip_labels(0).shape[0])
    encoder.to(device).train()
    heads.to(device)
    steps_per_token = config.steps_per_row
    window_tokens = round(config.event_features.window_s / config.runtime.row_s)

    def encode(batch: EncoderBatch) -> tuple[Tensor, Tensor]:
        """Rows ``(B, N, size)`` and the pooled clip ``(B, size)``."""
        n_rows = batch.frame_tags.shape[1]
        if temporal:
            rows = encode_temporal(cast(WhisperEncoder, encoder), batch.features, steps_per_token)
            rows = rows[:, :n_rows]
            weights = batch.frame_mask.to(rows.dtype).unsqueeze(-1)
            return rows, (rows * weights).sum(1) / weights.sum(1)
        events, pooled = encode_event(cast(ClapAudioEncoder, encoder), batch.features)
        rows = F.adaptive_avg_pool1d(events.transpose(1, 2), window_tokens).transpose(1, 2)
        # Clips of one batch are alike in length: each gets as many windows as the longest has.
        n_clips = len(batch.frame_tags)
        rows = rows.reshape(n_clips, -1, rows.shape[-1])[:, :n_rows]
        return rows, pooled.reshape(n_clips, -1, pooled.shape[-1]).mean(1)

    def loss_of(batch: EncoderBatch) -> tuple[Tensor, dict[str, float]]:
        losses = heads.losses(*encode(batch), batch)
        total = torch.stack([weights[kind] * loss for kind, loss in losses.items()]).sum()
        return total, {f"{kind}_loss": float(loss.detach()) for kind, loss in losses.items()}

    batches = LengthBatches(
        [train_set.frame_labels(i).shape[0] for i in range(len(train_set))],
        task.batch_size,
        task.loop.seed,
    )

    def batch_at(number: int) -> EncoderBatch:
        batch = _collate(train_set, batches[number], temporal)
        rng = np.random.default_rng((task.loop.seed, 1, number))
        melodies = set(batch.music_spans[:, 0].tolist())
        augment(batch.features, task.augmentation, rng, 1 if temporal else 3, melodies)
        return batch.to(device)

    def evaluate() -> dict[str, float]:
        encoder.eval()
        totals = np.zeros(9)
        with torch.no_grad(), autocast(task.loop.precision, device):
            for start in range(0, len(validation_set), task.batch_size):
                indices = list(range(start, min(start + task.batch_size, len(validation_set))))
                batch = _collate(validation_set, indices, temporal).to(device)
                rows = encode(batch)[0]
                guess = (heads.frame(rows) > 0)[batch.frame_mask]
                truth = (batch.frame_tags > 0.5)[batch.frame_mask]
                words = heads.word(span_means(rows, batch.word_spans)).argmax(-1)
                music = heads.music(span_means(rows, batch.music_spans)) > 0
                played = batch.pitches != _NO_PITCH
                notes = heads.pitch(rows).argmax(-1)[played]
                totals += [
                    float((guess & truth).sum()),
                    float(truth.sum() + guess.sum()) / 2,
                    float((words == batch.words).sum()),
                    len(words),
                    float((music[:, 0] == (batch.music[:, 0] > 0.5)).sum()),
                    float((music[:, 1] == (batch.music[:, 1] > 0.5)).sum()),
                    len(music),
                    float((notes == batch.pitches[played]).sum()),
                    len(notes),
                ]
        encoder.train()
        hits, tags, words_right, n_words, direction, mode, n_music, pitches, n_rows = totals
        return {
            "validation_frame_f1": hits / max(tags, 1.0),
            "validation_words": words_right / max(n_words, 1.0),
            "validation_direction": direction / max(n_music, 1.0),
            "validation_mode": mode / max(n_music, 1.0),
            "validation_pitch": pitches / max(n_rows, 1.0),
        }

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
        n_windows = max(len(windows) for _, windows in pairs)
        features = torch.empty(len(indices), n_windows, *pairs[0][1].shape[1:])
        for b, (_, windows) in enumerate(pairs):
            features[b] = float(windows.min())
            features[b, : len(windows)] = torch.from_numpy(windows.astype(np.float32))
        features = features.flatten(0, 1).unsqueeze(1)
    spans = _spans([dataset.scene(i) for i in indices], n_rows)
    return EncoderBatch(features, frame_tags, frame_mask, clip_tags, *spans)


def _spans(scenes: Sequence[Scene], n_rows: int) -> tuple[Tensor, ...]:
    """Words, pitches and music of a batch, in the order of :class:`EncoderBatch`."""
    word_spans, words, music_spans, music = [], [], [], []
    pitches = torch.full((len(scenes), n_rows), _NO_PITCH)
    for b, scene in enumerate(scenes):
        if scene.speech is not None:
            speech = scene.speech
            for word, start_s, end_s in zip(
                speech.words, speech.starts_s, speech.ends_s, strict=True
            ):
                word_spans.append([b, *_rows(start_s, end_s)])
                words.append(WORDS.index(word))
        if scene.music is not None:
            melody = scene.music
            for beat, pitch in enumerate(melody.pitches):
                start_s = melody.start_s + beat * melody.beat_s
                first, stop = _rows(start_s, start_s + melody.beat_s)
                pitches[b, first:stop] = pitch
            music_spans.append([b, *_rows(melody.start_s, melody.end_s)])
            music.append([melody.rising, melody.major, melody.fast, melody.meter == 3])
    return (
        torch.tensor(word_spans, dtype=torch.long).reshape(-1, 3),
        torch.tensor(words, dtype=torch.long),
        pitches,
        torch.tensor(music_spans, dtype=torch.long).reshape(-1, 3),
        torch.tensor(music, dtype=torch.float32).reshape(-1, 4),
    )


def _rows(start_s: float, end_s: float) -> tuple[int, int]:
    """First row of a span of time and the row behind its last; at least one row."""
    first = int(start_s * ROWS_PER_S)
    return first, max(first + 1, math.ceil(end_s * ROWS_PER_S))
