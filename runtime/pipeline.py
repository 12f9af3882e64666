"""The whole path, from audio and a question to an answer: one verb a stage.

``read`` (audio) -> ``listen`` (encoders) -> ``compose`` (projector and prompt) -> ``write``
(decoder); the text is parsed while it is written. :meth:`TinyGiant.ask` is built on
:meth:`TinyGiant.stream`.

    >>> from tinygiant.runtime import load
    >>> model = load()
    >>> answer = model.ask("street.wav", "What is heard?", choices=["a dog", "a siren"])
    >>> answer.text
    'a siren'
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .answer import AnswerParser, ParsedAnswer, TextPiece
from .audio import MAX_AUDIO_S, Audio, AudioSource, read_audio
from .bundle import Bundle, default_bundle_path
from .choices import ChoiceTrie, probabilities
from .chunks import split_chunks
from .decoder import Decoder
from .embeddings import TokenEmbeddings
from .errors import BundleError, UsageError
from .events import (
    Answer,
    AudioAccount,
    AudioRead,
    Event,
    Finished,
    FinishReason,
    PromptRead,
    StreamsReady,
    Timings,
    TokenCounts,
)
from .kv_cache import KvSnapshot
from .ort.memory import require_memory
from .ort.sessions import GraphPool, SessionSettings
from .prompt import IM_END, THINK_END, Prompt, build_prompt
from .signal import silent_choice, why_unheard
from .speculation import Drafter, Speculation
from .stages import Clock, Returning
from .streams import (
    Projection,
    StreamCache,
    StreamOutputs,
    audio_key,
    encode_chunks,
    project,
)
from .tokenizer import StreamingDetokenizer, Tokenizer

__all__ = ["MAX_NEW_TOKENS", "Memory", "TinyGiant", "load"]

MAX_NEW_TOKENS = 512
# Where the model is not to think. Qwen3's own form of it has EMPTY_THOUGHT_END as well; before
# choices it is left out, for a choice brings the line break that it had in training.
EMPTY_THOUGHT, EMPTY_THOUGHT_END = "<think>\n\n</think>", "\n\n"
Memory = Literal["default", "low"]


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
    if check_memory and provider == "cpu":
        require_memory(bundle, keep=keep)
    pool = GraphPool(bundle, settings, keep=keep, provider=provider)
    model = TinyGiant(bundle, pool, speculate=speculate)
    pool.load_all()
    pool.release()
    return model


class TinyGiant:
    """A loaded model. Questions may be asked one after another; see :func:`load`."""

    def __init__(self, bundle: Bundle, pool: GraphPool, *, speculate: bool = True) -> None:
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
        self._speculation = Speculation() if speculate else None
        # What every prompt begins with, and its keys and values once they are known.
        self._prefix: tuple[tuple[int, ...], KvSnapshot] | None = None
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
        audio: AudioSource | Audio,
        question: str,
        choices: Sequence[str] | None = None,
        *,
        think: bool = True,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_audio_s: float = MAX_AUDIO_S,
    ) -> Answer:
        """Ask a question about a clip; see :meth:`stream`, whose last event holds the answer."""
        events = self.stream(
            audio,
            question,
            choices,
            think=think,
            max_new_tokens=max_new_tokens,
            max_audio_s=max_audio_s,
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
        think: bool = True,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_audio_s: float = MAX_AUDIO_S,
    ) -> Iterator[Event]:
        """Ask a question about a clip and get the answer as it is made.

        Of a clip that is silent, or too short to hear anything, the model is not asked: the answer
        says so. With choices it is the one that says that nothing is heard (in English); without
        such a choice the model is asked all the same, and a note says that it guesses.

        Args:
            audio: a path, encoded bytes, a binary stream, ``(samples, sampling_rate_hz)``, or what
                :func:`~tinygiant.runtime.audio.read_audio` returned.
            question: what to ask, in plain text.
            choices: 2 to 26 possible answers; the answer is then exactly one of them.
            think: whether the model thinks first. If not, an empty thought ends the prompt, and
                either the answer is written at once or, with choices, each choice is scored and
                the likeliest taken, with their probabilities in the answer.
            max_new_tokens: how much the model may write. With choices this bounds the thought; the
                answer itself comes on top.
            max_audio_s: longest clip to read; an :class:`Audio` has been read already.

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
        if not think:
            prompt = self._without_thought(prompt, more_follows=trie is None)
        return self._stream(
            audio, _Request(prompt, choices, trie, think, max_new_tokens, max_audio_s)
        )

    def _stream(self, source: AudioSource | Audio, request: _Request) -> Iterator[Event]:
        clock = Clock()
        with clock.stage("audio"):
            audio = self._read(source, request.max_audio_s)
            unheard = why_unheard(audio.samples, audio.sampling_rate_hz)
        account = _account(audio, self.config.chunk_s)
        if unheard is not None:
            silent = silent_choice(request.choices or ())
            if request.choices is None or silent is not None:
                yield from self._nothing_heard(account, request, unheard, silent, clock)
                return
            guess = "one of the choices must be given: the model guesses"
            account = dataclasses.replace(account, notes=(*account.notes, guess))
        yield AudioRead(account)

        with clock.stage("encode"):
            outputs, cached = self._listen(audio)
        yield StreamsReady(cached, clock.seconds("encode"))

        with clock.stage("project"):
            projections, embeds = self._compose(request.prompt, outputs)

        transcript = _Transcript(
            self._tokenizer,
            thinking=request.think and request.trie is not None,
            after="" if request.think else EMPTY_THOUGHT,
        )
        first_token_s = 0.0
        with self._pool.use("decoder_model") as graph:
            with clock.stage("prefill"):
                capacity = embeds.shape[1] + request.max_written
                drafter = self._drafter(request)
                decoder = Decoder(
                    graph,
                    self._embeddings,
                    self.config.decoder,
                    capacity,
                    drafter,
                    kv_type=self.bundle.manifest.kv_cache,
                )
                logits = self._prefill(decoder, embeds, request.prompt.prefix_ids)
            yield _prompt_read(embeds, projections)

            tokens = Returning(self._write(decoder, logits, request))
            for token in clock.timed("decode", tokens):
                first_token_s = first_token_s or clock.total()
                yield from transcript.push(token)
            ending = tokens.value
            # What is bound to a graph keeps it in memory even after the pool has closed it.
            del decoder, logits, tokens
        if self._speculation is not None and request.think:
            self._speculation.remember(
                transcript.token_ids, clock.seconds("decode"), drafted=drafter is not None
            )
        self._pool.release()
        yield from transcript.finish()

        choice_index = ending.choice_index
        parsed = transcript.parsed()
        yield Finished(
            Answer(
                text=parsed.answer if choice_index is None else request.choice(choice_index),
                plan=parsed.plan,
                audio_analysis=parsed.audio_analysis,
                logic=parsed.logic,
                summary=parsed.summary,
                unparsed=parsed.unparsed,
                raw_text=transcript.text,
                choice_index=choice_index,
                finish_reason=ending.finish_reason,
                model=self.config.name,
                timings=_timings(clock, first_token_s, cached, transcript.n_tokens),
                audio=account,
                tokens=TokenCounts(
                    prompt=embeds.shape[1],
                    audio=sum(chunk.audio_embeds.shape[1] for chunk in projections),
                    generated=transcript.n_tokens,
                    drafted=0 if drafter is None else drafter.n_drafted,
                    accepted=0 if drafter is None else drafter.n_accepted,
                ),
                choice_probabilities=ending.probabilities,
                choice_scoring=None if ending.probabilities is None else "sum_of_log_probabilities",
                providers=self.providers,
            )
        )

    def _nothing_heard(
        self,
        account: AudioAccount,
        request: _Request,
        why: str,
        choice_index: int | None,
        clock: Clock,
    ) -> Iterator[Event]:
        """The events of a clip in which there is nothing to hear: the model is not asked."""
        if choice_index is None:
            text = f"Nothing is heard: the clip is {why}."
        else:
            text = request.choice(choice_index)
        yield AudioRead(account)
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
                model=self.config.name,
                timings=_timings(clock, clock.total(), cached=False, n_tokens=0),
                audio=account,
                tokens=TokenCounts(prompt=0, audio=0, generated=0),
                providers=self.providers,
            )
        )

    def _without_thought(self, prompt: Prompt, *, more_follows: bool) -> Prompt:
        """The prompt, ended by an empty thought."""
        empty = EMPTY_THOUGHT + (EMPTY_THOUGHT_END if more_follows else "")
        thought_ids = self._tokenizer.encode_markup(empty)
        return dataclasses.replace(prompt, suffix_ids=(*prompt.suffix_ids, *thought_ids))

    def _read(self, source: AudioSource | Audio, max_audio_s: float) -> Audio:
        """The audio in memory; what the caller has read already is taken as it is."""
        return source if isinstance(source, Audio) else read_audio(source, max_audio_s=max_audio_s)

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

    def _drafter(self, request: _Request) -> Drafter | None:
        """What guesses the next tokens of an answer; None if nothing is to be guessed."""
        if self._speculation is None or not request.think or not self._speculation.is_worth_it():
            return None
        return self._speculation.start(
            [request.prompt.instruction_ids], self._end_ids(request.trie is not None)
        )

    def _end_ids(self, with_choices: bool) -> set[int]:
        """The tokens that end what is written freely."""
        config = self.config.decoder
        return {*config.eos_token_ids} | ({config.think_end_token_id} if with_choices else set())

    def _prefill(
        self, decoder: Decoder, embeds: NDArray[np.float32], prefix_ids: tuple[int, ...]
    ) -> NDArray[np.float32]:
        """Read the prompt ``embeds (1, T, D)``; returns its last logits ``(V,)``.

        What every prompt begins with is read by itself, and kept: an answer is then the same to the
        bit whether it was known or not.
        """
        n_prefix = len(prefix_ids)
        if self._prefix is not None and self._prefix[0] == prefix_ids:
            decoder.cache.restore(self._prefix[1])
        else:
            decoder.feed(embeds[:, :n_prefix])
            # On a device of its own the cache does not come back.
            if self.providers["decoder_model"] == ("cpu",):
                self._prefix = prefix_ids, decoder.cache.snapshot()
        return decoder.prefill(embeds[:, n_prefix:])

    def _write(
        self, decoder: Decoder, logits: NDArray[np.float32], request: _Request
    ) -> Generator[int, None, _Ending]:
        """Yield the tokens of the text; returns how it ended.

        With choices the model thinks until it closes the thought, ends its text or has spent its
        tokens; the thought is then closed and one of the choices written. If it is not to think,
        the likeliest choice is written at once.
        """
        if request.trie is not None and not request.think:
            found = probabilities(request.trie.log_likelihoods(decoder, logits))
            best = int(found.argmax())
            yield from request.trie.sequences[best]
            return _Ending("stop", best, tuple(found.tolist()))
        end_ids = self._end_ids(request.trie is not None)
        n_prompt = decoder.cache.length
        written: list[int] = []
        free = Returning(
            decoder.generate(logits, max_new_tokens=request.max_new_tokens, stop_ids=end_ids)
        )
        for token in free:
            written.append(token)
            yield token
        finish_reason: FinishReason = "length" if free.value is None else "stop"
        if request.trie is None:
            return _Ending(finish_reason)
        think_end_id = self.config.decoder.think_end_token_id
        yield think_end_id
        unread = [*written[decoder.cache.length - n_prompt :], think_end_id]
        choice = yield from request.trie.decode(decoder.read, unread, decoder.best)
        return _Ending(finish_reason, choice)


@dataclass(frozen=True)
class _Request:
    """One question after checking; ``trie`` holds the answers that ``choices`` allow."""

    prompt: Prompt
    choices: Sequence[str] | None
    trie: ChoiceTrie | None
    think: bool
    max_new_tokens: int
    max_audio_s: float

    @property
    def max_written(self) -> int:
        """Tokens that may follow the prompt: the free ones, ``</think>`` and the choice."""
        if self.trie is None:
            return self.max_new_tokens
        return self.trie.max_tokens + (1 + self.max_new_tokens if self.think else 0)

    def choice(self, index: int) -> str:
        """One of the choices as it was given."""
        return (self.choices or ())[index]


@dataclass(frozen=True)
class _Ending:
    """How a text ended, and which choice it is, if there were any."""

    finish_reason: FinishReason
    choice_index: int | None = None
    probabilities: tuple[float, ...] | None = None


class _Transcript:
    """The model's text as it grows: tokens in, pieces out, the whole at the end.

    With ``after``, the prompt ended in that beginning of the text, which is not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, *, thinking: bool, after: str) -> None:
        self._detokenizer = StreamingDetokenizer(tokenizer)
        self._parser = AnswerParser(thinking=thinking)
        self._parser.feed(after)
        self._texts: list[str] = []
        self.token_ids: list[int] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)

    def push(self, token: int) -> list[TextPiece]:
        self.token_ids.append(token)
        self._texts.append(self._detokenizer.push(token))
        return self._parser.feed(self._texts[-1])

    def finish(self) -> list[TextPiece]:
        self._texts.append(self._detokenizer.finish())
        return self._parser.feed(self._texts[-1]) + self._parser.finish()

    def parsed(self) -> ParsedAnswer:
        return self._parser.result()


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


def _timings(clock: Clock, first_token_s: float, cached: bool, n_tokens: int) -> Timings:
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


def _prompt_read(embeds: NDArray[np.float32], projections: Sequence[Projection]) -> PromptRead:
    attention = [
        chunk.intent_attention[0] for chunk in projections if chunk.intent_attention is not None
    ]
    gates = [chunk.gate for chunk in projections if chunk.gate is not None]
    return PromptRead(
        n_tokens=embeds.shape[1],
        intent_attention=np.concatenate(attention) if attention else None,
        gate=np.concatenate(gates) if gates else None,
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
