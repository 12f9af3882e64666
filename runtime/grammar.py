r"""The form of an answer as a grammar, and the writer that holds decoding to it.

A grammar is a row of steps: :class:`Fixed` text (tags), a :class:`Free` text of the model's own, or
:class:`OneOf` the choices. It knows token ids and strings, no decoder. A :class:`Writer` walks
along it token by token: :meth:`Writer.forced` gives tokens that are known without the model,
:meth:`Writer.mask` those that may come next, :meth:`Writer.take` takes the next one. For every
model this holds:

- a free text holds no tag, half a tag or control token: ``<`` is followed by a letter, a slash or a
  bar only where that begins the tag that closes the text, and then the rest of the tag follows;
- it is not empty;
- it is closed if the same few tokens repeat, and if its tokens are used up; in the latter case the
  thought around it is closed too, so that there always is an answer;
- a stop token, or the thought's end before its time, closes both in the same way.

A tag may begin inside a token (``.</``) and be spread over several: by the bytes of each token it
is known whether it may come, and what of it belongs to a tag. Masks are sets of ids, found once for
each place in a grammar. Where a model writes the form by itself its tokens stay the same.
"""

from __future__ import annotations

import codecs
import re
import string
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .answer import Section, TextPiece, section_of
from .choices import ChoiceNode, ChoiceTrie
from .config import AnswerForm
from .events import FinishReason
from .masks import Mask
from .tokenizer import Tokenizer

__all__ = ["Fixed", "Free", "Grammar", "OneOf", "Step", "Vocabulary", "Writer"]

# A loop has at least so many tokens and is at least so many times the same, of at most so many
# tokens. "dog, dog, dog, ..." may name sixteen dogs.
_LOOP_TOKENS, _LOOP_TIMES, _LONGEST_PERIOD = 48, 4, 64
_BLANK_TOKENS = 4  # a free text may begin with so many tokens of white space

_TAG_START = re.compile(rb"<[A-Za-z/|]")
_AFTER_OPENER = frozenset(string.ascii_letters + "/|")
_GRAPHIC = re.compile(r"[!-~]")


@dataclass(frozen=True)
class Fixed:
    """Text that is written verbatim, control tokens included; it is not shown."""

    text: str


@dataclass(frozen=True)
class Free:
    """Text of the model's own, up to the tag ``close`` (with which the next step begins).

    With an empty ``close``, control tokens alone end it.
    """

    section: Section
    close: str = ""


@dataclass(frozen=True)
class OneOf:
    """One of the choices in ``trie``, whose texts begin with ``open`` and end with ``close``."""

    trie: ChoiceTrie
    open: str = ""
    close: str = ""


Step: TypeAlias = Fixed | Free | OneOf


@dataclass(frozen=True)
class Grammar:
    """The steps of one answer.

    Attributes:
        steps: in their order; between two free texts there is a fixed one.
        answer_at: the index of the step that is the answer; those before are the thought.
        leave: the text after a closed part if the thought ends early: the thought's end, and the
            opening of the answer.
        stop_ids: tokens that end the text.
        thought_end_ids: tokens that end the thought.
        has_tags: whether free texts are kept free of tags.
    """

    steps: tuple[Step, ...]
    answer_at: int
    leave: str
    stop_ids: frozenset[int]
    thought_end_ids: frozenset[int] = frozenset()
    has_tags: bool = True

    @classmethod
    def of_form(
        cls,
        form: AnswerForm,
        stop_ids: Collection[int],
        trie: ChoiceTrie | None = None,
        *,
        think: bool = True,
    ) -> Grammar:
        """The grammar of one answer in a model's ``form``: free, or one of the choices in ``trie``.

        Without ``think`` the prompt has ended in an empty thought, with the white space after it
        where the answer is free.
        """
        thought = form.thought if think else None
        opening = form.response_open if trie is None else ""
        steps: list[Step] = []
        leave = ""
        if thought is not None:
            leave = ("\n" if thought.tags else "") + thought.close + opening
            text = thought.open
            for tag in thought.tags:
                steps += [Fixed(f"{text}<{tag}>\n"), Free(section_of(tag), f"</{tag}>")]
                text = f"</{tag}>\n"
            if not thought.tags:
                steps += [*([Fixed(text)] if text else []), Free("other")]
            steps.append(Fixed(text.rstrip() * bool(thought.tags) + leave))
        elif opening:
            steps.append(Fixed(opening.lstrip() if form.thought is not None else opening))
        answer_at = len(steps)
        if trie is not None:
            steps.append(OneOf(trie, form.response_open, form.response_close))
        else:
            steps.append(Free("answer", form.response_close))
            steps += [Fixed(form.response_close)] if form.response_close else []
        return cls(
            tuple(steps),
            answer_at,
            leave,
            frozenset(stop_ids),
            frozenset() if thought is None else frozenset({thought.close_id}),
            has_tags=thought is not None or bool(form.response_open),
        )

    def signals(self, index: int) -> frozenset[int]:
        """Tokens by which the model ends the free text at ``index``; they are not written."""
        return self.stop_ids | (self.thought_end_ids if index < self.answer_at else frozenset())

    def after(self, index: int) -> tuple[str, int]:
        """The fixed text after the free one at ``index``, and the step after both."""
        follows = self.steps[index + 1] if index + 1 < len(self.steps) else None
        return (follows.text if isinstance(follows, Fixed) else ""), index + 2

    def early(self, index: int) -> tuple[str, int]:
        """The same where the thought, if it is part of one, ends early."""
        free = self.steps[index]
        if index >= self.answer_at or not isinstance(free, Free):
            return self.after(index)
        return free.close + self.leave, self.answer_at


class Vocabulary:
    """The tokens by what they may do to a text, and the masks that follow; kept with a model."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, hidden_ids: Collection[int] = ()
    ) -> None:
        """Look at every token of ``tokenizer``, of ``vocab_size`` ids that a decoder knows.

        ``hidden_ids`` may come at any time and are no text.
        """
        self.tokenizer = tokenizer
        self.hidden_ids = frozenset(hidden_ids)
        plain = {t: i for t, i in tokenizer.plain_tokens().items() if i < vocab_size}
        self._plain = plain
        self._n_ids = vocab_size
        hidden = [*self.hidden_ids]
        # Control tokens, and ids without a token: (vocab_size,), and so are the others.
        self._never = ~self._set([*plain.values(), *hidden])
        # With nothing to see in them.
        graphic = _GRAPHIC.search
        unclear = [i for t, i in plain.items() if not graphic(t)]
        unseen = [i for i in unclear if not _is_visible(tokenizer.token_bytes(i))]
        self._blank = self._set([*unseen, *hidden])
        # That make a tag of a "<" before them, and that hold one.
        self._after_opener = self._set([i for t, i in plain.items() if t[0] in _AFTER_OPENER])
        self._with_opener = {i: tokenizer.token_bytes(i) for t, i in plain.items() if "<" in t}
        self._masks: dict[tuple[object, ...], Mask] = {}
        self._ids: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of fixed text."""
        if text not in self._ids:
            self._ids[text] = tuple(self.tokenizer.encode_markup(text))
        return self._ids[text]

    def mask(
        self, grammar: Grammar, index: int, *, held: bytes, blank: bool, visible_now: bool
    ) -> Mask:
        """Which tokens may come next in the free text at ``index``.

        Args:
            grammar: the grammar.
            index: the step.
            held: ``b"<"`` where the text ends so, else empty.
            blank: whether nothing but white space was written so far.
            visible_now: whether the next token must hold something to see.
        """
        signals: frozenset[int] = frozenset() if blank else grammar.signals(index)
        free = grammar.steps[index]
        # Where a control token closes, no text does.
        after = grammar.after(index)[0] if isinstance(free, Free) and free.close else ""
        key = (after, grammar.has_tags, signals, held, blank, visible_now)
        if key not in self._masks:
            never = self._never.copy()
            never[[*signals]] = False
            if visible_now:
                never |= self._blank
            if grammar.has_tags:
                never |= self._breaks_tags(after.encode(), held, blank)
            self._masks[key] = Mask(np.flatnonzero(never), only=False)
        return self._masks[key]

    def _breaks_tags(self, after: bytes, held: bytes, blank: bool) -> NDArray[np.bool_]:
        """Tokens that would write a tag other than the one that closes, or close what is blank."""
        breaks = np.zeros(self._n_ids, np.bool_)
        if held:
            breaks |= self._after_opener
            if not blank:
                begun = (after[1:end].decode() for end in range(2, len(after) + 1))
                breaks[[self._plain[text] for text in begun if text in self._plain]] = False
        for token, spelled in self._with_opener.items():
            start = _TAG_START.search(held + spelled)
            if start is not None:
                content, tag = (held + spelled)[: start.start()], (held + spelled)[start.start() :]
                if not after.startswith(tag) or (blank and not _is_visible(content)):
                    breaks[token] = True
        return breaks

    def _set(self, ids: list[int]) -> NDArray[np.bool_]:
        """The ids as a set: ``(vocab_size,)``."""
        members = np.zeros(self._n_ids, np.bool_)
        members[ids] = True
        return members


class Writer:
    """One answer as it is written along a grammar."""

    def __init__(self, grammar: Grammar, vocabulary: Vocabulary, max_new_tokens: int) -> None:
        """Begin with nothing; the free texts have ``max_new_tokens`` (at least 1) in all.

        A quarter of them, at most 64, are kept for a free answer. Fixed text and choices come on
        top, and a text that would be empty gets one token more.
        """
        self._grammar, self._vocabulary = grammar, vocabulary
        self._limit = max_new_tokens
        is_free = isinstance(grammar.steps[grammar.answer_at], Free)
        kept = min(max_new_tokens // 4, 64) if is_free and grammar.answer_at else 0
        self._thought_limit = max_new_tokens - kept
        self._queue: deque[int] = deque()
        self._pieces: list[TextPiece] = []
        self._n_free = 0
        self._reasons: set[FinishReason] = set()
        self.done = False
        self.choice_index: int | None = None
        self._index = -1
        self._node: ChoiceNode | None = None  # among the choices
        self._begin()
        self._enter(0)

    @property
    def finish_reason(self) -> FinishReason:
        """``length`` where tokens were spent, else ``loop`` where a loop was ended, else stop."""
        ranked: tuple[FinishReason, ...] = ("length", "loop")
        return next((reason for reason in ranked if reason in self._reasons), "stop")

    @property
    def max_tokens(self) -> int:
        """A bound of the tokens of the whole text."""
        steps = self._grammar.steps
        total = self._limit * any(isinstance(step, Free) for step in steps)
        total += 4 * len(steps)  # tags that are cut inside tokens need more
        for step in steps:
            if isinstance(step, Fixed):
                total += len(self._vocabulary.encode(step.text))
            elif isinstance(step, OneOf):
                total += step.trie.max_tokens
        return total

    def forced(self) -> list[int]:
        """The tokens that come next whatever the model wants; they count as taken."""
        ids = list(self._queue)
        self._queue.clear()
        return ids

    def mask(self) -> Mask:
        """Which tokens may come next."""
        if self._queue:
            return Mask(np.array([self._queue[0]], np.intp), only=True)
        if self._node is not None:
            return Mask(np.array(sorted(self._node.children), np.intp), only=True)
        return self._vocabulary.mask(
            self._grammar,
            self._index,
            held=self._held,
            blank=self._blank,
            visible_now=self._blank and (self._is_spent() or self._n_section >= _BLANK_TOKENS),
        )

    def take(self, token: int) -> bool:
        """Go on with ``token``, which the mask allows; whether it is part of the text."""
        if self._queue:
            self._queue.popleft()
            return True
        if self._node is not None:
            self._node = self._node.children[token]
            self._walk()
            return token not in self._grammar.stop_ids
        if token in self._grammar.signals(self._index):
            self._close(*self._grammar.early(self._index))
            return False
        self._n_free += 1
        self._n_section += 1
        if token not in self._vocabulary.hidden_ids:
            self._text(self._vocabulary.tokenizer.token_bytes(token))
        if not self._blank and not self._queue and not self.done:
            self._check_end(token)
        return True

    def choose(self, index: int) -> None:
        """Take the choice at ``index`` where one is to be taken: its tokens are forced."""
        step = self._grammar.steps[self._index]
        assert isinstance(step, OneOf)
        ids = step.trie.sequences[index]
        self._queue = deque(token for token in ids if token not in self._grammar.stop_ids)
        self._chosen(step, index)

    def pieces(self) -> list[TextPiece]:
        """What was written since the last call, cut into pieces by section."""
        found, self._pieces = self._pieces, []
        return found

    def _enter(self, index: int) -> None:
        """Go to the step at ``index``; fixed ones are passed at once."""
        self._node = None
        steps = self._grammar.steps
        if index < len(steps) and isinstance(fixed := steps[index], Fixed):
            self._write_fixed(fixed.text, index + 1)
            self._enter(index + 1)
            return
        self._index = index
        self.done = index >= len(steps)
        if self.done:
            return
        step = steps[index]
        if isinstance(step, OneOf):
            self._node = step.trie.root
            self._walk()
            return
        self._begin()

    def _begin(self) -> None:
        """A free text begins."""
        self._held = b""  # a "<" that may begin a tag
        self._blank, self._n_section = True, 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._last = np.full(_LONGEST_PERIOD, -1)  # tokens, the last one first
        self._n_same = np.zeros(_LONGEST_PERIOD, np.int64)  # tokens that equal those a period ago

    def _text(self, spelled: bytes) -> None:
        """Add the bytes of a token to the free text; a tag in them closes it."""
        text, self._held = self._held + spelled, b""
        start = _TAG_START.search(text) if self._grammar.has_tags else None
        if start is None:
            if self._grammar.has_tags and text.endswith(b"<"):
                text, self._held = text[:-1], b"<"
            self._show(text)
            return
        self._show(text[: start.start()])
        written = text[start.start() :].decode()
        after, early = self._grammar.after(self._index), self._grammar.early(self._index)
        if after != early and early[0].startswith(written) and self._is_spent():
            self._reasons.add("length")
            after = early
        self._close(*after, written)

    def _show(self, content: bytes, *, final: bool = False) -> None:
        text = self._utf8.decode(content, final)
        self._blank = self._blank and not any(map(_is_shown, text))
        step = self._grammar.steps[self._index]
        assert isinstance(step, Free)
        if text:
            self._pieces.append(TextPiece(text, step.section))

    def _check_end(self, token: int) -> None:
        """Close a text that goes round in circles, or whose tokens are spent."""
        self._n_same = (self._n_same + 1) * (self._last == token)
        self._last[1:] = self._last[:-1]
        self._last[0] = token
        if self._is_spent():
            self._reasons.add("length")
            self._close(*self._grammar.early(self._index))
        elif (self._n_same >= _LOOP_SAME).any():
            self._reasons.add("loop")
            self._close(*self._grammar.after(self._index))

    def _is_spent(self) -> bool:
        in_thought = self._index < self._grammar.answer_at
        return self._n_free >= (self._thought_limit if in_thought else self._limit)

    def _close(self, text: str, index: int, written: str = "") -> None:
        """End the free text by ``text``, of which ``written`` stands, and go on at ``index``."""
        held, self._held = self._held, b""
        self._show(held, final=True)
        if text:
            self._write_fixed(text, index, written)
        self._enter(index)

    def _write_fixed(self, text: str, index: int, written: str = "") -> None:
        """Queue what is left of a fixed ``text``, after which the step at ``index`` comes."""
        steps = self._grammar.steps
        step = steps[index] if index < len(steps) else None
        section = step.section if isinstance(step, Free) else "other"
        self._queue.extend(self._vocabulary.encode(text[len(written) :]))
        self._pieces.append(TextPiece(text, section, markup=True))

    def _walk(self) -> None:
        """Along the trie to its next fork, or to its end."""
        node = self._node
        assert node is not None
        while len(node.children) == 1:
            [(token, node)] = node.children.items()
            if token not in self._grammar.stop_ids:
                self._queue.append(token)
        self._node = node
        if node.choice_index is None:
            return
        step = self._grammar.steps[self._index]
        assert isinstance(step, OneOf)
        self._chosen(step, node.choice_index)

    def _chosen(self, step: OneOf, index: int) -> None:
        self.choice_index = index
        ids = [i for i in step.trie.sequences[index] if i not in self._grammar.stop_ids]
        text = self._vocabulary.tokenizer.decode(ids)
        written = text[len(step.open) : len(text) - len(step.close)]
        pieces = (
            TextPiece(step.open, "answer", markup=True),
            TextPiece(written if step.trie.texts is None else step.trie.texts[index], "answer"),
            TextPiece(step.close, "other", markup=True),
        )
        self._pieces += [piece for piece in pieces if piece.text]
        self._enter(len(self._grammar.steps))


def _loop_same() -> NDArray[np.int64]:
    """How many tokens must equal those a period ago, for each period, to make a loop."""
    periods = np.arange(1, _LONGEST_PERIOD + 1)
    return np.maximum(_LOOP_TOKENS, _LOOP_TIMES * periods) - periods


_LOOP_SAME = _loop_same()


def _is_visible(spelled: bytes) -> bool:
    """Whether bytes hold a whole character that can be seen."""
    return any(map(_is_shown, spelled.decode("utf-8", "ignore")))


def _is_shown(character: str) -> bool:
    return character.isprintable() and not character.isspace() and character != "\ufffd"
