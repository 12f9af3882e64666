"""Nano's tokenizer: Qwen3's kind (NFC, its splitting rule, byte-level BPE), small vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from ..config import NANO_SPECIAL_TOKENS

__all__ = ["train_tokenizer"]

# Contractions, words with at most one leading mark, single digits, punctuation with its line ends,
# line ends, spaces: the rule in Qwen3's tokenizer.json.
_QWEN3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Learn a vocabulary of at most ``vocab_size`` ids from ``texts`` and write ``tokenizer.json``.

    The first ids are :data:`NANO_SPECIAL_TOKENS`, then the 256 bytes, so that any text can be
    written.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Qwen3 marks the ChatML tokens as special, the thinking tokens as plain added tokens.
    added = [
        AddedToken(token, special=token.startswith("<|"), normalized=False)
        for token in NANO_SPECIAL_TOKENS
    ]
    tokenizer.train_from_iterator(
        texts,
        BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=added,
            show_progress=False,
        ),
    )
    tokenizer.save(str(path))
