"""Compares a question with the model's training scope; and how long a clip can be at all.

Outside its training (:class:`~tinygiant.runtime.config.Scope`) a model answers all the same, less
surely: a note says so. A clip that does not fit the decoder's positions is refused before anything
runs.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

from .config import ModelConfig, QuestionKind, Scope
from .errors import AudioTooLongError, UsageError

__all__ = ["longest_clip_s", "positions_left", "require_positions", "scope_notes"]

_KINDS: dict[QuestionKind, str] = {
    "choices": "questions with choices",
    "open": "questions without choices",
    "choices-at-once": "answering without a thought",
    "open-at-once": "answering without choices and without a thought",
}
# Latin letters write these languages; others are not looked at.
_LATIN = frozenset(("cs", "da", "de", "en", "es", "fi", "fr", "it", "nl", "no", "pl", "pt", "sv"))


def scope_notes(
    scope: Scope, duration_s: float, question: str, *, has_choices: bool, thinks: bool
) -> tuple[str, ...]:
    """A line for each way in which a clip of ``duration_s`` and a question lie outside ``scope``.

    ``thinks`` is whether a thought comes first.
    """
    notes = []
    shortest, longest = scope.shortest_s or 0.0, scope.longest_s or math.inf
    # A tenth beyond is no other world.
    if not 0.9 * shortest <= duration_s <= 1.1 * longest:
        if scope.shortest_s is None:
            trained = f"of at most {longest:g} s"
        elif scope.longest_s is None:
            trained = f"of at least {shortest:g} s"
        else:
            trained = f"of {shortest:g} to {longest:g} s"
        notes.append(
            f"the clip has {duration_s:.3g} s, and this model was trained on clips {trained}: "
            "the answer is less certain"
        )
    kind: QuestionKind = "choices" if has_choices else "open"
    if not thinks:
        kind = "choices-at-once" if has_choices else "open-at-once"
    if scope.questions and kind not in scope.questions:
        notes.append(f"this model was not trained for {_KINDS[kind]}: the answer is less certain")
    if scope.languages and _LATIN.issuperset(scope.languages) and not _is_latin(question):
        notes.append(
            f"this model was trained on questions in {', '.join(scope.languages)} only: the answer "
            "is less certain"
        )
    return tuple(notes)


def require_positions(
    config: ModelConfig, chunks_s: Sequence[float], n_text: int, n_new: int, source: str
) -> None:
    """Refuse what the decoder has no positions for, before anything is computed.

    Args:
        config: the model.
        chunks_s: seconds of sound in each chunk.
        n_text: tokens of the prompt without audio rows.
        n_new: tokens that may be written.
        source: the clip's name.

    Raises:
        AudioTooLongError: a shorter clip would fit.
        UsageError: none would.
    """
    if positions_left(config, chunks_s, n_text + n_new) >= 0:
        return
    longest_s = longest_clip_s(config, n_text + n_new)
    if longest_s > 0:
        raise AudioTooLongError(
            f"{source}: holds {sum(chunks_s):.10g} s, this model has room for "
            f"{math.floor(10 * longest_s) / 10:g} s "
            "beside the question and the answer; cut the audio, or lower --max-new-tokens"
        )
    raise UsageError(
        f"{n_text} tokens of text and {n_new} new ones leave no room for sound in this model's "
        f"{config.decoder.max_positions} positions; shorten the question, or lower --max-new-tokens"
    )


def positions_left(config: ModelConfig, chunks_s: Sequence[float], n_others: int) -> int:
    """The decoder's positions beside the chunks' rows and ``n_others`` tokens; < 0: too few."""
    n_audio = sum(map(config.audio_rows, chunks_s)) * config.n_clips
    return config.decoder.max_positions - n_audio - n_others


def longest_clip_s(config: ModelConfig, n_others: int) -> float:
    """Seconds of sound that fit a decoder together with ``n_others`` tokens; 0 if none do.

    Infinite where the model does not hear what lies beyond its first chunk.
    """
    n_rows = max((config.decoder.max_positions - n_others) // config.n_clips, 0)
    n_chunks, n_rest = divmod(n_rows, config.rows_per_chunk)
    if config.audio_context == "full":
        if n_chunks and config.beyond_chunk == "dropped":
            return math.inf
        return n_chunks * config.chunk_s
    return n_chunks * config.chunk_s + n_rest * config.row_s


def _is_latin(text: str) -> bool:
    """Whether at least half of the letters of ``text`` are Latin."""
    letters = [c for c in text if c.isalpha()]
    n_latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
    return 2 * n_latin >= len(letters)
