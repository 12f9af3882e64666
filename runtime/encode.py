"""The encoders and the projector: chunks of features to rows of the decoder's input.

Encoder outputs depend only on the sound; the projector's rows may depend on the question too. So
encoder outputs are kept in a small cache by content, and a second question about the same clip
skips the encoders.

Shapes of a chunk: ``N`` audio rows, ``D`` decoder hidden size.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .audio import Audio
from .config import ModelConfig
from .errors import UsageError
from .preprocess import Chunk

if TYPE_CHECKING:
    from .ort.pool import GraphPool

__all__ = [
    "Encoded",
    "EncodedCache",
    "Projection",
    "adaptive_average_pool",
    "audio_key",
    "combine",
    "encode",
    "project",
]

Array = NDArray[np.float32]

DEFAULT_CACHE_BYTES = 64 * 2**20  # TinyGiantALM at full size: about 12 minutes of sound


@dataclass(frozen=True, eq=False)
class Encoded:
    """The encoder outputs of one chunk, as the projector's inputs by name.

    Rows are ``(1, rows, size)``, vectors ``(1, size)``.
    """

    inputs: Mapping[str, Array]

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.inputs.values())


@dataclass(frozen=True, eq=False)
class Projection:
    """A chunk as the decoder reads it, with the intent attention and the gate.

    Attributes:
        audio_embeds: ``(1, N, D)``.
        intent_attention: ``(1, N)``, the weight of each audio row under the question; None where
            the model has no intent query.
        gate: ``(1, D)``, the semantic gate before it is halved; None where the model has none.
    """

    audio_embeds: Array
    intent_attention: Array | None
    gate: Array | None


class EncodedCache:
    """Encoder outputs of the clips asked about last, bounded by their bytes; for any thread."""

    def __init__(self, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        """Keep at most ``max_bytes``; 0 keeps nothing."""
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[Encoded, ...]] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[bytes, threading.Lock] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes held now."""
        return sum(map(_total_bytes, self._entries.values()))

    def get(self, key: bytes) -> tuple[Encoded, ...] | None:
        """The outputs kept under ``key``, which become the last to be forgotten."""
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
            return self._entries.get(key)

    def get_or_make(
        self, key: bytes, make: Callable[[], tuple[Encoded, ...]]
    ) -> tuple[tuple[Encoded, ...], bool]:
        """The outputs, and whether they were kept; if not, ``make`` gives them.

        While one thread makes them, others that ask for the same wait for it.
        """
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        try:
            with making:
                found = self.get(key)
                outputs = make() if found is None else found
                self.put(key, outputs)
        finally:
            with self._lock:
                self._making.pop(key, None)
        return outputs, found is not None

    def put(self, key: bytes, outputs: tuple[Encoded, ...]) -> None:
        """Keep ``outputs``; those not used for longest make room for them."""
        if _total_bytes(outputs) > self._max_bytes:
            return
        with self._lock:
            self._entries[key] = outputs
            self._entries.move_to_end(key)
            while self.n_bytes > self._max_bytes:
                self._entries.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()


def audio_key(audio: Audio) -> bytes:
    """A key that two clips share only if their samples and rate are the same."""
    digest = hashlib.sha256(f"{audio.sampling_rate_hz}:{audio.samples.size}:".encode())
    digest.update(np.ascontiguousarray(audio.samples).data)
    return digest.digest()


def encode(chunks: Sequence[Chunk], pool: GraphPool, config: ModelConfig) -> tuple[Encoded, ...]:
    """Run every encoder over all chunks, one graph after another."""
    found: list[dict[str, list[Array]]] = [{} for _ in chunks]
    for encoder in config.encoders:
        with pool.use(encoder.graph) as graph:
            for chunk, outputs in zip(chunks, found, strict=True):
                runs = [graph.run({encoder.input: x}) for x in chunk.windows[encoder.graph]]
                for output in encoder.outputs:
                    name = f"{encoder.graph}.{output.name}"
                    outputs[name] = [run[output.name][0] for run in runs]
    return tuple(
        combine(outputs, chunk.n_rows, config) for outputs, chunk in zip(found, chunks, strict=True)
    )


def combine(outputs: Mapping[str, Sequence[Array]], n_rows: int, config: ModelConfig) -> Encoded:
    """Pool and join one chunk's encoder outputs into the projector's inputs.

    Args:
        outputs: by ``graph.output``, one array for each window with sound: ``(rows, size)`` or
            ``(size,)``.
        n_rows: audio rows of the chunk.
        config: the model.
    """
    inputs: dict[str, Array] = {}
    for wanted in config.projector.inputs:
        if wanted.rows is None:
            parts = [
                np.mean(np.stack(outputs[name]), axis=0, dtype=np.float32) for name in wanted.parts
            ]
        else:
            n_wanted = -(-n_rows * wanted.rows // config.rows_per_chunk)
            parts = [
                _rows(outputs[name], name, wanted.rows, config)[:n_wanted] for name in wanted.parts
            ]
        inputs[wanted.name] = np.concatenate(parts, axis=-1)[None]
    return Encoded(inputs)


def project(
    encoded: Sequence[Encoded], instruction_embeds: Array, pool: GraphPool, config: ModelConfig
) -> tuple[Projection, ...]:
    """Run the projector over each chunk, with the question's embeddings ``(1, L, D)``."""
    question: dict[str, Any] = {}
    if config.projector.reads_question:
        mask = np.ones(instruction_embeds.shape[:2], np.int64)
        question = {"instruction_embeds": instruction_embeds, "instruction_mask": mask}
    projections = []
    with pool.use(config.projector.graph) as projector:
        for chunk in encoded:
            found = projector.run({**chunk.inputs, **question})
            projections.append(
                Projection(found["audio_embeds"], found.get("intent_attention"), found.get("gate"))
            )
    return tuple(projections)


def adaptive_average_pool(x: Array, n_out: int) -> Array:
    """Average ``n_out`` spans of the first axis: ``(n_in, d) -> (n_out, d)``.

    Span ``i`` is ``floor(i * n_in / n_out) .. ceil((i + 1) * n_in / n_out)``, as in
    ``torch.nn.functional.adaptive_avg_pool1d``; with more spans than rows, rows repeat.
    """
    n_in = x.shape[0]
    if n_in == 0 or n_out < 1:
        raise UsageError(f"cannot pool {n_in} rows to {n_out}: expected at least one of each")
    if n_in % n_out == 0:
        even: Array = x.reshape(n_out, n_in // n_out, -1).mean(axis=1, dtype=x.dtype)
        return even
    positions = np.arange(n_out)
    starts = positions * n_in // n_out
    ends = -(-(positions + 1) * n_in // n_out)
    # reduceat sums between consecutive indices; every other sum is a span's. The extra row only
    # makes the last end a valid index.
    padded = np.concatenate([x, np.zeros_like(x[:1])])
    sums = np.add.reduceat(padded, np.stack([starts, ends], axis=1).ravel(), axis=0)[::2]
    pooled: Array = sums / (ends - starts)[:, None].astype(x.dtype)
    return pooled


def _rows(windows: Sequence[Array], name: str, n_out: int, config: ModelConfig) -> Array:
    """Rows of a chunk's windows as ``n_out`` rows for the whole chunk: ``(n_out, size)``.

    Windows without sound count as zeros, so that a row means the same time in every chunk. An
    encoder of variable length has its rows already, a margin of silence behind them.
    """
    encoder, output = config.outputs[name]
    if encoder.variable_length:
        return windows[0]
    assert output.rows is not None
    whole = np.zeros(
        (round(config.chunk_s / encoder.window_s), output.rows, output.size), np.float32
    )
    for index, window in enumerate(windows):
        whole[index] = window
    return adaptive_average_pool(whole.reshape(-1, output.size), n_out)


def _total_bytes(outputs: Sequence[Encoded]) -> int:
    return sum(chunk.n_bytes for chunk in outputs)
