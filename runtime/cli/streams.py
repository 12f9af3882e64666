"""The standard streams of a command, made safe before anything is read or written.

A descriptor that is closed at the start (``>&-``) would be given to the first file that is opened,
and what is printed would land in that file: the null device takes its place. And native libraries
print warnings of their own to standard error, past every ``--quiet`` (libmpg123 about a cut file):
they get the null device, this program keeps its own way to the terminal.
"""

from __future__ import annotations

import io
import os
import sys

from ..errors import StorageError
from .terminal import debugging

__all__ = ["prepare_streams", "require_output"]

_STANDARD_ERROR = 2


def prepare_streams() -> None:
    """Once, at the start of a process. With ``TINYGIANT_DEBUG=1`` libraries are heard."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if sys.stderr is None:  # libraries write to it, logging among them, and print to it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the terminal can show
    if isinstance(sys.stderr, io.TextIOWrapper) and not debugging():
        own = os.dup(_STANDARD_ERROR)
        encoding, errors = sys.stderr.encoding, sys.stderr.errors
        sys.stderr.flush()
        sys.stderr = open(own, "w", buffering=1, encoding=encoding, errors=errors)  # noqa: SIM115
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, _STANDARD_ERROR)
        os.close(nothing)


def require_output() -> None:
    """Refuse to compute what nobody can read.

    Raises:
        StorageError: standard output is closed.
    """
    if sys.stdout is None:
        raise StorageError(
            "standard output is closed, so the answer cannot be written; to drop it, send it to "
            "/dev/null"
        )
