"""What holds an answer to the model's form, and how long it may be in the positions there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .asking import Asked
from .config import ModelConfig
from .grammar import Grammar, Vocabulary, Writer
from .scope import positions_left
from .tokenizer import Tokenizer

__all__ = ["Writers"]


class Writers:
    """Makes the writer of each answer; the vocabulary is read once, when it is needed."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        """Make writers for the model of ``config``."""
        self._tokenizer = tokenizer
        self._config = config
        self._vocabulary: Vocabulary | None = None

    def fitted(
        self, asked: Asked, durations_s: Sequence[float]
    ) -> tuple[Asked, Writer | None, int]:
        """A question, its writer, and the most tokens they write: fewer than asked if that fits.

        ``durations_s`` are the seconds of sound in each chunk. There is no writer where the text is
        to be raw.
        """
        writer = self._writer(asked)
        n_most = asked.max_written
        if writer is not None and not asked.is_scored:
            n_most = writer.max_tokens
        left = positions_left(self._config, durations_s, asked.prompt.n_text + n_most)
        n_new = asked.options.max_new_tokens + left
        if not asked.options.fit or asked.is_scored or left >= 0 or n_new < 1:
            return asked, writer, n_most
        options = dataclasses.replace(asked.options, max_new_tokens=n_new)
        return self.fitted(dataclasses.replace(asked, options=options), durations_s)

    def _writer(self, asked: Asked) -> Writer | None:
        if asked.options.raw and not asked.is_scored:
            return None
        form, stop_ids = self._config.answer, self._config.decoder.stop_token_ids
        grammar = Grammar.of_form(form, stop_ids, asked.trie, think=asked.thinks)
        if self._vocabulary is None:
            size = self._config.decoder.vocab_size
            self._vocabulary = Vocabulary(self._tokenizer, size, form.hidden_token_ids)
        return Writer(grammar, self._vocabulary, asked.options.max_new_tokens)
