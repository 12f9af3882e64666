"""Frozen encoders run once: their outputs for a whole split, kept on disk.

After pre-training the encoders never change (paper: frozen), so the second stage reads cached
streams. That is most of the cost of a step saved, and what makes training on a CPU bearable.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tinygiant.runtime.config import ModelConfig
from tinygiant.runtime.preprocess import Chunk

from ..config import EVENT, TEMPORAL
from ..tinygiant import TinyGiantALM
from ..world.dataset import WorldDataset

__all__ = ["CachedStreams", "cache_streams"]

_BATCH_CLIPS = 16


class CachedStreams:
    """A split's ``streams(i) (N, stream_size)`` and ``anchor(i) (anchor_size,)``."""

    def __init__(self, folder: Path) -> None:
        self._rows = np.load(folder / "streams.npy", mmap_mode="r")
        self._offsets = np.load(folder / "offsets.npy")
        self._anchors = np.load(folder / "anchors.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self._anchors)

    def n_tokens(self, index: int) -> int:
        """Audio tokens of clip ``index``."""
        return int(self._offsets[index + 1] - self._offsets[index])

    def streams(self, index: int) -> NDArray[np.float32]:
        """Joined streams of clip ``index``, ``(N, stream_size) float32``."""
        start, stop = self._offsets[index : index + 2]
        return np.asarray(self._rows[start:stop], dtype=np.float32)

    def anchor(self, index: int) -> NDArray[np.float32]:
        """CLAP anchor of clip ``index``, ``(anchor_size,) float32``."""
        return np.asarray(self._anchors[index], dtype=np.float32)


def cache_streams(
    model: TinyGiantALM, dataset: WorldDataset, folder: Path, *, fingerprint: str
) -> CachedStreams:
    """Run the encoders over a split, or reuse what an earlier run with the same weights left.

    Args:
        model: encoders in evaluation mode.
        dataset: the split.
        folder: where the arrays go.
        fingerprint: of encoders and data; a cache of another one is made anew.
    """
    stamp = folder / "fingerprint.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == fingerprint:
        return CachedStreams(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    # Clips of one length form batches: nothing is padded, so nothing differs from a clip alone.
    by_length: dict[int, list[int]] = {}
    for index in range(len(dataset)):
        by_length.setdefault(len(dataset.frame_labels(index)), []).append(index)
    rows: dict[int, NDArray[np.float16]] = {}
    anchors: dict[int, NDArray[np.float16]] = {}
    bar = tqdm(total=len(dataset), desc=f"encoding {folder.name}", unit="clip")
    for indices in by_length.values():
        for start in range(0, len(indices), _BATCH_CLIPS):
            batch = indices[start : start + _BATCH_CLIPS]
            chunks = [_chunk(dataset, index, model.config.runtime) for index in batch]
            for index, (streams, anchor) in zip(batch, model.encode_chunks(chunks), strict=True):
                rows[index] = streams[0].cpu().numpy().astype(np.float16)
                anchors[index] = anchor[0].cpu().numpy().astype(np.float16)
            bar.update(len(batch))
    bar.close()
    in_order = [rows[index] for index in range(len(dataset))]
    np.save(folder / "streams.npy", np.concatenate(in_order))
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, in_order)]))
    np.save(folder / "anchors.npy", np.stack([anchors[i] for i in range(len(dataset))]))
    stamp.write_text(json.dumps(fingerprint))
    return CachedStreams(folder)


def _chunk(dataset: WorldDataset, index: int, config: ModelConfig) -> Chunk:
    """A clip's stored features as the encoders see them."""
    whisper, windows = dataset.features(index)
    n_tokens = len(dataset.frame_labels(index))
    duration_s = n_tokens * config.row_s
    encoder = next(encoder for encoder in config.encoders if encoder.graph == TEMPORAL)
    n_frames = config.frames(encoder, duration_s)
    temporal = np.full((whisper.shape[0], n_frames), float(whisper.min()), dtype=np.float32)
    width = min(n_frames, whisper.shape[1])
    temporal[:, :width] = whisper[:, :width]
    return Chunk(
        duration_s=duration_s,
        n_rows=config.audio_rows(duration_s),
        windows={
            TEMPORAL: (temporal[None],),
            EVENT: tuple(windows.astype(np.float32)[:, None, None]),
        },
    )
