"""The whole path, from sound and a question to an answer: one verb a stage.

``read -> preprocess -> encode -> project -> compose -> generate -> parse``. The whole of it is
:meth:`TinyGiant.stream`; :meth:`TinyGiant.ask` is built on that, and :meth:`TinyGiant.prepare` is
the part before the decoder, for verification and measurements.

    >>> from tinygiant.runtime import load
    >>> model = load()
    >>> answer = model.ask("street.wav", "What is heard?", choices=["a dog", "a siren"])
    >>> answer.text
    'a siren'
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Unpack

import numpy as np
from numpy.typing import NDArray

from .asking import Asked, AskKeywords, AskOptions, Clips, Prepared, Query, check, clips_of
from .audio import Audio, AudioSource, as_audio
from .batch import Batch, Trials
from .bundle import Bundle
from .decoder import Decoder
from .drafting import make_decoder, remember, start_drafts
from .embeddings import TokenEmbeddings
from .encode import Encoded, EncodedCache, Projection, audio_key, encode, project
from .errors import UsageError
from .events import Answer, AudioRead, Event, Finished, StreamsReady
from .fitting import Writers
from .generate import generate
from .many import answers, make_batch
from .ort.pool import GraphPool
from .prefix import Prefix
from .preprocess import chunks_s, preprocess
from .prompt import Prompt, compose
from .scope import require_positions
from .signal import silent_choice, why_unheard
from .speculation import Drafter, Speculation
from .stages import Clock, Returning, without_waits
from .tokenizer import Tokenizer
from .transcript import (
    Transcript,
    account,
    assemble,
    noted,
    nothing_heard,
    prompt_read,
    token_counts,
)

__all__ = ["TinyGiant"]


class TinyGiant:
    """A loaded model, as ``load`` makes one. Questions may be asked one after another."""

    def __init__(
        self, bundle: Bundle, pool: GraphPool, *, speculate: bool = True, workers: int = 0
    ) -> None:
        """Open tokenizer and embeddings of ``bundle``, whose graphs ``pool`` holds.

        ``workers`` are those of :meth:`ask_many` where it is not told how many.

        Raises:
            BundleError: they are damaged, or do not belong to the bundle's decoder.
        """
        self.bundle = bundle
        self.config = bundle.config
        self._pool = pool
        self._tokenizer = Tokenizer.of_bundle(bundle)
        self._embeddings = TokenEmbeddings.open(bundle)
        self._cache = EncodedCache()
        self._writers = Writers(self._tokenizer, self.config)
        self._prefix = Prefix(reads_question=self.config.projector.reads_question)
        self._speculation = Speculation() if speculate else None
        self._trials = Trials()
        self._workers = workers

    @property
    def providers(self) -> dict[str, tuple[str, ...]]:
        """Which providers run each graph; the one that was asked for is the first."""
        return dict(self._pool.providers)

    def forget(self) -> None:
        """Keep nothing of the clips heard so far; the next question about one listens again."""
        self._cache.clear()

    def ask(
        self,
        audio: Clips,
        question: str,
        choices: Sequence[str] | None = None,
        options: AskOptions = AskOptions(),  # noqa: B008 - frozen
        **changes: Unpack[AskKeywords],
    ) -> Answer:
        """Ask a question about a clip; see :meth:`stream`, whose last event holds the answer."""
        for event in self.stream(audio, question, choices, options, **changes):
            if isinstance(event, Finished):
                return event.answer
        raise AssertionError("the stream ended without an answer")

    def stream(
        self,
        audio: Clips,
        question: str,
        choices: Sequence[str] | None = None,
        options: AskOptions = AskOptions(),  # noqa: B008 - frozen
        **changes: Unpack[AskKeywords],
    ) -> Iterator[Event]:
        """Ask a question about a clip and get the answer as it is made.

        Of a clip that is silent, or too short to hear anything, the model is not asked: the answer
        says so. With choices it is the one that says that nothing is heard (in English); without
        such a choice the model is asked all the same, and a note says that it guesses.

        Args:
            audio: a path, encoded bytes, a binary stream, ``(samples, sampling_rate_hz)``, or what
                :func:`~tinygiant.runtime.audio.read_audio` returned; or a list of two of these for
                a model that compares two clips.
            question: what to ask, in plain text.
            choices: 2 to 26 possible answers; the answer is then exactly one of them.
            options: how to answer.
            changes: fields of ``options`` by keyword: ``think``, ``max_new_tokens``,
                ``max_audio_s``, ``fit``, ``raw``.

        Raises:
            AudioError: the audio cannot be read or is longer than ``max_audio_s``.
            QuestionError: the question or the choices cannot be asked, or not about so many clips
                (at once, not when the first event is taken).
            UsageError: ``max_new_tokens`` below 1, or more tokens than the decoder has positions.
            BundleError: the bundle's graphs fail.
        """
        options = dataclasses.replace(options, **changes)
        asked = check(question, choices, options, self._tokenizer, self.config)
        return without_waits(self._stream(clips_of(audio, self.config), asked))

    def ask_many(
        self, queries: Iterable[Query], *, parallel: int | None = None, workers: int | None = None
    ) -> Iterator[Answer | Exception]:
        """Ask questions about clips, several at a time; answers come in the order of ``queries``.

        The answers are those of :meth:`ask`. Of a question that cannot be answered comes the error
        that :meth:`ask` raises, and the others go on. See :mod:`~tinygiant.runtime.together`.

        Args:
            queries: the questions; taken as there is room for them.
            parallel: how many answers are written at a time, as :meth:`batch` takes it.
            workers: threads that hear the clips of the next questions meanwhile; with 0, a clip is
                heard when there is room for its answer. None: as ``load`` found fit.

        Raises:
            UsageError: ``parallel`` below 1 or ``workers`` below 0.
            BundleError: the bundle's graphs fail.
        """
        workers = self._workers if workers is None else workers
        if workers < 0:
            raise UsageError(f"workers is {workers}, expected at least 0")
        # With little memory an encoder is not in it beside the decoder.
        workers = workers if self._pool.keep else 0
        return answers(queries, self.events, self.batch(parallel), workers)

    def batch(self, size: int | None = None) -> Batch | None:
        """Room for ``size`` answers that are written in common steps of the decoder.

        Without a ``size``: ``PARALLEL``, or fewer where their keys and values would take more than
        an eighth of the memory that is left. None where there is no such thing: for a ``size`` of
        1, with ``memory="low"``, on a provider other than the CPU, and for bundles of earlier
        versions, whose decoder takes one sequence.

        Raises:
            UsageError: a ``size`` below 1.
        """
        return make_batch(
            size, self.bundle, self._pool, self._embeddings, self._trials, self._speculation
        )

    def events(self, query: Query, batch: Batch | None) -> Iterator[Event | None]:
        """The events of an answer that is written in steps of ``batch``, if there is any.

        A None comes where the answer is ready for the decoder, and then wherever it waits for
        :meth:`Batch.step`. Errors are those of :meth:`stream`.
        """
        asked = check(query.question, query.choices, query.options, self._tokenizer, self.config)
        return self._stream(clips_of(query.audio, self.config), asked, batch)

    def prepare(
        self,
        audio: Clips,
        question: str,
        choices: Sequence[str] | None = None,
        options: AskOptions = AskOptions(),  # noqa: B008 - frozen
        **changes: Unpack[AskKeywords],
    ) -> Prepared:
        """Everything before the decoder; arguments and errors as for :meth:`stream`."""
        options = dataclasses.replace(options, **changes)
        asked = check(question, choices, options, self._tokenizer, self.config)
        clips = [as_audio(clip, options.max_audio_s) for clip in clips_of(audio, self.config)]
        encoded, cached = self._encode(clips)
        projections = self._project(encoded, asked.prompt)
        embeds = np.concatenate(self._compose(asked.prompt, projections), axis=1)
        return Prepared(embeds, asked, tuple(itertools.chain(*projections)), cached)

    @contextmanager
    def decoder(
        self, capacity: int, drafter: Drafter | None = None, batch: Batch | None = None
    ) -> Iterator[Decoder]:
        """An empty sequence of at most ``capacity`` tokens, while its graph is in memory.

        It is one of ``batch``, if there is any. What is bound to a graph keeps it there: delete the
        decoder before the block ends.
        """
        if batch is not None:
            member = batch.join(capacity)
            try:
                yield member
            finally:
                batch.leave(member)
            return
        with self._pool.use(self.config.decoder.graph) as graph, self._pool.prompts() as prompts:
            yield make_decoder(
                graph,
                self._embeddings,
                self.config.decoder,
                capacity,
                drafter,
                kv_type=self.bundle.manifest.kv_cache,
                prompts=prompts,
                speculation=self._speculation,
            )

    def _stream(
        self, sources: Sequence[AudioSource | Audio], asked: Asked, batch: Batch | None = None
    ) -> Iterator[Event | None]:
        """See :meth:`events`."""
        clock, options = Clock(), asked.options
        with clock.stage("audio"):
            clips = [as_audio(source, options.max_audio_s) for source in sources]
            faults = [why_unheard(clip.samples, clip.sampling_rate_hz) for clip in clips]
            unheard = faults[0] if all(faults) else None
        heard, *others = (account(clip, asked, self.config) for clip in clips)
        if unheard is not None and not options.raw:
            silent = silent_choice(asked.choices or ())
            if asked.choices is None or silent is not None:
                yield from nothing_heard(
                    heard, asked, unheard, silent, self.config.name, self.providers, clock
                )
                return
            heard = noted(heard, "one of the choices must be given: the model guesses")
        longest = max(clips, key=lambda clip: clip.used_s)
        durations_s = chunks_s(longest.used_s, self.config)
        asked, writer, room = self._writers.fitted(asked, durations_s)
        n_new = asked.options.max_new_tokens
        if n_new < options.max_new_tokens:
            less = f"there is room for {n_new} new tokens, not for {options.max_new_tokens}"
            heard = noted(heard, less)
        require_positions(self.config, durations_s, asked.prompt.n_text, room, longest.source)
        yield from map(AudioRead, (heard, *others))

        with clock.stage("encode"):
            encoded, cached = self._encode(clips)
        yield StreamsReady(cached, clock.seconds("encode"))

        with clock.stage("project"):
            projections = self._project(encoded, asked.prompt)
            parts = self._compose(asked.prompt, projections)

        transcript = Transcript(self._tokenizer, self.config.answer, asked, writer)
        first_token_s = 0.0
        yield None
        if batch is not None and batch.width == 1:
            batch = None
        drafter = None if batch is not None else start_drafts(self._speculation, asked, self.config)
        n_tokens = sum(part.shape[1] for part in parts)
        with self.decoder(n_tokens + room, drafter, batch) as decoder:
            with clock.stage("prefill"):
                keep = self._pool.is_on_cpu(self.config.decoder.graph)
                logits = self._prefix.prefill(decoder, parts, asked.prompt, clips, keep=keep)
            yield prompt_read(n_tokens, list(itertools.chain(*projections)))

            tokens = Returning(generate(decoder, logits, asked, self.config, writer))
            for token in clock.timed("decode", tokens):
                if token is None:
                    with clock.stage("decode"):
                        yield None
                    continue
                first_token_s = first_token_s or clock.total()
                yield from transcript.push(token)
            ending = tokens.value
            del decoder, logits, tokens
        if batch is None:
            decode_s = clock.seconds("decode")
            remember(self._speculation, asked, transcript.token_ids, decode_s, drafter)
        self._pool.release()
        yield from transcript.finish()
        yield Finished(
            assemble(
                transcript,
                ending,
                asked,
                model=self.config.name,
                audio=heard,
                more_audio=tuple(others),
                tokens=token_counts(asked, parts, transcript, drafter),
                clock=clock,
                first_token_s=first_token_s,
                encode_cached=cached,
                providers=self.providers,
            )
        )

    def _encode(self, clips: Sequence[Audio]) -> tuple[list[tuple[Encoded, ...]], bool]:
        """Encoder outputs of every chunk of every clip, and whether all were known already."""
        found, cached = [], True
        for clip in clips:
            key, listen = audio_key(clip), partial(self._listen, clip)
            encoded, was_known = self._cache.get_or_make(key, listen)
            cached = cached and was_known
            found.append(encoded)
        return found, cached

    def _listen(self, clip: Audio) -> tuple[Encoded, ...]:
        return encode(preprocess(clip, self.config), self._pool, self.config)

    def _project(
        self, clips: Sequence[Sequence[Encoded]], prompt: Prompt
    ) -> list[tuple[Projection, ...]]:
        """Audio rows of every chunk; where the projector reads the question, through it."""
        instruction = self._embeddings.lookup(prompt.instruction_ids)[None]
        return [project(encoded, instruction, self._pool, self.config) for encoded in clips]

    def _compose(
        self, prompt: Prompt, clips: Sequence[Sequence[Projection]]
    ) -> tuple[NDArray[np.float32], ...]:
        """What the decoder reads, ``(1, n, D)`` of each part of the prompt."""
        rows = [[chunk.audio_embeds for chunk in projections] for projections in clips]
        return compose(prompt, rows, self._embeddings.lookup)
