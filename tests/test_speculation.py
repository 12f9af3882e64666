"""Drafts change how long an answer takes, never what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinygiant.export.decoder import DecoderSpec, build_decoder
from tinygiant.quantize import RECIPES, KvPeaks, kv_peaks, quantize_graph
from tinygiant.quantize.kv_cache import LONGEST_STEP
from tinygiant.runtime import TinyGiant, load
from tinygiant.runtime.config import KvType
from tinygiant.runtime.decoder import Decoder
from tinygiant.runtime.drafting import make_decoder
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.masks import Mask
from tinygiant.runtime.ort.sessions import Graph, SessionSettings
from tinygiant.runtime.speculation import (
    MAX_DRAFT_TOKENS,
    Drafter,
    NgramIndex,
    Speculation,
    logit_margin,
)

CONFIG = DecoderSpec(
    vocab_size=24,
    hidden_size=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=32,
    ffn_size=64,
    max_positions=128,
    stop_token_ids=(1,),
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
)
CAPACITY = 120


# --- what is guessed


def test_the_longest_ending_that_was_seen_goes_on_where_it_was_last() -> None:
    index = NgramIndex()
    index.extend([1, 2, 3, 9, 2, 3, 4])
    assert index.match([7, 2, 3]) == (2, 6)  # after the later "2 3"
    assert index.match([1, 2, 3]) == (3, 3)
    assert index.match([8]) == (0, 0)
    assert index.copy(3, 3) == [9, 2, 3]


def test_texts_do_not_run_into_one_another() -> None:
    index = NgramIndex()
    index.extend([1, 2])
    index.close()
    index.extend([3, 4])
    assert index.match([1, 2]) == (0, 0)  # nothing followed
    assert index.match([2, 3])[0] == 1
    assert index.copy(index.match([1])[1], 5) == [2]


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), min_size=1))
def test_a_match_is_what_a_search_finds(text: list[int], context: list[int]) -> None:
    index = NgramIndex()
    index.extend(text)
    n, position = index.match(context)
    found = [
        (k, end)
        for k in range(min(4, len(context)), 0, -1)
        for end in range(len(text) - 1, k - 1, -1)
        if text[end - k : end] == context[-k:]
    ]
    assert (n, position) == (found[0] if found else (0, 0))


# --- how much is guessed


def test_drafts_end_where_they_do_not_pay_and_begin_again_where_they_do() -> None:
    speculation = Speculation()
    speculation.learn_cost(1, 1.0)
    for _ in range(200):
        speculation.learn_cost(5, 1.0 + 4 * 0.5)  # each further token costs half a step
    for _ in range(100):
        speculation.learn_acceptance(2, 0, missed=True)
    assert speculation.length(2, MAX_DRAFT_TOKENS) == 0
    drafter = speculation.start([[5, 6, 7, 8, 5, 6]], stop_ids=())
    for _ in range(60):  # nothing is checked, but the guesses turn out right
        for token in (5, 6, 7, 8):
            drafter.draft(8)
            drafter.take([token])
    assert speculation.length(4, MAX_DRAFT_TOKENS) > 4


def test_drafts_that_are_read_again_do_not_pay() -> None:
    speculation = Speculation()
    speculation.learn_cost(1, 1.0)
    assert speculation.length(4, MAX_DRAFT_TOKENS) > 0
    for _ in range(100):
        speculation.learn_reread(20.0)
    assert speculation.length(4, MAX_DRAFT_TOKENS) == 0
    for _ in range(2_000):  # single steps
        speculation.learn_cost(1, 1.0)
    assert speculation.length(4, MAX_DRAFT_TOKENS) > 0


def test_answers_are_drafted_where_that_was_faster() -> None:
    def share(drafted_s: float, plain_s: float) -> float:
        speculation = Speculation()
        decisions = []
        for _ in range(160):
            decisions.append(speculation.is_worth_it())
            seconds = drafted_s if decisions[-1] else plain_s
            speculation.remember([5] * 10, seconds, drafted=decisions[-1])
        return sum(decisions) / len(decisions)

    assert share(1.0, 2.0) > 0.9
    assert 0 < share(2.0, 1.0) < 0.1


def test_the_least_margin_follows_what_is_seen_once_enough_was_seen() -> None:
    speculation = Speculation()
    start = speculation.min_margin
    for _ in range(15):
        speculation.learn_difference(0.5, 0.501)
    assert speculation.min_margin == start
    speculation.learn_difference(0.5, 0.502)
    assert 0.015 < speculation.min_margin < start
    speculation.learn_difference(0.1, 0.4)
    assert speculation.min_margin > 2
    fresh = Speculation()
    fresh.learn_difference(0.1, 0.4)
    assert fresh.min_margin > 2
    exact = Speculation()
    for _ in range(30):
        exact.learn_difference(0.1, 0.1)
    assert 0 < exact.min_margin < start


@pytest.mark.parametrize(
    ("acceptance", "cost", "expected"),
    [(1.0, 0.5, MAX_DRAFT_TOKENS), (0.5, 0.5, 0), (0.9, 0.2, 6)],
)
def test_the_length_is_the_one_with_the_most_tokens_for_the_time(
    acceptance: float, cost: float, expected: int
) -> None:
    speculation = Speculation()
    speculation.learn_cost(1, 1.0)
    for _ in range(400):
        speculation.learn_cost(2, 1.0 + cost)
        n_right = round(10 * acceptance)
        for right in [1] * n_right + [0] * (10 - n_right):
            speculation.learn_acceptance(3, right, missed=not right)
    rates = {
        d: sum(acceptance**i for i in range(d + 1)) / (1 + cost * d)
        for d in range(MAX_DRAFT_TOKENS + 1)
    }
    assert max(rates, key=rates.__getitem__) == pytest.approx(expected, abs=1)
    assert speculation.length(3, MAX_DRAFT_TOKENS) == pytest.approx(expected, abs=3)


def test_a_draft_holds_no_token_that_ends_the_text_and_keeps_the_limit() -> None:
    drafter = Speculation().start([[3, 4, 1, 5, 3, 4, 9, 9, 9, 9, 9, 9, 3, 4]], stop_ids=(1, 9))
    drafter.take([3, 4])
    assert drafter.draft(10) == []
    drafter = Speculation().start([[3, 4, 5, 6, 7, 8]], stop_ids=())
    drafter.take([3, 4])
    assert drafter.draft(2) == [5, 6]
    assert drafter.draft(0) == []


def test_the_logit_margin_is_in_standard_deviations() -> None:
    logits = np.array([0.0, 4.0, 1.0, 3.0], np.float32)
    assert logit_margin(logits, 1) == pytest.approx(1.0 / logits.std())
    assert logit_margin(logits, 1, among=[1, 2]) == pytest.approx(3.0 / logits.std())
    assert logit_margin(logits, 1, among=[1]) == np.inf


# --- what comes out


Weights = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def weights() -> Weights:
    from tinygiant.export.decoder import _layer_shapes

    rng = np.random.default_rng(5)

    def matrix(shape: tuple[int, ...]) -> NDArray[np.float32]:
        scale = 0.5 if len(shape) == 2 else 0.0
        return np.asarray(scale * rng.standard_normal(shape) + (len(shape) == 1), np.float32)

    tensors = {
        f"model.layers.{layer}.{name}": matrix(shape)
        for layer in range(CONFIG.n_layers)
        for name, shape in _layer_shapes(CONFIG).items()
    }
    tensors["model.norm.weight"] = np.ones(CONFIG.hidden_size, np.float32)
    tensors["model.embed_tokens.weight"] = matrix((CONFIG.vocab_size, CONFIG.hidden_size))
    return tensors


@pytest.fixture(scope="module", params=["fp32", "int4", "fp32-kv8", "int4-kv8"])
def graph(
    request: pytest.FixtureRequest, weights: Weights, tmp_path_factory: pytest.TempPathFactory
) -> Graph:
    folder = tmp_path_factory.mktemp("decoder")
    source, target = (folder / kind / "decoder_model.onnx" for kind in ("float", "quantized"))
    source.parent.mkdir()
    target.parent.mkdir()
    build_decoder(CONFIG, weights, source)
    weights_as, kv8, _ = request.param.partition("-kv8")
    peaks = seen_peaks(source, weights) if kv8 else None
    quantize_graph(source, target, RECIPES[weights_as].graphs["decoder"], peaks)
    return Graph(target, SessionSettings(threads=1, spin=False))


def seen_peaks(source: Path, weights: Weights) -> list[KvPeaks]:
    """Keys and values of some text, read by the float32 graph."""
    embeddings = TokenEmbeddings(weights["model.embed_tokens.weight"])
    reader = Decoder(Graph(source, SessionSettings(threads=1)), embeddings, CONFIG, CAPACITY)
    reader.read(np.random.default_rng(6).integers(3, CONFIG.vocab_size, CAPACITY).tolist())
    return [kv_peaks(key[0], value[0]) for _, key, value in reader.cache.buffers()]


def sequence(
    graph: Graph | Noisy, embeddings: TokenEmbeddings, drafter: Drafter | None = None
) -> Decoder:
    """A decoder whose cache is of the type that the graph takes."""
    loaded = graph.graph if isinstance(graph, Noisy) else graph
    int8 = loaded.input_types["past_key_values.0.key"] == "tensor(int8)"
    kv_type: KvType = "int8" if int8 else "fp32"
    return make_decoder(graph, embeddings, CONFIG, CAPACITY, drafter, kv_type=kv_type)


def eager() -> Speculation:
    """One that always drafts: what is drafted must not matter, however wrong it is."""
    speculation = Speculation()
    speculation.length = lambda match, limit: min(limit, 6)  # type: ignore[method-assign]
    speculation.is_worth_it = lambda: True  # type: ignore[method-assign]
    return speculation


PROMPT_TOKENS = st.integers(3, CONFIG.vocab_size - 1)


@settings(max_examples=40)
@given(
    # Of an int8 cache also prompts that are read in float32.
    prompt=st.lists(PROMPT_TOKENS, min_size=1, max_size=12)
    | st.lists(PROMPT_TOKENS, min_size=LONGEST_STEP + 1, max_size=LONGEST_STEP + 8),
    texts=st.lists(st.lists(PROMPT_TOKENS, max_size=30), max_size=3),
    n_new=st.integers(1, 60),
    right=st.booleans(),
)
def test_tokens_are_those_of_single_steps(
    prompt: list[int],
    texts: list[list[int]],
    n_new: int,
    right: bool,
    graph: Graph,
    weights: Weights,
) -> None:
    """Random drafts, and drafts that are mostly right because the answer was seen before."""
    embeddings = TokenEmbeddings(weights["model.embed_tokens.weight"])
    stop_ids = CONFIG.stop_token_ids
    plain = sequence(graph, embeddings)
    expected = list(plain.generate(plain.read(prompt), max_new_tokens=n_new, stop_ids=stop_ids))
    speculation = eager()
    drafter = speculation.start([*texts, *([expected] if right else [])], stop_ids)
    decoder = sequence(graph, embeddings, drafter)
    found = list(decoder.generate(decoder.read(prompt), max_new_tokens=n_new, stop_ids=stop_ids))
    assert found == expected
    assert decoder.cache.length == plain.cache.length
    # What follows is decided as if nothing had been drafted.
    choices = Mask(np.array([3, 7, 11, 20]), only=True)
    assert decoder.best(decoder.read([4]), choices) == plain.best(plain.read([4]), choices)


class Rules:
    """A guide that allows two thirds of the tokens, has some of its own, and drops every fifth."""

    def __init__(self, n_tokens: int) -> None:
        self.n_left = n_tokens
        self.queue: list[int] = [9, 4]

    @property
    def done(self) -> bool:
        return self.n_left <= 0

    def forced(self) -> list[int]:
        ids, self.queue = self.queue, []
        return ids

    def mask(self) -> Mask:
        if self.queue:
            return Mask(np.array(self.queue[:1]), only=True)
        if self.n_left % 7 == 0:
            return Mask(np.array([3, 7, 11, 20]), only=True)
        return Mask(np.arange(self.n_left % 3, CONFIG.vocab_size, 3), only=False)

    def take(self, token: int) -> bool:
        if self.queue:
            assert self.queue.pop(0) == token
            return True
        self.n_left -= 1
        if token % 4 == 0:
            self.queue = [5, 6, 7][: 1 + token % 3]
        return token % 5 != 0 or bool(self.queue)


@settings(max_examples=40)
@given(
    prompt=st.lists(PROMPT_TOKENS, min_size=1, max_size=12),
    texts=st.lists(st.lists(PROMPT_TOKENS, max_size=30), max_size=3),
    n_new=st.integers(1, 40),
    right=st.booleans(),
)
def test_guided_tokens_are_those_of_single_steps(
    prompt: list[int],
    texts: list[list[int]],
    n_new: int,
    right: bool,
    graph: Graph,
    weights: Weights,
) -> None:
    """What a guide knows is read at once, drafts are checked under its masks: nothing changes."""
    embeddings = TokenEmbeddings(weights["model.embed_tokens.weight"])
    plain, tokens, rules = sequence(graph, embeddings), [], Rules(n_new)
    logits = plain.read(prompt)
    while True:  # one token at a time, by hand
        for token in rules.forced():
            tokens.append(token)
            logits = plain.step([token])[-1]
        if rules.done:
            break
        token = plain.best(logits, rules.mask())
        if rules.take(token):
            tokens.append(token)
            logits = plain.step([token])[-1]
    single = sequence(graph, embeddings)
    assert list(single.write(single.read(prompt), Rules(n_new))) == tokens
    stop_ids = {token for token in range(CONFIG.vocab_size) if token % 5 == 0}
    drafter = eager().start([*texts, *([tokens] if right else [])], stop_ids)
    drafted = sequence(graph, embeddings, drafter)
    assert list(drafted.write(drafted.read(prompt), Rules(n_new))) == tokens
    assert not right or n_new < 20 or drafter.n_accepted


class Noisy:
    """A decoder graph whose steps of many tokens are off, logits by up to ``size``, cache by steps.

    Of an int8 cache, every tenth key and value is a whole step higher or lower.
    """

    def __init__(self, graph: Graph, size: float) -> None:
        self.graph, self.size, self.n_many = graph, size, 0

    def bind(self) -> Any:
        outer, inner = self, self.graph.bind()

        class Binding:
            logits: NDArray[np.float32]
            n_tokens, n_held = 0, 0

            def __init__(self) -> None:
                self.caches: list[NDArray[Any]] = []

            def input(self, name: str, array: NDArray[Any]) -> None:
                if name == "inputs_embeds":
                    self.n_tokens = array.shape[1]
                if name == "total_sequence_length":
                    self.n_held = int(array)
                inner.input(name, array)

            def output(self, name: str, array: NDArray[Any]) -> None:
                self.logits = array
                inner.output(name, array)

            def shared(self, input_name: str, output_name: str, array: NDArray[Any]) -> None:
                self.caches.append(array)
                inner.shared(input_name, output_name, array)

            def run(self) -> None:
                inner.run()
                if self.n_tokens > 1 and self.logits.shape[1] > 1:
                    outer.n_many += 1
                    rng = np.random.default_rng(outer.n_many)
                    noise = rng.uniform(-outer.size, outer.size, self.logits.shape)
                    self.logits += noise.astype(np.float32)
                    for cache in self.caches:
                        if cache.dtype == np.int8:
                            new = cache[:, :, self.n_held - self.n_tokens : self.n_held]
                            steps = rng.choice((-1, 0, 1), new.shape, p=(0.05, 0.9, 0.05))
                            new[...] = np.clip(new + steps, -128, 127)

        return Binding()


def test_steps_that_round_otherwise_are_not_believed_at_near_ties(
    graph: Graph, weights: Weights
) -> None:
    """Within half of the margin any error is harmless; far beyond it, tokens do change.

    The second half shows that the first is not passed by a text without near ties.
    """
    embeddings = TokenEmbeddings(weights["model.embed_tokens.weight"])

    def texts(size: float, min_margin: float) -> tuple[list[list[int]], int]:
        answers, n_accepted = [], 0
        for start in range(3, 15):
            plain = sequence(graph, embeddings)
            known = list(plain.generate(plain.read([start]), max_new_tokens=60, stop_ids=()))
            speculation = eager()
            speculation.min_margin = min_margin
            drafter = speculation.start([known], ())
            decoder = sequence(Noisy(graph, size), embeddings, drafter)
            found = list(decoder.generate(decoder.read([start]), max_new_tokens=60, stop_ids=()))
            answers.append(known if size == 0 else found)
            n_accepted += drafter.n_accepted
        return answers, n_accepted

    expected, _ = texts(0.0, 0.0)
    deviation = float(np.std([_logits(graph, embeddings, [start]) for start in range(3, 15)]))
    noise = 0.1 * deviation
    guarded, n_accepted = texts(noise, 0.5)
    assert guarded == expected
    assert n_accepted > 100  # most drafts are still taken
    unguarded, _ = texts(8 * noise, 0.0)
    assert unguarded != expected


def _logits(graph: Graph, embeddings: TokenEmbeddings, ids: Sequence[int]) -> NDArray[np.float32]:
    return sequence(graph, embeddings).read(ids)


# --- a whole question


def test_answers_are_the_same_with_and_without(
    tiny_bundle: Path, tone: Callable[[float, int], NDArray[np.float32]]
) -> None:
    """Twice the same questions: the second time, drafts come from the first answers."""
    models = [load(tiny_bundle, threads=1, speculate=speculate) for speculate in (False, True)]
    # Whether drafts pay is a matter of time, and on a busy machine they were not made at all.
    models[1]._speculation = eager()
    n_accepted = 0
    for _ in range(2):
        for seconds in (0.5, 2.0):
            for choices in (None, ["a dog", "a siren"]):
                plain, drafted = (
                    model.ask((tone(seconds, 16_000), 16_000), "What?", choices, max_new_tokens=40)
                    for model in models
                )
                assert drafted.raw_text == plain.raw_text
                assert drafted.choice_index == plain.choice_index
                assert drafted.finish_reason == plain.finish_reason
                assert (plain.tokens.drafted, plain.tokens.accepted) == (0, 0)
                assert drafted.tokens.accepted <= drafted.tokens.drafted
                n_accepted += drafted.tokens.accepted
    assert n_accepted > 0


def test_what_all_prompts_begin_with_is_read_once(
    tiny: TinyGiant,
    tiny_bundle: Path,
    tone: Callable[[float, int], NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    run = Decoder._run

    def counted(self: Decoder, embeds: Any, positions: Any) -> Any:
        read.append(embeds.shape[1])
        return run(self, embeds, positions)

    monkeypatch.setattr(Decoder, "_run", counted)
    model = load(tiny_bundle, threads=1)
    sound = (tone(1.0, 16_000), 16_000)
    first = model.ask(sound, "What?", max_new_tokens=1, raw=True)
    n_first, read[:] = sum(read), []
    second = model.ask(sound, "What?", max_new_tokens=1, raw=True)
    assert n_first == first.tokens.prompt == second.tokens.prompt
    assert model._prefix.kept is not None
    [fixed, _], _ = model._prefix.kept  # type: ignore[misc]
    assert sum(read) == first.tokens.prompt - sum(map(len, fixed))
    assert (
        second.raw_text
        == first.raw_text
        == tiny.ask(sound, "What?", max_new_tokens=1, raw=True).raw_text
    )
