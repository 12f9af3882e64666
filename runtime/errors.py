"""Every error a user can meet, and the exit code each one ends in.

The contract: a bad input raises exactly one of these. Its message is one line: what was found, what
was expected and what to do. The command-line tools print that line and exit with ``exit_code``.
Each class is also the builtin that callers of a library would expect::

    TinyGiantError                    1   anything below; also unforeseen failures
    ├── UsageError (ValueError)       2   options or arguments that do not fit together
    ├── AudioError (ValueError)       3   audio that cannot be read, or holds no usable sound
    │   └── AudioTooLongError         3   audio longer than the stated limit
    ├── BundleError (ValueError)      4   a bundle that is missing, damaged or of an unknown format
    ├── QuestionError (ValueError)    5   a question or choices that cannot be asked
    ├── CheckpointError (ValueError)  6   a checkpoint with wrong, missing or unknown tensors
    ├── VerificationError             7   an exported graph that does not reproduce its model
    ├── StorageError (OSError)        8   a file or folder that cannot be written
    ├── MissingDependencyError        9   an optional package that is not installed (ImportError)
    ├── MissingEngineError           10   a program that training data is made with (RuntimeError)
    └── IncompleteBatchError         11   a batch with items that could not be answered

An interrupt (Ctrl-C) ends with 130, as shells expect.
"""

from __future__ import annotations

__all__ = [
    "AudioError",
    "AudioTooLongError",
    "BundleError",
    "CheckpointError",
    "IncompleteBatchError",
    "MissingDependencyError",
    "MissingEngineError",
    "QuestionError",
    "StorageError",
    "TinyGiantError",
    "UsageError",
    "VerificationError",
]


class TinyGiantError(Exception):
    """Base of all errors of this project."""

    exit_code = 1


class UsageError(TinyGiantError, ValueError):
    """Options or arguments that do not fit together."""

    exit_code = 2


class AudioError(TinyGiantError, ValueError):
    """Audio that cannot be read, or that holds nothing to listen to."""

    exit_code = 3


class AudioTooLongError(AudioError):
    """Audio longer than the limit in force."""


class BundleError(TinyGiantError, ValueError):
    """A bundle that is missing, incomplete, tampered with or of an unknown format."""

    exit_code = 4


class QuestionError(TinyGiantError, ValueError):
    """A question, or a set of choices, that cannot be asked."""

    exit_code = 5


class CheckpointError(TinyGiantError, ValueError):
    """A checkpoint whose tensors or configuration do not fit the model."""

    exit_code = 6


class VerificationError(TinyGiantError, RuntimeError):
    """An exported bundle that does not reproduce the model it was made from."""

    exit_code = 7


class StorageError(TinyGiantError, OSError):
    """A file or folder that cannot be written (disk full, read-only, no permission)."""

    exit_code = 8


class MissingDependencyError(TinyGiantError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""

    exit_code = 9


class MissingEngineError(TinyGiantError, RuntimeError):
    """An external program that is not installed; the message names its Debian package."""

    exit_code = 10


class IncompleteBatchError(TinyGiantError, RuntimeError):
    """A batch that went through, but with items that could not be answered."""

    exit_code = 11
