"""The first lines of ``tg-export``: interrupts are handled before anything else."""

from __future__ import annotations

from tinygiant.runtime.cli.interrupt import exit_on_interrupt

__all__ = ["main"]


def main() -> int:
    """Run ``tg-export``; returns the exit code."""
    exit_on_interrupt("tg-export")
    from .cli import main as command

    return command()
