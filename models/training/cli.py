"""``tg-train``: make checkpoints.

``tg-train nano`` makes the small model from nothing; ``tg-train cota`` trains a full model's
projector and decoder by the paper's recipe on data of CoTA's format; ``tg-train average`` makes
the mean of several runs.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import tomllib
import typing
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygiant.runtime.cli.interrupt import raise_on_interrupt
from tinygiant.runtime.cli.options import OneLineParser
from tinygiant.runtime.config import AudioContext
from tinygiant.runtime.errors import MissingDependencyError, TinyGiantError, UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["main"]

# Holds the process that started this one as a step of its own, which ends when that one does.
PARENT_VARIABLE = "TINYGIANT_TRAIN_PARENT"


def main(argv: list[str] | None = None) -> int:
    """Run ``tg-train``; returns the exit code (see tinygiant.runtime.errors)."""
    try:
        options = _parser().parse_args(argv)
        _prepare_torch(options.threads)
        options.run(options)
    except TinyGiantError as error:
        print(f"tg-train: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("tg-train: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def _prepare_torch(threads: int) -> None:
    """Import what training needs, here so that --help is instant and a missing extra one line."""
    try:
        import torch

        import tinygiant.models.training.cota
        import tinygiant.models.training.nano
        import tinygiant.models.training.picture  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name or error} is not installed; run: pip install 'tinygiant[train]'"
        ) from error
    raise_on_interrupt()  # from here on there is a state to go on from
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="tg-train", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = OneLineParser(add_help=False)
    common.add_argument("--out", "-o", type=Path, required=True, help="the run's folder")
    common.add_argument("--seed", type=int, default=0, help="seed of weights and order (default 0)")
    common.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    common.add_argument(
        "--recipe", type=Path, help="a TOML file instead of the one that comes with the command"
    )

    nano = commands.add_parser(
        "nano", parents=[common], help="the small model, from scratch, on synthesised audio"
    )
    nano.add_argument("--data", type=Path, help="the world's folder (default: OUT/world)")
    nano.add_argument("--cache", type=Path, help="the engines' banks (default: OUT/banks)")
    nano.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    nano.add_argument("--no-intent-query", action="store_true", help="ablation")
    nano.add_argument("--no-semantic-gate", action="store_true", help="ablation")
    nano.add_argument(
        "--encoders", type=Path, metavar="RUN", help="take tokenizer and encoders from this run"
    )
    nano.add_argument(
        "--decoder", type=Path, metavar="CHECKPOINT", help="start from this checkpoint's decoder"
    )
    nano.add_argument(
        "--start", type=Path, metavar="CHECKPOINT",
        help="continue the training of this checkpoint: encoders, projector and decoder",
    )  # fmt: skip
    nano.set_defaults(run=_nano)

    average = commands.add_parser(
        "average", help="a checkpoint whose projector and decoder are the mean of several runs'"
    )
    average.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT",
        help="two or more of one configuration; the encoders are those of the first",
    )  # fmt: skip
    average.add_argument("--out", "-o", type=Path, required=True, help="the checkpoint to write")
    average.set_defaults(run=_average, threads=1)

    cota = commands.add_parser(
        "cota",
        parents=[common],
        help="the paper's recipe: projector and decoder on parquet files of CoTA's format",
    )
    cota.add_argument("data", type=Path, nargs="+", help="parquet files: audio, user, assistant")
    cota.add_argument("--validation", type=Path, nargs="+", help="parquet files (default: DATA)")
    cota.add_argument("--checkpoint", type=Path, help="start from a checkpoint of this project")
    for part in ("whisper", "htsat", "clap", "qwen3", "projector"):
        cota.add_argument(f"--{part}", type=Path, help="or from public checkpoints on disk")
    cota.add_argument(
        "--audio-context", choices=typing.get_args(AudioContext),
        help="with parts: train on whole windows of 30 s (full, the paper's, the default) or on "
        "clips as long as they are (clip: faster)",
    )  # fmt: skip
    cota.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    cota.set_defaults(run=_cota)

    encoder = commands.add_parser(
        "encoder", parents=[common], help="one step of nano: pre-train one encoder"
    )
    encoder.add_argument("component", help="whisper or htsat")
    encoder.add_argument("--data", type=Path, help="the world's folder (default: OUT/world)")
    encoder.add_argument("--start", type=Path, metavar="CHECKPOINT", help="start from its weights")
    encoder.add_argument("--threads", type=int, default=1)
    encoder.set_defaults(run=_encoder)
    return parser


def _nano(options: argparse.Namespace) -> None:
    from .nano import NanoRun, train_nano
    from .picture import draw_losses

    if options.start and (options.no_intent_query or options.no_semantic_gate or options.decoder):
        raise UsageError(
            "--start takes the whole model as it is; leave out ablations and --decoder"
        )
    run = NanoRun(
        folder=options.out,
        data=options.data or options.out / "world",
        cache=options.cache or options.out / "banks",
        recipe=read_recipe(options.recipe, "nano"),
        recipe_file=options.recipe,
        seed=options.seed,
        device=_device(options.device),
        intent_query=not options.no_intent_query,
        semantic_gate=not options.no_semantic_gate,
        encoders=options.encoders,
        decoder=options.decoder,
        start=options.start,
    )
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    try:
        checkpoint = train_nano(run)
    finally:
        del os.environ[PARENT_VARIABLE]
    draw_losses(options.out)
    print(checkpoint)


def _end_with(parent: int) -> None:
    """End this process once ``parent``, which started it, is gone; also if that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _encoder(options: argparse.Namespace) -> None:
    parent = os.environ.get(PARENT_VARIABLE, "")
    if parent.isdecimal():
        _end_with(int(parent))
    from .nano import ENCODERS, NanoRun, pretrain

    if options.component not in ENCODERS:
        raise UsageError(
            f"component {options.component!r} is unknown; use one of {', '.join(ENCODERS)}"
        )
    run = NanoRun(
        folder=options.out,
        data=options.data or options.out / "world",
        cache=options.out / "banks",
        recipe=read_recipe(options.recipe, "nano"),
        recipe_file=options.recipe,
        seed=options.seed,
        device=_device(options.device),
        start=options.start,
    )
    pretrain(run, options.component)


def _average(options: argparse.Namespace) -> None:
    from .average import average

    average(options.checkpoints, options.out)
    print(options.out)


def _cota(options: argparse.Namespace) -> None:
    from ..parts import Parts
    from .cota import CotaRun, train_cota
    from .picture import draw_losses

    if options.checkpoint is not None and options.audio_context is not None:
        raise UsageError("--audio-context is part of a checkpoint; leave the option out")
    if options.checkpoint is not None:
        start: Path | Parts = options.checkpoint
    elif options.whisper and options.htsat and options.qwen3:
        start = Parts(
            options.whisper,
            options.htsat,
            options.qwen3,
            options.clap,
            options.projector,
            options.audio_context or "full",
        )
    else:
        raise UsageError("give --checkpoint, or at least --whisper, --htsat and --qwen3")
    run = CotaRun(
        folder=options.out,
        data=options.data,
        validation=options.validation or options.data,
        start=start,
        recipe=read_recipe(options.recipe, "paper"),
        seed=options.seed,
        device=_device(options.device),
    )
    checkpoint = train_cota(run)
    draw_losses(options.out)
    print(checkpoint)


def read_recipe(path: Path | None, default: str) -> dict[str, Any]:
    """A recipe's tables, from a file or from those that come with the package.

    Raises:
        UsageError: the file is missing or is not TOML.
    """
    try:
        if path is not None:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        own = resources.files("tinygiant.models.training") / "recipes" / f"{default}.toml"
        return tomllib.loads(own.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"recipe {path}: cannot be read ({error})") from error


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"device {name!r} is unknown: use cpu, cuda or auto") from error


if __name__ == "__main__":
    sys.exit(main())
