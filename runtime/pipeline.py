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
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Unpack

import numpy as np
from numpy.typing import NDArray

from .asking import MAX_NEW_TOKENS, Asked, AskKeywords, AskOptions, Clips, Query, check
from .audio import Audio, AudioSource, read_audio
from .batch import Batch, Trials
from .bundle import Bundle, default_bundle_path
from .decoder import Decoder
from .drafting import make_decoder
from .embeddings import TokenEmbeddings
from .encode import Encoded, EncodedCache, Projection, audio_key, encode, project
from .errors import BundleError, QuestionError, UsageError
from .events import Answer, AudioRead, Event, Finished, StreamsReady, TokenCounts
from .generate import end_ids, generate
from .grammar import Grammar, Vocabulary, Writer
from .kv_cache import KvSnapshot
from .ort.memory import how_many, require_memory
from .ort.pool import GraphPool, is_small
from .ort.sessions import Graph, SessionSettings
from .preprocess import chunks_s, preprocess
from .prompt import Prompt, compose
from .scope import positions_left, require_positions
from .signal import silent_choice, why_unheard
from .speculation import Drafter, Speculation
from .stages import Clock, Returning
from .together import Together
from .tokenizer import Tokenizer
from .transcript import Transcript, account, assemble, nothing_heard, prompt_read

__all__ = [
    "MAX_NEW_TOKENS",
    "PARALLEL",
    "Clips",
    "Memory",
    "Prepared",
    "Query",
    "TinyGiant",
    "load",
]

Memory = Literal["default", "low"]

PARALLEL = 4
"""Answers that are written at a time: beyond, a step takes nearly as long as two."""


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    memory: Memory = "default",
    verify: bool = True,
    spin: bool = True,
    provider: str = "cpu",
    check_memory: bool = True,
    speculate: bool = True,
    many: bool = False,
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
        provider: what computes: ``cpu``, ``cuda``, ``tensorrt``, ..., or one for each part, such as
            ``encoders=tensorrt,decoder=cuda``.
        check_memory: refuse a bundle for which there cannot be enough memory; on the CPU alone.
        speculate: guess the next tokens from the question and from earlier text, and check several
            in one step where that pays. The answers are the same.
        many: questions will come by the dozen (:meth:`TinyGiant.ask_many`). The products of a small
            bundle gain nothing by a second thread; they then get one, and as many threads as there
            are to compute with hear the clips of the next questions.

    Raises:
        TinyGiantError: there cannot be enough memory, or it runs out.
        BundleError: the bundle is missing, damaged or of an unknown format.
        UsageError: an impossible number of threads, an unknown ``memory``, or a provider that this
            onnxruntime does not have or that does not come up.
    """
    if memory not in ("default", "low"):
        raise UsageError(f"memory {memory!r} is unknown: choose default or low")
    keep = memory == "default"
    settings = SessionSettings(threads=threads, spin=spin)
    bundle = Bundle.open(default_bundle_path() if path is None else path, verify=verify)
    workers = 0
    if many and is_small(bundle):
        workers = settings.n_threads if settings.n_threads > 1 else 0
        settings = dataclasses.replace(settings, threads=1)
    if check_memory and provider == "cpu":
        require_memory(bundle, keep=keep)
    pool = GraphPool(bundle, settings, keep=keep, provider=provider)
    model = TinyGiant(bundle, pool, speculate=speculate, workers=workers)
    pool.load_all()
    pool.release()
    return model


@dataclass(frozen=True, eq=False)
class Prepared:
    """A question about a clip as the decoder reads it.

    Attributes:
        embeds: ``(1, T, D)``.
        asked: the question.
        projections: what the projector gave, one a chunk.
        encode_cached: whether the encoders did not have to run.
    """

    embeds: NDArray[np.float32]
    asked: Asked
    projections: tuple[Projection, ...]
    encode_cached: bool


class TinyGiant:
    """A loaded model. Questions may be asked one after another; see :func:`load`."""

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
        self._tokenizer = Tokenizer.from_file(bundle.file(bundle.manifest.tokenizer))
        self._embeddings = TokenEmbeddings.open(bundle)
        self._cache = EncodedCache()
        self._speculation = Speculation() if speculate else None
        self._vocabulary: Vocabulary | None = None  # once it is needed
        # What every prompt begins with, and its keys and values once they are known.
        self._prefix: tuple[Hashable, KvSnapshot] | None = None
        self._trials = Trials()
        self._workers = workers
        _check_tokenizer(self._tokenizer, bundle)

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
        return _without_waits(self._stream(self._clips(audio), asked))

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
                heard when there is room for its answer. None: as :func:`load` found fit.

        Raises:
            UsageError: ``parallel`` below 1 or ``workers`` below 0.
            BundleError: the bundle's graphs fail.
        """
        workers = self._workers if workers is None else workers
        if workers < 0:
            raise UsageError(f"workers is {workers}, expected at least 0")
        # With little memory an encoder is not in it beside the decoder.
        workers = workers if self._pool.keep else 0
        return self._ask_many(enumerate(queries), self.batch(parallel), workers)

    def batch(self, size: int | None = None) -> Batch | None:
        """Room for ``size`` answers that are written in common steps of the decoder.

        Without a ``size``: ``PARALLEL``, or fewer where their keys and values would take more than
        an eighth of the memory that is left. None where there is no such thing: for a ``size`` of
        1, with ``memory="low"``, on a provider other than the CPU, and for bundles of earlier
        versions, whose decoder takes one sequence.

        Raises:
            UsageError: a ``size`` below 1.
        """
        if size is None:
            token_bytes = self.config.decoder.kv_token_bytes(self.bundle.manifest.kv_cache)
            size = how_many(PARALLEL, token_bytes)
        if size < 1:
            raise UsageError(f"{size} answers at a time, expected at least 1")
        graph = self.config.decoder.graph
        if size < 2 or not self._pool.keep or self.providers[graph] != ("cpu",):
            return None
        with self._pool.use(graph) as decoder, self._prompt_graph() as prompts:
            if not decoder.is_batched:
                return None
            return Batch(
                decoder,
                self._embeddings,
                self.config.decoder,
                size,
                kv_type=self.bundle.manifest.kv_cache,
                prompts=prompts,
                trials=self._trials,
            )

    def events(self, query: Query, batch: Batch | None) -> Iterator[Event | None]:
        """The events of an answer that is written in steps of ``batch``, if there is any.

        A None comes where the answer is ready for the decoder, and then wherever it waits for
        :meth:`Batch.step`. Errors are those of :meth:`stream`.
        """
        asked = check(query.question, query.choices, query.options, self._tokenizer, self.config)
        return self._stream(self._clips(query.audio), asked, batch)

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
        clips = [_read(clip, options) for clip in self._clips(audio)]
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
        with self._pool.use(self.config.decoder.graph) as graph, self._prompt_graph() as prompts:
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

    @contextmanager
    def _prompt_graph(self) -> Iterator[Graph | None]:
        """The second graph of the decoder, if there is one and it is to be used.

        It costs memory beside the first, and has to share keys and values with it.
        """
        name = self.bundle.manifest.prompt_graph
        both = {self.providers[graph] for graph in (name, self.config.decoder.graph) if graph}
        if not name or not self._pool.keep or both != {("cpu",)}:
            yield None
            return
        with self._pool.use(name) as graph:
            yield graph

    def _ask_many(
        self, queries: Iterator[tuple[int, Query]], batch: Batch | None, workers: int
    ) -> Iterator[Answer | Exception]:
        ended: dict[int, Answer | Exception] = {}
        n_given = 0
        with Together[int](batch, workers) as together:
            while True:
                while together.has_room and (following := next(queries, None)) is not None:
                    index, query = following
                    together.add(index, partial(self.events, query, batch))
                if together.is_idle:
                    return
                for index, event in together.turn():
                    if isinstance(event, BundleError):
                        raise event
                    if isinstance(event, Finished):
                        ended[index] = event.answer
                    elif isinstance(event, Exception):
                        ended[index] = event
                while n_given in ended:
                    yield ended.pop(n_given)
                    n_given += 1

    def _stream(
        self, sources: Sequence[AudioSource | Audio], asked: Asked, batch: Batch | None = None
    ) -> Iterator[Event | None]:
        """See :meth:`events`."""
        clock, options = Clock(), asked.options
        with clock.stage("audio"):
            clips = [_read(source, options) for source in sources]
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
            guess = "one of the choices must be given: the model guesses"
            heard = dataclasses.replace(heard, notes=(*heard.notes, guess))
        longest = max(clips, key=lambda clip: clip.used_s)
        durations_s = chunks_s(longest.used_s, self.config)
        asked, writer, room = self._fitted(asked, durations_s)
        n_new = asked.options.max_new_tokens
        if n_new < options.max_new_tokens:
            less = f"there is room for {n_new} new tokens, not for {options.max_new_tokens}"
            heard = dataclasses.replace(heard, notes=(*heard.notes, less))
        require_positions(self.config, durations_s, asked.prompt.n_text, room, longest.source)
        yield from map(AudioRead, (heard, *others))

        with clock.stage("encode"):
            encoded, cached = self._encode(clips)
        yield StreamsReady(cached, clock.seconds("encode"))

        with clock.stage("project"):
            projections = self._project(encoded, asked.prompt)
            parts = self._compose(asked.prompt, projections)
            n_tokens = sum(part.shape[1] for part in parts)

        transcript = Transcript(self._tokenizer, self.config.answer, asked, writer)
        first_token_s = 0.0
        yield None
        if batch is not None and batch.width == 1:
            batch = None
        drafter = self._drafter(asked) if batch is None else None
        with self.decoder(n_tokens + room, drafter, batch) as decoder:
            with clock.stage("prefill"):
                logits = self._prefill(decoder, parts, asked.prompt, clips)
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
            self._remember(transcript, asked, clock.seconds("decode"), drafted=drafter is not None)
        self._pool.release()
        yield from transcript.finish()
        counts = TokenCounts(
            prompt=n_tokens,
            audio=sum(
                rows.shape[1]
                for ids, rows in zip(asked.prompt.parts, parts, strict=True)
                if ids is None
            ),
            generated=len(transcript.token_ids),
            drafted=0 if drafter is None else drafter.n_drafted,
            accepted=0 if drafter is None else drafter.n_accepted,
        )
        yield Finished(
            assemble(
                transcript,
                ending,
                asked,
                model=self.config.name,
                audio=heard,
                more_audio=tuple(others),
                tokens=counts,
                clock=clock,
                first_token_s=first_token_s,
                encode_cached=cached,
                providers=self.providers,
            )
        )

    def _clips(self, audio: Clips) -> list[AudioSource | Audio]:
        """The clips of a question; raises QuestionError if the model does not hear so many."""
        clips = audio if isinstance(audio, list) else [audio]
        n_heard = self.config.n_clips
        if len(clips) not in (1, n_heard):
            raise QuestionError(
                f"{len(clips)} clips given, {self.config.name} hears "
                f"{'one' if n_heard == 1 else f'one or {n_heard}'} at a time"
            )
        return clips

    def _writer(self, asked: Asked) -> Writer | None:
        """What holds the text to the model's form; None where it is to be raw."""
        if asked.options.raw and not asked.is_scored:
            return None
        form, stop_ids = self.config.answer, self.config.decoder.stop_token_ids
        grammar = Grammar.of_form(form, stop_ids, asked.trie, think=asked.thinks)
        if self._vocabulary is None:
            size = self.config.decoder.vocab_size
            self._vocabulary = Vocabulary(self._tokenizer, size, form.hidden_token_ids)
        return Writer(grammar, self._vocabulary, asked.options.max_new_tokens)

    def _fitted(
        self, asked: Asked, durations_s: Sequence[float]
    ) -> tuple[Asked, Writer | None, int]:
        """A question, its writer, and the most tokens they write: fewer than asked if that fits."""
        writer = self._writer(asked)
        n_most = asked.max_written
        if writer is not None and not asked.is_scored:
            n_most = writer.max_tokens
        left = positions_left(self.config, durations_s, asked.prompt.n_text + n_most)
        n_new = asked.options.max_new_tokens + left
        if not asked.options.fit or asked.is_scored or left >= 0 or n_new < 1:
            return asked, writer, n_most
        options = dataclasses.replace(asked.options, max_new_tokens=n_new)
        return self._fitted(dataclasses.replace(asked, options=options), durations_s)

    def _encode(self, clips: Sequence[Audio]) -> tuple[list[tuple[Encoded, ...]], bool]:
        """Encoder outputs of every chunk of every clip, and whether all were known already."""
        found, cached = [], True
        for clip in clips:
            encoded, was_known = self._cache.get_or_make(
                audio_key(clip), partial(self._listen, clip)
            )
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

    def _prefill(
        self,
        decoder: Decoder,
        parts: Sequence[NDArray[np.float32]],
        prompt: Prompt,
        clips: Sequence[Audio],
    ) -> NDArray[np.float32]:
        """Read the prompt, ``(1, n, D)`` of each of its parts; returns its last logits ``(V,)``.

        What no question changes is read by itself, and its keys and values are kept: an answer is
        then the same to the bit whether they were known or not. Audio rows belong to it unless the
        projector reads the question.
        """
        n_fixed = prompt.n_fixed
        if self.config.projector.reads_question:
            n_fixed = min(n_fixed, prompt.parts.index(None))
        fixed = prompt.parts[:n_fixed]
        key = fixed, tuple(map(audio_key, clips)) if None in fixed else ()
        if self._prefix is not None and self._prefix[0] == key:
            decoder.cache.restore(self._prefix[1])
        elif n_fixed:
            decoder.feed(np.concatenate(parts[:n_fixed], axis=1))
            # On a device of its own the cache does not come back.
            if self.providers[self.config.decoder.graph] == ("cpu",):
                self._prefix = key, decoder.cache.snapshot()
        return decoder.prefill(np.concatenate(parts[n_fixed:], axis=1))

    def _drafter(self, asked: Asked) -> Drafter | None:
        """What guesses the next tokens of an answer; None if nothing is to be guessed."""
        if self._speculation is None or asked.is_scored or not asked.options.think:
            return None
        if not self._speculation.is_worth_it():
            return None
        return self._speculation.start([asked.prompt.instruction_ids], end_ids(asked, self.config))

    def _remember(
        self, transcript: Transcript, asked: Asked, decode_s: float, *, drafted: bool
    ) -> None:
        """Keep an answer for the drafts of later ones."""
        if self._speculation is not None and asked.options.think and not asked.is_scored:
            self._speculation.remember(transcript.token_ids, decode_s, drafted=drafted)


def _without_waits(events: Iterator[Event | None]) -> Iterator[Event]:
    """The events of an answer that waits for nobody."""
    for event in events:
        if event is not None:
            yield event


def _read(source: AudioSource | Audio, options: AskOptions) -> Audio:
    """The sound in memory; what the caller has read already is taken as it is."""
    if isinstance(source, Audio):
        return source
    return read_audio(source, max_audio_s=options.max_audio_s)


def _check_tokenizer(tokenizer: Tokenizer, bundle: Bundle) -> None:
    decoder, thought = bundle.config.decoder, bundle.config.answer.thought
    problems = []
    if tokenizer.max_id >= decoder.vocab_size:
        problems.append(f"it has ids up to {tokenizer.max_id}, the decoder {decoder.vocab_size}")
    if unknown := sorted(set(decoder.stop_token_ids) - tokenizer.control_ids):
        problems.append(f"it has no control tokens {unknown}, which end the decoder's text")
    if thought is not None and tokenizer.token_id(thought.close) != thought.close_id:
        problems.append(f"{thought.close} is not the decoder's {thought.close_id}")
    if problems:
        raise BundleError(
            f"the tokenizer does not belong to this decoder: {'; '.join(problems)}; "
            "export the bundle again"
        )
