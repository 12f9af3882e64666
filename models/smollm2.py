"""SmolLM2-135M, the language model inside Mizar and Mellow: its sizes and its tokenizer.

Both models make ``!`` the padding token, so it becomes a control token: it is split out of
questions, and each question is filled up with it. :func:`read_tokenizer` writes that into the
tokenizer, so that a bundle's ``tokenizer.json`` needs no further explanation.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from transformers import LlamaConfig

from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.text import one_line

from .hub import HubFile

__all__ = [
    "END_ID",
    "PADDING_ID",
    "SMOLLM2_PROBE",
    "TOKENIZER",
    "Probe",
    "read_tokenizer",
    "smollm2_135m",
]

END_ID, PADDING_ID = 0, 17
_END, _PADDING = "<|endoftext|>", "!"

TOKENIZER = HubFile(
    "HuggingFaceTB/SmolLM2-135M",
    "tokenizer.json",
    "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
)
"""Where the tokenizer is published."""

Probe = tuple[str, tuple[int, ...]]
"""A text and its token ids, by which a vocabulary is known."""

SMOLLM2_PROBE: Probe = (
    "what can be heard in this recording?",
    (5588, 416, 325, 3984, 281, 451, 10016, 47),
)


def smollm2_135m() -> LlamaConfig:
    """The decoder's configuration (``HuggingFaceTB/SmolLM2-135M``)."""
    return LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        attn_implementation="sdpa",
    )


def read_tokenizer(path: Path, vocab_size: int, probe: Probe | None = SMOLLM2_PROBE) -> str:
    """The content of ``tokenizer.json`` with ``!`` as a control token.

    Args:
        path: ``tokenizer.json`` or the folder it is in.
        vocab_size: tokens that the decoder knows.
        probe: a text and its token ids; None if any vocabulary of that size will do.

    Raises:
        CheckpointError: there is none, or it is another model's.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    expected = "the tokenizer.json of SmolLM2-135M is expected"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        found = tokenizers.Tokenizer.from_str(json.dumps(data))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such tokenizer; {expected}") from error
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # on some damaged files the package panics instead of raising
        raise CheckpointError(f"{file}: not a tokenizer ({one_line(error)}); {expected}") from error
    ids = found.get_vocab(with_added_tokens=True)
    problems = [
        f"{token} is {ids.get(token, 'missing')}, expected {wanted}"
        for token, wanted in ((_END, END_ID), (_PADDING, PADDING_ID))
        if ids.get(token) != wanted
    ]
    if len(ids) != vocab_size:
        problems.append(f"it has {len(ids)} tokens, the decoder {vocab_size}")
    if (
        probe is not None
        and tuple(found.encode(probe[0], add_special_tokens=False).ids) != probe[1]
    ):
        problems.append("it splits text differently")
    if problems:
        raise CheckpointError(
            f"{file}: another model's tokenizer ({'; '.join(problems)}); {expected}"
        )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [token for token in data["added_tokens"] if token["content"] != _PADDING]
    added.append({"id": PADDING_ID, "content": _PADDING, **flags, "special": True})
    data["added_tokens"] = sorted(added, key=lambda token: int(token["id"]))
    return json.dumps(data, ensure_ascii=False)
