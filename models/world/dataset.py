"""Building and reading a split of the world on disk.

    DIR/<split>/
        shards/0000/            500 clips, complete or absent
            whisper.npy         (sum of frames, 128) float16, log-mel at 100 frames a second
            clap.npy            (sum of windows, 1001, 64) float16, log-mel of each 10 s
            frames.npy          (sum of rows, n_frame_tags) uint8, dense labels at 10 rows a second
            offsets.npy         (501, 3) int64, first frame, row and window of every clip; the end
            clips.jsonl         scene and clip-level tags
            meta.jsonl          questions, MMAR's fields
            open.jsonl          questions without choices
            fresh.jsonl         of test and shifted clips: those in fresh phrasings
        audio/<id>.flac         48 kHz, on request
        {clips,meta,open}.jsonl all shards' lines, written when the split is complete

A clip's Whisper frames cover its label rows and 1 s of zeros: ``10 * (rows + 10)`` frames. Shards
are made independently and renamed when complete, so that an interrupted build goes on where it
was, and any number of workers gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray
from tqdm import tqdm

from tinygiant.runtime.audio import resample
from tinygiant.runtime.errors import StorageError
from tinygiant.runtime.features import log_mel

from ..features import WHISPER, ClapFeatures
from .dsp import RATE_HZ, Audio
from .engines import Banks, load_banks
from .labels import CLIP_TAGS, FRAME_TAGS, clip_labels, frame_labels, n_rows
from .questions import question_records
from .render import render
from .scene import Scene, sample_scene, scene_from_dict, scene_to_dict
from .vocabulary import Kind, Split

__all__ = ["SHARD_CLIPS", "WorldDataset", "build", "clip_features"]

SHARD_CLIPS = 500
MARGIN_ROWS = 10
_FRAMES_PER_ROW = 10
_TESTED: tuple[Split, ...] = ("test", "shifted")
# folder, cache_dir, split, shard, size, seed, audio, questions, kind
_Job = tuple[Path, Path, Split, int, int, int, bool, int, Kind]
_WINDOW = 10 * RATE_HZ


def clip_features(samples: Audio, scene: Scene) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Whisper ``(n_frames, 128)`` and CLAP ``(n_windows, 1001, 64)`` log-mel of a clip at 48 kHz.

    ``n_frames = 10 * (n_rows(scene) + 10)``: the clip and 1 s of zeros; a window is 10 s.
    """
    n_frames = _FRAMES_PER_ROW * (n_rows(scene) + MARGIN_ROWS)
    whisper = log_mel(resample(samples, RATE_HZ, WHISPER.sampling_rate_hz), WHISPER, n_frames)
    clap = ClapFeatures()
    events = [
        log_mel(samples[i : i + _WINDOW], clap.log_mel, clap.log_mel.n_frames(clap.window_s))
        for i in range(0, samples.size, _WINDOW)
    ]
    return whisper.T.astype(np.float16), np.stack(events).astype(np.float16)


def build(
    split: Split,
    n_clips: int,
    out_dir: Path,
    cache_dir: Path,
    workers: int = 2,
    seed: int = 0,
    audio: bool = False,
    questions: int = 4,
    kind: Kind = "core",
) -> Path:
    """Make ``n_clips`` clips of a split under ``out_dir/<split>``, which is returned.

    Clips of another ``kind`` than ``core`` have a folder of their own, ``<split>-<kind>``; those of
    training are always ``mixed`` in ``train``.

    Shards that are already there are kept. ``audio`` also writes 48 kHz FLAC files.

    Raises:
        MissingEngineError: the banks are not in ``cache_dir`` and an engine is missing.
        StorageError: a file cannot be written, or the folder holds a build with other settings.
    """
    own_folder = kind != "core" and split in _TESTED
    folder = out_dir / (f"{split}-{kind}" if own_folder else split)
    settings = {
        "kind": kind,
        "split": split,
        "clips": n_clips,
        "seed": seed,
        "questions": questions,
        "audio": audio,
        "frame_tags": list(FRAME_TAGS),
        "clip_tags": list(CLIP_TAGS),
    }
    if split in _TESTED:
        settings["fresh"] = True
    try:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        _keep_settings(folder / "settings.json", settings)
        load_banks(cache_dir, workers)
        jobs: list[_Job] = []
        for shard, first in enumerate(range(0, n_clips, SHARD_CLIPS)):
            size = min(SHARD_CLIPS, n_clips - first)
            if not (folder / "shards" / f"{shard:04d}").is_dir():
                job = (folder, cache_dir, split, shard, size, seed, audio, questions, kind)
                jobs.append(job)
        done = n_clips - sum(job[4] for job in jobs)
        with tqdm(total=n_clips, initial=done, unit="clip", desc=split) as bar:
            for clips in _run(jobs, workers):
                bar.update(clips)
        for name in ("clips.jsonl", *_asked(split)):
            partial = folder / f"{name}.partial"
            with partial.open("wb") as joined:
                for shard_dir in sorted((folder / "shards").glob("[0-9]*[0-9]")):
                    joined.write((shard_dir / name).read_bytes())
            partial.rename(folder / name)
    except OSError as e:
        if isinstance(e, StorageError):
            raise
        raise StorageError(f"{folder} could not be written: {e}; free space or change --out") from e
    return folder


def _keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix two builds in one folder; only the number of clips may grow by whole shards."""
    if path.is_file():
        old = json.loads(path.read_text())
        grows = old["clips"] % SHARD_CLIPS == 0 and settings["clips"] >= old["clips"]
        if {**old, "clips": 0} != {**settings, "clips": 0} or not (
            grows or old["clips"] == settings["clips"]
        ):
            raise StorageError(
                f"{path.parent} holds a build with other settings: choose another folder, "
                f"remove it, or repeat the settings in {path.name}"
            )
    path.write_text(json.dumps(settings, indent=1))


def _run(jobs: list[_Job], workers: int) -> Iterator[int]:
    """The clips of each shard as it gets done: here if there is one worker, else in processes."""
    if workers == 1:
        yield from (_build_shard(*job) for job in jobs)
        return
    # A forked child of a process that holds torch's threads can hang: start fresh ones.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(_build_shard, *job) for job in jobs]):
            yield finished.result()


def _asked(split: Split) -> dict[str, dict[str, Any]]:
    """The files of a split's questions, and how each is asked."""
    files: dict[str, dict[str, Any]] = {"meta.jsonl": {}, "open.jsonl": {"choices": False}}
    if split in _TESTED:
        files["fresh.jsonl"] = {"choices": False, "wordings": "fresh"}
    return files


def _build_shard(
    folder: Path,
    cache_dir: Path,
    split: Split,
    shard: int,
    size: int,
    seed: int,
    audio: bool,
    questions: int,
    kind: Kind,
) -> int:
    banks = load_banks(cache_dir)
    building = folder / "shards" / f"{shard:04d}.building"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    if audio:
        (folder / "audio").mkdir(exist_ok=True)
    whispers, claps, frames = [], [], []
    offsets = [(0, 0, 0)]
    lines: dict[str, list[Any]] = {name: [] for name in ("clips.jsonl", *_asked(split))}
    for index in range(shard * SHARD_CLIPS, shard * SHARD_CLIPS + size):
        scene, samples = _make_clip(split, index, seed, banks, kind)
        whisper, clap = clip_features(samples, scene)
        rows = frame_labels(scene)
        whispers.append(whisper)
        claps.append(clap)
        frames.append(rows)
        frame, row, window = offsets[-1]
        offsets.append((frame + len(whisper), row + len(rows), window + len(clap)))
        tags = [CLIP_TAGS[k] for k in np.flatnonzero(clip_labels(scene))]
        lines["clips.jsonl"].append({"scene": scene_to_dict(scene), "tags": tags})
        for name, how in _asked(split).items():
            lines[name] += question_records(scene, questions, **how)
        if audio:
            sf.write(folder / "audio" / f"{scene.id}.flac", samples, RATE_HZ, subtype="PCM_16")
    for name, of_file in lines.items():
        text = "".join(json.dumps(line) + "\n" for line in of_file)
        (building / name).write_text(text, encoding="utf-8")
    np.save(building / "whisper.npy", np.concatenate(whispers))
    np.save(building / "clap.npy", np.concatenate(claps))
    np.save(building / "frames.npy", np.concatenate(frames))
    np.save(building / "offsets.npy", np.array(offsets, np.int64))
    building.rename(folder / "shards" / f"{shard:04d}")
    return size


def _make_clip(
    split: Split, index: int, seed: int, banks: Banks, kind: Kind
) -> tuple[Scene, Audio]:
    """A scene and its audio as a 16-bit file holds it, so that features agree with the FLAC."""
    scene = sample_scene(
        split,
        index,
        seed,
        banks.word_duration_s,
        kind=kind,
        recording_duration_s=banks.recording_duration_s,
    )
    samples = render(scene, banks)
    return scene, (np.clip(np.round(samples * 32768), -32768, 32767) / 32768).astype(np.float32)


class WorldDataset:
    """The complete shards of a built split, memory-mapped; ``folder`` is ``DIR/<split>``.

    A split that is still being built can be read too: it has the clips that are complete, in the
    order of their indices.
    """

    def __init__(self, folder: Path | str, n_clips: int | None = None) -> None:
        """Open ``folder``, or the shards of its first ``n_clips``.

        Raises:
            StorageError: it holds no complete shard.
        """
        self.folder = Path(folder)
        self._shards = sorted((self.folder / "shards").glob("[0-9][0-9][0-9][0-9]"))
        if n_clips is not None:
            self._shards = self._shards[: -(-n_clips // SHARD_CLIPS)]
        if not self._shards:
            raise StorageError(
                f"{self.folder} holds no complete shard: build it with python -m "
                f"tinygiant.models.world --split {self.folder.name} --out {self.folder.parent}"
            )
        self._arrays = [
            {
                name: np.load(shard / f"{name}.npy", mmap_mode="r")
                for name in ("whisper", "clap", "frames", "offsets")
            }
            for shard in self._shards
        ]
        sizes = [len(arrays["offsets"]) - 1 for arrays in self._arrays]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, i: int) -> tuple[dict[str, NDArray[Any]], int]:
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        shard = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._arrays[shard], i - int(self._starts[shard])

    def features(self, i: int) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Whisper ``(128, n_frames)`` and CLAP ``(n_windows, 1001, 64)`` float16 log-mel."""
        arrays, k = self._locate(i)
        (first, _, window), (last, _, stop) = arrays["offsets"][k : k + 2]
        return arrays["whisper"][first:last].T, arrays["clap"][window:stop]

    def n_frames(self, i: int) -> int:
        """Whisper frames of clip ``i``, without touching the features."""
        arrays, k = self._locate(i)
        return int(arrays["offsets"][k + 1, 0] - arrays["offsets"][k, 0])

    def frame_labels(self, i: int) -> NDArray[np.uint8]:
        """``(n_rows, len(FRAME_TAGS)) uint8``; ``n_frames = 10 * (n_rows + 10)``."""
        arrays, k = self._locate(i)
        (_, first, _), (_, last, _) = arrays["offsets"][k : k + 2]
        return arrays["frames"][first:last]

    def clip_labels(self, i: int) -> NDArray[np.uint8]:
        """``(len(CLIP_TAGS),) uint8``."""
        return clip_labels(self.scene(i))

    def scene(self, i: int) -> Scene:
        """The scene of clip ``i``."""
        return scene_from_dict(self._clips[i]["scene"])

    def records(self, i: int) -> list[dict[str, Any]]:
        """The question records of clip ``i``, of which an empty clip has few."""
        return self._records.get(self._clips[i]["scene"]["id"], [])

    @cached_property
    def _clips(self) -> list[dict[str, Any]]:
        return list(self._lines("clips.jsonl"))

    @cached_property
    def _records(self) -> dict[str, list[dict[str, Any]]]:
        by_clip: dict[str, list[dict[str, Any]]] = {}
        for record in self._lines("meta.jsonl"):
            by_clip.setdefault(record["id"].rpartition("-q")[0], []).append(record)
        return by_clip

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        for shard in self._shards:
            for line in (shard / name).read_text().splitlines():
                yield json.loads(line)
