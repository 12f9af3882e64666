"""Decoders as GGUF files, which llama.cpp reads.

Imports the standard library, and in each function the package that it needs, as the modules do that
use it: a peer's Python need not hold the project.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["quantized", "write_gguf"]

_F16 = 1  # llama.cpp's type of files: norms float32, the rest float16


def write_gguf(
    path: Path,
    architecture: str,
    size: Mapping[str, Any],
    tensors: Iterable[tuple[str, Any]],
    *,
    tokenizer: str,
    tokens: Sequence[str],
    merges: Sequence[str],
    control: Collection[int] = (),
    end_id: int = 0,
    half: bool = False,
) -> None:
    """Write one file.

    Args:
        path: the file.
        architecture: as llama.cpp calls it, such as ``llama`` or ``qwen3``.
        size: the decoder's sizes, by their names in ``DecoderSpec``.
        tensors: llama.cpp's names and the arrays, made when their turn comes.
        tokenizer: llama.cpp's name of how a byte-level BPE cuts text before it.
        tokens: all tokens, by their ids.
        merges: the BPE's, two tokens and a space between.
        control: ids of tokens that no text holds.
        end_id: the token that begins and ends a text.
        half: the arrays are float16 but for norms; else float32.
    """
    gguf: Any = importlib.import_module("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(size["max_positions"])
    writer.add_embedding_length(size["hidden_size"])
    writer.add_block_count(size["n_layers"])
    writer.add_feed_forward_length(size["ffn_size"])
    writer.add_head_count(size["n_heads"])
    writer.add_head_count_kv(size["n_kv_heads"])
    writer.add_key_length(size["head_dim"])
    writer.add_value_length(size["head_dim"])
    writer.add_rope_dimension_count(size["head_dim"])
    writer.add_layer_norm_rms_eps(size["rms_norm_eps"])
    writer.add_rope_freq_base(size["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(_F16 if half else 0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer)
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds[i in control] for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    writer.add_bos_token_id(end_id)
    writer.add_eos_token_id(end_id)
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized(write: Callable[[Path], None], file: Path, kind: str, *, pure: bool = False) -> None:
    """Let llama.cpp turn what ``write`` writes into ``file`` of ``kind``, such as ``Q8_0``.

    ``pure`` is all of it in that kind, instead of llama.cpp's mixture.
    """
    llama_cpp: Any = importlib.import_module("llama_cpp")
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        plain = Path(scratch) / "plain.gguf"
        write(plain)
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        parameters.nthread = 1
        parameters.pure = pure
        code = llama_cpp.llama_model_quantize(
            os.fsencode(plain), os.fsencode(file), ctypes.byref(parameters)
        )
    if code:
        raise RuntimeError(f"llama_model_quantize to {kind} failed with {code}")
