"""Graphs of encoders that this project has no exporter for, made by optimum.

optimum traces the modules of transformers, with attention in single operators: larger and slower
than our own graphs, and verified like them.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import onnx_ir as ir

from tinygiant.models.family import Part
from tinygiant.models.transformers_encoder import TransformersEncoder
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.text import one_line

__all__ = ["export_with_optimum"]

_OPSET = 18  # the highest that optimum's tracer writes for these models


def export_with_optimum(part: Part) -> ir.Model:
    """The graph of a part whose module is a :class:`TransformersEncoder`, in float32.

    Raises:
        CheckpointError: optimum cannot export the model.
    """
    from optimum.exporters.onnx import onnx_export_from_model

    model = cast(TransformersEncoder, part.module).model
    with tempfile.TemporaryDirectory(prefix="tinygiant-optimum-") as scratch, _quiet():
        try:
            onnx_export_from_model(
                model, scratch, task="feature-extraction", opset=_OPSET, do_validation=False
            )
        except Exception as error:  # of optimum, torch or onnx; whatever it is, nothing was written
            raise CheckpointError(
                f"optimum cannot export a {model.config.model_type} model: {one_line(error)}"
            ) from error
        graph = ir.load(Path(scratch) / "model.onnx")
        ir.external_data.load_to_model(graph)
    return graph


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """optimum prints and warns of every branch that it fixes."""
    loggers = [logging.getLogger(name) for name in ("optimum", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
