"""The whole path, from audio and a question to an answer: one verb a stage.

``read`` (audio) -> ``listen`` (encoders) -> ``compose`` (projector and prompt) -> ``write``
(decoder), and the text is parsed while it is written. :meth:`TinyGiant.ask` is built on
:meth:`TinyGiant.stream`.

    >>> from tinygiant.runtime import load
    >>> model = load()
    >>> answer = model.ask("street.wav", "What is heard?", choices=["a dog", "a siren"])
    >>> answer.text
    'a siren'
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tinygiant.runtime.answer import AnswerParser
from tinygiant.runtime.audio import MAX_AUDIO_S, Audio, AudioSource, read_audio
from tinygiant.runtime.bundle import Bundle, default_bundle_path
from tinygiant.runtime.choices import ChoiceTrie
from tinygiant.runtime.chunks import split_chunks
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import BundleError, UsageError
from tinygiant.runtime.events import (
    Answer,
    AudioAccount,
    AudioRead,
    Event,
    Finished,
    FinishReason,
    PromptRead,
    StreamsReady,
    TextPiece,
    Timings,
    TokenCounts,
)
from tinygiant.runtime.prompt import IM_END, THINK_END, Prompt, build_prompt
from tinygiant.runtime.sessions import GraphPool, SessionSettings
from tinygiant.runtime.streams import (
    Projection,
    StreamCache,
    StreamOutputs,
    audio_key,
    encode_chunks,
    project,
)
from tinygiant.runtime.tokenizer import StreamingDetokenizer, Tokenizer

__all__ = ["MAX_NEW_TOKENS", "Memory", "TinyGiant", "load"]

MAX_NEW_TOKENS = 512
Memory = Literal["default", "low"]

_T = TypeVar("_T")


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    memory: Memory = "default",
    verify: bool = True,
    spin: bool = True,
) -> TinyGiant:
    """Load a bundle and make it ready for questions.

    Args:
        path: the bundle's folder; the environment variable ``TINYGIANT_BUNDLE``, else the model
            that is installed with this package, if None.
        threads: threads to compute with; the physical cores if None.
        memory: ``default`` keeps every graph loaded; ``low`` loads each when it is needed and
            releases it, so that peak memory is that of the largest.
        verify: compare the sha256 of every file with the manifest's.
        spin: let waiting threads spin for a moment; faster, but busy.

    Raises:
        BundleError: the bundle is missing, damaged or of an unknown format.
        UsageError: an impossible number of threads or an unknown ``memory``.
    """
    if memory not in ("default", "low"):
        raise UsageError(f"memory {memory!r} is unknown: choose default or low")
    keep = memory == "default"
    settings = SessionSettings(threads=threads, spin=spin, arena=keep)
    bundle = Bundle.open(default_bundle_path() if path is None else path, verify=verify)
    pool = GraphPool(bundle, settings, keep=keep)
    model = TinyGiant(bundle, pool)
    pool.load_all()
    return model


class TinyGiant:
    """A loaded model. Questions may be asked one after another; see :func:`load`."""

    def __init__(self, bundle: Bundle, pool: GraphPool) -> None:
        """Open tokenizer and embeddings of ``bundle``, whose graphs ``pool`` holds.

        Raises:
            BundleError: they are damaged, or do not belong to the bundle's decoder.
        """
        self.bundle = bundle
        self.config = bundle.config
        self._pool = pool
        self._tokenizer = Tokenizer.from_file(bundle.file(bundle.manifest.tokenizer))
        self._embeddings = TokenEmbeddings.open(bundle)
        self._cache = StreamCache()
        _check_tokenizer(self._tokenizer, bundle)

    def ask(
        self,
        audio: AudioSource | Audio,
        question: str,
        choices: Sequence[str] | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_audio_s: float = MAX_AUDIO_S,
    ) -> Answer:
        """Ask a question about a clip; see :meth:`stream`, whose last event holds the answer."""
        events = self.stream(
            audio, question, choices, max_new_tokens=max_new_tokens, max_audio_s=max_audio_s
        )
        for event in events:
            if isinstance(event, Finished):
                return event.answer
        raise AssertionError("the stream ended without an answer")

    def stream(
        self,
        audio: AudioSource | Audio,
        question: str,
        choices: Sequence[str] | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_audio_s: float = MAX_AUDIO_S,
    ) -> Iterator[Event]:
        """Ask a question about a clip and get the answer as it is made.

        Args:
            audio: a path, encoded bytes, a binary stream, ``(samples, sampling_rate_hz)``, or what
                :func:`~tinygiant.runtime.audio.read_audio` returned.
            question: what to ask, in plain text.
            choices: 2 to 26 possible answers; the answer is then exactly one of them.
            max_new_tokens: how much the model may write. With choices this bounds the thought; the
                answer itself comes on top.
            max_audio_s: longest clip to accept.

        Raises:
            AudioError: the audio cannot be read or is longer than ``max_audio_s``.
            QuestionError: the question or the choices cannot be asked (at once, not when the first
                event is taken).
            UsageError: ``max_new_tokens`` below 1, or more tokens than the decoder has positions.
            BundleError: the bundle's graphs fail.
        """
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
        prompt = build_prompt(question, choices, self._tokenizer, self.config.prompt)
        trie = None if choices is None else ChoiceTrie.of_choices(choices, self._tokenizer)
        return self._stream(audio, prompt, choices, trie, max_new_tokens, max_audio_s)

    def _stream(
        self,
        source: AudioSource | Audio,
        prompt: Prompt,
        choices: Sequence[str] | None,
        trie: ChoiceTrie | None,
        max_new_tokens: int,
        max_audio_s: float,
    ) -> Iterator[Event]:
        clock = _Clock()
        with clock.stage("audio"):
            audio = (
                source if isinstance(source, Audio) else read_audio(source, max_audio_s=max_audio_s)
            )
            account = _account(audio, self.config.chunk_s)
        yield AudioRead(account)

        with clock.stage("encode"):
            outputs, cached = self._listen(audio)
        yield StreamsReady(cached, clock.seconds("encode"))

        with clock.stage("project"):
            projections, embeds = self._compose(prompt, outputs)
        n_prompt = embeds.shape[1]
        n_audio = sum(projection.audio_embeds.shape[1] for projection in projections)

        raw: list[str] = []
        parser = AnswerParser(thinking=trie is not None)
        detokenizer = StreamingDetokenizer(self._tokenizer)
        n_generated, first_token_s = 0, 0.0
        with self._pool.use("decoder_model") as graph:
            with clock.stage("prefill"):
                room = max_new_tokens + (0 if trie is None else 1 + trie.max_tokens)
                decoder = Decoder(graph, self._embeddings, self.config.decoder, n_prompt + room)
                logits = decoder.prefill(embeds)
            yield PromptRead(
                n_prompt,
                _joined([projection.intent_attention for projection in projections], axis=1),
                _joined([projection.gate for projection in projections], axis=0),
            )
            tokens = _Returning(self._write(decoder, logits, max_new_tokens, trie))
            for token in clock.timed("decode", tokens):
                n_generated += 1
                first_token_s = first_token_s or clock.total()
                raw.append(detokenizer.push(token))
                for piece in parser.feed(raw[-1]):
                    yield TextPiece(piece.text, piece.section, piece.markup)
        raw.append(detokenizer.finish())
        for piece in (*parser.feed(raw[-1]), *parser.finish()):
            yield TextPiece(piece.text, piece.section, piece.markup)

        finish_reason, choice_index = tokens.value
        parsed = parser.result()
        decode_s = clock.seconds("decode")
        yield Finished(
            Answer(
                text=parsed.answer if choices is None else choices[choice_index or 0],
                plan=parsed.plan,
                audio_analysis=parsed.audio_analysis,
                logic=parsed.logic,
                summary=parsed.summary,
                unparsed=parsed.unparsed,
                raw_text="".join(raw),
                choice_index=choice_index,
                finish_reason=finish_reason,
                model=self.config.name,
                timings=Timings(
                    audio_s=clock.seconds("audio"),
                    encode_s=clock.seconds("encode"),
                    project_s=clock.seconds("project"),
                    prefill_s=clock.seconds("prefill"),
                    decode_s=decode_s,
                    first_token_s=first_token_s,
                    total_s=clock.total(),
                    encode_cached=cached,
                    tokens_per_s=n_generated / decode_s if decode_s else 0.0,
                ),
                audio=account,
                tokens=TokenCounts(prompt=n_prompt, audio=n_audio, generated=n_generated),
            )
        )

    def _listen(self, audio: Audio) -> tuple[tuple[StreamOutputs, ...], bool]:
        """Stream outputs of every chunk, and whether they were known already."""
        key = audio_key(audio)
        known = self._cache.get(key)
        if known is not None:
            return known, True
        outputs = encode_chunks(split_chunks(audio, self.config), self._pool, self.config)
        self._cache.put(key, outputs)
        return outputs, False

    def _compose(
        self, prompt: Prompt, outputs: Sequence[StreamOutputs]
    ) -> tuple[tuple[Projection, ...], NDArray[np.float32]]:
        """What the decoder reads, ``(1, T, D)``: prefix, each chunk's audio rows, suffix."""
        instruction = self._embeddings.lookup(prompt.instruction_ids)[None]
        projections = project(outputs, instruction, self._pool)
        parts = [
            self._embeddings.lookup(prompt.prefix_ids)[None],
            *(projection.audio_embeds for projection in projections),
            self._embeddings.lookup(prompt.suffix_ids)[None],
        ]
        return projections, np.concatenate(parts, axis=1)

    def _write(
        self,
        decoder: Decoder,
        logits: NDArray[np.float32],
        max_new_tokens: int,
        trie: ChoiceTrie | None,
    ) -> Generator[int, None, tuple[FinishReason, int | None]]:
        """Yield the tokens of the text; returns why it ended and the index of the choice.

        With choices the model thinks until it closes the thought, ends its text or has spent its
        tokens; the thought is then closed and one of the choices written.
        """
        config = self.config.decoder
        end_ids = {*config.eos_token_ids}
        if trie is not None:
            end_ids.add(config.think_end_token_id)
        n_prompt = decoder.cache.length
        written: list[int] = []
        free = _Returning(decoder.generate(logits, max_new_tokens=max_new_tokens, stop_ids=end_ids))
        for token in free:
            written.append(token)
            yield token
        finish_reason: FinishReason = "length" if free.value is None else "stop"
        if trie is None:
            return finish_reason, None
        yield config.think_end_token_id
        unread = [*written[decoder.cache.length - n_prompt :], config.think_end_token_id]
        return finish_reason, (yield from trie.decode(decoder.read, unread))


class _Clock:
    """Seconds spent in each named stage, however often it is entered."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self.seconds(name) + time.perf_counter() - start

    def timed(self, name: str, items: Iterable[_T]) -> Iterator[_T]:
        """The items, with the time each takes to come counted for a stage."""
        iterator = iter(items)
        while True:
            with self.stage(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def seconds(self, name: str) -> float:
        return self._seconds.get(name, 0.0)

    def total(self) -> float:
        return sum(self._seconds.values())


class _Returning(Generic[_T]):
    """Iterates over a generator of tokens and keeps the ``value`` that it returns."""

    value: _T

    def __init__(self, tokens: Generator[int, None, _T]) -> None:
        self._tokens = tokens

    def __iter__(self) -> Iterator[int]:
        self.value = yield from self._tokens


def _account(audio: Audio, chunk_s: float) -> AudioAccount:
    return AudioAccount(
        source=audio.source,
        received_s=audio.received_s,
        used_s=audio.used_s,
        dropped_s=audio.dropped_s,
        sampling_rate_hz=audio.sampling_rate_hz,
        channels=audio.channels,
        n_chunks=int(-(-audio.used_s // chunk_s)),
        notes=audio.notes,
    )


def _check_tokenizer(tokenizer: Tokenizer, bundle: Bundle) -> None:
    decoder = bundle.config.decoder
    problems = []
    if tokenizer.max_id >= decoder.vocab_size:
        problems.append(f"it has ids up to {tokenizer.max_id}, the decoder {decoder.vocab_size}")
    if tokenizer.token_id(THINK_END) != decoder.think_end_token_id:
        problems.append(f"{THINK_END} is not the decoder's {decoder.think_end_token_id}")
    if tokenizer.token_id(IM_END) not in decoder.eos_token_ids:
        problems.append(f"{IM_END} is not among the decoder's {decoder.eos_token_ids}")
    if problems:
        raise BundleError(
            f"the tokenizer does not belong to this decoder: {'; '.join(problems)}; "
            "export the bundle again"
        )


def _joined(arrays: Sequence[NDArray[np.float32] | None], axis: int) -> NDArray[np.float32] | None:
    found = [array for array in arrays if array is not None]
    if not found:
        return None
    joined: NDArray[np.float32] = np.concatenate(found, axis=axis)
    return joined.reshape(-1) if axis == 1 else joined
