"""The beginning of a prompt, read once: what no question changes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from .audio import Audio
from .decoder import Decoder
from .encode import audio_key
from .kv_cache import KvSnapshot
from .prompt import Prompt

__all__ = ["Prefix"]


class Prefix:
    """The last such beginning, with its keys and values.

    Audio rows belong to it unless the projector reads the question.

    Attributes:
        kept: which parts of which prompt it is, and their keys and values; None as long as no
            prompt was read.
    """

    def __init__(self, *, reads_question: bool) -> None:
        """Keep nothing yet; ``reads_question`` is whether the projector does."""
        self.kept: tuple[Hashable, KvSnapshot] | None = None
        self._reads_question = reads_question

    def prefill(
        self,
        decoder: Decoder,
        parts: Sequence[NDArray[np.float32]],
        prompt: Prompt,
        clips: Sequence[Audio],
        *,
        keep: bool,
    ) -> NDArray[np.float32]:
        """Read the prompt, ``(1, n, D)`` of each of its parts; returns its last logits ``(V,)``.

        The beginning is read by itself whether its keys and values are known or not: an answer is
        then the same to the bit. ``keep`` is whether they can be kept.
        """
        n_fixed = prompt.n_fixed
        if self._reads_question:
            n_fixed = min(n_fixed, prompt.parts.index(None))
        fixed = prompt.parts[:n_fixed]
        key = fixed, tuple(map(audio_key, clips)) if None in fixed else ()
        if self.kept is not None and self.kept[0] == key:
            decoder.cache.restore(self.kept[1])
        elif n_fixed:
            decoder.feed(np.concatenate(parts[:n_fixed], axis=1))
            if keep:
                self.kept = key, decoder.cache.snapshot()
        return decoder.prefill(np.concatenate(parts[n_fixed:], axis=1))
