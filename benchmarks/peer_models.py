"""Models of random weights for the engines this project is compared with, each in its own format.

    python -m benchmarks.peer_models NAME FOLDER [--tiny]

writes the folder of one model of :data:`MAKERS`: the encoder of Whisper-large-v3-turbo, or
Qwen3-0.6B, at true dimensions (:data:`WHISPER`, :data:`QWEN3`) or at tiny ones. What an engine does
for a second does not depend on what the weights say. A folder that is there is complete: it gets
its name at the end. Whisper's text decoder, which nobody runs here, is cut to one layer.

Imports the standard library and ``gguf_files``, and in each maker what that maker needs: a peer's
Python need not hold the project.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.gguf_files import quantized, write_gguf

__all__ = [
    "MAKERS",
    "MODULES",
    "QWEN3",
    "TINY_QWEN3",
    "TINY_WHISPER",
    "WHISPER",
    "Qwen3Size",
    "WhisperSize",
    "main",
    "qwen3_tensors",
    "whisper_cpp_header",
    "whisper_cpp_tensors",
]

_SEED = 0
_DEVIATION = 0.02
_GGML_MAGIC = 0x67676D6C
_F32, _F16 = 0, 1  # ggml's types of tensors


@dataclass(frozen=True)
class WhisperSize:
    """Dimensions of a Whisper model; the defaults are large-v3-turbo's encoder."""

    d_model: int = 1_280
    n_layers: int = 32
    n_heads: int = 20
    ffn_size: int = 5_120
    n_mels: int = 128
    n_positions: int = 1_500
    n_text_layers: int = 1
    n_text_positions: int = 448
    vocab_size: int = 51_866

    @property
    def n_frames(self) -> int:
        """Feature frames of a whole window: 3,000."""
        return 2 * self.n_positions


@dataclass(frozen=True)
class Qwen3Size:
    """Dimensions of a Qwen3 model with tied embeddings; the defaults are those of 0.6B."""

    hidden_size: int = 1_024
    n_layers: int = 28
    n_heads: int = 16
    n_kv_heads: int = 8
    head_dim: int = 128
    ffn_size: int = 3_072
    vocab_size: int = 151_936
    n_positions: int = 40_960
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6


WHISPER, QWEN3 = WhisperSize(), Qwen3Size()
TINY_WHISPER = WhisperSize(d_model=64, n_layers=4, n_heads=2, ffn_size=256, n_positions=100)
# Rows of Q4_K are blocks of 256.
TINY_QWEN3 = Qwen3Size(256, 2, 4, 2, 64, 512, 2_048, 4_096)


def qwen3_tensors(size: Qwen3Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor, as llama.cpp names them; numpy's order of axes."""
    hidden, queries = size.hidden_size, size.n_heads * size.head_dim
    keys = size.n_kv_heads * size.head_dim
    yield "token_embd.weight", (size.vocab_size, hidden)
    yield "output_norm.weight", (hidden,)
    for layer in range(size.n_layers):
        for name, shape in (
            ("attn_norm", (hidden,)),
            ("attn_q", (queries, hidden)),
            ("attn_k", (keys, hidden)),
            ("attn_v", (keys, hidden)),
            ("attn_output", (hidden, queries)),
            ("attn_q_norm", (size.head_dim,)),
            ("attn_k_norm", (size.head_dim,)),
            ("ffn_norm", (hidden,)),
            ("ffn_gate", (size.ffn_size, hidden)),
            ("ffn_up", (size.ffn_size, hidden)),
            ("ffn_down", (hidden, size.ffn_size)),
        ):
            yield f"blk.{layer}.{name}.weight", shape


def whisper_cpp_tensors(size: WhisperSize) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and ggml type of each tensor of whisper.cpp's format; numpy's order of axes."""
    d = size.d_model
    yield "encoder.positional_embedding", (size.n_positions, d), _F32
    yield "encoder.conv1.weight", (d, size.n_mels, 3), _F16
    yield "encoder.conv1.bias", (d, 1), _F32
    yield "encoder.conv2.weight", (d, d, 3), _F16
    yield "encoder.conv2.bias", (d, 1), _F32
    yield from _norm("encoder.ln_post", d)
    for layer in range(size.n_layers):
        yield from _whisper_cpp_block(f"encoder.blocks.{layer}", size, ("attn",))
    yield "decoder.positional_embedding", (size.n_text_positions, d), _F32
    yield "decoder.token_embedding.weight", (size.vocab_size, d), _F16
    yield from _norm("decoder.ln", d)
    for layer in range(size.n_text_layers):
        yield from _whisper_cpp_block(f"decoder.blocks.{layer}", size, ("attn", "cross_attn"))


def _whisper_cpp_block(
    name: str, size: WhisperSize, attentions: tuple[str, ...]
) -> Iterator[tuple[str, tuple[int, ...], int]]:
    d = size.d_model
    for attention in attentions:
        yield from _norm(f"{name}.{attention}_ln", d)
        for part in ("query", "key", "value", "out"):
            yield f"{name}.{attention}.{part}.weight", (d, d), _F16
            if part != "key":
                yield f"{name}.{attention}.{part}.bias", (d,), _F32
    yield from _norm(f"{name}.mlp_ln", d)
    yield f"{name}.mlp.0.weight", (size.ffn_size, d), _F16
    yield f"{name}.mlp.0.bias", (size.ffn_size,), _F32
    yield f"{name}.mlp.2.weight", (d, size.ffn_size), _F16
    yield f"{name}.mlp.2.bias", (d,), _F32


def _norm(name: str, size: int) -> Iterator[tuple[str, tuple[int, ...], int]]:
    yield f"{name}.weight", (size,), _F32
    yield f"{name}.bias", (size,), _F32


def whisper_cpp_header(size: WhisperSize) -> bytes:
    """Magic number and hyper-parameters of whisper.cpp's format, all int32."""
    return struct.pack(
        "<12i",
        _GGML_MAGIC,
        size.vocab_size,
        size.n_positions,
        size.d_model,
        size.n_heads,
        size.n_layers,
        size.n_text_positions,
        size.d_model,
        size.n_heads,
        size.n_text_layers,
        size.n_mels,
        _F16,
    )


def _random_whisper(size: WhisperSize, folder: Path) -> None:
    """A Hugging Face folder of a Whisper model and a tokenizer of few tokens."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(_SEED)
    config = WhisperConfig(
        d_model=size.d_model,
        encoder_layers=size.n_layers,
        encoder_attention_heads=size.n_heads,
        encoder_ffn_dim=size.ffn_size,
        decoder_layers=size.n_text_layers,
        decoder_attention_heads=size.n_heads,
        decoder_ffn_dim=size.ffn_size,
        num_mel_bins=size.n_mels,
        max_source_positions=size.n_positions,
        max_target_positions=size.n_text_positions,
        vocab_size=size.vocab_size,
    )
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    marks = ("startoftranscript", "transcribe", "translate", "notimestamps", "nospeech", "en")
    _save_tokenizer(["<|endoftext|>", *(f"<|{mark}|>" for mark in marks)], folder)


def _random_qwen3(size: Qwen3Size, folder: Path) -> None:
    """A Hugging Face folder of a Qwen3 model and a tokenizer of as many tokens."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(_SEED)
    Qwen3ForCausalLM(Qwen3Config(**qwen3_config(size))).save_pretrained(folder)
    _save_tokenizer(["<|endoftext|>", *(f"t{i}" for i in range(1, size.vocab_size))], folder)


def qwen3_config(size: Qwen3Size) -> dict[str, Any]:
    """Arguments of transformers' ``Qwen3Config``."""
    return {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.n_layers,
        "num_attention_heads": size.n_heads,
        "num_key_value_heads": size.n_kv_heads,
        "head_dim": size.head_dim,
        "intermediate_size": size.ffn_size,
        "max_position_embeddings": size.n_positions,
        "rms_norm_eps": size.rms_norm_eps,
        "rope_theta": size.rope_theta,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _save_tokenizer(tokens: list[str], folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=[])),
        bos_token=tokens[0],
        eos_token=tokens[0],
        unk_token=tokens[0],
    )
    tokenizer.save_pretrained(folder)


def _whisper_ct2(size: WhisperSize, folder: Path) -> None:
    converters: Any = importlib.import_module("ctranslate2.converters")
    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        _random_whisper(size, Path(source))
        converter = converters.TransformersConverter(source)
        converter.convert(str(folder), quantization="int8", force=True)


def _whisper_cpp(size: WhisperSize, folder: Path) -> None:
    import numpy as np

    generator = np.random.default_rng(_SEED)
    with (folder / "model.bin").open("wb") as file:
        file.write(whisper_cpp_header(size))
        n_bins = 201
        file.write(struct.pack("<2i", size.n_mels, n_bins))
        file.write(bytes(4 * size.n_mels * n_bins))  # mel filters, which are not used here
        _write_tokens(file, [f"t{i}" for i in range(50_257)])
        for name, shape, kind in whisper_cpp_tensors(size):
            file.write(struct.pack("<3i", len(shape), len(name), kind))
            file.write(struct.pack(f"<{len(shape)}i", *reversed(shape)) + name.encode())
            values = _DEVIATION * generator.standard_normal(shape, np.float32)
            (values.astype(np.float16) if kind == _F16 else values).tofile(file)


def _write_tokens(file: BinaryIO, tokens: list[str]) -> None:
    file.write(struct.pack("<i", len(tokens)))
    for token in tokens:
        file.write(struct.pack("<i", len(token)) + token.encode())


def _whisper_onnx(size: WhisperSize, folder: Path) -> None:
    """This project's own graph, unquantized: attention fused, frames pooled to audio tokens."""
    import onnx_ir
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    from tinygiant.export.tracing import trace
    from tinygiant.models.config import preset, upstream_fields
    from tinygiant.models.graphs import temporal_part

    torch.manual_seed(_SEED)
    config = WhisperConfig(**whisper_config(size), attn_implementation="sdpa")
    contract = dataclasses.replace(
        preset("full"), whisper=upstream_fields(config), tokens_per_chunk=size.n_positions // 5
    )
    graph = trace(temporal_part(WhisperEncoder(config), contract))
    onnx_ir.save(graph, folder / "model.onnx", external_data="model.onnx.data")


def whisper_config(size: WhisperSize) -> dict[str, Any]:
    """Arguments of transformers' ``WhisperConfig`` that an encoder needs."""
    return {
        "d_model": size.d_model,
        "encoder_layers": size.n_layers,
        "encoder_attention_heads": size.n_heads,
        "encoder_ffn_dim": size.ffn_size,
        "num_mel_bins": size.n_mels,
        "max_source_positions": size.n_positions,
    }


def _gguf(size: Qwen3Size, path: Path) -> None:
    """A Qwen3 in float16, in llama.cpp's format."""
    import numpy as np

    generator = np.random.default_rng(_SEED)

    def tensors() -> Iterator[tuple[str, Any]]:
        for name, shape in qwen3_tensors(size):
            if len(shape) == 1:
                yield name, np.ones(shape, np.float32)
            else:
                values = _DEVIATION * generator.standard_normal(shape, np.float32)
                yield name, values.astype(np.float16)

    tokens = [f"t{i}" for i in range(size.vocab_size)]
    sizes = vars(size) | {"max_positions": size.n_positions}
    write_gguf(
        path, "qwen3", sizes, tensors(), tokenizer="qwen2", tokens=tokens, merges=["t 0"], half=True
    )


def _quantized_gguf(size: Qwen3Size, folder: Path, kind: str, *, pure: bool) -> None:
    quantized(lambda plain: _gguf(size, plain), folder / "model.gguf", kind, pure=pure)


def _qwen3_q4_0(size: Qwen3Size, folder: Path) -> None:
    _quantized_gguf(size, folder, "Q4_0", pure=True)


def _qwen3_q8_0(size: Qwen3Size, folder: Path) -> None:
    _quantized_gguf(size, folder, "Q8_0", pure=True)


def _qwen3_q4_k_m(size: Qwen3Size, folder: Path) -> None:
    _quantized_gguf(size, folder, "Q4_K_M", pure=False)


def _qwen3_genai(size: Qwen3Size, folder: Path) -> None:
    """onnxruntime-genai's own builder: int4 in blocks of 32, as Q4_0 has them."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        _random_qwen3(size, Path(source))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", source, "-o", str(folder), "-c", str(Path(source) / "cache")]
        command += ["-p", "int4", "-e", "cpu", "--extra_options"]
        command += ["accuracy_level=4", "block_size=32", "prune_lm_head=true"]
        subprocess.run(command, check=True)


def _qwen3_optimum(size: Qwen3Size, folder: Path) -> None:
    from optimum.onnxruntime import ORTModelForCausalLM

    with tempfile.TemporaryDirectory(dir=folder.parent) as source:
        _random_qwen3(size, Path(source))
        ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(folder)


MAKERS: dict[str, Callable[[Any, Path], None]] = {
    "whisper-ct2-int8": _whisper_ct2,
    "whisper-cpp-f16": _whisper_cpp,
    "whisper-onnx-fp32": _whisper_onnx,
    "qwen3-q4_0": _qwen3_q4_0,
    "qwen3-q8_0": _qwen3_q8_0,
    "qwen3-q4_k_m": _qwen3_q4_k_m,
    "qwen3-genai-int4": _qwen3_genai,
    "qwen3-optimum-fp32": _qwen3_optimum,
}

# What has to be importable to make them.
MODULES: dict[str, tuple[str, ...]] = {
    "whisper-ct2-int8": ("ctranslate2", "torch", "transformers"),
    "whisper-cpp-f16": ("numpy",),
    "whisper-onnx-fp32": ("tinygiant", "onnx_ir", "onnxscript", "torch", "transformers"),
    "qwen3-q4_0": ("llama_cpp", "gguf"),
    "qwen3-q8_0": ("llama_cpp", "gguf"),
    "qwen3-q4_k_m": ("llama_cpp", "gguf"),
    "qwen3-genai-int4": ("onnxruntime_genai", "onnx_ir", "torch", "transformers"),
    "qwen3-optimum-fp32": ("optimum.onnxruntime", "torch", "transformers"),
}


def main(arguments: list[str] | None = None) -> int:
    """Make one model; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_models")
    parser.add_argument("name", choices=MAKERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    if options.name.startswith("whisper"):
        size: Any = TINY_WHISPER if options.tiny else WHISPER
    else:
        size = TINY_QWEN3 if options.tiny else QWEN3
    target = options.folder.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        folder = Path(work) / target.name
        folder.mkdir()
        MAKERS[options.name](size, folder)
        made_by = {"model": options.name, "size": vars(size), "seed": _SEED}
        (folder / "made.json").write_text(json.dumps(made_by, indent=1) + "\n", encoding="utf-8")
        folder.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
