"""Encoders and projector behind a fake pool: what runs, how often, and on what."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.chunks import split_chunks
from tinygiant.runtime.config import ClapFeatures, EventStream, ModelConfig, ProjectorConfig
from tinygiant.runtime.streams import (
    StreamCache,
    StreamOutputs,
    audio_key,
    encode_chunks,
    project,
)

Tone = Callable[[float, int], NDArray[np.float32]]
SHARED = EventStream(shared_tower=True, anchor_size=768)


class FakeGraph:
    """Gives arrays of the right shape whose values say which run made them."""

    def __init__(self, name: str, config: ModelConfig, log: list[str]) -> None:
        self.name, self.config, self.log, self.runs = name, config, log, 0
        self.seen: list[dict[str, Any]] = []
        inputs = ["streams"]
        if config.projector.semantic_gate:
            inputs.append("anchor")
        if config.projector.intent_query:
            inputs += ["instruction_embeds", "instruction_mask"]
        self.input_names = tuple(inputs) if name == "projector" else ("input_features",)

    def run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        assert set(inputs) == set(self.input_names)
        self.runs += 1
        self.seen.append(inputs)
        self.log.append(self.name)
        config, value = self.config, float(self.runs)
        event = config.event
        if self.name == "whisper_encoder":
            n_frames = inputs["input_features"].shape[2]
            shape = (1, n_frames // config.frames_per_token, config.temporal.hidden_size)
            return {"temporal": np.full(shape, value, np.float32)}
        if self.name == "projector":
            n, d = inputs["streams"].shape[1], config.projector.hidden_size
            out = {"audio_embeds": np.full((1, n, d), value, np.float32)}
            if config.projector.intent_query:
                out["intent_attention"] = np.full((1, n), value, np.float32)
            if config.projector.semantic_gate:
                out["gate"] = np.full((1, d), value, np.float32)
            return out
        events = np.full((1, event.steps_per_window, event.hidden_size), value, np.float32)
        anchor = np.full((1, event.anchor_size), value, np.float32)
        if self.name == "clap_encoder":
            return {"anchor": anchor}
        return {"events": events, "anchor": anchor} if event.shared_tower else {"events": events}


class FakePool:
    def __init__(self, config: ModelConfig) -> None:
        self.log: list[str] = []
        names = ("whisper_encoder", "htsat_encoder", "clap_encoder", "projector")
        self.graphs = {name: FakeGraph(name, config, self.log) for name in names}

    @contextmanager
    def use(self, name: str) -> Iterator[FakeGraph]:
        self.log.append(f"load {name}")
        yield self.graphs[name]
        self.log.append(f"release {name}")

    def runs(self) -> dict[str, int]:
        return {name: graph.runs for name, graph in self.graphs.items()}


def encode(
    config: ModelConfig, tone: Tone, seconds: float
) -> tuple[FakePool, tuple[StreamOutputs, ...]]:
    pool = FakePool(config)
    audio = read_audio((tone(seconds, 8_000), 8_000))
    return pool, encode_chunks(split_chunks(audio, config), pool, config)  # type: ignore[arg-type]


def test_a_clip_of_61_s_has_three_chunks_and_seven_windows(tone: Tone) -> None:
    pool, outputs = encode(ModelConfig(), tone, 61.0)
    assert pool.runs() == {
        "whisper_encoder": 3, "htsat_encoder": 7, "clap_encoder": 7, "projector": 0,
    }  # fmt: skip
    assert [chunk.streams.shape for chunk in outputs] == [(1, 300, 2048)] * 3
    assert [chunk.anchor.shape for chunk in outputs if chunk.anchor is not None] == [(1, 1024)] * 3
    # temporal features first, then events; anchors are means over the windows with audio
    assert [chunk.streams[0, 0, 0] for chunk in outputs] == [1, 2, 3]
    assert [chunk.streams[0, 0, -1] for chunk in outputs] == [1, 4, 7]
    assert [chunk.streams[0, 299, -1] for chunk in outputs] == [3, 6, 0]
    assert [float(chunk.anchor[0, 0]) for chunk in outputs if chunk.anchor is not None] == [2, 5, 7]


def test_each_graph_sees_every_chunk_before_the_next_is_loaded(tone: Tone) -> None:
    pool, _ = encode(ModelConfig(), tone, 31.0)
    steps = [line for line in pool.log if line.startswith(("load", "release"))]
    assert steps == [
        f"{verb} {name}"
        for name in ("whisper_encoder", "htsat_encoder", "clap_encoder")
        for verb in ("load", "release")
    ]


def test_a_shared_tower_runs_once_a_window(tone: Tone) -> None:
    pool, outputs = encode(ModelConfig(event=SHARED), tone, 12.0)
    assert pool.runs()["htsat_encoder"] == 2
    assert pool.runs()["clap_encoder"] == 0
    assert outputs[0].anchor is not None
    assert float(outputs[0].anchor[0, 0]) == 1.5


def test_without_a_gate_no_anchor_is_made(tone: Tone) -> None:
    config = ModelConfig(projector=ProjectorConfig(semantic_gate=False))
    pool, outputs = encode(config, tone, 1.0)
    assert "load clap_encoder" not in pool.log
    assert outputs[0].anchor is None
    [projection] = project(outputs, np.zeros((1, 3, 1024), np.float32), pool)  # type: ignore[arg-type]
    assert projection.gate is None
    assert projection.intent_attention is not None


def test_the_anchors_tower_may_have_features_of_its_own(tone: Tone) -> None:
    event = EventStream(
        features=ClapFeatures(sampling_rate_hz=32_000, hop_length=320),
        anchor_features=ClapFeatures(),
    )
    pool, _ = encode(ModelConfig(event=event), tone, 1.0)
    event_features = pool.graphs["htsat_encoder"].seen[0]["input_features"]
    anchor_features = pool.graphs["clap_encoder"].seen[0]["input_features"]
    assert event_features.shape == anchor_features.shape == (1, 1, 1001, 64)
    assert not np.array_equal(event_features, anchor_features)


def test_clip_context_keeps_only_rows_with_audio(tone: Tone) -> None:
    config = ModelConfig(audio_context="clip")
    pool, outputs = encode(config, tone, 1.25)
    assert outputs[0].streams.shape == (1, 13, 2048)
    assert pool.graphs["whisper_encoder"].seen[0]["input_features"].shape == (1, 128, 230)


@pytest.mark.parametrize("intent_query", [True, False])
@pytest.mark.parametrize("semantic_gate", [True, False])
def test_the_projector_gets_what_its_graph_takes(
    tone: Tone, intent_query: bool, semantic_gate: bool
) -> None:
    sizes = ProjectorConfig(intent_query=intent_query, semantic_gate=semantic_gate)
    pool, outputs = encode(ModelConfig(projector=sizes), tone, 31.0)
    instruction = np.ones((1, 4, 1024), np.float32)
    projections = project(outputs, instruction, pool)  # type: ignore[arg-type]
    assert [p.audio_embeds.shape for p in projections] == [(1, 300, 1024)] * 2
    assert all((p.intent_attention is not None) == intent_query for p in projections)
    assert all((p.gate is not None) == semantic_gate for p in projections)
    if intent_query:
        mask = pool.graphs["projector"].seen[0]["instruction_mask"]
        np.testing.assert_array_equal(mask, np.ones((1, 4), np.int64))


def outputs_of(n_floats: int) -> tuple[StreamOutputs, ...]:
    return (StreamOutputs(np.zeros((1, 1, n_floats), np.float32), None),)


def test_the_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = StreamCache(max_bytes=3 * 40)
    entries = {key: outputs_of(10) for key in (b"a", b"b", b"c", b"d")}
    for key in (b"a", b"b", b"c"):
        cache.put(key, entries[key])
    assert cache.get(b"a") is entries[b"a"]
    cache.put(b"d", entries[b"d"])
    assert cache.get(b"b") is None
    assert [cache.get(key) is not None for key in (b"a", b"c", b"d")] == [True] * 3
    assert cache.n_bytes == 120


def test_the_cache_is_bounded() -> None:
    cache = StreamCache(max_bytes=100)
    cache.put(b"a", outputs_of(10))
    cache.put(b"big", outputs_of(26))
    assert cache.get(b"big") is None
    assert cache.get(b"a") is not None
    cache.put(b"a", outputs_of(20))
    assert cache.n_bytes == 80
    nothing = StreamCache(max_bytes=0)
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
