"""Nano from nothing: world, tokenizer, encoders, cached streams, projector and decoder, checkpoint.

Every step leaves its result in the run's folder and is skipped when it is there, so the same
command resumes an interrupted run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tinygiant.runtime.config import QuestionKind, Scope
from tinygiant.runtime.errors import TinyGiantError
from tinygiant.runtime.tokenizer import Tokenizer

from ..checkpoint import TOKENIZER_FILE, load, load_component, load_config, save
from ..config import TinyGiantConfig, preset
from ..tensors import load_into, open_tensors
from ..tinygiant import build, build_component
from ..world.dataset import WorldDataset
from ..world.dataset import build as build_world
from ..world.scene import LONGEST_S, SHORTEST_S
from .augmentation import Augmentation
from .encoders import EncoderTask, pretrain_encoder
from .loop import LoopConfig, recipe_table
from .reasoning import ReasoningTask, train_reasoning
from .streams import cache_streams
from .tokenizer import train_tokenizer
from .world_set import (
    WorldDrillSet,
    WorldFormsSet,
    WorldReasoningSet,
    training_texts,
)

__all__ = ["ENCODERS", "NanoRun", "pretrain", "train_nano"]

ENCODERS = ("whisper", "htsat")


@dataclass(frozen=True)
class _Stage:
    """What projector and decoder are asked, and which of a recipe's settings say how."""

    questions: Callable[..., WorldReasoningSet]
    validation: Callable[..., WorldReasoningSet]
    options: tuple[str, ...] = ()


_STAGES = {
    "reasoning": _Stage(WorldReasoningSet, WorldReasoningSet),
    "drill": _Stage(WorldDrillSet, WorldReasoningSet),
    "forms": _Stage(WorldFormsSet, WorldFormsSet, ("first_clip", "given")),
}


@dataclass(frozen=True)
class NanoRun:
    """One run: where everything is, and what it varies.

    ``encoders`` is another run's folder whose tokenizer, encoders and streams are taken over, as
    for the ablations, which share them. ``decoder`` is a checkpoint whose decoder is where this
    run's starts from.
    """

    folder: Path
    data: Path
    cache: Path
    recipe: dict[str, Any]
    seed: int
    device: torch.device
    intent_query: bool = True
    semantic_gate: bool = True
    encoders: Path | None = None
    decoder: Path | None = None
    start: Path | None = None
    recipe_file: Path | None = None

    @property
    def shared(self) -> Path:
        """The folder with tokenizer, encoders and streams."""
        return self.encoders or self.folder

    @property
    def config(self) -> TinyGiantConfig:
        """Nano's configuration with this run's ablations, and what it is trained for."""
        nano = preset("nano")
        projector = dataclasses.replace(
            nano.projector, intent_query=self.intent_query, semantic_gate=self.semantic_gate
        )
        questions: tuple[QuestionKind, ...] = ("choices",)
        if "forms" in self.recipe:
            questions = ("choices", "open", "choices-at-once", "open-at-once")
        scope = Scope(SHORTEST_S, LONGEST_S, questions, ("en",))
        return dataclasses.replace(nano, projector=projector, scope=scope)


def train_nano(run: NanoRun) -> Path:
    """Do whatever is still missing of a run; returns the checkpoint's folder."""
    checkpoint = run.folder / "checkpoint"
    if checkpoint.is_dir():
        return checkpoint
    # A wrong recipe or folder is told before the world is built, which takes minutes.
    _check_recipe(run)
    if run.start is not None:
        load_config(run.start)
    world = run.recipe["world"]
    for split in ("train", "validation"):
        build_world(
            split,
            world[f"{split}_clips"],
            run.data,
            run.cache,
            workers=2,
            seed=world["seed"],
            kind=world.get("kind", "mixed"),
        )
    train_set, validation_set = (WorldDataset(run.data / s) for s in ("train", "validation"))
    config = run.config
    tokenizer_path = run.shared / TOKENIZER_FILE
    if not tokenizer_path.is_file():
        run.shared.mkdir(parents=True, exist_ok=True)
        if run.start is not None:
            shutil.copyfile(run.start / TOKENIZER_FILE, tokenizer_path)
        else:
            texts = training_texts(train_set, config.prompt)
            train_tokenizer(texts, config.decoder["vocab_size"], tokenizer_path)
    _pretrain_encoders(run)
    model = build(config, run.seed) if run.start is None else load(run.start)
    model.config = dataclasses.replace(model.config, scope=config.scope)
    if run.decoder is not None:
        model.decoder.load_state_dict(load(run.decoder).decoder.state_dict())
    for name in ENCODERS:
        path = _encoder_file(run, name)
        load_into(getattr(model, name), open_tensors(path), where=str(path))
    streams = {}
    for split, dataset in (("train", train_set), ("validation", validation_set)):
        print_ = _fingerprint(run, dataset)
        streams[split] = cache_streams(
            model, dataset, run.shared / "streams" / split, fingerprint=print_
        )
    tokenizer = Tokenizer.from_file(tokenizer_path)
    arguments = {
        split: (dataset, streams[split], tokenizer, config.runtime)
        for split, dataset in (("train", train_set), ("validation", validation_set))
    }
    for stage in _STAGES:
        if stage in run.recipe:
            asked, task = _reasoning_task(run, stage)
            questions = _STAGES[stage].questions(*arguments["train"], **asked)
            validation = _STAGES[stage].validation(*arguments["validation"])
            train_reasoning(model, task, questions, validation, run.folder / stage, run.device)
    save(model.cpu(), checkpoint, tokenizer=tokenizer_path)
    return checkpoint


def _check_recipe(run: NanoRun) -> None:
    """Make every task of the recipe, so that a table that does not fit is told at once."""
    if run.encoders is None:
        for name in ENCODERS:
            _encoder_task(run, name)
    for stage in _STAGES:
        if stage in run.recipe:
            _reasoning_task(run, stage)


def _reasoning_task(run: NanoRun, stage: str) -> tuple[dict[str, Any], ReasoningTask]:
    """How a stage draws its questions, and how it learns from them."""
    settings = dict(run.recipe[stage])
    asked = {name: settings.pop(name) for name in _STAGES[stage].options if name in settings}
    with recipe_table(stage):
        return asked, ReasoningTask(
            batch_size=settings.pop("batch_size"),
            projector_learning_rate=settings.pop("projector_learning_rate"),
            decoder_learning_rate=settings.pop("decoder_learning_rate"),
            draw_ahead=settings.pop("draw_ahead", 1),
            loop=LoopConfig(seed=run.seed, **settings),
        )


def _encoder_task(run: NanoRun, name: str) -> tuple[int | None, EncoderTask]:
    """How many clips an encoder learns from, and how."""
    with recipe_table(f"encoders.{name}"):
        settings = dict(run.recipe["encoders"][name])
        n_clips = settings.pop("clips", None)
        return n_clips, EncoderTask(
            component=name,
            batch_size=settings.pop("batch_size"),
            learning_rate=settings.pop("learning_rate"),
            augmentation=Augmentation(**settings.pop("augmentation", {})),
            loop=LoopConfig(seed=run.seed, **settings),
        )


def pretrain(run: NanoRun, name: str) -> None:
    """Pre-train one encoder of a run and leave its weights in the run's folder."""
    n_clips, task = _encoder_task(run, name)
    train_set = WorldDataset(run.data / "train", n_clips)
    validation_set = WorldDataset(run.data / "validation")
    if run.start is None:
        fresh = build_component(run.config, name, run.seed)
    else:
        fresh = load_component(run.start, name)
    assert fresh is not None, "nano has this component"
    encoder = pretrain_encoder(
        fresh,
        run.config,
        task,
        train_set,
        validation_set,
        run.folder / f"encoder-{name}",
        run.device,
        run.seed,
    )
    path = _encoder_file(run, name)
    unfinished = path.with_suffix(".partial")
    save_file({k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}, unfinished)
    unfinished.replace(path)


def _pretrain_encoders(run: NanoRun) -> None:
    """Both encoders; on a CPU at the same time, a core each, which wastes less than two a step."""
    missing = [name for name in ENCODERS if not _encoder_file(run, name).is_file()]
    if run.encoders is not None and missing:
        raise TinyGiantError(
            f"{run.encoders}: no trained encoders ({', '.join(missing)}); finish that run first"
        )
    if run.device.type != "cpu":
        for name in missing:
            pretrain(run, name)
        return
    command = [sys.executable, "-m", "tinygiant.models.training.cli", "encoder"]
    options = ["--out", str(run.folder), "--data", str(run.data), "--seed", str(run.seed)]
    if run.recipe_file is not None:
        options += ["--recipe", str(run.recipe_file)]
    if run.start is not None:
        options += ["--start", str(run.start)]
    processes = [subprocess.Popen([*command, name, *options]) for name in missing]
    failed = [name for name, p in zip(missing, processes, strict=True) if p.wait() != 0]
    if failed:
        raise TinyGiantError(f"pre-training failed for {', '.join(failed)}; see the lines above")


def _encoder_file(run: NanoRun, name: str) -> Path:
    return run.shared / f"encoder-{name}" / "encoder.safetensors"


def _fingerprint(run: NanoRun, dataset: WorldDataset) -> str:
    digest = hashlib.sha256(json.dumps([len(dataset), run.recipe["world"]]).encode())
    for name in ENCODERS:
        digest.update(_encoder_file(run, name).read_bytes())
    return digest.hexdigest()
