"""Weights beside a graph: tensors are written one at a time, and the graph only points at them.

The contract: the caller hands over one array after another and may drop each at once, so a graph of
any size is written in the memory of its largest tensor. Small tensors stay inside the graph, where
shape inference and graph passes can read them.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

__all__ = ["INLINE_LIMIT_BYTES", "ExternalWeights", "weights_name"]

INLINE_LIMIT_BYTES = 1_024
# onnxruntime maps a tensor from the file instead of copying it only where its offset is a multiple
# of the operating system's mapping granularity: 4 KiB pages on Linux, 64 KiB elsewhere.
_ALIGNMENT_BYTES = 65_536
_ALIGN_FROM_BYTES = 1 << 20


def weights_name(graph_name: str) -> str:
    """Name of the file that holds the weights of graph file ``graph_name``."""
    return f"{graph_name}.data"


class ExternalWeights:
    """Appends arrays to a weights file and returns the initializers that point into it.

    Use as a context manager; the file is complete when the block is left.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._offset = 0
        self.initializers: list[onnx.TensorProto] = []

    def __enter__(self) -> ExternalWeights:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, name: str, array: npt.NDArray[Any]) -> str:
        """Store ``array`` as initializer ``name`` and return the name."""
        if array.nbytes < INLINE_LIMIT_BYTES:
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
            return name
        if self._file is None:
            raise ValueError("ExternalWeights.add needs an open file: use it in a with block")
        if array.nbytes >= _ALIGN_FROM_BYTES:
            self._pad(-self._offset % _ALIGNMENT_BYTES)
        tensor = onnx.TensorProto()
        tensor.name = name
        tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor.dims.extend(array.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", self._path.name),
            ("offset", str(self._offset)),
            ("length", str(array.nbytes)),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        self._file.write(np.ascontiguousarray(array).data)
        self._offset += array.nbytes
        self.initializers.append(tensor)
        return name

    def _pad(self, n_bytes: int) -> None:
        assert self._file is not None
        self._file.write(b"\0" * n_bytes)
        self._offset += n_bytes
