"""The bundle: a folder that holds a whole exported model, described by its ``manifest.json``.

The contract between exporter and runtime. A bundle is self-describing: the runtime takes every
constant from the manifest. The exporter builds a :class:`Manifest` and writes
``manifest.to_json()``; the runtime reads it with :meth:`Bundle.open`, strictly. Format version 2
(version 1, which knew one model only, is still read: :mod:`~tinygiant.runtime.format1`)::

    {
      "format": "tinygiant-bundle",
      "format_version": 2,
      "model":  {...},                       ModelConfig, as config_to_dict writes it
      "graphs": {                            keys: those that the model is composed of
        "decoder_model": {
          "file": "onnx/decoder_model.onnx",
          "external_data": ["onnx/decoder_model.onnx.data"],
          "scheme": "int4-b32",              free text: how the weights are stored
          "operators": ["ai.onnx:Add", ...]  all that its nodes may use, as domain:name
        }, ...
      },
      "embeddings": {"file": "embed_tokens.npy", "dtype": "fp32" | "fp16" | "int8",
                     "scale_file": null},    int8: (vocab_size,) float32, one scale a row
      "tokenizer": "tokenizer.json",
      "kv_cache": "int8",                    how the decoder keeps keys and values, or "fp32"
      "prompt_graph": "",                    name of a second decoder graph, which reads prompts
      "recipe": {"name": "int4", "details": {...}},
      "opset": 21,
      "min_onnxruntime": "1.20.0",
      "source": {"checkpoint": "nano", "sha256": "...", "weights": "trained" | "seeded-random",
                 "seed": null},
      "created": {"tinygiant": "0.1.0", "torch": "2.13.0", ...},
      "verification": {...},                 summary of verification.json
      "files": [{"path": "...", "sha256": "...", "size_bytes": 123}, ...]
    }

``files`` lists every file of the folder but the manifest itself. ``created`` names tool versions
and holds no time, so that the same checkpoint exported twice with the same tools gives the same
manifest. Paths are relative, made of ``[A-Za-z0-9._-]`` parts joined by ``/``; none is absolute,
holds ``..`` or a backslash, or is reached through a link that leaves the folder.

Any fault of a bundle raises one :class:`BundleError` of one line.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import format1
from .config import KvType, ModelConfig, Role, config_from_dict, config_to_dict
from .errors import BundleError
from .files import LFS_SIGNATURE, sha256
from .operators import (
    CONTROL_FLOW,
    MAX_GRAPH_BYTES,
    OPERATOR,
    GraphContents,
    graph_contents,
)
from .text import one_line, printable

__all__ = [
    "BUNDLE_VARIABLE",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Bundle",
    "EmbeddingsEntry",
    "FileEntry",
    "GraphEntry",
    "Manifest",
    "RecipeEntry",
    "SourceEntry",
    "default_bundle_path",
    "describe_file",
]

FORMAT = "tinygiant-bundle"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
BUNDLE_VARIABLE = "TINYGIANT_BUNDLE"

_MAX_MANIFEST_BYTES = 4 * 2**20
_PATH_PART = r"[A-Za-z0-9_-][A-Za-z0-9._-]*"
_PATH = re.compile(rf"{_PATH_PART}(?:/{_PATH_PART})*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"\d+(?:\.\d+)*")


@dataclass(frozen=True)
class FileEntry:
    """One file of the bundle: relative ``path``, lower-case hexadecimal ``sha256``, size."""

    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class GraphEntry:
    """One ONNX graph: its file, the files its weights lie in, how they are stored, its operators.

    ``operators`` are all that its nodes may use, as ``domain:name`` (``ai.onnx:MatMul``).
    """

    file: str
    external_data: tuple[str, ...]
    scheme: str
    operators: tuple[str, ...]


@dataclass(frozen=True)
class EmbeddingsEntry:
    """The token embeddings ``(vocab_size, D)``; ``int8`` has one float32 scale a row."""

    file: str
    dtype: Literal["fp32", "fp16", "int8"]
    scale_file: str | None


@dataclass(frozen=True)
class RecipeEntry:
    """The quantization recipe the bundle was made with; ``details`` is for people and reports."""

    name: str
    details: dict[str, Any]


@dataclass(frozen=True)
class SourceEntry:
    """The source of the bundle: checkpoint name and hash, and whether it was trained.

    For a published model also ``origin``, its address, and ``licence``.
    """

    checkpoint: str
    sha256: str
    weights: Literal["trained", "seeded-random"]
    seed: int | None
    origin: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``; the module's docstring shows it.

    ``prompt_graph`` is a second graph of the decoder, if there is one: it reads prompts faster, and
    leaves the same keys and values behind for the first, which a runtime may do without it.
    """

    model: ModelConfig
    graphs: dict[str, GraphEntry]
    embeddings: EmbeddingsEntry
    tokenizer: str
    recipe: RecipeEntry
    opset: int
    min_onnxruntime: str
    source: SourceEntry
    created: dict[str, str]
    verification: dict[str, Any]
    files: tuple[FileEntry, ...]
    kv_cache: KvType = "fp32"
    prompt_graph: str = ""

    def __post_init__(self) -> None:
        problems = _manifest_problems(self)
        if problems:
            raise BundleError("manifest: " + "; ".join(problems))

    @property
    def roles(self) -> dict[str, Role]:
        """The role of every graph, by its name."""
        prompts: dict[str, Role] = {self.prompt_graph: "decoder"} if self.prompt_graph else {}
        return self.model.graphs | prompts

    def to_json(self) -> str:
        """The manifest as it is written to disk: sorted keys, so that it is reproducible."""
        data = config_to_dict(self) | {"format": FORMAT, "format_version": FORMAT_VERSION}
        return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Read a parsed ``manifest.json``; see :func:`config_from_dict` for its fields.

        Raises:
            BundleError: another format or version; a field that is unknown, of another type, or
                missing without a default.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BundleError(f"manifest: not a {FORMAT}; export the model with tg-export")
        version = data.get("format_version")
        fields = {k: v for k, v in data.items() if k not in ("format", "format_version")}
        if version == 1 and not isinstance(version, bool):
            fields["model"] = format1.upgrade(fields.get("model"), where="manifest.model")
        elif version != FORMAT_VERSION:
            raise BundleError(
                f"manifest: format version {str(version)[:20]} is unknown, this runtime reads "
                f"1 and {FORMAT_VERSION}; update tinygiant or export the bundle again"
            )
        return config_from_dict(cls, fields, where="manifest")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its resolved ``root`` and its checked ``manifest``.

    ``stamp`` tells the manifest file apart from one put in its place later.
    """

    root: Path
    manifest: Manifest
    stamp: tuple[int, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, verify: bool = True) -> Bundle:
        """Open and check the bundle in folder ``path``.

        Presence, kind, size and containment of every file are always checked; ``verify`` also
        compares every sha256, which costs one read of the whole bundle.

        Raises:
            BundleError: whatever is missing, damaged, unknown or outside the folder.
        """
        folder = Path(path)
        where = printable(folder)
        try:
            if not folder.exists():
                raise BundleError(f"{where}: no such bundle; export one with tg-export")
            if not folder.is_dir():
                raise BundleError(f"{where}: not a folder; a bundle is a folder with a manifest")
            root = folder.resolve(strict=True)
            stamp = _stamp(root)
            manifest = _read_manifest(root)
            for entry in manifest.files:
                _check_file(root, entry, verify=verify)
        except BundleError as error:
            raise BundleError(_prefixed(where, str(error))) from error
        except (OSError, ValueError) as error:
            raise BundleError(f"{where}: cannot be read: {one_line(error)}") from error
        return cls(root, manifest, stamp)

    def require_unchanged(self) -> None:
        """Refuse to go on once another bundle was put in this one's place.

        Raises:
            BundleError: the manifest is another file than the one that was opened, or is gone.
        """
        try:
            unchanged = _stamp(self.root) == self.stamp
        except OSError:
            unchanged = False
        if not unchanged:
            raise BundleError(
                f"{printable(self.root)}: the bundle was replaced or removed while in use; load it "
                "again"
            )

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.manifest.model

    def file(self, relative: str) -> Path:
        """The absolute path of one listed file."""
        return self.root / relative

    def graph(self, name: str) -> Path:
        """The absolute path of graph ``name``.

        Raises:
            BundleError: the bundle has no such graph.
        """
        if name not in self.manifest.graphs:
            raise BundleError(f"{printable(self.root)}: the bundle has no graph {name}")
        return self.root / self.manifest.graphs[name].file

    def read_graph(self, name: str) -> bytes:
        """The checked bytes of graph ``name``'s file, without its weights, to be run as they are.

        Raises:
            BundleError: the file is not the one that the manifest describes; it uses an operator
                that the manifest does not list for it, loops, or weights from other files
                than those that are listed for it.
        """
        path, entry = self.graph(name), self.manifest.graphs[name]
        listed = next(file for file in self.manifest.files if file.path == entry.file)
        try:
            content = _read_listed(path, listed)
            _check_contents(graph_contents(content), entry)
        except (BundleError, OSError) as error:
            self.require_unchanged()
            message = f"{printable(self.root)}: graph {name}: {one_line(error)}"
            raise BundleError(message) from error
        return content


def default_bundle_path() -> Path:
    """Where the bundle is taken from if none is named.

    The folder in the environment variable ``TINYGIANT_BUNDLE``, else the nano model that is
    installed with the runtime.
    """
    named = os.environ.get(BUNDLE_VARIABLE)
    if named:
        return Path(named)
    return Path(str(importlib.resources.files("tinygiant.runtime"))) / "bundles" / "nano"


def describe_file(root: Path, relative: str) -> FileEntry:
    """The manifest entry of the file ``root / relative``; reads the whole file."""
    path = root / relative
    return FileEntry(relative, sha256([path]), path.stat().st_size)


def _manifest_problems(manifest: Manifest) -> list[str]:
    problems = []
    listed = [entry.path for entry in manifest.files]
    problems += [f"path {path!r:.80} is not allowed" for path in listed if not _allowed(path)]
    # Case-insensitive file systems (macOS, Windows) would see one file where two are listed.
    if len({path.lower() for path in listed}) != len(listed):
        problems.append("a file is listed twice")
    for entry in manifest.files:
        if not _SHA256.fullmatch(entry.sha256) or entry.size_bytes < 0:
            problems.append(f"file {entry.path!r:.80} has no valid sha256 or size")
    if manifest.prompt_graph in manifest.model.graphs:
        problems.append(f"prompt_graph {manifest.prompt_graph!r:.80} is a graph of the model")
    if missing := sorted(set(manifest.roles) - set(manifest.graphs)):
        problems.append(f"graphs {missing!r:.80} are missing")
    if unknown := sorted(set(manifest.graphs) - set(manifest.roles)):
        problems.append(f"graphs {unknown!r:.80} are unknown")
    for name, graph in sorted(manifest.graphs.items()):
        strange = [op for op in graph.operators if not OPERATOR.fullmatch(op) or op in CONTROL_FLOW]
        problems += [f"graph {name:.40}: operator {op!r:.80} is not allowed" for op in strange[:3]]
    unlisted = sorted(_used_files(manifest) - set(listed))
    problems += [f"file {path!r:.80} is used but not listed" for path in unlisted]
    if (manifest.embeddings.dtype == "int8") != (manifest.embeddings.scale_file is not None):
        problems.append("embeddings have a scale_file if and only if they are int8")
    if not _VERSION.fullmatch(manifest.min_onnxruntime):
        problems.append(f"min_onnxruntime {manifest.min_onnxruntime!r:.20} is not a version")
    return problems


def _used_files(manifest: Manifest) -> set[str]:
    used = {manifest.tokenizer, manifest.embeddings.file}
    if manifest.embeddings.scale_file is not None:
        used.add(manifest.embeddings.scale_file)
    for graph in manifest.graphs.values():
        used |= {graph.file, *graph.external_data}
    return used


def _allowed(path: str) -> bool:
    return len(path) <= 255 and path != MANIFEST_NAME and _PATH.fullmatch(path) is not None


def _stamp(root: Path) -> tuple[int, ...]:
    """Changes when the manifest is replaced; (0,) if there is none, which is reported later."""
    path = root / MANIFEST_NAME
    if not path.exists():
        return (0,)
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST_NAME
    if not path.exists():
        raise BundleError(f"no {MANIFEST_NAME}; this folder is not a bundle")
    _check_contained(root, path)
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST_NAME} is larger than {_MAX_MANIFEST_BYTES} bytes")
    content = path.read_bytes()
    _refuse_pointer(MANIFEST_NAME, content)
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{MANIFEST_NAME} is damaged ({one_line(error)}); copy or export the bundle again"
        ) from error
    return Manifest.from_dict(data)


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"key {key!r:.40} appears twice")
        data[key] = value
    return data


def _check_contained(root: Path, path: Path) -> None:
    """Refuse whatever is not a regular file below ``root`` once every link is followed."""
    resolved = path.resolve(strict=True)
    name = path.relative_to(root)
    if not resolved.is_relative_to(root):
        raise BundleError(f"{name} is a link that leaves the bundle; copy the file itself")
    if not stat.S_ISREG(resolved.stat().st_mode):
        raise BundleError(f"{name} is not a regular file")


def _check_file(root: Path, entry: FileEntry, *, verify: bool) -> None:
    path = root / entry.path
    if not path.exists():
        raise BundleError(f"{entry.path} is missing; copy or export the bundle again")
    _check_contained(root, path)
    size_bytes = path.stat().st_size
    if size_bytes != entry.size_bytes:
        with path.open("rb") as file:
            _refuse_pointer(entry.path, file.read(len(LFS_SIGNATURE)))
        raise BundleError(
            f"{entry.path} has {size_bytes} bytes, the manifest says {entry.size_bytes}; "
            "copy or export the bundle again"
        )
    if verify and sha256([path]) != entry.sha256:
        raise BundleError(
            f"{entry.path} was changed: its sha256 is not the manifest's; "
            "copy or export the bundle again"
        )


def _read_listed(path: Path, listed: FileEntry) -> bytes:
    if listed.size_bytes > MAX_GRAPH_BYTES:
        raise BundleError(
            f"{listed.path} has {listed.size_bytes} bytes, at most {MAX_GRAPH_BYTES} are read; "
            "weights belong beside it"
        )
    with path.open("rb") as file:
        content = file.read(listed.size_bytes + 1)
    if hashlib.sha256(content).hexdigest() != listed.sha256:
        raise BundleError(
            f"{listed.path} was changed: its sha256 is not the manifest's; "
            "copy or export the bundle again"
        )
    return content


def _check_contents(contents: GraphContents, entry: GraphEntry) -> None:
    """Refuse operators and weights that the manifest does not list for the graph."""
    folder = entry.file.rpartition("/")[0]
    used = {f"{folder}/{name}" if folder else name for name in contents.weight_files}
    for what, unlisted in (
        ("weights in", used - set(entry.external_data)),
        ("operator", contents.operators - set(entry.operators)),
    ):
        if unlisted:
            names = printable(", ".join(sorted(unlisted)[:3]))
            raise BundleError(
                f"{what} {names:.120}: the manifest does not list it for this graph; "
                "export the bundle again"
            )


def _refuse_pointer(name: str, start: bytes) -> None:
    if start.startswith(LFS_SIGNATURE):
        raise BundleError(f"{name} is a git-lfs pointer, not the file; run: git lfs pull")


def _prefixed(where: str, message: str) -> str:
    return message if message.startswith(where) else f"bundle {where}: {message}"
