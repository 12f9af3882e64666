"""onnxruntime sessions: the only module that imports onnxruntime.

A :class:`Graph` is one loaded ONNX graph; a :class:`GraphPool` hands out a bundle's graphs and
decides whether they stay in memory. What a run needed beside the weights goes back to the system
when it ends, and so does all of a graph that is closed: a process holds what it will use again.
Threads default to the physical cores this process may use;
whatever onnxruntime raises becomes a :class:`BundleError` of one line. A graph runs on the provider
that was asked for or not at all; operators that the provider lacks run on the next one, and
:attr:`Graph.providers` tells so. Importing this module turns onnxruntime's telemetry off (its Linux
wheels carry some since 1.29).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..bundle import Bundle
from ..config import KvType, ModelConfig
from ..errors import BundleError, TinyGiantError, UsageError
from ..text import one_line, printable
from .providers import CPU, PROVIDERS, Provider, assign, require_available

# Read by onnxruntime while it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

__all__ = [
    "Binding",
    "Graph",
    "GraphPool",
    "SessionSettings",
    "not_packed",
    "onnxruntime_version",
    "physical_cores",
    "release_free_memory",
    "require_onnxruntime",
    "unchanged_mappings",
]

_FATAL = 4
_KV_TYPES: Mapping[KvType, str] = {"fp32": "tensor(float)", "int8": "tensor(int8)"}
_LARGE_INPUT_BYTES = 2**20
# Below this, looking for pages to let go of costs more time than the pages are worth.
_LARGE_BUNDLE_BYTES = 64 * 2**20
_MADV_DONTNEED = 4  # Linux, all architectures


@dataclass(frozen=True)
class SessionSettings:
    """How graphs are run.

    ``threads``: threads of one operator, the physical cores if None. ``spin``: threads wait for
    work by spinning for a moment, which is faster and keeps cores busy. ``arena``: memory that one
    operator frees is kept for the next one; without it every operator asks the system anew, which
    made the full-size encoder a fifth slower and its peak higher.
    """

    threads: int | None = None
    spin: bool = True
    arena: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise UsageError(f"{self.threads} threads: expected a number from 1 to 1024")


class Graph:
    """One ONNX graph, ready to run.

    Attributes:
        name: the file's, without its ending.
        input_names: in the order of the graph.
        input_types: by name, as onnxruntime calls them: "tensor(float)".
        output_names: in the order of the graph.
        providers: names of the providers that run its operators, the one asked for first.
    """

    def __init__(
        self,
        path: Path,
        settings: SessionSettings | None = None,
        *,
        content: bytes | None = None,
        provider: Provider = CPU,
        pack: bool = True,
    ) -> None:
        """Load the graph at ``path``.

        Args:
            path: the file; its weights are looked for beside it.
            settings: how to run it.
            content: the file's bytes, where the caller has read and checked them.
            provider: what is to run it.
            pack: hold a copy of the weights in the form that the kernels read; without it weights
                stay in their mapped file, and products take a little longer.

        Raises:
            BundleError: onnxruntime cannot read it; also if it points to data outside its folder.
            UsageError: it would not run on ``provider``.
            TinyGiantError: memory runs out.
        """
        self.name = path.stem
        self._provider = provider
        settings = settings or SessionSettings()
        self._shrink = _shrink_options() if settings.arena and provider == CPU else None
        options = _session_options(settings, path.parent, provider)
        if not pack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        try:
            self._session: Any = onnxruntime.InferenceSession(
                path.read_bytes() if content is None else content,
                options,
                providers=_provider_list(provider),
                enable_fallback=0,
            )
        except Exception as error:
            if _is_memory(error):
                raise _out_of_memory(self.name) from error
            raise BundleError(
                f"graph {printable(path)} cannot be loaded by onnxruntime "
                f"{onnxruntime.__version__}: {one_line(error)}"
            ) from error
        self.providers = self._used_providers()
        self.input_names = tuple(node.name for node in self._session.get_inputs())
        self.output_names = tuple(node.name for node in self._session.get_outputs())
        self.input_types = {node.name: str(node.type) for node in self._session.get_inputs()}

    def _used_providers(self) -> tuple[str, ...]:
        """Those that run operators; refuses a session that does without the one asked for."""
        if self._provider == CPU:
            return (CPU.name,)
        wanted = self._provider.ort_name
        came_up = self._session.get_providers()
        if came_up[:1] != [wanted]:
            raise UsageError(
                f"graph {self.name} came up on {', '.join(came_up)}, not on {wanted}: its "
                "libraries cannot be loaded; onnxruntime says above which, or use --provider cpu"
            )
        parts = self._session.get_provider_graph_assignment_info()
        used = {part.ep_name for part in parts if part.get_nodes()}
        if wanted not in used:
            raise UsageError(
                f"graph {self.name} has no operator that {wanted} runs; give it to another one"
            )
        short = {provider.ort_name: name for name, provider in PROVIDERS.items()}
        others = sorted(short.get(name, name) for name in used - {wanted})
        return (self._provider.name, *others)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph on named arrays; returns every output by name.

        The memory of the run is given back when it ends.

        Raises:
            BundleError: names, shapes or types that the graph does not take.
        """
        try:
            outputs = self._session.run(list(self.output_names), dict(inputs), self._shrink)
        except Exception as error:
            raise self._failed(error) from error
        return dict(zip(self.output_names, outputs, strict=True))

    def bind(self) -> Binding:
        """A fresh binding of the graph's inputs and outputs to arrays of the caller."""
        return Binding(self._session.io_binding(), self, self._provider.device)

    def run_bound(self, binding: Binding) -> None:
        """Run the graph on what ``binding`` holds.

        The memory of the run is kept for the next one, unless its inputs were large: a prompt is
        followed by single tokens.
        """
        options = self._shrink if binding.input_bytes >= _LARGE_INPUT_BYTES else None
        try:
            self._session.run_with_iobinding(binding.io, options)
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Release the weights now, even while somebody still holds the graph."""
        self._session = None
        release_free_memory()

    def _failed(self, error: Exception) -> TinyGiantError:
        if _is_memory(error):
            return _out_of_memory(self.name)
        return BundleError(f"graph {self.name} failed: {one_line(error)}")


class Binding:
    """Arrays bound to a graph's inputs and outputs.

    On the CPU nothing is copied: the graph reads and writes the arrays in place. On a ``device``
    with memory of its own, inputs are copied there when they are bound, outputs come back after
    each run, and what is shared stays there.
    """

    def __init__(self, io: Any, graph: Graph, device: str | None = None) -> None:
        self.io = io
        self._graph = graph
        self._device = device
        # onnxruntime keeps only the address of an array: it must live as long as it is bound.
        self._bound: dict[str, NDArray[Any]] = {}
        self._inputs: set[str] = set()

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs that are not outputs as well."""
        return sum(self._bound[name].nbytes for name in self._inputs)

    def input(self, name: str, array: NDArray[Any]) -> None:
        """Let input ``name`` read the C-contiguous ``array``."""
        self._bound[name] = array
        self._inputs.add(name)
        self.io.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))

    def output(self, name: str, array: NDArray[Any]) -> None:
        """Let output ``name`` be written into the C-contiguous ``array``."""
        self._bound[name] = array
        self.io.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))

    def shared(self, input_name: str, output_name: str, array: NDArray[Any]) -> None:
        """Let one buffer be read as an input and written as an output, as the KV cache is.

        On the CPU it is ``array`` itself; on a device a copy of it, which never comes back.
        """
        if self._device is None:
            self._bound[input_name] = array
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        self.io.bind_ortvalue_input(input_name, value)
        self.io.bind_ortvalue_output(output_name, value)

    def run(self) -> None:
        """Run the graph; the bound outputs hold the result."""
        self._graph.run_bound(self)


class GraphPool:
    """A bundle's graphs by name: kept once loaded, or released after each use.

    With ``keep`` false, peak memory is that of the largest graph instead of their sum.
    ``providers`` tells for each graph which providers run it: the one asked for, and once the graph
    has been loaded also those that run the operators it lacks.
    """

    def __init__(
        self, bundle: Bundle, settings: SessionSettings, *, keep: bool = True, provider: str = "cpu"
    ) -> None:
        """Take the graphs from ``bundle``.

        Args:
            bundle: the opened bundle.
            settings: how to run its graphs.
            keep: whether a graph stays in memory once it is loaded.
            provider: what runs them, as :func:`tinygiant.runtime.ort.providers.assign` reads it.

        Raises:
            BundleError: this onnxruntime is older than the bundle asks for.
            UsageError: an unknown provider, or one that this onnxruntime does not have.
        """
        require_onnxruntime(bundle.manifest.min_onnxruntime)
        self._assigned = assign(provider, bundle.config.graphs)
        require_available(self._assigned.values(), onnxruntime.get_available_providers())
        self.providers: dict[str, tuple[str, ...]] = {
            name: (assigned.name,) for name, assigned in self._assigned.items()
        }
        self._bundle = bundle
        self._settings = settings
        self._keep = keep
        self._not_packed = not_packed(bundle.config)
        self._graphs: dict[str, Graph] = {}
        self._unchanged: frozenset[tuple[int, int]] | None = None

    def load_all(self) -> None:
        """Load every graph now, so that the first question does not wait; only with ``keep``.

        Loading is work of one thread, so as many graphs as there are threads are loaded at a time.
        """
        if not self._keep:
            return
        missing = [name for name in self._bundle.manifest.graphs if name not in self._graphs]
        # The largest first: the others fit beside it.
        missing.sort(key=self._size_bytes, reverse=True)
        workers = self._settings.threads or physical_cores()
        with ThreadPoolExecutor(workers, thread_name_prefix="load") as executor:
            self._graphs.update(zip(missing, executor.map(self._load, missing), strict=True))

    def release(self) -> None:
        """Give back what is not needed until the next run: freed memory and the bundle's pages.

        onnxruntime reads much of a weights file once, to pack it, and keeps it mapped. The pages
        stay in the system's cache of files and come back when they are read again. A small bundle
        is left alone, and so are pages on other systems than Linux.
        """
        if sum(file.size_bytes for file in self._bundle.manifest.files) < _LARGE_BUNDLE_BYTES:
            return
        release_free_memory()
        if not self._keep or sys.platform != "linux":
            return
        root = self._bundle.root
        if self._unchanged is None:
            self._unchanged = unchanged_mappings(_proc_self("smaps"), root)
        libc = ctypes.CDLL(None)
        for line in _proc_self("maps").splitlines():
            span = _mapping(line, f"{root}/")
            if span in self._unchanged:
                start, end = span
                libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)

    @contextmanager
    def use(self, name: str) -> Iterator[Graph]:
        """Graph ``name`` for the length of a ``with`` block."""
        if self._keep:
            if name not in self._graphs:
                self._graphs[name] = self._load(name)
            yield self._graphs[name]
            if name in self._not_packed:
                self.release()
            return
        graph = self._load(name)
        try:
            yield graph
        finally:
            graph.close()

    def _size_bytes(self, name: str) -> int:
        entry = self._bundle.manifest.graphs[name]
        files = {entry.file, *entry.external_data}
        return sum(f.size_bytes for f in self._bundle.manifest.files if f.path in files)

    def _load(self, name: str) -> Graph:
        graph = Graph(
            self._bundle.graph(name),
            self._settings,
            content=self._bundle.read_graph(name),
            provider=self._assigned[name],
            pack=name not in self._not_packed,
        )
        self.providers[name] = graph.providers
        _require_kv_type(graph, self._bundle.manifest.kv_cache)
        self._bundle.require_unchanged()  # after loading, so that there is no moment in between
        return graph


def not_packed(model: ModelConfig) -> frozenset[str]:
    """Graphs whose weights stay in their mapped files: encoders of a part of a chunk.

    Products of their unpacked weights take 5 % longer, which is 0.3 % of a question at full size,
    and 105 MB of copies are not made.
    """
    return frozenset(e.graph for e in model.encoders if e.window_s < model.chunk_s)


def _require_kv_type(graph: Graph, kv_type: KvType) -> None:
    """Refuse a decoder that keeps keys and values otherwise than its manifest says."""
    expected = _KV_TYPES[kv_type]
    for name, found in graph.input_types.items():
        if name.startswith("past_key_values.") and found != expected:
            raise BundleError(
                f"graph {graph.name} takes {printable(name):.80} as {found}, but the manifest's "
                f"kv_cache is {kv_type}; export the bundle again"
            )


def release_free_memory() -> None:
    """Give memory that was freed back to the system; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def unchanged_mappings(smaps: str, root: Path) -> frozenset[tuple[int, int]]:
    """Addresses of mapped files below ``root``, from the text of ``/proc/PID/smaps`` (proc(5)).

    Only those without a private copy of a page: to let go of a copy would lose what was written.
    """
    found: set[tuple[int, int]] = set()
    prefix, span = f"{root}/", None
    for line in smaps.splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):
            span = _mapping(line, prefix)
        elif span is not None and key == "Anonymous:" and rest.strip() == "0 kB":
            found.add(span)
    return frozenset(found)


def _mapping(line: str, prefix: str) -> tuple[int, int] | None:
    """Start and end of "7f00-7f10 rw-p 00000000 fe:00 123    /path", if it is of such a file."""
    fields = line.split(maxsplit=5)
    if len(fields) < 6 or not fields[5].startswith(prefix):
        return None
    start, _, end = fields[0].partition("-")
    return int(start, 16), int(end, 16)


def _proc_self(name: str) -> str:
    """A file of ``/proc/self``; empty where there is none."""
    try:
        return Path("/proc/self", name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _shrink_options() -> Any:
    """Options of a run that empties the session's arena when it ends."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _is_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "bad_alloc" in str(error)


def _out_of_memory(graph: str) -> TinyGiantError:
    return TinyGiantError(
        f"memory ran out in graph {graph}; use --memory low or a smaller recipe, or end programs"
    )


def onnxruntime_version() -> str:
    """The installed onnxruntime's version."""
    return str(onnxruntime.__version__)


def require_onnxruntime(minimum: str) -> None:
    """Refuse an onnxruntime older than ``minimum``, a dotted version.

    Raises:
        BundleError: it is older.
    """
    if _version_key(onnxruntime_version()) < _version_key(minimum):
        raise BundleError(
            f"the bundle needs onnxruntime {minimum} or newer, found {onnxruntime_version()}; "
            f"run: pip install 'onnxruntime>={minimum}'"
        )


def physical_cores() -> int:
    """Physical cores this process may use: those it may run on, within its container's quota."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return max(os.cpu_count() or 1, 1)
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    # Threads of one core have the same list of siblings.
    cores = {_read(topology.format(cpu)) or str(cpu) for cpu in allowed}
    quota = _quota(_read("/sys/fs/cgroup/cpu.max"))
    return max(1, min(len(cores), quota or len(cores)))


def _quota(cpu_max: str) -> int | None:
    """Whole cores in cgroup v2's ``cpu.max`` ("150000 100000": one and a half); None: no limit."""
    found = re.fullmatch(r"(\d+) ([1-9]\d*)", cpu_max)
    return max(1, int(found[1]) // int(found[2])) if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _provider_list(provider: Provider) -> list[Any]:
    """The provider, then what may run the operators it lacks; onnxruntime's own form."""
    available = onnxruntime.get_available_providers()
    others = [PROVIDERS[name] for name in provider.then if PROVIDERS[name].ort_name in available]
    chain = [provider, *others, *([] if provider == CPU else [CPU])]
    return [(entry.ort_name, dict(entry.options)) for entry in chain]


def _session_options(settings: SessionSettings, folder: Path, provider: Provider) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.threads or physical_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Shapes change from step to step, so a planned pattern is never used twice.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = settings.arena
    # Errors are raised and shown once, by us; onnxruntime would print them a second time.
    options.log_severity_level = _FATAL
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "1" if settings.spin else "0"
    )
    # Graphs are given as bytes, which were checked as ONNX: never taken for another format, and
    # their weights lie in this folder.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder.absolute())
    )
    if provider != CPU:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _version_key(version: str) -> tuple[int, ...]:
    key = [int(number) for number in re.findall(r"\d+", version)[:3]]
    return tuple(key + [0] * (3 - len(key)))
