"""Quantization: graphs in, smaller graphs out, by named recipes.

Needs onnx (extra ``export``). Import direction: reads ``tinygiant.runtime`` only; knows nothing of
PyTorch.
"""

from __future__ import annotations

import tinygiant.runtime.ort.sessions  # noqa: F401 - turns telemetry off before onnxruntime is imported

from .embeddings import quantize_rows
from .graph import load_graph, save_graph, weights_path
from .kv_cache import KvPeaks, kv_peaks
from .quantizer import quantize_graph
from .recipes import RECIPES, Recipe, Scheme, recipe
from .report import GraphReport, graph_size_bytes

__all__ = [
    "RECIPES",
    "GraphReport",
    "KvPeaks",
    "Recipe",
    "Scheme",
    "graph_size_bytes",
    "kv_peaks",
    "load_graph",
    "quantize_graph",
    "quantize_rows",
    "recipe",
    "save_graph",
    "weights_path",
]
