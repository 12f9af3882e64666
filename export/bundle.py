"""Writes a bundle so that its folder is always complete, or absent.

Files go to a temporary folder next to the target, are flushed to the disk, and the folder is
renamed when it is complete. If the process ends before, the target is unchanged; the next run
recognises the temporary folder of a killed process (nobody holds its lock) and removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tinygiant.runtime.bundle import MANIFEST_NAME
from tinygiant.runtime.errors import StorageError, UsageError

__all__ = ["staged_folder"]

_MARK = "tg-export"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block is left without an error.

    Args:
        target: the folder to make.
        force: replace a bundle of that name; without it an existing target is refused.

    Raises:
        UsageError: the target exists and must not be replaced.
        StorageError: something cannot be written; nothing is left behind.
    """
    target = target.absolute()
    _check_target(target, force=force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(target), dir=target.parent))
    except OSError as error:
        raise _storage_error(target, error) from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        folder.chmod(0o755)  # mkdtemp makes it private
        _flush(folder)
        _check_target(target, force=force)
        _put_in_place(folder, target)
    except StorageError:
        raise
    except OSError as error:
        raise _storage_error(target, error) from error
    finally:
        # After a swap this is the folder that was replaced; after a rename it is gone.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _prefix(target: Path) -> str:
    return f".{target.name}.{_MARK}-"


def _check_target(target: Path, *, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise UsageError(f"{target} exists; choose another folder, or replace it with --force")
    if not (target / MANIFEST_NAME).is_file():
        raise UsageError(
            f"{target} exists and is not a bundle, so it is not replaced; choose another folder"
        )


def _remove_leftovers(target: Path) -> None:
    """Remove temporary folders of this target whose process is gone."""
    for folder in target.parent.glob(f"{_prefix(target)}*"):
        with suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _flush(folder: Path) -> None:
    """Make files and folder entries reach the disk before the rename does."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(folder: Path, target: Path) -> None:
    if target.exists():
        _swap(folder, target)
    else:
        folder.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(folder: Path, target: Path) -> None:
    """Exchange two folders: in one step where the system can, else in two."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        exchange = getattr(libc, "renameat2", None)
        if exchange is not None:
            arguments = (_AT_FDCWD, os.fsencode(folder), _AT_FDCWD, os.fsencode(target))
            if exchange(*arguments, _RENAME_EXCHANGE) == 0:
                return
            if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    replaced = folder.with_name(f"{folder.name}.old")
    target.rename(replaced)
    folder.rename(target)
    replaced.rename(folder)


def _storage_error(target: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(f"{target}: cannot be written ({reason}); nothing was left behind")
