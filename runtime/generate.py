"""Tokens of an answer: free text, a thought and then a choice, or the likeliest choice at once."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .asking import Asked
from .choices import probabilities
from .config import ModelConfig
from .decoder import Decoder
from .events import FinishReason
from .grammar import Writer
from .masks import Mask
from .stages import Returning

__all__ = ["Ending", "end_ids", "generate"]


@dataclass(frozen=True)
class Ending:
    """How a text ended, and which choice it is, if there were any."""

    finish_reason: FinishReason
    choice_index: int | None = None
    probabilities: tuple[float, ...] | None = None


def end_ids(asked: Asked, config: ModelConfig) -> frozenset[int]:
    """The tokens that end what is written freely: the thought's end too, where it has a meaning."""
    thought = config.answer.thought
    ends_thought = asked.thinks and (asked.trie is not None or not asked.options.raw)
    closing = (thought.close_id,) if thought is not None and ends_thought else ()
    return frozenset((*config.decoder.stop_token_ids, *closing))


def generate(
    decoder: Decoder,
    logits: NDArray[np.float32],
    asked: Asked,
    config: ModelConfig,
    writer: Writer | None,
) -> Generator[int | None, None, Ending]:
    """Yield the tokens of the text after ``logits (V,)``; returns how it ended.

    A None among them: the decoder waits for a step of its batch.

    ``writer`` holds the text to the model's form; without one it is raw. Where a choice is to be
    taken without a thought, each is scored, and the likeliest written.
    """
    if writer is None:
        return (yield from _raw(decoder, logits, asked, config))
    if asked.trie is not None and asked.is_scored:
        scores = asked.trie.log_likelihoods(decoder, logits)
        found = probabilities(scores, config.choice_temperature)
        writer.choose(int(found.argmax()))
        yield from writer.forced()
        return Ending("stop", writer.choice_index, tuple(found.tolist()))
    yield from decoder.write(logits, writer)
    return Ending(writer.finish_reason, writer.choice_index)


def _raw(
    decoder: Decoder, logits: NDArray[np.float32], asked: Asked, config: ModelConfig
) -> Generator[int | None, None, Ending]:
    """The model's own text; of choices one is written after the thought, however it ended."""
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
        if token is not None:
            written.append(token)
        yield token
    finish_reason: FinishReason = "length" if free.value is None else "stop"
    if asked.trie is None or config.answer.thought is None:
        return Ending(finish_reason)
    close_id = config.answer.thought.close_id
    yield close_id
    unread = [*written[decoder.cache.length - n_prompt :], close_id]

    def choose(logits: NDArray[np.float32], allowed: Sequence[int]) -> int:
        return decoder.best(logits, Mask(np.array(allowed, np.intp), only=True))

    choice = yield from asked.trie.decode(decoder.read, unread, choose)
    return Ending(finish_reason, choice)
