"""Audio encoders of Hugging Face folders that read samples: HuBERT, wav2vec 2.0, WavLM and others.

The project has no exporter of its own for them: optimum knows how (``Part.exporter``). A family
that wants one takes the configuration and the part from here; features, windows, pooling, recipes
and verification are the same as for any encoder.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tinygiant.runtime.config import EncoderConfig, EncoderOutput, Waveform
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.text import one_line

from .family import Part

__all__ = ["TransformersEncoder", "transformers_encoder", "transformers_part"]

INPUT, OUTPUT = "input_values", "last_hidden_state"


class TransformersEncoder(nn.Module):
    """A model of transformers from samples ``(1, n_samples)`` to rows ``(1, rows, size)``."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_values: Tensor) -> Tensor:
        """``(1, n_samples)`` -> ``(1, rows, size)``."""
        rows: Tensor = self.model(input_values).last_hidden_state
        return rows


def transformers_encoder(
    folder: Path, graph: str, window_s: float
) -> tuple[EncoderConfig, TransformersEncoder]:
    """The encoder in ``folder`` as ``graph``, run on windows of ``window_s`` seconds.

    Its one output is ``last_hidden_state``.

    Raises:
        CheckpointError: the folder holds no model that transformers knows, or one that reads
            something else than samples.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        kernels, strides = config.conv_kernel, config.conv_stride
    except AttributeError as error:
        raise CheckpointError(
            f"{folder}: a {config.model_type} model does not read samples; encoders like HuBERT, "
            "wav2vec 2.0 and WavLM do"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: no encoder of transformers ({one_line(error)})"
        ) from error
    try:
        module = AutoModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: weights do not load ({one_line(error)})") from error
    features = _features(folder)
    rows = features.n_frames(window_s)
    for kernel, stride in zip(kernels, strides, strict=True):
        rows = (rows - kernel) // stride + 1
    output = EncoderOutput(OUTPUT, "rows", int(config.hidden_size), rows)
    encoder = EncoderConfig(graph, features, window_s, (output,), input=INPUT)
    return encoder, TransformersEncoder(module).eval()


def transformers_part(encoder: EncoderConfig, module: TransformersEncoder) -> Part:
    """The part behind the encoder's graph."""
    example = {INPUT: torch.zeros(1, encoder.n_frames)}
    return Part(module, example, (OUTPUT,), exporter="optimum")


def _features(folder: Path) -> Waveform:
    """How the samples are prepared: the folder's ``preprocessor_config.json``."""
    path = folder / "preprocessor_config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Waveform(
            sampling_rate_hz=int(found["sampling_rate"]), normalize=bool(found["do_normalize"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected sampling_rate and do_normalize ({one_line(error)})"
        ) from error
