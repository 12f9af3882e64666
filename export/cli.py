"""``tg-export``: make a bundle from a checkpoint, and prove that it reproduces it.

Progress goes to standard error, the table of sizes and errors to standard output. A failure is one
line and an exit code of :mod:`tinygiant.runtime.errors`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tinygiant.runtime.cli.interrupt import raise_on_interrupt
from tinygiant.runtime.cli.options import OneLineParser
from tinygiant.runtime.config import AudioContext
from tinygiant.runtime.errors import (
    MissingDependencyError,
    StorageError,
    TinyGiantError,
    UsageError,
)
from tinygiant.runtime.text import one_line

if TYPE_CHECKING:
    from tinygiant.models.family import Model

__all__ = ["main"]

# Families whose published checkpoint has an option of its own.
_PUBLISHED = {"mizar": "Mizar-159M", "mellow": "Mellow", "ultravox": "Ultravox v0.5 1B"}
_OPTIONS = ", ".join(f"--{name}" for name in _PUBLISHED)

DEBUG_VARIABLE = "TINYGIANT_DEBUG"

_DESCRIPTION = """\
Make a bundle for tg-run: export every part of a model to ONNX, quantize it, and compare the result
with the PyTorch model. No bundle is written unless it passes."""

_EPILOG = """\
examples:
  tg-export runs/nano -o bundles/nano --recipe int8
  tg-export --preset full --random-weights 0 -o bundles/full-random --recipe int4
  tg-export --whisper whisper-large-v3-turbo --htsat clap-htsat-unfused \\
    --clap larger_clap_general --qwen3 Qwen3-0.6B --projector projector.safetensors -o bundles/full
  tg-export --mizar stage3_q4_seed20260905.ckpt --tokenizer SmolLM2-135M -o bundles/mizar
  tg-export --mellow soham97/mellow --allow-download -o bundles/mellow
  tg-export --ultravox model.safetensors --llama Llama-3.2-1B-Instruct -o bundles/ultravox

recipes: fp32 (exact), int8 (8-bit weights), int8-b128 (in larger blocks: faster), int8-rows (8-bit
  weights and activations: reads prompts fastest; needs VNNI, or Arm's dot product), int4 (4-bit
  decoder with keys and values in 8 bits, 8-bit encoders), int4-b32 (in smaller blocks: closer and
  slower), int4-gptq (4 bits fitted to what the decoder sees, 8 where it hurts); auto: the smallest
  that suits the decoder's size, runs on any processor and passes. What a decoder loses is measured
  on text that the model itself writes; one that loses too much is not written.

exit codes:
  0 written · 1 unforeseen failure · 2 wrong options, or the folder exists · 6 checkpoint does not
  fit · 7 the bundle does not reproduce the model · 8 folder cannot be written · 9 a package is
  missing · 130 interrupted

environment:
  TINYGIANT_DEBUG=1  show the traceback of a failure
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tg-export``; returns the exit code."""
    debug = os.environ.get(DEBUG_VARIABLE) == "1"
    try:
        _run(_parser().parse_args(arguments))
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left behind", 130)
    except TinyGiantError as error:
        if debug:
            raise
        # Every missed limit is named, so this line may be long.
        return _fail(" ".join(str(error).split()), error.exit_code)
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        return _fail(
            f"unforeseen {kind}: {one_line(error)}; set {DEBUG_VARIABLE}=1 to see where",
            TinyGiantError.exit_code,
        )


def _run(options: argparse.Namespace) -> None:
    try:
        # Imported here, so that --help is instant and a missing extra is one line.
        from tinygiant.quantize.recipes import recipe

        from .card import graph_table
        from .exporter import export_bundle
    except ImportError as error:
        raise MissingDependencyError(
            f"{error.name or error} is not installed; run: pip install 'tinygiant[export]'"
        ) from error
    raise_on_interrupt()  # from here on there are drafts to remove
    chosen = None if options.recipe == "auto" else recipe(options.recipe)
    source = _source(options)
    done = export_bundle(
        source,
        Path(options.output),
        chosen,
        prompts=options.prompts == "int8",
        force=options.force,
        threads=options.threads,
        progress=_progress,
    )
    tokens = done.verification.end_to_end
    size_bytes = sum(entry.size_bytes for entry in done.manifest.files)
    lines = [graph_table(done.reports, done.verification)]
    if tokens is not None:
        lines.append(
            f"tokens: {tokens.agreement:.1%} of {tokens.n_steps} as PyTorch's, "
            f"{tokens.decided_agreement:.1%} of the {tokens.n_decided} that are decided clearly"
        )
    if done.verification.quality is not None:
        proof = "" if done.verification.quality.judged else " (random weights: proves nothing)"
        lines.append(f"quality: {done.verification.quality.line}{proof}")
    written = done.manifest.recipe.name
    lines.append(f"{options.output}: {size_bytes / 1e6:.1f} MB, {written}, verified")
    try:
        print("\n".join(lines), flush=True)
    except OSError as error:
        raise StorageError(f"the summary cannot be written: {error.strerror}") from error


def _source(options: argparse.Namespace) -> Model:
    from tinygiant.models.parts import Parts
    from tinygiant.models.sources import CheckpointSource, PartsSource, RandomSource

    published = [name for name in _PUBLISHED if getattr(options, name) is not None]
    parts = {name: getattr(options, name) for name in ("whisper", "htsat", "clap", "qwen3")}
    ways = (
        options.checkpoint is not None,
        options.preset is not None or options.random_weights is not None,
        any(parts.values()) or options.projector is not None,
        *(True for _ in published),
    )
    if sum(ways) != 1:
        raise UsageError(
            f"no model is given, or several; give one: a CHECKPOINT, or one of {_OPTIONS}, or "
            "--preset with --random-weights, or the parts --whisper, --htsat and --qwen3; see "
            "tg-export --help"
        )
    if options.allow_download and not published:
        raise UsageError(f"--allow-download goes with one of {_OPTIONS}; leave it out")
    if options.llama is not None and published != ["ultravox"]:
        raise UsageError("--llama goes with --ultravox; leave it out")
    tokenizer = None if options.tokenizer is None else Path(options.tokenizer)
    if published:
        if options.audio_context is not None:
            raise UsageError("--audio-context is fixed in a published model; leave it out")
        from tinygiant.models.family import family

        llama = {} if options.llama is None else {"language_model": Path(options.llama)}
        return family(published[0]).open(
            Path(getattr(options, published[0])),
            tokenizer=tokenizer,
            allow_download=options.allow_download,
            **llama,
        )
    if options.checkpoint is not None:
        if options.audio_context is not None:
            raise UsageError("--audio-context is part of a checkpoint; leave the option out")
        return CheckpointSource(Path(options.checkpoint))
    if any(parts.values()) or options.projector is not None:
        missing = [f"--{name}" for name in ("whisper", "htsat", "qwen3") if not parts[name]]
        if missing:
            raise UsageError(f"parts of the model are missing; add {', '.join(missing)}")
        paths = {name: Path(value) for name, value in parts.items() if value}
        projector = None if options.projector is None else Path(options.projector)
        context: AudioContext = options.audio_context or "full"
        return PartsSource(
            Parts(
                paths["whisper"],
                paths["htsat"],
                paths["qwen3"],
                paths.get("clap"),
                projector,
                context,
            ),
            seed=0,
        )
    if options.preset is None or options.random_weights is None:
        raise UsageError("--preset and --random-weights SEED go together; give both")
    return RandomSource(options.preset, options.random_weights, tokenizer, options.audio_context)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="tg-export",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", nargs="?", help="checkpoint folder of this project")
    add("-o", "--output", metavar="DIR", required=True, help="folder of the new bundle")
    add(
        "--recipe",
        default="int8",
        metavar="NAME",
        help="fp32, int8, int8-b128, int8-rows, int4, int4-b32, int4-gptq or auto (%(default)s)",
    )
    add(
        "--prompts", choices=("same", "int8"), default="same",
        help="int8: a second graph of the decoder, which reads prompts with 8-bit products: about "
        "twice as fast, and about as much larger as the decoder has parameters (%(default)s)",
    )  # fmt: skip
    add("--force", action="store_true", help="replace an existing bundle")
    add("--threads", type=int, metavar="N", help="threads to verify with; default: physical cores")
    add("--preset", metavar="NAME", help="nano or full, with --random-weights")
    add(
        "--random-weights", type=int, metavar="SEED", help="seeded random weights, to measure speed"
    )
    for name, title in _PUBLISHED.items():
        add(f"--{name}", metavar="CKPT", help=f"{title}'s checkpoint file, or its name on the Hub")
    add(
        "--allow-download", action="store_true",
        help="allow downloads of missing files from the Hugging Face Hub; else nothing is fetched",
    )  # fmt: skip
    add(
        "--llama", metavar="DIR",
        help="folder of Llama-3.2-1B-Instruct from Hugging Face, for --ultravox",
    )  # fmt: skip
    add(
        "--tokenizer", metavar="PATH",
        help="tokenizer.json or its folder: SmolLM2-135M's for --mizar, --mellow; --ultravox has "
        "that of --llama; for random weights any (default: bytes)",
    )  # fmt: skip
    add("--whisper", metavar="DIR", help="Whisper folder from Hugging Face")
    add("--htsat", metavar="PATH", help="CLAP folder, or an original HTS-AT .ckpt")
    add("--clap", metavar="DIR", help="CLAP folder; default: HTS-AT replaces CLAP")
    add("--qwen3", metavar="DIR", help="Qwen3 folder from Hugging Face")
    add("--projector", metavar="FILE", help="projector .safetensors; default: random, seed 0")
    add(
        "--audio-context", choices=typing.get_args(AudioContext),
        help="whether the model was trained on whole windows of 30 s (full, the paper's) or on "
        "clips as long as they are (clip: faster); with --preset or parts",
    )  # fmt: skip
    version = importlib.metadata.version("tinygiant")
    add("--version", action="version", version=f"tg-export {version}")
    return parser


def _progress(line: str) -> None:
    print(f"tg-export: {line}", file=sys.stderr, flush=True)


def _fail(message: str, code: int) -> int:
    print(f"tg-export: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
