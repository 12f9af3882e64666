"""The first lines of ``tg-train``: interrupts are taken care of before all else."""

from __future__ import annotations

from tinygiant.runtime.cli.interrupt import exit_on_interrupt

__all__ = ["main"]


def main() -> int:
    """Run ``tg-train``; returns the exit code."""
    exit_on_interrupt("tg-train")
    from .cli import main as command

    return command()
