"""onnxruntime sessions: the only module that imports onnxruntime.

A :class:`Graph` is one loaded ONNX graph; a :class:`GraphPool` hands out a bundle's graphs and
decides whether they stay in memory. Threads default to the physical cores this process may use;
whatever onnxruntime raises becomes a :class:`BundleError` of one line. A graph runs on the provider
that was asked for or not at all; operators that the provider lacks run on the next one, and
:attr:`Graph.providers` tells so. Importing this module turns onnxruntime's telemetry off (its Linux
wheels carry some since 1.29).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tinygiant.runtime.bundle import Bundle
from tinygiant.runtime.errors import BundleError, TinyGiantError, UsageError
from tinygiant.runtime.providers import CPU, PROVIDERS, Provider, assign, require_available
from tinygiant.runtime.text import one_line, printable

# Read by onnxruntime while it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

__all__ = [
    "Binding",
    "Graph",
    "GraphPool",
    "SessionSettings",
    "onnxruntime_version",
    "physical_cores",
    "require_onnxruntime",
]

_FATAL = 4


@dataclass(frozen=True)
class SessionSettings:
    """How graphs are run.

    ``threads``: threads of one operator, the physical cores if None. ``spin``: threads wait for
    work by spinning for a moment, which is faster and keeps cores busy. ``arena``: onnxruntime
    keeps freed memory for the next run; without it peak memory is lower and runs are slower.
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
    ) -> None:
        """Load the graph at ``path``.

        Args:
            path: the file; its weights are looked for beside it.
            settings: how to run it.
            content: the file's bytes, where the caller has read and checked them.
            provider: what is to run it.

        Raises:
            BundleError: onnxruntime cannot read it; also if it points to data outside its folder.
            UsageError: it would not run on ``provider``.
            TinyGiantError: memory runs out.
        """
        self.name = path.stem
        self._provider = provider
        try:
            self._session: Any = onnxruntime.InferenceSession(
                path.read_bytes() if content is None else content,
                _session_options(settings or SessionSettings(), path.parent, provider),
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

        Raises:
            BundleError: names, shapes or types that the graph does not take.
        """
        try:
            outputs = self._session.run(list(self.output_names), dict(inputs))
        except Exception as error:
            raise self._failed(error) from error
        return dict(zip(self.output_names, outputs, strict=True))

    def bind(self) -> Binding:
        """A fresh binding of the graph's inputs and outputs to arrays of the caller."""
        return Binding(self._session.io_binding(), self, self._provider.device)

    def run_bound(self, binding: Binding) -> None:
        """Run the graph on what ``binding`` holds."""
        try:
            self._session.run_with_iobinding(binding.io)
        except Exception as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Release the weights now, even while somebody still holds the graph."""
        self._session = None

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

    def input(self, name: str, array: NDArray[Any]) -> None:
        """Let input ``name`` read the C-contiguous ``array``."""
        self._bound[name] = array
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
            provider: what runs them, as :func:`tinygiant.runtime.providers.assign` reads it.

        Raises:
            BundleError: this onnxruntime is older than the bundle asks for.
            UsageError: an unknown provider, or one that this onnxruntime does not have.
        """
        require_onnxruntime(bundle.manifest.min_onnxruntime)
        self._assigned = assign(provider, bundle.manifest.graphs)
        require_available(self._assigned.values(), onnxruntime.get_available_providers())
        self.providers: dict[str, tuple[str, ...]] = {
            name: (assigned.name,) for name, assigned in self._assigned.items()
        }
        self._bundle = bundle
        self._settings = settings
        self._keep = keep
        self._graphs: dict[str, Graph] = {}

    def load_all(self) -> None:
        """Load every graph now, so that the first question does not wait; only with ``keep``."""
        if self._keep:
            for name in self._bundle.manifest.graphs:
                self._graphs[name] = self._graphs.get(name) or self._load(name)

    @contextmanager
    def use(self, name: str) -> Iterator[Graph]:
        """Graph ``name`` for the length of a ``with`` block."""
        if self._keep:
            if name not in self._graphs:
                self._graphs[name] = self._load(name)
            yield self._graphs[name]
            return
        graph = self._load(name)
        try:
            yield graph
        finally:
            graph.close()

    def _load(self, name: str) -> Graph:
        graph = Graph(
            self._bundle.graph(name),
            self._settings,
            content=self._bundle.read_graph(name),
            provider=self._assigned[name],
        )
        self.providers[name] = graph.providers
        self._bundle.require_unchanged()  # after loading, so that there is no moment in between
        return graph


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
