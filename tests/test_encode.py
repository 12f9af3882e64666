"""Encoders and projector behind a fake pool: what runs, how often, and on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.models.config import EBranchformerConfig, preset
from tinygiant.models.features import ClapFeatures
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.config import ModelConfig
from tinygiant.runtime.encode import Encoded, EncodedCache, audio_key, encode, project
from tinygiant.runtime.preprocess import preprocess

Tone = Callable[[float, int], NDArray[np.float32]]
FULL = preset("full").runtime
SHARED = dataclasses.replace(preset("full"), clap=None).runtime


def with_projector(**switches: bool) -> ModelConfig:
    projector = EBranchformerConfig(**switches)
    return dataclasses.replace(preset("full"), projector=projector).runtime


class FakeGraph:
    """Gives arrays of the right shape whose values say which run made them."""

    def __init__(self, name: str, config: ModelConfig, log: list[str]) -> None:
        self.name, self.config, self.log, self.runs = name, config, log, 0
        self.seen: list[dict[str, Any]] = []
        inputs = [wanted.name for wanted in config.projector.inputs]
        if config.projector.reads_question:
            inputs += ["instruction_embeds", "instruction_mask"]
        self.inputs = set(inputs) if name == "projector" else {"input_features"}

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        assert set(inputs) == self.inputs
        self.runs += 1
        self.seen.append(inputs)
        self.log.append(self.name)
        if self.name == "projector":
            n, d = inputs["streams"].shape[1], 1024
            shapes = {"audio_embeds": (1, n, d), "intent_attention": (1, n), "gate": (1, d)}
            wanted = {name: shapes[name] for name in self.config.projector.outputs}
        else:
            encoder = next(e for e in self.config.encoders if e.graph == self.name)
            wanted = {}
            for output in encoder.outputs:
                n_rows = output.rows
                if encoder.variable_length:
                    n_rows = inputs["input_features"].shape[2] // 10
                wanted[output.name] = (1, *((n_rows,) if n_rows else ()), output.size)
        return {name: np.full(shape, self.runs, np.float32) for name, shape in wanted.items()}


class FakePool:
    def __init__(self, config: ModelConfig) -> None:
        self.log: list[str] = []
        self.graphs = {name: FakeGraph(name, config, self.log) for name in config.graphs}

    @contextmanager
    def use(self, name: str) -> Iterator[FakeGraph]:
        self.log.append(f"load {name}")
        yield self.graphs[name]
        self.log.append(f"release {name}")

    def runs(self) -> dict[str, int]:
        return {name: graph.runs for name, graph in self.graphs.items()}


def run(config: ModelConfig, tone: Tone, seconds: float) -> tuple[FakePool, list[dict[str, Any]]]:
    pool = FakePool(config)
    audio = read_audio((tone(seconds, 8_000), 8_000))
    outputs = encode(preprocess(audio, config), pool, config)  # type: ignore[arg-type]
    return pool, [dict(chunk.inputs) for chunk in outputs]


def test_a_clip_of_61_s_has_three_chunks_and_seven_windows(tone: Tone) -> None:
    pool, outputs = run(FULL, tone, 61.0)
    assert pool.runs() == {
        "whisper_encoder": 3, "htsat_encoder": 7, "clap_encoder": 7, "projector": 0,
        "decoder_model": 0,
    }  # fmt: skip
    assert [chunk["streams"].shape for chunk in outputs] == [(1, 300, 2048)] * 3
    assert [chunk["anchor"].shape for chunk in outputs] == [(1, 1024)] * 3
    # temporal features first, then events; anchors are means over the windows with audio
    assert [chunk["streams"][0, 0, 0] for chunk in outputs] == [1, 2, 3]
    assert [chunk["streams"][0, 0, -1] for chunk in outputs] == [1, 4, 7]
    assert [chunk["streams"][0, 299, -1] for chunk in outputs] == [3, 6, 0]
    assert [float(chunk["anchor"][0, 0]) for chunk in outputs] == [2, 5, 7]


def test_each_graph_sees_every_chunk_before_the_next_is_loaded(tone: Tone) -> None:
    pool, _ = run(FULL, tone, 31.0)
    steps = [line for line in pool.log if line.startswith(("load", "release"))]
    assert steps == [
        f"{verb} {name}"
        for name in ("whisper_encoder", "htsat_encoder", "clap_encoder")
        for verb in ("load", "release")
    ]


def test_a_shared_tower_runs_once_a_window(tone: Tone) -> None:
    pool, outputs = run(SHARED, tone, 12.0)
    assert pool.runs()["htsat_encoder"] == 2
    assert "clap_encoder" not in pool.graphs
    assert float(outputs[0]["anchor"][0, 0]) == 1.5


def test_without_a_gate_no_anchor_is_made(tone: Tone) -> None:
    config = with_projector(semantic_gate=False)
    pool, outputs = run(config, tone, 1.0)
    assert "load clap_encoder" not in pool.log
    assert [*outputs[0]] == ["streams"]
    instruction = np.zeros((1, 3, 1024), np.float32)
    [projection] = project([Encoded(outputs[0])], instruction, pool, config)  # type: ignore[arg-type]
    assert projection.gate is None
    assert projection.intent_attention is not None


def test_the_anchors_tower_may_have_features_of_its_own(tone: Tone) -> None:
    original = ClapFeatures(sampling_rate_hz=32_000, hop_length=320)
    pool, _ = run(dataclasses.replace(preset("full"), event_features=original).runtime, tone, 1.0)
    event_features = pool.graphs["htsat_encoder"].seen[0]["input_features"]
    anchor_features = pool.graphs["clap_encoder"].seen[0]["input_features"]
    assert event_features.shape == anchor_features.shape == (1, 1, 1001, 64)
    assert not np.array_equal(event_features, anchor_features)


def test_clip_context_keeps_only_rows_with_audio(tone: Tone) -> None:
    config = dataclasses.replace(FULL, audio_context="clip")
    pool, outputs = run(config, tone, 1.25)
    assert outputs[0]["streams"].shape == (1, 13, 2048)
    assert pool.graphs["whisper_encoder"].seen[0]["input_features"].shape == (1, 128, 230)


@pytest.mark.parametrize("intent_query", [True, False])
@pytest.mark.parametrize("semantic_gate", [True, False])
def test_the_projector_gets_what_its_graph_takes(
    tone: Tone, intent_query: bool, semantic_gate: bool
) -> None:
    config = with_projector(intent_query=intent_query, semantic_gate=semantic_gate)
    pool, outputs = run(config, tone, 31.0)
    instruction = np.ones((1, 4, 1024), np.float32)
    projections = project([Encoded(x) for x in outputs], instruction, pool, config)  # type: ignore[arg-type]
    assert [p.audio_embeds.shape for p in projections] == [(1, 300, 1024)] * 2
    assert all((p.intent_attention is not None) == intent_query for p in projections)
    assert all((p.gate is not None) == semantic_gate for p in projections)
    if intent_query:
        mask = pool.graphs["projector"].seen[0]["instruction_mask"]
        np.testing.assert_array_equal(mask, np.ones((1, 4), np.int64))


def outputs_of(n_floats: int) -> tuple[Encoded, ...]:
    return (Encoded({"rows": np.zeros((1, 1, n_floats), np.float32)}),)


def test_the_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = EncodedCache(max_bytes=3 * 40)
    entries = {key: outputs_of(10) for key in (b"a", b"b", b"c", b"d")}
    for key in (b"a", b"b", b"c"):
        cache.put(key, entries[key])
    assert cache.get(b"a") is entries[b"a"]
    cache.put(b"d", entries[b"d"])
    assert cache.get(b"b") is None
    assert [cache.get(key) is not None for key in (b"a", b"c", b"d")] == [True] * 3
    assert cache.n_bytes == 120


def test_the_cache_is_bounded() -> None:
    cache = EncodedCache(max_bytes=100)
    cache.put(b"a", outputs_of(10))
    cache.put(b"big", outputs_of(26))
    assert cache.get(b"big") is None
    assert cache.get(b"a") is not None
    cache.put(b"a", outputs_of(20))
    assert cache.n_bytes == 80
    nothing = EncodedCache(max_bytes=0)
    nothing.put(b"a", outputs_of(1))
    assert nothing.get(b"a") is None


def test_keys_differ_with_samples_and_rate(tone: Tone) -> None:
    audio = read_audio((tone(0.5, 8_000), 8_000))
    same = read_audio((tone(0.5, 8_000), 8_000))
    faster = dataclasses.replace(audio, sampling_rate_hz=16_000)
    quieter = dataclasses.replace(audio, samples=audio.samples * np.float32(0.999))
    shorter = dataclasses.replace(audio, samples=audio.samples[:-1])
    assert audio_key(audio) == audio_key(same)
    assert len({audio_key(other) for other in (audio, faster, quieter, shorter)}) == 4
