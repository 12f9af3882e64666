"""Quantization: graphs in, smaller graphs out, by named recipes.

Needs onnx (extra ``export``). Import direction: reads ``tinygiant.runtime`` only; knows nothing of
PyTorch.
"""

from __future__ import annotations

import tinygiant.runtime.sessions  # noqa: F401 - turns telemetry off before onnxruntime is imported
from tinygiant.quantize.embeddings import quantize_rows
from tinygiant.quantize.graph import load_graph, save_graph, weights_path
from tinygiant.quantize.kv_cache import KvPeaks, kv_peaks
from tinygiant.quantize.quantizer import quantize_graph
from tinygiant.quantize.recipes import RECIPES, Limits, Recipe, Scheme, recipe
from tinygiant.quantize.report import GraphReport, graph_size_bytes

__all__ = [
    "RECIPES",
    "GraphReport",
    "KvPeaks",
    "Limits",
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
