"""Several sequences in one step: the tokens of each by itself, whoever comes and goes meanwhile."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.model_stub import small_qwen3
from tinygiant.export.decoder import DecoderSpec, build_decoder
from tinygiant.quantize.kv_cache import KvPeaks
from tinygiant.quantize.quantizer import quantize_graph
from tinygiant.quantize.recipes import RECIPES
from tinygiant.runtime import (
    Answer,
    AskOptions,
    AudioError,
    BundleError,
    Query,
    QuestionError,
    TinyGiant,
    UsageError,
    load,
    pipeline,
)
from tinygiant.runtime.batch import Batch, BatchedDecoder, Trials
from tinygiant.runtime.decoder import BindableGraph, Decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.many import PARALLEL
from tinygiant.runtime.masks import Mask
from tinygiant.runtime.ort import pool
from tinygiant.runtime.ort.machine import Machine
from tinygiant.runtime.ort.memory import how_many
from tinygiant.runtime.ort.sessions import Graph, SessionSettings
from tinygiant.runtime.speculation import Speculation
from tinygiant.runtime.together import Together

CONFIG = DecoderSpec(
    vocab_size=131,
    hidden_size=256,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    ffn_size=384,
    max_positions=512,
    stop_token_ids=(1,),
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
)
SETTINGS = SessionSettings(threads=1, spin=False)
Tone = Callable[[float, int], NDArray[np.float32]]


@dataclasses.dataclass
class Model:
    """A decoder of random weights, and what it writes by itself."""

    graph: Graph
    embeddings: TokenEmbeddings
    kv_type: Any

    def alone(self, prompt: list[int], n_new: int) -> list[int]:
        decoder = Decoder(
            self.graph, self.embeddings, CONFIG, len(prompt) + n_new, kv_type=self.kv_type
        )
        return list(decoder.generate(decoder.read(prompt), max_new_tokens=n_new, stop_ids=(1,)))

    def form_alone(self, prompt: list[int], form: Form) -> list[int]:
        capacity = len(prompt) + 2 * form.n_tokens
        decoder = Decoder(self.graph, self.embeddings, CONFIG, capacity, kv_type=self.kv_type)
        return [token for token in decoder.write(decoder.read(prompt), form) if token is not None]

    def batch(
        self,
        size: int,
        trials: Trials | None = None,
        graph: Any = None,
        speculation: Speculation | None = None,
    ) -> Batch:
        return Batch(
            graph or self.graph,
            self.embeddings,
            CONFIG,
            size,
            kv_type=self.kv_type,
            trials=trials,
            speculation=speculation,
        )


class Form:
    """A guide: some free tokens, then some of its own, and so on."""

    def __init__(self, parts: list[tuple[int, int]]) -> None:
        """Parts are how many of each."""
        self.n_tokens = sum(map(sum, parts)) + 1
        self._parts = list(parts)
        self._n_free = 0
        self._queue: list[int] = []
        self._begin()

    def _begin(self) -> None:
        while self._n_free == 0 and self._parts:
            self._n_free, n_own = self._parts.pop(0)
            self._queue += [7 + 3 * i for i in range(n_own)]

    @property
    def done(self) -> bool:
        return self._n_free == 0

    def forced(self) -> list[int]:
        tokens, self._queue = self._queue, []
        return tokens

    def mask(self) -> Mask:
        return Mask(np.arange(2, CONFIG.vocab_size, 3), only=True)

    def take(self, token: int) -> bool:
        assert token % 3 == 2
        self._n_free -= 1
        self._begin()
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoders")


@pytest.fixture(scope="module", params=["fp32", "int8", "int4-b32", "int4"])
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        qwen = small_qwen3(CONFIG)
        with torch.no_grad():
            for parameter in qwen.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    source = folder / "fp32.onnx"
    if not source.exists():
        build_decoder(CONFIG, {k: v.numpy() for k, v in qwen.state_dict().items()}, source)
    recipe = RECIPES[request.param]
    path = folder / f"{recipe.name}-q.onnx"
    peaks = KvPeaks(*np.full((2, CONFIG.n_kv_heads, CONFIG.head_dim), 6, np.float32))
    is_int8 = recipe.kv_cache == "int8"
    quantize_graph(source, path, recipe.graphs["decoder"], [peaks] * 2 if is_int8 else None)
    table = qwen.get_input_embeddings().weight.detach().numpy()
    return Model(Graph(path, SETTINGS), TokenEmbeddings(table), recipe.kv_cache)


class Sequence:
    """One that is written in a batch."""

    def __init__(self, batch: Batch, prompt: list[int], n_new: int | Form) -> None:
        self.tokens: list[int] = []
        self.batch = batch
        n_tokens = 2 * n_new.n_tokens if isinstance(n_new, Form) else n_new
        self.decoder = batch.join(len(prompt) + n_tokens)
        logits = self.decoder.read(prompt)
        self.written: Generator[int | None, None, int | None]
        if isinstance(n_new, Form):
            self.written = self.decoder.write(logits, n_new)
        else:
            self.written = self.decoder.generate(logits, max_new_tokens=n_new, stop_ids=(1,))

    def advance(self) -> bool:
        """Up to the next step; whether one is needed."""
        for token in self.written:
            if token is None:
                return True
            self.tokens.append(token)
        self.batch.leave(self.decoder)
        return False


def together(
    batch: Batch, questions: Iterable[tuple[list[int], int | Form, int]]
) -> list[list[int]]:
    """Tokens of each: (prompt, n_new, steps before it may join)."""
    waiting, live, found = list(enumerate(questions)), [], {}
    n_steps = 0
    while waiting or live:
        while waiting and len(live) < batch.size and (not live or n_steps >= waiting[0][1][2]):
            index, (prompt, n_new, _) = waiting.pop(0)
            live.append((index, Sequence(batch, prompt, n_new)))
        still = []
        for index, sequence in live:
            if sequence.advance():
                still.append((index, sequence))
            else:
                found[index] = sequence.tokens
        live = still
        batch.step()
        n_steps += 1
    return [found[index] for index in sorted(found)]


PROMPT = st.lists(st.integers(2, CONFIG.vocab_size - 1), min_size=1, max_size=40)
QUESTION = st.tuples(PROMPT, st.integers(1, 24), st.integers(0, 60))


@settings(max_examples=25, deadline=None)
@given(questions=st.lists(QUESTION, min_size=1, max_size=7), size=st.integers(2, 5))
def test_the_tokens_of_each_by_itself(
    model: Model, questions: list[tuple[list[int], int, int]], size: int
) -> None:
    wanted = [model.alone(prompt, n_new) for prompt, n_new, _ in questions]
    assert together(model.batch(size), questions) == wanted


@settings(max_examples=25, deadline=None)
@given(
    questions=st.lists(
        st.tuples(
            PROMPT,
            st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=4),
            st.integers(0, 60),
        ),
        min_size=1,
        max_size=6,
    ),
    size=st.integers(2, 5),
)
def test_tokens_that_a_form_knows_are_read_at_once_and_change_nothing(
    model: Model, questions: list[tuple[list[int], list[tuple[int, int]], int]], size: int
) -> None:
    wanted = [model.form_alone(prompt, Form(parts)) for prompt, parts, _ in questions]
    asked = [(prompt, Form(parts), steps) for prompt, parts, steps in questions]
    assert together(model.batch(size, speculation=Speculation()), asked) == wanted


@pytest.mark.parametrize("model", ["int4-b32"], indirect=True)
def test_a_form_takes_a_batch_less_steps(model: Model) -> None:
    """Nine tokens of a form in a row took nine steps of all: as long as an answer's own."""
    questions = [([5, 9, 17], [(2, 9), (3, 9), (2, 9)], 0), ([40, 3], [(2, 9), (3, 9), (2, 9)], 0)]
    n_runs = {}
    for name, speculation in (("one by one", None), ("at once", Speculation())):
        counting = Counting(model.graph)
        asked = [(prompt, Form(parts), steps) for prompt, parts, steps in questions]
        batch = model.batch(2, graph=counting, speculation=speculation)
        found = together(batch, asked)
        assert found == [model.form_alone(prompt, Form(parts)) for prompt, parts, _ in questions]
        n_runs[name] = (counting.runs.get(2, 0), counting.n_long)
    steps, _ = n_runs["one by one"]
    assert n_runs["at once"][0] <= steps - 27  # of 34, those of the form
    assert n_runs["at once"][1] == n_runs["one by one"][1] + 6


class Counting:
    """A graph that counts its runs by how many sequences they have."""

    def __init__(self, graph: BindableGraph, wrong_at: int = 0, what: str = "logits") -> None:
        self.graph = graph
        self.runs: dict[int, int] = {}
        self.n_long = 0  # runs of several tokens
        self.wrong_at = wrong_at
        self.what = what

    def bind(self) -> Any:
        binding, counting = self.graph.bind(), self
        inputs: dict[str, NDArray[Any]] = {}

        class Watched:
            def input(self, name: str, array: NDArray[Any]) -> None:
                inputs[name] = array
                binding.input(name, array)

            def output(self, name: str, array: NDArray[Any]) -> None:
                inputs[name] = array
                binding.output(name, array)

            def shared(self, past: str, present: str, array: NDArray[Any]) -> None:
                inputs[present] = array
                binding.shared(past, present, array)

            def run(self) -> None:
                binding.run()
                n, n_new, _ = inputs["inputs_embeds"].shape
                if n_new == 1:
                    counting.runs[n] = counting.runs.get(n, 0) + 1
                else:
                    counting.n_long += 1
                if n == counting.wrong_at:
                    # The smallest difference there is, in what the last sequence got.
                    wrong = inputs[counting.what][-1, -1]
                    if counting.what != "logits":
                        wrong = wrong[inputs["seqlens_k"][-1]]
                    wrong[0] = np.nextafter(wrong[0], np.inf)

        return Watched()


QUESTIONS = [([5, 9, 17], 12, 0), ([40, 3, 8, 90, 77, 6], 12, 0), ([101], 12, 0)]


@pytest.mark.parametrize("model", ["fp32"], indirect=True)
def test_a_step_reads_the_weights_once_for_all(model: Model) -> None:
    counting = Counting(model.graph)
    batch = model.batch(3, graph=counting)
    n_tokens = [len(model.alone(prompt, n)) for prompt, n, _ in QUESTIONS]
    assert n_tokens == [12] * 3  # none meets its stop token
    together(batch, QUESTIONS)
    assert batch.width == 3
    # One prompt is a single token. Of the eleven steps two are computed one by one as well.
    assert counting.runs == {1: 1 + 2 * 3, 3: 11}


@pytest.mark.parametrize("what", ["logits", "present.1.value"])
@pytest.mark.parametrize("model", ["fp32"], indirect=True)
def test_steps_that_differ_are_taken_one_by_one(model: Model, what: str) -> None:
    """onnxruntime's 4-bit product in blocks of 128 sums a single row in another order: one bit of
    a logit, or of a value that is kept, is enough for sequences to be stepped by themselves."""
    counting, trials = Counting(model.graph, wrong_at=3, what=what), Trials()
    batch = model.batch(3, trials, counting)
    wanted = [model.alone(prompt, n) for prompt, n, _ in QUESTIONS]
    assert together(batch, QUESTIONS) == wanted
    assert counting.runs == {1: 1 + 11 * 3, 3: 1}
    assert batch.width == 1
    assert model.batch(3, trials).width == 1  # it is remembered with the model


@pytest.mark.parametrize("model", ["fp32"], indirect=True)
def test_a_longer_sequence_moves_the_others_to_more_room(model: Model) -> None:
    """Slots have room for the longest sequence; what is in them is kept."""
    questions = [([5, 9, 17], 20, 0), ([8] * 300, 20, 5), ([70, 71], 20, 8)]
    wanted = [model.alone(prompt, n_new) for prompt, n_new, _ in questions]
    batch = model.batch(3)
    assert together(batch, questions) == wanted
    assert batch.width == 3  # a slot that was lost would be noticed, and hidden, by the trials
    assert batch._slots is None  # nothing is held for nobody


def test_members_are_decoders(model: Model) -> None:
    """Scoring choices reads several tokens and forgets them again, while others wait."""
    batch = model.batch(2)
    first, second = batch.join(30), batch.join(30)
    plain = Decoder(model.graph, model.embeddings, CONFIG, 30, kv_type=model.kv_type)
    assert isinstance(first, BatchedDecoder)
    for decoder in (first, second, plain):
        decoder.read([4, 5, 6, 7])
    batch.leave(first)  # the second gets its slot
    for decoder in (second, plain):
        decoder.step([9, 8, 3])
        decoder.truncate(5)
    np.testing.assert_array_equal(second.step([12, 60]), plain.step([12, 60]))


def facts(answer: Answer | Exception) -> Any:
    """What an answer says, times apart: how fast it came, and what was drafted."""
    if isinstance(answer, Exception):
        return type(answer), str(answer)
    tokens = dataclasses.replace(answer.tokens, drafted=0, accepted=0)
    return dataclasses.replace(answer, timings=None, tokens=tokens)  # type: ignore[arg-type]


def one_at_a_time(model: TinyGiant, query: Query) -> Any:
    try:
        return facts(model.ask(query.audio, query.question, query.choices, query.options))
    except Exception as error:
        return facts(error)


@pytest.fixture
def queries(tone: Tone, tmp_path: Path) -> list[Query]:
    """Open ones, choices with and without a thought, raw text, short and long ones, bad ones."""
    short, long = ((tone(seconds, 16_000), 16_000) for seconds in (0.6, 2.4))
    silence = (np.zeros(16_000, np.float32), 16_000)
    birds = ["a crow", "a crane", "a cat"]
    return [
        Query(short, "What is heard?", options=AskOptions(max_new_tokens=60)),
        Query(long, "Which one?", birds, AskOptions(max_new_tokens=9)),
        Query(tmp_path / "none.wav", "What is heard?"),
        Query(long, "Which one is it now?", birds, AskOptions(think=False)),
        Query(short, "What is heard?", options=AskOptions(max_new_tokens=1)),
        Query(silence, "What is heard?"),
        Query(short, " "),
        Query(long, "And now?", options=AskOptions(think=False, max_new_tokens=20)),
        Query(short, "What else?", birds, AskOptions(raw=True, max_new_tokens=14)),
        Query(long, "What?", options=AskOptions(raw=True, max_new_tokens=30)),
    ]


@pytest.mark.parametrize(("parallel", "workers"), [(1, 0), (2, 1), (3, 0), (4, 2), (16, 3)])
def test_answers_are_those_of_one_at_a_time(
    tiny: TinyGiant, queries: list[Query], parallel: int, workers: int
) -> None:
    wanted = [one_at_a_time(tiny, query) for query in queries]
    errors = [found[0] for found in wanted if isinstance(found, tuple)]
    assert errors == [AudioError, QuestionError]
    tiny.forget()
    answers = tiny.ask_many(queries, parallel=parallel, workers=workers)
    assert [*map(facts, answers)] == wanted
    assert parallel == 1 or tiny._trials.is_known(2)
    assert not tiny._trials.differs


def test_the_embedded_model_answers_together() -> None:
    model = load(threads=1)
    clips = sorted((Path(__file__).parents[1] / "examples").glob("*.flac"))
    asked = [("What is heard?", None, True), ("Which?", ["rain", "a dog", "a bell"], True),
             ("Which?", ["rain", "a bell"], False)]  # fmt: skip
    queries = [
        Query(clip, question, choices, AskOptions(think=think))
        for question, choices, think in asked
        for clip in clips
    ]
    wanted = [one_at_a_time(model, query) for query in queries]
    assert len({answer.text for answer in wanted}) > 4
    assert [*map(facts, model.ask_many(queries, parallel=4, workers=1))] == wanted


def test_small_products_get_one_thread_and_questions_the_others(
    tiny_bundle: Path, queries: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At nano's size a second thread of a product gains nothing, one for the next clip does."""
    heard_in: set[str] = set()
    encode = pipeline.encode

    def watched(*arguments: Any) -> Any:
        heard_in.add(threading.current_thread().name.partition("_")[0])
        return encode(*arguments)

    monkeypatch.setattr(pipeline, "encode", watched)
    for many, threads, n_each, where in (
        (False, 2, 2, "MainThread"), (True, 2, 1, "hear"), (True, 1, 1, "MainThread"),
    ):  # fmt: skip
        model = load(tiny_bundle, threads=threads, many=many)
        assert model._pool._settings.n_threads == n_each
        heard_in.clear()
        for _ in model.ask_many(queries[:2]):
            pass
        assert heard_in == {where}
    monkeypatch.setattr(pool, "_LARGE_BUNDLE_BYTES", 1)
    assert load(tiny_bundle, threads=2, many=True)._pool._settings.n_threads == 2


def test_a_clip_is_heard_once_whoever_hears_it(
    tiny: TinyGiant, queries: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers began with the same clip at the same time."""
    n_heard: list[str] = []
    encode = pipeline.encode

    def watched(*arguments: Any) -> Any:
        n_heard.append(threading.current_thread().name)
        time.sleep(0.1)
        return encode(*arguments)

    monkeypatch.setattr(pipeline, "encode", watched)
    tiny.forget()
    asked = [dataclasses.replace(queries[4], question=f"What is {n}?") for n in range(6)]
    answers = [*tiny.ask_many(asked, parallel=4, workers=3)]
    assert len(n_heard) == 1
    cached = [answer.timings.encode_cached for answer in answers if isinstance(answer, Answer)]
    assert sorted(cached) == [False] + 5 * [True]
    assert not tiny._cache._making


def test_queries_are_taken_when_there_is_room(tiny: TinyGiant, queries: list[Query]) -> None:
    """A list of a million clips is not heard before its first answer comes."""
    taken: list[int] = []

    def many() -> Iterator[Query]:
        for index in range(1_000_000):
            taken.append(index)
            yield dataclasses.replace(queries[0], options=AskOptions(max_new_tokens=3))

    answers = tiny.ask_many(many(), parallel=3, workers=1)
    for _ in range(4):
        assert isinstance(next(answers), Answer)
    answers.close()  # type: ignore[attr-defined]
    assert len(taken) < 4 + 3 + 1 + 3
    assert one_at_a_time(tiny, queries[0]) == facts(next(tiny.ask_many(queries, parallel=2)))


def test_where_there_are_no_batches(
    tiny: TinyGiant, tiny_bundle: Path, queries: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle of an earlier version, low memory, one at a time: answered all the same."""
    assert tiny.batch(2) is not None
    assert tiny.batch(1) is None
    default = tiny.batch()
    assert default is not None and default.size == PARALLEL
    wanted = [one_at_a_time(tiny, query) for query in queries[:4]]
    low = load(tiny_bundle, threads=1, memory="low")
    assert low.batch(4) is None
    assert [*map(facts, low.ask_many(queries[:4], parallel=4))] == wanted
    with tiny._pool.use(tiny.config.decoder.graph) as graph:
        monkeypatch.setattr(graph, "is_batched", False)
    assert tiny.batch(4) is None
    assert [*map(facts, tiny.ask_many(queries[:4], parallel=4))] == wanted


def test_as_many_as_an_eighth_of_the_memory_has_room_for() -> None:
    """Full size in int8 keeps 224 KiB a token, 224 MiB for the 1,024 tokens of a typical answer."""

    class Left(Machine):
        def __init__(self, mib: int | None) -> None:
            self.mib = mib

        def obtainable_bytes(self) -> int | None:
            return None if self.mib is None else self.mib << 20

    found = [how_many(4, 224 << 10, Left(mib)) for mib in (None, 7168, 7167, 3584, 1792, 1)]
    assert found == [4, 4, 3, 2, 1, 1]


def test_a_model_that_fails_ends_it(
    tiny: TinyGiant, queries: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> NDArray[np.float32]:
        raise BundleError("graph decoder_model failed: no such thing")

    answers = tiny.ask_many(queries[:2], parallel=2)
    monkeypatch.setattr(Batch, "_step", broken)
    with pytest.raises(BundleError, match="no such thing"):
        list(answers)
    with pytest.raises(UsageError, match="0 answers at a time"):
        tiny.ask_many(queries, parallel=0)


def test_time_in_a_batch_is_time_that_passed(tiny: TinyGiant, queries: list[Query]) -> None:
    """Decoding includes the wait for the others; nothing is counted twice."""
    start_s = time.perf_counter()
    answers = [*tiny.ask_many([queries[0]] * 3, parallel=3)]
    wall_s = time.perf_counter() - start_s
    for answer in answers:
        assert isinstance(answer, Answer)
        assert 0 < answer.timings.decode_s <= wall_s
        assert answer.timings.first_token_s <= answer.timings.total_s <= wall_s


@pytest.mark.parametrize("workers", [0, 1])
def test_an_answer_that_is_dropped_says_nothing_more(workers: int) -> None:
    """Also while its events are being taken; the others go on."""
    closed: list[str] = []

    def events(name: str) -> Iterator[Any]:
        try:
            yield f"{name} is heard"
            yield f"{name} is still heard"
            for n in range(3):
                yield None
                yield f"{name} {n}"
        finally:
            closed.append(name)

    for at in ("a is heard", "a 0", "a 1"):
        found: list[Any] = []
        closed.clear()
        with Together[str](None, workers) as several:
            for name in "ab":
                several.add(name, partial(events, name))
            while not several.is_idle:
                for key, event in several.turn():
                    found.append(event)
                    if event == at:
                        several.drop(key)
        assert [event for event in found if event and event[0] == "a"][-1] == at
        assert [event for event in found if not event or event[0] == "b"][-2:] == ["b 2", None]
        assert found.count(None) == 1
        assert closed == ["a", "b"]
