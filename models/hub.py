"""Public files by name: on this disk, or from the Hugging Face Hub if that was allowed.

The contract of :func:`locate`: nothing is fetched unless ``allow_download``; a fetched file whose
sha256 is not the published one is not used. An interrupted download resumes where it stopped
(huggingface_hub keeps it in its own cache).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.text import one_line, printable

__all__ = ["HubFile", "locate", "sha256_of"]

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>[\w./-]+))?")


@dataclass(frozen=True)
class HubFile:
    """A file of a public repository.

    Attributes:
        repo: ``owner/name`` on the hub.
        file: its path in the repository.
        sha256: as published outside of the hub, where it is; else the hub's own is checked.
    """

    repo: str
    file: str
    sha256: str | None = None


def locate(given: str, default: HubFile, *, allow_download: bool) -> Path:
    """A file or folder on this disk for what the user named.

    Args:
        given: a path, or ``owner/name`` of a repository on the hub, or ``owner/name:file`` for
            another file of it than the usual.
        default: the usual file, and what is known about it.
        allow_download: whether it may be fetched.

    Raises:
        CheckpointError: it is not there, must not or cannot be fetched, or is another file than the
            published one.
    """
    path = Path(given)
    if path.exists():
        return path
    name = _HUB_NAME.fullmatch(given)
    if name is None or given.startswith((".", "/")):
        raise CheckpointError(f"{printable(given)}: no such file or folder; check the path")
    repo, file = name["repo"], name["file"] or default.file
    if not allow_download:
        raise CheckpointError(
            f"{given}: no such file; if the repository {repo} of the Hugging Face Hub is meant, "
            f"add --allow-download to fetch {file} from it"
        )
    usual = (repo, file) == (default.repo, default.file)
    return _fetch(default if usual else HubFile(repo, file))


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(wanted: HubFile) -> Path:
    # Not needed for files on the disk.
    import huggingface_hub
    from huggingface_hub.hf_api import RepoFile

    where = f"{wanted.repo}/{wanted.file}"
    try:
        infos = huggingface_hub.HfApi().get_paths_info(wanted.repo, [wanted.file])
        large = [info.lfs for info in infos if isinstance(info, RepoFile) and info.lfs]
        path = Path(huggingface_hub.hf_hub_download(wanted.repo, wanted.file))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise CheckpointError(
            f"{where}: cannot be fetched from the Hugging Face Hub ({one_line(error)}); check name "
            "and network, or fetch it yourself and give its path"
        ) from error
    published = {str(entry.sha256) for entry in large}
    if wanted.sha256 is not None:
        published.add(wanted.sha256)
    found = sha256_of(path)
    if others := published - {found}:
        raise CheckpointError(
            f"{path}: not the published file: its sha256 is {found}, published is "
            f"{', '.join(sorted(others))}; delete it and fetch it again"
        )
    return path
