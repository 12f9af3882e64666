"""Bookkeeping of an answer: the text as it grows, the account of the audio, and the whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from .answer import AnswerParser, Section, TextPiece
from .asking import Asked
from .audio import Audio
from .config import AnswerForm, ModelConfig
from .encode import Projection
from .events import (
    Answer,
    AudioAccount,
    AudioRead,
    Event,
    Finished,
    PromptRead,
    StreamsReady,
    Timings,
    TokenCounts,
)
from .generate import Ending
from .grammar import Writer
from .preprocess import n_chunks
from .scope import scope_notes
from .speculation import Drafter
from .stages import Clock
from .tokenizer import StreamingDetokenizer, Tokenizer

__all__ = [
    "Transcript",
    "account",
    "assemble",
    "noted",
    "nothing_heard",
    "prompt_read",
    "token_counts",
]


class Transcript:
    """The model's text as it grows: tokens in, pieces out, the whole at the end.

    A ``writer`` knows what it has written; without one the text is parsed.
    """

    def __init__(
        self, tokenizer: Tokenizer, form: AnswerForm, asked: Asked, writer: Writer | None
    ) -> None:
        self._detokenizer = StreamingDetokenizer(tokenizer)
        self._hidden = frozenset(form.hidden_token_ids)
        self._writer = writer
        self._parser = AnswerParser(
            thinking=asked.thinks and asked.trie is not None, plain=form.is_plain
        )
        self._parser.feed(asked.prefilled)
        self._texts: list[str] = []
        self._written: list[TextPiece] = []
        self.token_ids: list[int] = []

    @property
    def text(self) -> str:
        """Everything that was written, markup included."""
        return "".join(self._texts)

    def push(self, token: int) -> list[TextPiece]:
        """One more token; returns the pieces of text that are decided by now."""
        self.token_ids.append(token)
        self._texts.append("" if token in self._hidden else self._detokenizer.push(token))
        return self._parser.feed(self._texts[-1]) if self._writer is None else self._pieces()

    def finish(self) -> list[TextPiece]:
        """The text has ended: returns the last pieces."""
        self._texts.append(self._detokenizer.finish())
        if self._writer is not None:
            return self._pieces()
        return self._parser.feed(self._texts[-1]) + self._parser.finish()

    def parse(self) -> dict[str, str]:
        """The parts of the whole text, by their names in :class:`Answer`."""
        if self._writer is not None:
            return {name: self._section(section) for name, section in _SECTIONS.items()}
        parsed = self._parser.result()
        return {
            "text": parsed.answer,
            "plan": parsed.plan,
            "audio_analysis": parsed.audio_analysis,
            "logic": parsed.logic,
            "summary": parsed.summary,
            "unparsed": parsed.unparsed,
        }

    def _pieces(self) -> list[TextPiece]:
        pieces = self._writer.pieces() if self._writer is not None else []
        self._written += pieces
        return pieces

    def _section(self, section: Section) -> str:
        shown = (p.text for p in self._written if p.section == section and not p.markup)
        return "".join(shown).strip()


_SECTIONS: dict[str, Section] = {
    "text": "answer",
    "plan": "plan",
    "audio_analysis": "audio_analysis",
    "logic": "logic",
    "summary": "summary",
    "unparsed": "other",
}


def account(audio: Audio, asked: Asked, config: ModelConfig) -> AudioAccount:
    """The account of the audio, with notes on what the model was not made for."""
    used_s, dropped_s, notes = audio.used_s, audio.dropped_s, audio.notes
    if config.beyond_chunk == "dropped" and used_s > config.chunk_s:
        note = f"the model hears the first {config.chunk_s:g} s; the rest was left out"
        dropped_s, notes = dropped_s + used_s - config.chunk_s, (*notes, note)
        used_s = config.chunk_s
    notes += scope_notes(
        config.scope,
        used_s,
        asked.question,
        has_choices=asked.choices is not None,
        thinks=asked.thinks,
    )
    return AudioAccount(
        source=audio.source,
        received_s=audio.received_s,
        used_s=used_s,
        dropped_s=dropped_s,
        sampling_rate_hz=audio.sampling_rate_hz,
        channels=audio.channels,
        n_chunks=n_chunks(audio.used_s, config),
        notes=notes,
    )


def noted(audio: AudioAccount, note: str) -> AudioAccount:
    """The account with one note more."""
    return dataclasses.replace(audio, notes=(*audio.notes, note))


def prompt_read(n_tokens: int, projections: Sequence[Projection]) -> PromptRead:
    """The event, with what there is to see of all chunks."""
    attention = [p.intent_attention[0] for p in projections if p.intent_attention is not None]
    gates = [p.gate for p in projections if p.gate is not None]
    return PromptRead(
        n_tokens=n_tokens,
        intent_attention=np.concatenate(attention) if attention else None,
        gate=np.concatenate(gates) if gates else None,
    )


def token_counts(
    asked: Asked,
    parts: Sequence[NDArray[np.float32]],
    transcript: Transcript,
    drafter: Drafter | None,
) -> TokenCounts:
    """The tokens of an answer; ``parts (1, n, D)`` are those of its prompt."""
    audio = [rows for ids, rows in zip(asked.prompt.parts, parts, strict=True) if ids is None]
    return TokenCounts(
        prompt=sum(part.shape[1] for part in parts),
        audio=sum(rows.shape[1] for rows in audio),
        generated=len(transcript.token_ids),
        drafted=0 if drafter is None else drafter.n_drafted,
        accepted=0 if drafter is None else drafter.n_accepted,
    )


def assemble(
    transcript: Transcript,
    ending: Ending,
    asked: Asked,
    *,
    model: str,
    audio: AudioAccount,
    more_audio: tuple[AudioAccount, ...],
    tokens: TokenCounts,
    clock: Clock,
    first_token_s: float,
    encode_cached: bool,
    providers: dict[str, tuple[str, ...]],
) -> Answer:
    """The finished answer."""
    parts = transcript.parse()
    if ending.choice_index is not None and asked.choices is not None:
        parts["text"] = asked.choices[ending.choice_index]
    return Answer(
        **parts,
        raw_text=transcript.text,
        choice_index=ending.choice_index,
        finish_reason=ending.finish_reason,
        model=model,
        timings=_timings(clock, first_token_s, tokens.generated, cached=encode_cached),
        audio=audio,
        more_audio=more_audio,
        tokens=tokens,
        choice_probabilities=ending.probabilities,
        choice_scoring=None if ending.probabilities is None else "sum_of_log_probabilities",
        providers=providers,
    )


def nothing_heard(
    audio: AudioAccount,
    asked: Asked,
    why: str,
    choice_index: int | None,
    model: str,
    providers: dict[str, tuple[str, ...]],
    clock: Clock,
) -> Iterator[Event]:
    """The events of a clip in which there is nothing to hear: the model is not asked."""
    text = f"Nothing is heard: the clip is {why}."
    if choice_index is not None and asked.choices is not None:
        text = asked.choices[choice_index]
    yield AudioRead(audio)
    yield StreamsReady(cached=False, encode_s=0.0)
    yield PromptRead(n_tokens=0, intent_attention=None, gate=None)
    yield TextPiece(text, "answer")
    yield Finished(
        Answer(
            text=text,
            plan="",
            audio_analysis="",
            logic="",
            summary="",
            unparsed="",
            raw_text=text,
            choice_index=choice_index,
            finish_reason="stop",
            model=model,
            timings=_timings(clock, clock.total(), 0, cached=False),
            audio=audio,
            tokens=TokenCounts(prompt=0, audio=0, generated=0),
            providers=providers,
        )
    )


def _timings(clock: Clock, first_token_s: float, n_tokens: int, *, cached: bool) -> Timings:
    decode_s = clock.seconds("decode")
    return Timings(
        audio_s=clock.seconds("audio"),
        encode_s=clock.seconds("encode"),
        project_s=clock.seconds("project"),
        prefill_s=clock.seconds("prefill"),
        decode_s=decode_s,
        first_token_s=first_token_s,
        total_s=clock.total(),
        encode_cached=cached,
        tokens_per_s=n_tokens / decode_s if decode_s else 0.0,
    )
