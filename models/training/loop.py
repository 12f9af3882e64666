"""The training loop: any model, any loss, resumable to the bit.

What a step sees is a pure function of the seed and the step's number, so a run that was killed and
resumed from its last state gives the same weights as one that was not (same machine, same number
of threads). The state is written to a temporary file and renamed: a kill loses at most the steps
since the last one.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinygiant.runtime.errors import CheckpointError, StorageError, TinyGiantError, UsageError

__all__ = ["LoopConfig", "ParameterGroup", "recipe_table", "train"]

Precision = Literal["auto", "float32", "bfloat16"]
STATE_FILE = "state.pt"
LOG_FILE = "log.jsonl"
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to learn.

    ``steps`` optimizer steps, each over ``accumulate`` batches. The learning rate of each group
    rises linearly for ``warmup_steps``, then falls as a cosine to ``final_fraction`` of the peak.
    ``precision = auto`` uses bfloat16 autocast where the device multiplies it natively.
    """

    steps: int
    accumulate: int = 1
    warmup_steps: int = 100
    final_fraction: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: Precision = "auto"
    seed: int = 0
    log_every: int = 20
    save_every: int = 200
    evaluate_every: int = 500


@contextmanager
def recipe_table(name: str) -> Iterator[None]:
    """What is made of a recipe's table inside is told if the table does not fit.

    Raises:
        UsageError: the table lacks a setting, or has an unknown one.
    """
    try:
        yield
    except KeyError as error:
        raise UsageError(f"recipe: [{name}] has no {error.args[0]!r}") from error
    except TypeError as error:
        raise UsageError(f"recipe: [{name}] {str(error).partition('() ')[2] or error}") from error


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a peak learning rate."""

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float


def train(
    config: LoopConfig,
    *,
    modules: Mapping[str, nn.Module],
    groups: Iterable[ParameterGroup],
    batch_at: Callable[[int], Batch],
    loss_of: Callable[[Batch], tuple[Tensor, dict[str, float]]],
    folder: Path,
    device: torch.device,
    evaluate: Callable[[], dict[str, float]] | None = None,
    title: str = "training",
) -> None:
    """Train ``modules`` in place; resumes by itself from the state in ``folder``.

    Args:
        config: the schedule.
        modules: what is trained, by the name it has in the saved state.
        groups: which parameters learn at which rate.
        batch_at: the batch of a given number, counted from 0 over the whole run; must be pure.
        loss_of: mean loss of a batch and the numbers to log beside it.
        folder: where the state and the JSON-lines log go.
        device: where the modules are.
        evaluate: called every ``evaluate_every`` steps and at the end; its numbers are logged.
        title: shown beside the progress bar.

    Raises:
        CheckpointError: the state in ``folder`` is of another run.
        StorageError: the state or the log cannot be written.
        TinyGiantError: the loss is not finite.
    """
    _keep_freed_memory()
    groups = list(groups)
    optimizer = torch.optim.AdamW(
        [{"params": g.parameters, "lr": g.learning_rate, "name": g.name} for g in groups],
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    parameters = [p for g in groups for p in g.parameters]
    step = _resume(folder, modules, optimizer)
    bar = tqdm(total=config.steps, initial=step, desc=title, unit="step", file=sys.stderr)
    started, first_step = time.monotonic(), step
    with _open_log(folder, step) as log:
        while step < config.steps:
            scale = schedule(config, step)
            for group, settings in zip(groups, optimizer.param_groups, strict=True):
                settings["lr"] = group.learning_rate * scale
            optimizer.zero_grad(set_to_none=True)
            numbers: dict[str, float] = {}
            for part in range(config.accumulate):
                with autocast(config.precision, device):
                    loss, extra = loss_of(batch_at(step * config.accumulate + part))
                (loss / config.accumulate).backward()
                for name, value in {"loss": float(loss.detach()), **extra}.items():
                    numbers[name] = numbers.get(name, 0.0) + value / config.accumulate
            if not math.isfinite(numbers["loss"]):
                raise TinyGiantError(
                    f"{title}: the loss is {numbers['loss']} at step {step}; lower the learning "
                    f"rate, or resume from the state in {folder}"
                )
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            step += 1
            bar.update()
            if step % config.log_every == 0 or step == config.steps:
                numbers |= {
                    "step": step,
                    "grad_norm": float(norm),
                    "lr_scale": scale,
                    "steps_per_s": (step - first_step) / (time.monotonic() - started),
                }
                bar.set_postfix(loss=f"{numbers['loss']:.4f}")
                _write_log(log, numbers)
            if evaluate is not None and (step % config.evaluate_every == 0 or step == config.steps):
                _write_log(log, {"step": step, **evaluate()})
            if step % config.save_every == 0 or step == config.steps:
                _save(folder, step, modules, optimizer)
    bar.close()


def schedule(config: LoopConfig, step: int) -> float:
    """Fraction of the peak learning rate at a step: linear warm-up, then cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return config.final_fraction + (1 - config.final_fraction) * cosine


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a precision on a device."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported()
        else:
            native = bool(_cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"})
        precision = "bfloat16" if native else "float32"
    if precision == "bfloat16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def _cpu_flags() -> set[str]:
    # Without native support oneDNN converts bfloat16 to float32 around every product: slower.
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("flags", "Features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep what it frees.

    By default it returns every large block to the kernel and gets it back, page by page, a moment
    later: measured at half of a step's time for nano. Other allocators have no such call.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def _save(
    folder: Path, step: int, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> None:
    state = {
        "step": step,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizer": optimizer.state_dict(),
    }
    temporary = folder / (STATE_FILE + ".partial")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE_FILE)
    except (OSError, RuntimeError) as error:
        raise StorageError(f"{folder}: the training state cannot be written ({error})") from error


def _resume(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> int:
    path = folder / STATE_FILE
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{path}: this state is of another run ({reason}); give a fresh folder, or remove it"
        ) from error


def _open_log(folder: Path, step: int) -> TextIO:
    """The log, cut back to the step that the state is at, so that no step stands in it twice."""
    path = folder / LOG_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                kept = [line for line in file if json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")
        return path.open("a", encoding="utf-8")
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{path}: the training log cannot be kept ({error})") from error


def _write_log(log: TextIO, numbers: Mapping[str, float]) -> None:
    log.write(json.dumps({name: round(value, 6) for name, value in numbers.items()}) + "\n")
    log.flush()
