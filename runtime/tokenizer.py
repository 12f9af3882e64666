"""Text to token ids and back, over a byte-level BPE ``tokenizer.json`` (Qwen's kind).

Two ways in, on purpose. :meth:`Tokenizer.encode` is for text from outside: whatever it spells,
control tokens included, it becomes plain text tokens, so nobody can end a turn or close a thought
by writing ``<|im_end|>`` into a question. :meth:`Tokenizer.encode_markup` is for text this project
writes itself, where control tokens are meant.

One way out: token bytes are joined, then read as UTF-8. :class:`StreamingDetokenizer` does it token
by token, never splits a character, and gives in total exactly what :meth:`Tokenizer.decode` gives.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from .errors import BundleError
from .text import one_line, printable

if TYPE_CHECKING:
    from .bundle import Bundle

__all__ = ["StreamingDetokenizer", "Tokenizer"]

_MAX_FILE_BYTES = 64 * 2**20
# Composed Latin, Chinese, an emoji of four bytes and white space: a tokenizer that is not
# byte-level does not give these back.
_PROBE = "Is it a caf\u00e9? \u97f3\u58f0 \U0001f3b5\n\t12"


class Tokenizer:
    """A byte-level BPE tokenizer whose control tokens cannot be reached from user text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Wrap ``tokenizer``; nothing is added to, cut from or padded onto what it encodes.

        Raises:
            BundleError: it is not byte-level.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        if len(set(ids.values())) != len(ids):
            raise BundleError("two tokens have the same id; export the tokenizer again")
        missing = _BYTE_OF_CHARACTER.keys() - ids.keys()
        if needed := {_BYTE_OF_CHARACTER[character] for character in missing} - _RARE_BYTES:
            raise BundleError(f"{len(needed)} bytes of text have no token: byte-level is expected")
        self._max_id = max(ids.values())
        added = tokenizer.get_added_tokens_decoder()
        self._added_ids: dict[str, int] = {
            token.content: token_id for token_id, token in added.items()
        }
        contents = sorted(self._added_ids, key=len, reverse=True)
        self._any_added = re.compile("|".join(map(re.escape, contents))) if contents else None
        self._bytes_of_id: dict[int, bytes] = {}
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise BundleError(
                "text changes when it is encoded and decoded again; a byte-level BPE is expected"
            )

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            BundleError: it is missing, too large, not a tokenizer or not byte-level.
        """
        try:
            if path.stat().st_size > _MAX_FILE_BYTES:
                raise BundleError(f"{printable(path)}: larger than {_MAX_FILE_BYTES} bytes")
            return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))
        except BundleError as error:
            raise BundleError(f"{printable(path)}: {error}") from error
        except (KeyboardInterrupt, SystemExit):
            raise
        except (
            BaseException
        ) as error:  # on some damaged files the package panics instead of raising
            raise BundleError(f"{printable(path)}: not a tokenizer: {one_line(error)}") from error

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Tokenizer:
        """Read the tokenizer of ``bundle``.

        Raises:
            BundleError: it is damaged, or does not belong to the bundle's decoder.
        """
        tokenizer = cls.from_file(bundle.file(bundle.manifest.tokenizer))
        decoder, thought = bundle.config.decoder, bundle.config.answer.thought
        problems = []
        if tokenizer.max_id >= decoder.vocab_size:
            problems.append(
                f"it has ids up to {tokenizer.max_id}, the decoder {decoder.vocab_size}"
            )
        if unknown := sorted(set(decoder.stop_token_ids) - tokenizer.control_ids):
            problems.append(f"it has no control tokens {unknown}, which end the decoder's text")
        if thought is not None and tokenizer.token_id(thought.close) != thought.close_id:
            problems.append(f"{thought.close} is not the decoder's {thought.close_id}")
        if problems:
            raise BundleError(
                f"the tokenizer does not belong to this decoder: {'; '.join(problems)}; "
                "export the bundle again"
            )
        return tokenizer

    @property
    def max_id(self) -> int:
        """The largest token id."""
        return self._max_id

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self._added_ids.values())

    def token_id(self, content: str) -> int:
        """The id of the control token spelled ``content``.

        Raises:
            BundleError: the tokenizer has no such control token.
        """
        if content not in self._added_ids:
            raise BundleError(f"the tokenizer has no control token {content}; export it again")
        return self._added_ids[content]

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` as plain text: no control token, whatever it spells.

        The text is brought to NFC, as Qwen's tokenizer does. Where it spells a control token it is
        encoded in two parts, cut after the token's first character.
        """
        text = unicodedata.normalize("NFC", text)
        ids: list[int] = []
        start = 0
        for cut in self._cuts(text):
            ids += self._encode(text[start:cut])
            start = cut
        return ids + self._encode(text[start:])

    def encode_markup(self, text: str) -> list[int]:
        """Ids of ``text`` with control tokens recognised; never for text from outside."""
        return self._encode(text)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ``token_ids``, control tokens spelled out; ids without a token give none."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: part of a character, one or many."""
        known = self._bytes_of_id.get(token_id)
        if known is None:
            known = self._bytes_of_id[token_id] = self._spell(token_id)
        return known

    def plain_tokens(self) -> dict[str, int]:
        """The ids of all tokens but control tokens, as the vocabulary spells them.

        Printable ASCII characters stand for themselves, every other byte for another character.
        """
        spelled: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=False)
        return {text: token for text, token in spelled.items() if text not in self._added_ids}

    def _cuts(self, text: str) -> list[int]:
        if self._any_added is None:
            return []
        cuts: list[int] = []
        while match := self._any_added.search(text, cuts[-1] if cuts else 0):
            cuts.append(match.start() + 1)
        return cuts

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _spell(self, token_id: int) -> bytes:
        token: str | None = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # a control token with characters outside the byte alphabet
            return token.encode("utf-8")


class StreamingDetokenizer:
    """Text of a growing token sequence, a piece a token; each token costs the same.

    Bytes of an unfinished character wait for the next token. The pieces joined, with
    :meth:`finish` at the end, equal ``tokenizer.decode`` of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes; may be empty."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: a replacement character for bytes that never became a character."""
        return self._decoder.decode(b"", final=True)


def _byte_alphabet() -> dict[str, int]:
    """The character byte-level BPE writes for each byte (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes take the characters from 256 on, in order.
    """
    printable_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable_bytes]
    alphabet = {chr(byte): byte for byte in printable_bytes}
    return alphabet | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
# No question holds these: control characters, and bytes of UTF-8 that begin no assigned character.
# A vocabulary learned from text, such as SmolLM2's, may lack some of them.
_RARE_BYTES = {*range(0x20), 0x7F, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF4, 0x100)} - {0x09, 0x0A}
