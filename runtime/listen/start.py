"""The first lines of ``tg-listen``: interrupts are handled before anything else."""

from __future__ import annotations

from ..cli.interrupt import exit_on_interrupt

__all__ = ["main"]


def main() -> int:
    """Run ``tg-listen``; returns the exit code."""
    exit_on_interrupt("tg-listen")
    from .cli import main as command

    return command()
