"""``python -m tinygiant.models.world``: build a split of the synthetic world."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tinygiant.runtime.errors import TinyGiantError

from .dataset import build
from .vocabulary import KINDS, SPLITS

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and build; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tinygiant.models.world",
        description="Build a split of the synthetic audio-reasoning world. An interrupted build "
        "goes on where it was when the same command is given again.",
    )
    parser.add_argument("--split", required=True, choices=SPLITS)
    parser.add_argument("--clips", required=True, type=int, help="number of clips")
    parser.add_argument("--out", required=True, type=Path, help="folder; the split gets its own")
    parser.add_argument("--cache", required=True, type=Path, help="folder of the engines' banks")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--questions", type=int, default=4, help="questions a clip (default 4)")
    parser.add_argument(
        "--kind", choices=KINDS, default="core", help="the sort of clips (default core)"
    )
    parser.add_argument("--audio", action="store_true", help="also write 48 kHz FLAC files")
    given = parser.parse_args(arguments)
    try:
        folder = build(
            given.split,
            given.clips,
            given.out,
            given.cache,
            workers=given.workers,
            seed=given.seed,
            audio=given.audio,
            questions=given.questions,
            kind=given.kind,
        )
    except TinyGiantError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
