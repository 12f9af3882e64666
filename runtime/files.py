"""Files on disk: the hash that names their content, and a stand-in that is not the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

__all__ = ["LFS_SIGNATURE", "sha256"]

LFS_SIGNATURE = b"version https://git-lfs.github.com/spec/"
"""The first bytes of a git-lfs pointer, which replaces a file that was not fetched."""

_BLOCK_BYTES = 2**20


def sha256(paths: Iterable[Path]) -> str:
    """Hexadecimal SHA-256 of the files one after another; each is read once, in blocks."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()
