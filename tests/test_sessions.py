"""What the runtime takes of a machine, and what it gives back: threads, spinning, memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.runtime import Bundle, load
from tinygiant.runtime.ort import pool as pools
from tinygiant.runtime.ort import sessions
from tinygiant.runtime.ort.machine import Machine
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

Tone = Callable[[float, int], NDArray[np.float32]]


def forge(root: Path, files: dict[str, str]) -> Machine:
    """A machine whose system says what ``files`` hold."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(root)


# --- threads


@pytest.mark.parametrize(
    ("cpu_max", "cores"),
    [("200000 100000", 2), ("150000 100000", 1), ("5000 100000", 1), ("max 100000", 6), ("", 6),
     ("1 0", 6)],
)  # fmt: skip
def test_a_container_s_quota_bounds_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert forge(tmp_path, {"sys/fs/cgroup/cpu.max": cpu_max}).physical_cores() == cores


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5}, raising=False)
    siblings = {0: "0,4", 1: "1,5", 5: "1,5", 2: "2,6"}
    files = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{text}\n"
        for cpu, text in siblings.items()
    }
    assert forge(tmp_path, files).physical_cores() == 3


def test_this_machine_has_cores() -> None:
    assert 1 <= Machine().physical_cores() <= len(os.sched_getaffinity(0))


def options_of(graph: Graph) -> Any:
    return graph._session.get_session_options()


@pytest.mark.parametrize(("spin", "entry"), [(True, "1"), (False, "0")])
def test_threads_and_spinning_reach_onnxruntime(tiny_bundle: Path, spin: bool, entry: str) -> None:
    graph = Graph(tiny_bundle / "onnx/projector.onnx", SessionSettings(threads=3, spin=spin))
    options = options_of(graph)
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == entry


def test_threads_default_to_the_physical_cores(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "physical_cores", lambda self: 5)
    graph = Graph(tiny_bundle / "onnx/projector.onnx")
    assert options_of(graph).intra_op_num_threads == 5


@pytest.mark.parametrize("spin", [True, False])
def test_load_passes_the_wish_on(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, spin: bool
) -> None:
    asked = []
    usual = sessions._session_options

    def watched(settings: SessionSettings, *rest: Any) -> Any:
        asked.append((settings.threads, settings.spin))
        return usual(settings, *rest)

    monkeypatch.setattr(sessions, "_session_options", watched)
    load(tiny_bundle, threads=2, spin=spin)
    assert set(asked) == {(2, spin)}


# --- memory


class Recorded:
    """A session that remembers the options of its runs."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.shrunk: list[bool] = []

    def _note(self, options: Any) -> None:
        entry = "memory.enable_memory_arena_shrinkage"
        self.shrunk.append(options is not None and options.get_run_config_entry(entry) == "cpu:0")

    def run(self, names: Any, inputs: Any, options: Any = None) -> Any:
        self._note(options)
        return self.session.run(names, inputs, options)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self._note(options)
        self.session.run_with_iobinding(binding, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def recorded(bundle: Path, name: str) -> tuple[Graph, Recorded]:
    graph = Graph(bundle / f"onnx/{name}.onnx", SessionSettings(threads=1))
    session = graph._session = Recorded(graph._session)
    return graph, session


def test_the_arena_is_emptied_after_an_encoder_s_run(tiny_bundle: Path) -> None:
    config = Bundle.open(tiny_bundle).config
    graph, session = recorded(tiny_bundle, config.encoders[-1].graph)
    features = config.encoders[-1].features
    shape = (1, 1, config.encoders[-1].n_frames, features.n_mels)
    graph.run({graph.input_names[0]: np.zeros(shape, np.float32)})
    assert session.shrunk == [True]


@pytest.mark.parametrize(("n_values", "shrunk"), [(2**18, True), (2**18 - 1, False)])
def test_the_arena_is_emptied_after_a_prompt_and_not_after_a_token(
    tiny_bundle: Path, n_values: int, shrunk: bool
) -> None:
    """1 MiB of inputs tells a prompt from a step; emptying it each step would cost a tenth."""
    graph, session = recorded(tiny_bundle, "projector")
    binding = graph.bind()
    array = np.zeros(n_values, np.float32)
    binding._bound["x"] = array
    binding._inputs.add("x")
    session.run_with_iobinding = lambda io, options: session._note(options)  # type: ignore
    graph.run_bound(binding)
    assert session.shrunk == [shrunk]


def test_threads_rest_where_another_graph_s_run_follows(tiny_bundle: Path) -> None:
    """Five graphs' threads waited for work in loops, and took the processors of the sixth's.

    Nano was twice as fast with one thread as with two.
    """
    bundle = Bundle.open(tiny_bundle)
    pool = GraphPool(bundle, SessionSettings(threads=2))
    resting = set()
    for name in bundle.manifest.graphs:
        with pool.use(name) as graph:
            options = graph._session.get_session_options()
        try:
            if options.get_session_config_entry("session.force_spinning_stop") == "1":
                resting.add(name)
        except RuntimeError:  # it was not set
            pass
    # Tokens follow one another.
    assert resting == set(bundle.manifest.graphs) - {bundle.config.decoder.graph}


def test_low_memory_holds_no_graph_between_questions(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tone: Tone
) -> None:
    closed: list[str] = []
    close = Graph.close

    def watched(self: Graph) -> None:
        closed.append(self.name)
        close(self)
        with pytest.raises(Exception, match=r"NoneType|closed"):
            self.run({})

    monkeypatch.setattr(Graph, "close", watched)
    load(tiny_bundle, threads=1, memory="low").ask((tone(1.0, 16_000), 16_000), "What?")
    assert sorted(set(closed)) == sorted(Bundle.open(tiny_bundle).manifest.graphs)


def test_freed_memory_goes_back_after_each_question(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tone: Tone
) -> None:
    """Of a large bundle; walking the heap of a small one costs more than it gives."""
    trims = []
    monkeypatch.setattr(pools, "release_free_memory", lambda: trims.append(1))
    pool = GraphPool(Bundle.open(tiny_bundle), SessionSettings(threads=1))
    pool.release()
    assert not trims
    monkeypatch.setattr(pools, "_LARGE_BUNDLE_BYTES", 0)
    pool.release()
    assert len(trims) == 1
    model = load(tiny_bundle, threads=1)
    trims.clear()
    model.ask((tone(1.0, 16_000), 16_000), "What?", max_new_tokens=1)
    assert trims
