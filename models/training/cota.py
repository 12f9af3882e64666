"""The paper's recipe on data of CoTA's format (Audio-Reasoner): parquet, one question a row.

Columns: ``audio`` (a struct of ``array`` and ``sampling_rate``, or of an encoded file's ``bytes``,
as the datasets library stores it), ``user`` (starts with ``<audio>``) and ``assistant``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tinygiant.runtime.audio import Audio, read_audio
from tinygiant.runtime.errors import CheckpointError, TinyGiantError, UsageError
from tinygiant.runtime.preprocess import preprocess
from tinygiant.runtime.prompt import build_prompt
from tinygiant.runtime.tokenizer import Tokenizer

from ..checkpoint import TOKENIZER_FILE, load, load_config, save
from ..parts import Parts, assemble
from ..tinygiant import TinyGiantALM
from .loop import LoopConfig, recipe_table
from .reasoning import ReasoningTask, Sample, train_reasoning
from .world_set import END_OF_TURN

__all__ = ["CotaRun", "CotaSet", "train_cota"]

_COLUMNS = ("audio", "user", "assistant")
# A day: the limit is on what a row may ask to decode, not on what is used of it.
_MAX_AUDIO_S = 86_400.0


class CotaSet:
    """Rows of parquet files as training samples; audio is encoded when a sample is read.

    ``cut_audio`` and ``cut_text`` count the samples read so far that were longer than one chunk of
    audio, or than ``max_text_tokens``.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        model: TinyGiantALM,
        tokenizer: Tokenizer,
        max_text_tokens: int,
    ) -> None:
        self._model = model
        self._runtime = model.config.runtime
        self._tokenizer = tokenizer
        self._max_text_tokens = max_text_tokens
        self._files = [_open(path) for path in paths]
        self._groups = [
            (file, group)
            for file, parquet in enumerate(self._files)
            for group in range(parquet.num_row_groups)
        ]
        sizes = [
            self._files[file].metadata.row_group(group).num_rows for file, group in self._groups
        ]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._lengths = [
            len(text.as_py())
            for parquet in self._files
            for text in parquet.read(columns=["assistant"])["assistant"]
        ]
        self._loaded: tuple[int, pa.Table] | None = None
        self.cut_audio = 0
        self.cut_text = 0

    def __len__(self) -> int:
        return int(self._starts[-1])

    def lengths(self) -> Sequence[int]:
        """Characters of each response."""
        return self._lengths

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Row ``index``; nothing varies between epochs.

        Raises:
            TinyGiantError: the row's audio or text cannot be used; the row is named.
        """
        row = self._row(index)
        try:
            audio = _audio(row["audio"])
            chunk = preprocess(audio, self._runtime)[0]
            self.cut_audio += audio.used_s > self._runtime.chunk_s
            question = str(row["user"]).replace(self._model.config.prompt.audio_marker, "", 1)
            prompt = build_prompt(question, None, self._tokenizer, self._runtime.prompt)
        except TinyGiantError as error:
            raise type(error)(f"row {index}: {error}") from error
        # CoTA writes <THINK>; the decoder's vocabulary has <think> as one token.
        text = re.sub(r"<(/?)THINK>", r"<\1think>", str(row["assistant"]))
        response = self._tokenizer.encode_markup(text + END_OF_TURN)
        room = self._max_text_tokens - len(prompt.prefix_ids) - len(prompt.suffix_ids)
        self.cut_text += len(response) > room
        streams, anchor = self._model.encode_chunk(chunk)
        return Sample(
            streams=streams[0].cpu().numpy(),
            anchor=anchor[0].cpu().numpy(),
            prefix_ids=prompt.prefix_ids,
            suffix_ids=prompt.suffix_ids,
            instruction_ids=prompt.instruction_ids,
            response_ids=response[: max(room, 1)],
        )

    def _row(self, index: int) -> Mapping[str, Any]:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if self._loaded is None or self._loaded[0] != group:
            file, number = self._groups[group]
            table = self._files[file].read_row_group(number, columns=list(_COLUMNS))
            self._loaded = (group, table)
        row: Mapping[str, Any] = self._loaded[1].slice(index - int(self._starts[group]), 1)
        return {name: row[name][0].as_py() for name in _COLUMNS}


@dataclass(frozen=True)
class CotaRun:
    """A run of the paper's recipe: from a checkpoint of this project, or from public parts."""

    folder: Path
    data: Sequence[Path]
    validation: Sequence[Path]
    start: Path | Parts
    recipe: Mapping[str, Any]
    seed: int
    device: torch.device


def train_cota(run: CotaRun) -> Path:
    """Train projector and decoder; returns the checkpoint's folder."""
    if isinstance(run.start, Parts):
        model, tokenizer_path = assemble(run.start, seed=run.seed), run.start.qwen3
    else:
        load_config(run.start)
        model, tokenizer_path = load(run.start), run.start
    tokenizer_path = tokenizer_path / TOKENIZER_FILE
    tokenizer = Tokenizer.from_file(tokenizer_path)
    model.to(run.device)
    settings = dict(run.recipe["reasoning"])
    max_text_tokens = settings.pop("max_text_tokens")
    train_set, validation_set = (
        CotaSet(paths, model, tokenizer, max_text_tokens) for paths in (run.data, run.validation)
    )
    task = recipe_task(settings, len(train_set), run.seed)
    train_reasoning(model, task, train_set, validation_set, run.folder / "reasoning", run.device)
    for what, count in (("audio", train_set.cut_audio), ("text", train_set.cut_text)):
        print(f"tg-train: {count} samples had their {what} cut to the limit", file=sys.stderr)
    checkpoint = run.folder / "checkpoint"
    save(model.cpu(), checkpoint, tokenizer=tokenizer_path)
    return checkpoint


def recipe_task(settings: Mapping[str, Any], n_samples: int, seed: int) -> ReasoningTask:
    """The task of a recipe that counts in epochs, for a data set of ``n_samples``.

    Raises:
        UsageError: the recipe has fields it should not have, or lacks some.
    """
    fields = dict(settings)
    with recipe_table("reasoning"):
        batch = fields["batch_size"] * fields["accumulate"]
        steps = math.ceil(fields.pop("epochs") * n_samples / batch)
        warmup = max(1, round(fields.pop("warmup_fraction") * steps))
        own = {f.name for f in dataclasses.fields(ReasoningTask)} - {"loop", "draw_ahead"}
        task_fields = {name: fields.pop(name) for name in own}
        loop = LoopConfig(steps=steps, warmup_steps=warmup, seed=seed, **fields)
    return ReasoningTask(loop=loop, **task_fields)


def _audio(value: Any) -> Audio:
    if isinstance(value, dict) and value.get("bytes") is not None:
        return read_audio(value["bytes"], max_audio_s=_MAX_AUDIO_S)
    if isinstance(value, dict) and value.get("array") is not None:
        array = np.asarray(value["array"], dtype=np.float32)
        return read_audio((array, int(value["sampling_rate"])), max_audio_s=_MAX_AUDIO_S)
    raise CheckpointError("the audio column holds neither 'array' and 'sampling_rate' nor 'bytes'")


def _open(path: Path) -> pq.ParquetFile:
    try:
        parquet = pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{path}: not a readable parquet file ({error})") from error
    missing = [name for name in _COLUMNS if name not in parquet.schema_arrow.names]
    if missing:
        raise UsageError(f"{path}: columns missing, {', '.join(missing)}; expected CoTA's")
    return parquet
