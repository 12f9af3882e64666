"""onnxruntime sessions: the only module that imports onnxruntime.

A :class:`Graph` is one loaded ONNX graph. Threads default to the physical cores this process may
use; an exception of onnxruntime becomes a :class:`BundleError` of one line. A graph runs on the
provider that was asked for or not at all; operators that the provider lacks run on the next one,
and :attr:`Graph.providers` lists both. Importing this module turns onnxruntime's telemetry off (its
Linux wheels carry some since 1.29).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import BundleError, TinyGiantError, UsageError
from ..text import one_line, printable
from .machine import Machine
from .providers import CPU, PROVIDERS, Provider

# Read by onnxruntime while it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime

__all__ = [
    "Binding",
    "Graph",
    "SessionSettings",
    "available_providers",
    "onnxruntime_version",
    "release_free_memory",
    "require_onnxruntime",
]

_FATAL = 4
_LARGE_INPUT_BYTES = 2**20


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

    @property
    def n_threads(self) -> int:
        """Threads of one operator."""
        return self.threads or Machine().physical_cores()


class Graph:
    """One ONNX graph, ready to run.

    Attributes:
        name: the file's, without its ending.
        input_names: in the order of the graph.
        input_types: by name, as onnxruntime calls them: "tensor(float)".
        output_names: in the order of the graph.
        is_batched: whether its first input takes any number of sequences.
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
        rest: bool = False,
    ) -> None:
        """Load the graph at ``path``.

        Args:
            path: the file; its weights are looked for in its folder.
            settings: how to run it.
            content: the file's bytes, where the caller has read and checked them.
            provider: the provider that runs it.
            pack: hold a copy of the weights in the form that the kernels read; without it weights
                stay in their mapped file, and products take a little longer.
            rest: let threads sleep as soon as a run ends, because another graph's come next: those
                that still wait for work would take their processors.

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
        if rest:
            options.add_session_config_entry("session.force_spinning_stop", "1")
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
        self._parts: dict[str, list[str]] = {}
        for name in self.output_names:
            whole, _, part = name.rpartition(".")
            if whole in self.output_names and part.isdecimal():
                self._parts.setdefault(whole, [whole]).append(name)
        self.is_batched = isinstance(self._session.get_inputs()[0].shape[0], str)
        self.input_types = {node.name: str(node.type) for node in self._session.get_inputs()}

    def _used_providers(self) -> tuple[str, ...]:
        """Those that run operators; refuses a session that does without the one asked for."""
        if self._provider == CPU:
            return (CPU.name,)
        wanted = self._provider.ort_name
        came_up = self._session.get_providers()
        if came_up[:1] != [wanted]:
            raise UsageError(
                f"graph {self.name} came up on {', '.join(came_up)}, not on {wanted}: libraries "
                "of it cannot be loaded; install those that onnxruntime names above, or use "
                "--provider cpu"
            )
        parts = self._session.get_provider_graph_assignment_info()
        used = {part.ep_name for part in parts if part.get_nodes()}
        if wanted not in used:
            raise UsageError(
                f"graph {self.name} has no operator that {wanted} runs; choose another provider"
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
        """Run the graph on the arrays of ``binding``.

        The memory of the run is kept for the next one, unless its inputs were large: a prompt is
        followed by single tokens.
        """
        options = self._shrink if binding.input_bytes >= _LARGE_INPUT_BYTES else None
        try:
            self._session.run_with_iobinding(binding.io, options)
        except Exception as error:
            raise self._failed(error) from error

    def parts_of(self, output_name: str) -> list[str]:
        """The output of that name, and those called ``NAME.0`` and so on."""
        return self._parts.get(output_name, [output_name])

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

        Outputs ``NAME.0`` and so on, of a graph that has them, are written to it too. On the CPU it
        is ``array`` itself; on a device a copy of it, which never comes back.
        """
        if self._device is None:
            self._bound[input_name] = array
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        else:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, self._device, 0)
        self.io.bind_ortvalue_input(input_name, value)
        for name in self._graph.parts_of(output_name):
            self.io.bind_ortvalue_output(name, value)

    def run(self) -> None:
        """Run the graph; the bound outputs hold the result."""
        self._graph.run_bound(self)


def release_free_memory() -> None:
    """Give memory that was freed back to the system; glibc keeps it otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


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


def available_providers() -> list[str]:
    """Execution providers that the installed onnxruntime has, by its names."""
    return list(onnxruntime.get_available_providers())


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


def _provider_list(provider: Provider) -> list[Any]:
    """The provider, then what may run the operators it lacks; onnxruntime's own form."""
    available = available_providers()
    others = [PROVIDERS[name] for name in provider.then if PROVIDERS[name].ort_name in available]
    chain = [provider, *others, *([] if provider == CPU else [CPU])]
    return [(entry.ort_name, dict(entry.options)) for entry in chain]


def _session_options(settings: SessionSettings, folder: Path, provider: Provider) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.n_threads
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
