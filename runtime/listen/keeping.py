"""Sounds kept as FLAC files, if that is asked for; the folder is bounded by size and age."""

from __future__ import annotations

import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import soundfile

from ..errors import StorageError
from ..text import one_line, printable
from .ear import Sound
from .settings import KeepSettings

__all__ = ["ClipFolder"]

_OURS = re.compile(r"\d{8}T\d{9}Z-.+-\d+\.flac")
_DAY_S = 86_400.0


class ClipFolder:
    """A folder of clips. Only files of its own kind are counted and removed."""

    def __init__(self, settings: KeepSettings) -> None:
        """Make the folder if need be.

        Raises:
            StorageError: it cannot be made, or not written.
        """
        assert settings.folder is not None
        self.settings = settings
        self._folder = Path(settings.folder)
        try:
            self._folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise self._failure(error) from error
        if not os.access(self._folder, os.W_OK | os.X_OK):
            raise self._failure(PermissionError(13, "Permission denied"))

    def begin(self) -> None:
        """Nothing is to be reached before the first clip."""

    def close(self) -> None:
        """Nothing stays open between clips."""

    def keep(self, sound: Sound) -> str:
        """Write a sound, and remove what is too old or too much; returns the file's name.

        Raises:
            StorageError: it cannot be written; nothing of it is left.
        """
        when = datetime.fromtimestamp(sound.time, UTC).strftime("%Y%m%dT%H%M%S%f")[:-3]
        name = f"{when}Z-{sound.source}-{sound.number}.flac"
        draft = self._folder / f".{name}.part"
        try:
            self.prune()
            with open(draft, "wb") as file:
                soundfile.write(file, sound.samples, sound.rate_hz, format="FLAC")
            os.replace(draft, self._folder / name)
        except (OSError, soundfile.LibsndfileError) as error:
            draft.unlink(missing_ok=True)
            raise self._failure(error) from error
        self.prune()
        return name

    def prune(self) -> None:
        """Remove clips beyond the bounds, the oldest first."""
        found = []
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name):
                status = path.stat()
                # A clock that was set back makes files of the future: their distance counts too.
                age_s = abs(time.time() - status.st_mtime)
                if age_s > self.settings.max_days * _DAY_S:
                    path.unlink()
                else:
                    found.append((path.name, status.st_size))
            elif path.name.endswith(".flac.part") and _OURS.fullmatch(path.name[1:-5]):
                path.unlink()  # of a process that was killed
        n_bytes = sum(size for _, size in found)
        for name, size in sorted(found):
            if n_bytes <= self.settings.max_mb * 1e6:
                break
            (self._folder / name).unlink()
            n_bytes -= size

    def _failure(self, error: Exception) -> StorageError:
        reason = getattr(error, "strerror", None) or one_line(error)
        return StorageError(
            f"{printable(self._folder)}: no clip can be kept there ({reason}); make room, or check "
            "[keep] folder"
        )
