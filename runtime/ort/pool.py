"""A bundle's graphs: kept once they are loaded, or released after each use.

A process keeps only what it will use again: the working memory of a run goes back to the system,
and so does all memory of a closed graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from ..bundle import Bundle
from ..config import KvType, ModelConfig
from ..errors import BundleError
from ..text import printable
from .providers import assign, require_available
from .sessions import (
    Graph,
    SessionSettings,
    available_providers,
    release_free_memory,
    require_onnxruntime,
)

__all__ = ["GraphPool", "is_small", "not_packed"]

_KV_TYPES: Mapping[KvType, str] = {"fp32": "tensor(float)", "int8": "tensor(int8)"}
_LARGE_BUNDLE_BYTES = 64 * 2**20


class GraphPool:
    """A bundle's graphs by name: kept once loaded, or released after each use.

    With ``keep`` false, peak memory is that of the largest graph instead of their sum.
    ``providers`` has for each graph the providers that run it: the one asked for, and once the
    graph has been loaded also those that run the operators it lacks.
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
        self._assigned = assign(provider, bundle.manifest.roles)
        require_available(self._assigned.values(), available_providers())
        self.providers: dict[str, tuple[str, ...]] = {
            name: (assigned.name,) for name, assigned in self._assigned.items()
        }
        self._bundle = bundle
        self._prompt_graph = bundle.manifest.prompt_graph
        self._settings = settings
        self.keep = keep
        self._not_packed = not_packed(bundle.config)
        self._graphs: dict[str, Graph] = {}

    def load_all(self) -> None:
        """Load every graph now, so that the first question does not wait; only with ``keep``.

        Loading is work of one thread, so as many graphs as there are threads are loaded at a time.
        """
        if not self.keep:
            return
        missing = [
            name
            for name in self._bundle.manifest.graphs
            if name not in self._graphs and (name != self._prompt_graph or self._has_prompts)
        ]
        # The largest first: the others fit next to it.
        missing.sort(key=self._size_bytes, reverse=True)
        workers = self._settings.n_threads
        with ThreadPoolExecutor(workers, thread_name_prefix="load") as executor:
            self._graphs.update(zip(missing, executor.map(self._load, missing), strict=True))

    def release(self) -> None:
        """Give memory that was freed back to the system; that of a small bundle is left alone."""
        # Freed memory of a small bundle is not worth the walk over the heap.
        if not is_small(self._bundle):
            release_free_memory()

    def is_on_cpu(self, name: str) -> bool:
        """Whether graph ``name`` runs on the CPU alone, where its outputs can be kept."""
        return self.providers[name] == ("cpu",)

    @contextmanager
    def use(self, name: str) -> Iterator[Graph]:
        """Graph ``name`` for the length of a ``with`` block."""
        if self.keep:
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

    @contextmanager
    def prompts(self) -> Iterator[Graph | None]:
        """The decoder's graph for prompts, if there is one and it is to be used.

        It costs memory beside the other one, and has to share keys and values with it.
        """
        if not self._has_prompts:
            yield None
            return
        with self.use(self._prompt_graph) as graph:
            yield graph

    @property
    def _has_prompts(self) -> bool:
        both = self._prompt_graph, self._bundle.config.decoder.graph
        return bool(self._prompt_graph) and self.keep and all(self.is_on_cpu(n) for n in both)

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
            rest=name != self._bundle.config.decoder.graph,
        )
        self.providers[name] = graph.providers
        _require_kv_type(graph, self._bundle.manifest.kv_cache)
        self._bundle.require_unchanged()  # after loading, so that there is no moment in between
        return graph


def is_small(bundle: Bundle) -> bool:
    """Whether products are so small that neither a second thread nor tidying up pays."""
    return sum(file.size_bytes for file in bundle.manifest.files) < _LARGE_BUNDLE_BYTES


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
