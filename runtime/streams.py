"""The encoders and the projector: chunks of audio to rows of decoder embeddings.

Stream outputs depend on the audio alone, the projector also on the question. So outputs are kept
in a small cache by content, and a second question about the same clip skips the encoders.

Shapes of a chunk: ``N`` audio tokens, ``A`` anchor size, ``D`` decoder hidden size.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .audio import Audio
from .chunks import Chunk, event_rows, join_streams, mean_anchor
from .config import ModelConfig
from .ort.sessions import GraphPool

__all__ = ["Projection", "StreamCache", "StreamOutputs", "audio_key", "encode_chunks", "project"]

Array = NDArray[np.float32]

DEFAULT_CACHE_BYTES = 64 * 2**20  # about 12 minutes of audio at full size


@dataclass(frozen=True, eq=False)
class StreamOutputs:
    """What the encoders found in one chunk.

    Attributes:
        streams: ``(1, N, stream_size)``, temporal and event features of each audio token.
        anchor: ``(1, A)``, or None where the model has no gate and no tower that gives one.
    """

    streams: Array
    anchor: Array | None

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays."""
        return self.streams.nbytes + (0 if self.anchor is None else self.anchor.nbytes)


@dataclass(frozen=True, eq=False)
class Projection:
    """A chunk as the decoder reads it, and what there is to see of how it was listened to.

    Attributes:
        audio_embeds: ``(1, N, D)``.
        intent_attention: ``(1, N)``, how much the question looks at each audio token; None where
            that part is ablated.
        gate: ``(1, D)``, the semantic gate before it is halved; None where it is ablated.
    """

    audio_embeds: Array
    intent_attention: Array | None
    gate: Array | None


class StreamCache:
    """Stream outputs of the clips asked about last, bounded by their bytes."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Keep at most ``max_bytes``; 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[StreamOutputs, ...]] = OrderedDict()

    @property
    def n_bytes(self) -> int:
        """Bytes held now."""
        return sum(map(_total_bytes, self._entries.values()))

    def get(self, key: bytes) -> tuple[StreamOutputs, ...] | None:
        """The outputs kept under ``key``, which become the last to be forgotten."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: bytes, outputs: tuple[StreamOutputs, ...]) -> None:
        """Keep ``outputs``; those not used for longest make room for them."""
        if _total_bytes(outputs) > self._max_bytes:
            return
        self._entries[key] = outputs
        self._entries.move_to_end(key)
        while self.n_bytes > self._max_bytes:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


def audio_key(audio: Audio) -> bytes:
    """A key that two clips share only if their samples and rate are the same."""
    digest = hashlib.sha256(f"{audio.sampling_rate_hz}:{audio.samples.size}:".encode())
    digest.update(np.ascontiguousarray(audio.samples).data)
    return digest.digest()


def encode_chunks(
    chunks: Sequence[Chunk], pool: GraphPool, config: ModelConfig
) -> tuple[StreamOutputs, ...]:
    """Run the encoders over every chunk, each graph over all of them before the next is loaded.

    A tower that serves events and anchor runs once a window.
    """
    with pool.use("whisper_encoder") as whisper:
        temporal = [
            whisper.run({"input_features": chunk.temporal_features[None]})["temporal"][0]
            for chunk in chunks
        ]
    with pool.use("htsat_encoder") as htsat:
        windows = [[htsat.run(_window(x)) for x in chunk.event_features] for chunk in chunks]
    anchors: list[Array | None]
    if config.event.shared_tower:
        anchors = [mean_anchor([out["anchor"][0] for out in outs])[None] for outs in windows]
    elif config.projector.semantic_gate:
        with pool.use("clap_encoder") as clap:
            anchors = [
                mean_anchor(
                    [
                        clap.run(_window(x))["anchor"][0]
                        for x in chunk.anchor_features or chunk.event_features
                    ]
                )[None]
                for chunk in chunks
            ]
    else:
        anchors = [None] * len(chunks)
    return tuple(
        StreamOutputs(
            streams=join_streams(
                rows, event_rows([out["events"][0] for out in outs], chunk.n_tokens, config)
            ),
            anchor=anchor,
        )
        for chunk, rows, outs, anchor in zip(chunks, temporal, windows, anchors, strict=True)
    )


def project(
    outputs: Sequence[StreamOutputs], instruction_embeds: Array, pool: GraphPool
) -> tuple[Projection, ...]:
    """Run the projector over each chunk, with the question's embeddings ``(1, L, D)``."""
    instruction = {
        "instruction_embeds": instruction_embeds,
        "instruction_mask": np.ones(instruction_embeds.shape[:2], np.int64),
    }
    projections = []
    with pool.use("projector") as projector:
        for chunk in outputs:
            available: dict[str, Any] = instruction | {"streams": chunk.streams}
            if chunk.anchor is not None:
                available["anchor"] = chunk.anchor
            # Ablated parts leave their inputs and outputs out of the graph.
            found = projector.run({name: available[name] for name in projector.input_names})
            projections.append(
                Projection(found["audio_embeds"], found.get("intent_attention"), found.get("gate"))
            )
    return tuple(projections)


def _window(features: Array) -> dict[str, Array]:
    return {"input_features": features[None, None]}


def _total_bytes(outputs: Sequence[StreamOutputs]) -> int:
    return sum(chunk.n_bytes for chunk in outputs)
