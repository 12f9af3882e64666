"""Tokens of an answer: free text, a thought and then a choice, or the likeliest choice at once."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .asking import Asked
from .choices import probabilities
from .config import ModelConfig
from .decoder import Decoder
from .events import FinishReason
from .stages import Returning

__all__ = ["Ending", "end_ids", "generate"]


@dataclass(frozen=True)
class Ending:
    """How a text ended, and which choice it is, if there were any."""

    finish_reason: FinishReason
    choice_index: int | None = None
    probabilities: tuple[float, ...] | None = None


def end_ids(asked: Asked, config: ModelConfig) -> frozenset[int]:
    """The tokens that end what is written freely: with choices, the end of the thought too."""
    thought = config.answer.thought
    closing = () if asked.trie is None or thought is None else (thought.close_id,)
    return frozenset((*config.decoder.stop_token_ids, *closing))


def generate(
    decoder: Decoder, logits: NDArray[np.float32], asked: Asked, config: ModelConfig
) -> Generator[int, None, Ending]:
    """Yield the tokens of the text after ``logits (V,)``; returns how it ended.

    With choices the model thinks until it closes the thought, ends its text or has spent its
    tokens; the thought is then closed and one of the choices written. If it is not to think, the
    likeliest choice is written at once.
    """
    if asked.trie is not None and asked.is_scored:
        found = probabilities(asked.trie.log_likelihoods(decoder, logits))
        best = int(found.argmax())
        yield from asked.trie.sequences[best]
        return Ending("stop", best, tuple(found.tolist()))
    n_prompt = decoder.cache.length
    written: list[int] = []
    free = Returning(
        decoder.generate(
            logits,
            max_new_tokens=asked.options.max_new_tokens,
            stop_ids=end_ids(asked, config),
        )
    )
    for token in free:
        written.append(token)
        yield token
    finish_reason: FinishReason = "length" if free.value is None else "stop"
    if asked.trie is None or config.answer.thought is None:
        return Ending(finish_reason)
    close_id = config.answer.thought.close_id
    yield close_id
    unread = [*written[decoder.cache.length - n_prompt :], close_id]
    choice = yield from asked.trie.decode(decoder.read, unread, decoder.best)
    return Ending(finish_reason, choice)
