"""The first lines of ``tg-serve``: interrupts are handled before anything else."""

from __future__ import annotations

from ..cli.interrupt import exit_on_interrupt

__all__ = ["main"]


def main() -> int:
    """Run ``tg-serve``; returns the exit code."""
    exit_on_interrupt("tg-serve")
    from .cli import main as command

    return command()
