"""Whatever a model wants to write: the form is kept, nothing is empty, nothing goes on for ever."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tinygiant.runtime.choices import ChoiceTrie
from tinygiant.runtime.config import AnswerForm, ThoughtForm
from tinygiant.runtime.grammar import Grammar, Vocabulary, Writer
from tinygiant.runtime.tokenizer import Tokenizer

TAGS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
# Tokens that begin, hold, end or cross tags; white space; parts of characters.
NASTY = (
    ".</", "</", "</P", "LANNING", "<RES", "PONSE>", "</RESPONSE>", ">\n", "e></", "<", "<<", " <",
    "</PLANNING>\n<CAPTION>\n", "</CAPTION>\nx", "</think", "<think", "<|", "im_end", "|>", "<a",
    "a<", "!</SUMMARY>", "</SUMMARY>\n", "  ", "\n\n", " \t", "\u00a0", "<CAPTION>", "</resp",
    "x < y", "1<2", "</>", "dog", " dog", "Summary:", "Plan", "\n**Logic**", "\u97f3", "\ufffd",
)  # fmt: skip
CHOICES = ["a dog", "a dog barks", "siren", "\u97f3"]


def _alphabet() -> dict[int, str]:
    """Byte-level BPE's character for each byte, written down from GPT-2's definition."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {b: chr(256 + n) for n, b in enumerate(rest)}


def make_tokenizer(extra: Sequence[str]) -> Tokenizer:
    """All bytes, and ``extra`` tokens that merges need not reach: a model may write them."""
    letters = _alphabet()
    spelled = ["".join(letters[byte] for byte in token.encode()) for token in extra]
    tokens = list(dict.fromkeys([*letters.values(), *spelled]))
    vocabulary = {token: number + len(CONTROLS) for number, token in enumerate(tokens)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    # The ids 0 to 4 are free: give the vocabulary's holes to the control tokens.
    vocabulary |= {content: number for number, content in enumerate(CONTROLS)}
    inner.model = tokenizers.models.BPE(vocabulary, merges=[])
    inner.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in CONTROLS])
    return Tokenizer(inner)


TOKENIZER = make_tokenizer(NASTY)
VOCAB = TOKENIZER.max_id + 5  # a decoder may know ids that no token has
VOCABULARY = Vocabulary(TOKENIZER, VOCAB)
SPELLED = [TOKENIZER.decode([token]) for token in range(TOKENIZER.max_id + 1)]
EOS, THINK_END = TOKENIZER.token_id("<|im_end|>"), TOKENIZER.token_id("</think>")
THOUGHT = ThoughtForm("</think>", THINK_END, "<think>\n\n</think>", "\n\n", TAGS, "<think>\n")
TAGGED = AnswerForm(THOUGHT, "\n<RESPONSE>\n", "</RESPONSE>")
UNTAGGED = AnswerForm(ThoughtForm("</think>", THINK_END, open="<think>"), "", "")
PLAIN = AnswerForm()

Wish = Callable[[list[int], str], NDArray[np.float32]]


def write(
    wish: Wish,
    form: AnswerForm = TAGGED,
    n: int = 60,
    *,
    choices: Sequence[str] | None = None,
    think: bool = True,
) -> tuple[Writer, list[int]]:
    """What becomes of a model that wishes for tokens, asked greedily as a decoder asks it."""
    trie = None
    if choices is not None:
        sequences = [
            TOKENIZER.encode(f"{form.response_open}{choice}{form.response_close}")
            + ([] if form.response_close else [EOS])
            for choice in choices
        ]
        trie = ChoiceTrie(sequences)
    grammar = Grammar.of_form(form, [EOS, 0], trie, think=think)
    writer, tokens = Writer(grammar, VOCABULARY, n), []
    while True:
        tokens += writer.forced()
        if writer.done:
            break
        token = writer.mask().best(wish(tokens, TOKENIZER.decode(tokens)).copy())
        if writer.take(token):
            tokens.append(token)
        assert len(tokens) <= writer.max_tokens
    assert not writer.forced()
    return writer, tokens


def content_is_good(text: str, *, tagged: bool = True) -> bool:
    visible = [c for c in text if c.isprintable() and not c.isspace() and c != "\ufffd"]
    has_tag = re.search(r"<[A-Za-z/|]", text) if tagged else None
    return bool(visible) and has_tag is None


PARTS = re.compile(
    r"<think>\n<PLANNING>\n(.*?)</PLANNING>"
    r"(?:\n<CAPTION>\n(.*?)</CAPTION>"
    r"(?:\n<REASONING>\n(.*?)</REASONING>"
    r"(?:\n<SUMMARY>\n(.*?)</SUMMARY>)?)?)?"
    r"\n</think>\n<RESPONSE>\n(.*?)</RESPONSE>",
    re.DOTALL,
)


def check(writer: Writer, tokens: list[int], form: AnswerForm, think: bool) -> None:
    """The text has the form, found again by a regular expression; the pieces are the text."""
    text = TOKENIZER.decode(tokens)
    pieces = writer.pieces()
    assert "".join(piece.text for piece in pieces) == text
    answer = "".join(p.text for p in pieces if p.section == "answer" and not p.markup)
    if form is TAGGED and think:
        found = PARTS.fullmatch(text)
        assert found is not None, text
        assert all(content_is_good(part) for part in found.groups() if part is not None), text
        assert answer == found.groups()[-1]
        shown = [p.section for p in pieces if not p.markup and p.text]
        order = ["plan", "audio_analysis", "logic", "summary", "answer"]
        assert [order.index(section) for section in shown] == sorted(map(order.index, shown))
    elif form is TAGGED:
        found = re.fullmatch(r"<RESPONSE>\n(.*?)</RESPONSE>", text, re.DOTALL)
        assert found is not None and content_is_good(found[1]) and answer == found[1]
    elif form is UNTAGGED and think:
        found = re.fullmatch(r"<think>(.*?)</think>(.*)", text, re.DOTALL)
        assert found is not None and content_is_good(found[1]) and content_is_good(found[2])
    else:
        assert content_is_good(text, tagged=False) and answer == text
    controls = [token for token in tokens if token < len(CONTROLS)]
    begun = [TOKENIZER.token_id("<think>"), THINK_END] if think and form is not PLAIN else []
    assert controls == begun


# --- models that want something -----------------------------------------------------------------


def constantly(*favourites: int) -> Wish:
    """A model that wants the first of its favourites that it may have, always."""
    logits = np.linspace(0, -1, VOCAB, dtype=np.float32)
    for rank, token in enumerate(reversed(favourites)):
        logits[token] = 10 + rank
    return lambda tokens, text: logits


def spelling(goal: str) -> Wish:
    """A model that writes ``goal`` again and again, in the largest tokens, or the smallest."""

    def wish(tokens: list[int], text: str) -> NDArray[np.float32]:
        done = max((n for n in range(len(goal)) if text.endswith(goal[:n])), default=0)
        logits = np.zeros(VOCAB, np.float32)
        for token in range(len(CONTROLS), TOKENIZER.max_id + 1):
            spelled = SPELLED[token]
            if goal[done:].startswith(spelled):
                logits[token] = 5 + len(spelled) * (1 if len(tokens) % 2 else -0.1)
        return logits

    return wish


def random_wishes(seed: int) -> Wish:
    def wish(tokens: list[int], text: str) -> NDArray[np.float32]:
        rng = np.random.default_rng([seed, *tokens[-3:], len(tokens)])
        return rng.standard_normal(VOCAB).astype(np.float32)

    return wish


def token_of(text: str) -> int:
    return SPELLED.index(text, len(CONTROLS))


FORMS = st.sampled_from([(TAGGED, True), (TAGGED, False), (UNTAGGED, True), (PLAIN, True)])
TOKENS = st.integers(0, TOKENIZER.max_id)
GOALS = [
    "</RESPONSE>", "</PLANNING>", "</CAPTION>", "<RESPONSE>\ntiger</RESPONSE>", "<think>",
    "</think>", "<|im_end|>",
    "</PLAN x", "a <b", "<", "</", "<<</", " \n", "Summary:\nx\n", "dog, dog, ",
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(FORMS, st.integers(0, 2**32), st.integers(1, 80))
def test_random_models(form: tuple[AnswerForm, bool], seed: int, n: int) -> None:
    writer, tokens = write(random_wishes(seed), form[0], n, think=form[1])
    check(writer, tokens, *form)


@settings(max_examples=100, deadline=None)
@given(FORMS, st.lists(TOKENS, min_size=1, max_size=6), st.integers(1, 200))
def test_models_that_want_always_the_same(
    form: tuple[AnswerForm, bool], favourites: list[int], n: int
) -> None:
    """End of text at once, the thought's end, half a tag, white space, half a character."""
    writer, tokens = write(constantly(*favourites), form[0], n, think=form[1])
    check(writer, tokens, *form)


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("form", [(TAGGED, True), (TAGGED, False), (UNTAGGED, True)])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_models_that_spell_tags(goal: str, form: tuple[AnswerForm, bool], n: int) -> None:
    writer, tokens = write(spelling(goal), form[0], n, think=form[1])
    check(writer, tokens, *form)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*GOALS, "Hear the dog.", "\u97f3"]), min_size=1, max_size=5), FORMS
)
def test_models_that_change_their_mind(goals: list[str], form: tuple[AnswerForm, bool]) -> None:
    wishes = [spelling(goal) for goal in goals]
    writer, tokens = write(
        lambda tokens, text: wishes[len(tokens) // 3 % len(wishes)](tokens, text),
        form[0],
        90,
        think=form[1],
    )
    check(writer, tokens, *form)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([TAGGED, UNTAGGED, PLAIN]),
    st.booleans(),
    st.lists(TOKENS, min_size=1, max_size=4),
    st.integers(1, 40),
)
def test_choices_are_one_production(
    form: AnswerForm, think: bool, favourites: list[int], n: int
) -> None:
    writer, tokens = write(constantly(*favourites), form, n, choices=CHOICES, think=think)
    assert writer.choice_index is not None
    chosen = CHOICES[writer.choice_index]
    text = TOKENIZER.decode(tokens)
    assert text.endswith(f"{form.response_open}{chosen}{form.response_close}")
    pieces = writer.pieces()
    assert "".join(piece.text for piece in pieces) == text
    answer = [p.text for p in pieces if p.section == "answer" and not p.markup]
    assert answer == [chosen]


# --- what a model writes by itself ----------------------------------------------------------------


def reciting(text: str) -> Wish:
    """A model that was trained on ``text`` in the tokenizer's own tokens, and then stops."""
    ids = [*TOKENIZER.encode_markup(text), EOS]

    def wish(tokens: list[int], _: str) -> NDArray[np.float32]:
        logits = np.zeros(VOCAB, np.float32)
        logits[ids[len(tokens)] if tokens == ids[: len(tokens)] else EOS] = 1
        return logits

    return wish


WORDS = st.text("ab .,<>/!\n\u97f3\u00e9:", min_size=1, max_size=12).filter(
    lambda text: content_is_good(text) and not text.endswith("<") and text[:4].strip()
)


@settings(max_examples=100, deadline=None)
@given(st.lists(WORDS, min_size=5, max_size=5))
def test_well_formed_text_stays_the_same(words: list[str]) -> None:
    parts = [f"<{tag}>\n{word}</{tag}>" for tag, word in zip(TAGS, words, strict=False)]
    text = "\n".join(["<think>", *parts, "</think>", "<RESPONSE>", f"{words[4]}</RESPONSE>"])
    writer, tokens = write(reciting(text), n=400)
    assert tokens == TOKENIZER.encode_markup(text)
    assert writer.finish_reason == "stop"


def test_tags_inside_tokens_and_across_them() -> None:
    """``.</`` ends a text by its dot and begins the tag; ``<`` and ``/P`` do so in two tokens."""
    text = (
        "<think>\n<PLANNING>\ndog.</PLANNING>\n<CAPTION>\nx < y</CAPTION>\n"
        "<REASONING>\n1<2.</REASONING>\n<SUMMARY>\ndog!</SUMMARY>\n</think>\n"
        "<RESPONSE>\ndog<</RESPONSE>"
    )

    def wish(tokens: list[int], written: str) -> NDArray[np.float32]:
        assert text.startswith(written)
        logits = np.zeros(VOCAB, np.float32)
        for token in range(len(CONTROLS), TOKENIZER.max_id + 1):
            spelled = SPELLED[token]
            if text[len(written) :].startswith(spelled):
                logits[token] = len(spelled)  # the largest, which crosses the tag's edge
        return logits

    writer, tokens = write(wish, n=400)
    assert TOKENIZER.decode(tokens) == text
    assert {token_of(".</"), token_of("x < y"), token_of("!</SUMMARY>")} <= {*tokens}
    assert [piece.text for piece in writer.pieces() if piece.section == "summary"][1:] == [
        "dog",
        "!",
    ]


def test_a_stop_token_ends_the_thought_and_an_answer_follows() -> None:
    wish = constantly(EOS, token_of("dog"))
    writer, tokens = write(wish)
    assert TOKENIZER.decode(tokens) == (
        "<think>\n<PLANNING>\ndog</PLANNING>\n</think>\n<RESPONSE>\ndog</RESPONSE>"
    )
    assert writer.finish_reason == "stop"
    writer, tokens = write(wish, PLAIN)
    assert (TOKENIZER.decode(tokens), writer.finish_reason) == ("dog", "stop")


def test_a_spent_budget_closes_the_thought_and_leaves_tokens_for_the_answer() -> None:
    writer, tokens = write(random_letters, n=40)
    found = PARTS.fullmatch(TOKENIZER.decode(tokens))
    assert found is not None
    plan, *others, answer = found.groups()
    assert (len(plan), others, len(answer)) == (30, [None, None, None], 10)
    assert writer.finish_reason == "length"


def random_letters(tokens: list[int], _: str) -> NDArray[np.float32]:
    logits = np.zeros(VOCAB, np.float32)
    logits[[token_of(letter) for letter in "abcdefgh"]] = np.random.default_rng(
        len(tokens)
    ).uniform(1, 2, 8)
    return logits


@pytest.mark.parametrize("cycle", [["dog"], [" dog", "a"], list("abcdefgh"), list("abcdefgh") * 8])
def test_a_loop_is_ended_and_reported(cycle: list[str]) -> None:
    """It would have filled all 2,000 tokens; the parts after it are still written."""
    ids = [token_of(text) for text in cycle]
    writer, tokens = write(
        lambda tokens, _: constantly(ids[len(tokens) % len(ids)])(tokens, _), n=2_000
    )
    check(writer, tokens, TAGGED, True)
    found = PARTS.fullmatch(TOKENIZER.decode(tokens))
    assert found is not None and None not in found.groups()
    assert writer.finish_reason == "loop"
    assert len(tokens) < 5 * (4 * len(ids) + 48 + 40)


def test_what_is_said_a_few_times_is_no_loop() -> None:
    """Twelve equal sounds, and a list whose numbers change."""
    text = "dog, " * 9 + "".join(f"{n} a b c. " for n in range(12))
    parts = "".join(f"<{tag}>\n{text}</{tag}>\n" for tag in TAGS)
    whole = f"<think>\n{parts}</think>\n<RESPONSE>\n{text}</RESPONSE>"
    writer, tokens = write(reciting(whole), n=5_000)
    assert TOKENIZER.decode(tokens) == whole
    assert writer.finish_reason == "stop"


# --- cost ---------------------------------------------------------------------------------------


def test_masks_at_full_size_are_sets_not_loops() -> None:
    """151,936 ids, a thousand of them with an opening bracket; a step of such a model: 20 ms."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFG ./>"))
    words = {"".join(rng.choice(letters, size=rng.integers(2, 9))) for _ in range(150_500)}
    opened = {"<" + "".join(rng.choice(letters, size=rng.integers(1, 6))) for _ in range(1_000)}
    tokenizer = make_tokenizer([*NASTY, *words, *opened])
    vocabulary = Vocabulary(tokenizer, 151_936)
    grammar = Grammar.of_form(TAGGED, [EOS, 0])
    writer = Writer(grammar, vocabulary, 10_000)
    writer.forced()
    logits = rng.standard_normal(151_936).astype(np.float32)
    token = token_of("a")
    writer.mask().best(logits)  # finds the set

    def fastest(step: Callable[[], object]) -> float:
        times = []
        for _ in range(50):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(lambda: writer.mask().best(logits)) < 500e-6  # some 40 us, 11 without a mask
    assert fastest(lambda: writer.take(token)) < 500e-6
