"""Choices: whatever the logits, the answer is one of them, and it is the likeliest path."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.shipped import FORM
from tinygiant.runtime.choices import ChoiceTrie, probabilities
from tinygiant.runtime.config import AnswerForm
from tinygiant.runtime.errors import BundleError, QuestionError
from tinygiant.runtime.prompt import check_choices
from tinygiant.runtime.tokenizer import Tokenizer

VOCAB = 512
STOP = 2
TRICKY = st.sampled_from(
    ["a dog", "a dog barks", "a dog.", "a", "ab", "1", "10", "1.5", " 2", "yes", "Yes", "YES!",
     "<RESPONSE>", "</think>", "<|im_end|>", "- a dog", "caf\u00e9", "\u97f3", "\u97f3\u58f0",
     "\U0001f3b5", "\U0001f3b6", "don't", "don", "'", '"quoted"', "...", "?!", "\\n", "a  b"]
)  # fmt: skip
CHOICES = st.lists(
    st.one_of(TRICKY, st.text(min_size=1, max_size=6)), min_size=2, max_size=26, unique=True
)


class Model:
    """A decoder of random but fixed opinions: logits depend on everything read so far."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.read_so_far: list[int] = []
        self.n_runs = 0

    def read(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        assert token_ids
        self.n_runs += 1
        self.read_so_far += token_ids
        return self.logits(self.read_so_far)

    def logits(self, context: Sequence[int]) -> NDArray[np.float32]:
        rng = np.random.default_rng([self.seed, *context])
        return rng.standard_normal(VOCAB).astype(np.float32)


def decode(trie: ChoiceTrie, model: Model, unread: list[int]) -> tuple[list[int], int]:
    steps, tokens = trie.decode(model.read, unread), []
    while True:
        try:
            tokens.append(next(steps))
        except StopIteration as end:
            return tokens, end.value


def trie_of(choices: Sequence[str], tokenizer: Tokenizer, form: AnswerForm = FORM) -> ChoiceTrie:
    return ChoiceTrie.of_choices(choices, tokenizer, form, STOP)


def asked(choices: list[str], tokenizer: Tokenizer) -> tuple[str, ...]:
    try:
        checked = check_choices(choices)
        trie_of(choices, tokenizer)
    except QuestionError:
        assume(False)
    return checked


@given(choices=CHOICES, seed=st.integers(0, 2**32))
def test_the_answer_is_exactly_one_choice(
    choices: list[str], seed: int, tokenizer: Tokenizer
) -> None:
    checked = asked(choices, tokenizer)
    tokens, index = decode(trie_of(choices, tokenizer), Model(seed), [4])
    assert tokenizer.decode(tokens) == f"\n<RESPONSE>\n{checked[index]}</RESPONSE>"


@given(choices=CHOICES, seed=st.integers(0, 2**32))
def test_it_is_the_greedy_path_among_the_choices(
    choices: list[str], seed: int, tokenizer: Tokenizer
) -> None:
    checked = asked(choices, tokenizer)
    model = Model(seed)
    tokens, index = decode(trie_of(choices, tokenizer), Model(seed), [4])
    # The same, without a trie: keep the sequences that agree, token by token.
    sequences = [tokenizer.encode(f"\n<RESPONSE>\n{choice}</RESPONSE>") for choice in checked]
    left = list(range(len(sequences)))
    for position in range(len(tokens)):
        logits = model.logits([4, *tokens[:position]])
        allowed = sorted({sequences[i][position] for i in left})
        best = max(allowed, key=lambda token: (logits[token], -token))
        left = [i for i in left if sequences[i][position] == best]
    assert left == [index]
    assert tokens == sequences[index]


@given(choices=CHOICES, seed=st.integers(0, 2**32))
def test_the_model_runs_at_forks_only(choices: list[str], seed: int, tokenizer: Tokenizer) -> None:
    checked = asked(choices, tokenizer)
    sequences = [tokenizer.encode(f"\n<RESPONSE>\n{choice}</RESPONSE>") for choice in checked]
    model = Model(seed)
    tokens, _ = decode(trie_of(choices, tokenizer), model, [4])
    forks = sum(
        len({s[i] for s in sequences if s[:i] == tokens[:i] and len(s) > i}) > 1
        for i in range(len(tokens))
    )
    assert model.n_runs == forks
    assert model.read_so_far == [4, *tokens][: len(model.read_so_far)]


class Scorer(Model):
    """The same opinions, read as a decoder is: step by step, and back again."""

    cache = property(lambda self: self)
    length = property(lambda self: len(self.read_so_far))

    def step(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        assert token_ids
        return np.stack([self.read([token]) for token in token_ids])

    def truncate(self, length: int) -> None:
        assert length <= len(self.read_so_far)
        del self.read_so_far[length:]


@given(choices=CHOICES, seed=st.integers(0, 2**32))
def test_scores_are_those_of_each_choice_by_itself(
    choices: list[str], seed: int, tokenizer: Tokenizer
) -> None:
    asked(choices, tokenizer)
    trie = trie_of(choices, tokenizer)
    model, prompt = Scorer(seed), [4, 7]
    logits = model.step(prompt)[-1]
    found = trie.log_likelihoods(model, logits)  # type: ignore[arg-type]
    assert model.read_so_far == prompt
    for score, sequence in zip(found, trie.sequences, strict=True):
        want = 0.0
        for position, token in enumerate(sequence):
            row = model.logits([*prompt, *sequence[:position]]).astype(np.float64)
            want += row[token] - np.log(np.exp(row).sum())
        assert score == pytest.approx(want, rel=1e-6)


def test_what_choices_share_is_read_once(tokenizer: Tokenizer) -> None:
    trie = trie_of(["a dog barks", "a dog growls", "a dog"], tokenizer)
    model = Scorer(1)
    trie.log_likelihoods(model, model.logits([]))  # type: ignore[arg-type]
    shared = 0
    while len({sequence[shared] for sequence in trie.sequences}) == 1:
        shared += 1
    assert shared > len(tokenizer.encode("\n<RESPONSE>\n"))
    assert model.n_runs == shared + sum(len(s) - 1 - shared for s in trie.sequences)


def test_likelihoods_become_probabilities() -> None:
    found = probabilities(np.log(np.array([0.02, 0.06, 0.0]) + 1e-300) - 5_000.0)
    np.testing.assert_allclose(found, [0.25, 0.75, 0.0], atol=1e-12)


def test_a_temperature_evens_probabilities_out_and_keeps_their_order() -> None:
    found = probabilities(np.log([0.01, 0.16, 0.09]) - 900.0, temperature=2.0)
    np.testing.assert_allclose(found, [1 / 8, 4 / 8, 3 / 8], atol=1e-12)  # of the roots


def test_every_choice_can_win(tokenizer: Tokenizer) -> None:
    choices = [f"{letter} sound" for letter in "abcdefghijklmnopqrstuvwxyz"]
    trie = trie_of(choices, tokenizer)
    for index, choice in enumerate(choices):
        wanted = tokenizer.encode(f"\n<RESPONSE>\n{choice}</RESPONSE>")

        def logits(_: Sequence[int], wanted: list[int] = wanted) -> NDArray[np.float32]:
            rows = np.zeros(VOCAB, np.float32)
            rows[wanted] = 1.0
            return rows

        steps, tokens = trie.decode(logits, [4]), []
        while True:
            try:
                tokens.append(next(steps))
            except StopIteration as end:
                assert end.value == index
                break
        assert tokens == wanted


def test_a_prefix_of_another_choice_can_win(tokenizer: Tokenizer) -> None:
    trie = trie_of(["a dog barks", "a dog"], tokenizer)
    found = {decode(trie, Model(seed), [4])[1] for seed in range(20)}
    assert found == {0, 1}


def test_composed_and_decomposed_spelling_is_one_choice(tokenizer: Tokenizer) -> None:
    choices = ["cafe\u0301", "tea"]
    tokens, index = decode(trie_of(choices, tokenizer), Model(1), [4])
    assert unicodedata.normalize("NFC", choices[index]) in tokenizer.decode(tokens)


def test_choices_that_contain_the_closing_tag_cannot_be_told_apart(tokenizer: Tokenizer) -> None:
    for choices in (["a", "a</RESPONSE>"], ["a</RESPONSE>", "a"]):
        with pytest.raises(QuestionError, match="cannot be told apart"):
            trie_of(choices, tokenizer)


@pytest.mark.parametrize(
    "sequences",
    [[[1, 2], [1, 2]], [[1], [1, 2]], [[1, 2], [1]], [[3], [1, 2], [1, 2, 3]], [[], [1]]],
)
def test_sequences_that_end_inside_another_are_refused(sequences: list[list[int]]) -> None:
    with pytest.raises(QuestionError, match="cannot be told apart"):
        ChoiceTrie(sequences)


def test_a_choice_the_tokenizer_cannot_spell_is_refused(tokenizer: Tokenizer) -> None:
    class Lossy(Tokenizer):
        def __init__(self) -> None:
            pass

        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text.replace("z", ""))

        def decode(self, token_ids: object) -> str:
            return tokenizer.decode(token_ids)  # type: ignore[arg-type]

    with pytest.raises(QuestionError, match="choice 2 cannot be spelled"):
        trie_of(["a", "zebra"], Lossy())


@pytest.mark.parametrize("choices", [["a"], ["a", "a"], ["a", ""], ["a", "b\n"]])
def test_choices_are_checked_first(choices: list[str], tokenizer: Tokenizer) -> None:
    with pytest.raises(QuestionError):
        trie_of(choices, tokenizer)


def test_not_a_number_is_an_error(tokenizer: Tokenizer) -> None:
    trie = trie_of(["a", "b"], tokenizer)
    with pytest.raises(BundleError, match="NaN"):
        list(trie.decode(lambda _: np.full(VOCAB, np.nan, np.float32), [4]))
    with pytest.raises(BundleError, match="NaN"):
        trie.log_likelihoods(Scorer(1), np.full(VOCAB, np.nan, np.float32))  # type: ignore[arg-type]


def test_a_plain_answer_ends_with_the_stop_token(tokenizer: Tokenizer) -> None:
    """Without a closing tag "a dog" would be the beginning of "a dog barks": it needs its end."""
    choices = ["a dog barks", "a dog"]
    trie = trie_of(choices, tokenizer, AnswerForm(choice_format="{letter}) {choice}"))
    assert [tokenizer.decode(ids[:-1]) for ids in trie.sequences] == ["a) a dog barks", "b) a dog"]
    assert {ids[-1] for ids in trie.sequences} == {STOP}
    assert decode(trie, Model(3), [4])[1] in (0, 1)
