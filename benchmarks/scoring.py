r"""Multiple-choice scoring and its statistics: pure functions, no files, no models.

The match is that of MMAR's official evaluation: sets of ``\b\w+\b`` of the lower-cased texts, the
answer's tokens all in the prediction, and no token in the prediction that belongs to other choices
only. A prediction that is exactly the answer is therefore right, and one that is exactly another
choice is wrong unless both have the same set of words.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinygiant.runtime.answer import parse_answer

__all__ = [
    "MODALITIES",
    "Comparison",
    "Item",
    "Tally",
    "agreement",
    "breakdown",
    "calibration_error",
    "caption_parts",
    "compare",
    "names",
    "string_match",
    "tally",
    "well_formed",
    "wilson_interval",
]

# MMAR's names, in the order of the paper's table.
MODALITIES = (
    "sound",
    "music",
    "speech",
    "mix-sound-music",
    "mix-sound-speech",
    "mix-music-speech",
    "mix-sound-music-speech",
)
_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True)
class Item:
    """One question of MMAR's record format.

    ``caption`` is what the Audio Analysis should say; None where the record does not tell. The
    choices of an ``open`` question are not shown: they are the right answer and all wrong ones.
    """

    id: str
    audio_path: str
    question: str
    choices: tuple[str, ...]
    answer: str
    modality: str
    category: str
    sub_category: str
    caption: str | None
    open: bool = False


@dataclass(frozen=True)
class Tally:
    """Right answers among ``n`` questions; ``chance`` is the accuracy of guessing."""

    n: int
    correct: int
    chance: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.correct / self.n if self.n else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the 95 % Wilson interval."""
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "ci95": list(wilson_interval(self.correct, self.n)),
            "chance": self.chance,
        }


@dataclass(frozen=True)
class Comparison:
    """Two runs over the same questions; ``p_value`` is the exact two-sided McNemar test's."""

    n: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int

    @property
    def difference_points(self) -> float:
        """Accuracy of B minus that of A, in percentage points."""
        return 100.0 * (self.only_b - self.only_a) / self.n if self.n else 0.0

    @property
    def p_value(self) -> float:
        """Probability of a split of the discordant pairs at least as uneven, were both equal."""
        n = self.only_a + self.only_b
        tail = sum(math.comb(n, k) for k in range(min(self.only_a, self.only_b) + 1))
        return min(1.0, tail / (1 << n) * 2)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with what is computed from the counts."""
        return {
            **dataclasses.asdict(self),
            "difference_points": self.difference_points,
            "p_value": self.p_value,
        }


def string_match(answer: str, prediction: str, choices: Sequence[str]) -> bool:
    """Whether MMAR's official evaluation counts ``prediction`` as right."""
    predicted, right = _token_set(prediction), _token_set(answer)
    wrong = {token for choice in choices for token in _token_set(choice)} - right
    return bool(predicted) and right <= predicted and predicted.isdisjoint(wrong)


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share; (0, 1) of nothing."""
    if n == 0:
        return 0.0, 1.0
    share, z2 = correct / n, _Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the exact bound is 0 or 1; rounding would miss it by a hair.
    low = 0.0 if correct == 0 else centre - half
    return low, 1.0 if correct == n else centre + half


def tally(items: Iterable[Item], answers: Mapping[str, str]) -> Tally:
    """Score the items that ``answers`` (id to prediction) has; the others are left out."""
    answered = [item for item in items if item.id in answers]
    correct = sum(string_match(i.answer, answers[i.id], i.choices) for i in answered)
    # Nobody can guess an answer without seeing any.
    guessed = sum(0 if item.open else 1 / len(item.choices) for item in answered)
    chance = guessed / max(len(answered), 1)
    return Tally(len(answered), correct, chance)


def breakdown(items: Sequence[Item], answers: Mapping[str, str], field: str) -> dict[str, Tally]:
    """A tally for each value of an item's ``field``, modalities in MMAR's order, others sorted."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        if item.id in answers:
            groups.setdefault(getattr(item, field), []).append(item)
    order = {name: position for position, name in enumerate(MODALITIES)}
    keys = sorted(groups, key=lambda name: (order.get(name, len(order)), name))
    return {key: tally(groups[key], answers) for key in keys}


def compare(
    items: Iterable[Item], answers_a: Mapping[str, str], answers_b: Mapping[str, str]
) -> Comparison:
    """Paired comparison over the items that both runs answered."""
    n, right_a, right_b, only_a, only_b = 0, 0, 0, 0, 0
    for item in items:
        if item.id not in answers_a or item.id not in answers_b:
            continue
        a, b = (
            string_match(item.answer, run[item.id], item.choices) for run in (answers_a, answers_b)
        )
        n += 1
        right_a += a
        right_b += b
        only_a += a and not b
        only_b += b and not a
    return Comparison(n, right_a / max(n, 1), right_b / max(n, 1), only_a, only_b)


def well_formed(answer: str) -> bool:
    """Whether an answer is a text that one may show: not empty, no tag, at most 60 words."""
    words = answer.split()
    return 0 < len(words) <= 60 and re.search(r"</?[A-Za-z_|]+[^<>]{0,40}>", answer) is None


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """The expected calibration error of Guo et al. (2017), in ``bins`` bins of equal width.

    The mean, weighted by their sizes, of the bins' differences between mean confidence and share
    of right answers; 0..1.
    """
    groups: dict[int, list[tuple[float, bool]]] = {}
    for confidence, correct in zip(confidences, right, strict=True):
        groups.setdefault(min(int(confidence * bins), bins - 1), []).append((confidence, correct))
    gaps = (abs(sum(c for c, _ in group) - sum(r for _, r in group)) for group in groups.values())
    return sum(gaps) / max(len(confidences), 1)


def agreement(
    items: Iterable[Item], answers: Mapping[str, str], thoughts: Mapping[str, str]
) -> dict[str, Any] | None:
    """Does the thought agree with the answer given, and with the scene?

    Over the items whose record has a caption; None if there is none, or if no answer has a thought.

    Args:
        items: the questions.
        answers: id to prediction.
        thoughts: id to the thought's text, markup included.

    Returns:
        ``summary_names_answer``: share whose Summary names the answer that was given;
        ``caption_exact``: share whose Audio Analysis is the record's caption word for word;
        ``scene_named``: share whose Audio Analysis names every thing in the foreground and the
        background, in the right order and nothing else, whatever it says of their attributes;
        ``background``: share with the right background; ``item_precision`` and ``item_recall``: of
        the things listed, each with its attributes, over all items together;
        ``accuracy_if_caption_exact`` and ``accuracy_otherwise``: what hearing right is worth (None
        where there is nothing to count).
    """
    n = named = background = listed = wanted = found = scene = 0
    right: dict[bool, list[bool]] = {True: [], False: []}
    for item in items:
        if item.id not in answers or item.caption is None:
            continue
        n += 1
        thought = parse_answer(thoughts.get(item.id, ""))
        named += names(thought.summary, answers[item.id])
        said, true = caption_parts(thought.audio_analysis), caption_parts(item.caption)
        said_items, true_items = Counter(said[1]), Counter(true[1])
        background += said[0] == true[0]
        scene += said[0] == true[0] and list(map(_thing, said[1])) == list(map(_thing, true[1]))
        listed += said_items.total()
        wanted += true_items.total()
        found += (said_items & true_items).total()
        exact = thought.audio_analysis == item.caption
        right[exact].append(string_match(item.answer, answers[item.id], item.choices))
    if n == 0 or not any(thoughts.values()):
        return None
    return {
        "n": n,
        "summary_names_answer": named / n,
        "caption_exact": len(right[True]) / n,
        "scene_named": scene / n,
        "background": background / n,
        "item_precision": _share(found, listed),
        "item_recall": _share(found, wanted),
        "accuracy_if_caption_exact": _share(sum(right[True]), len(right[True])),
        "accuracy_otherwise": _share(sum(right[False]), len(right[False])),
    }


def names(text: str, phrase: str) -> bool:
    """Whether the words of ``phrase`` stand in ``text`` one after another, in any case."""
    words, wanted = _words(text), _words(phrase)
    starts = range(len(words) - len(wanted) + 1)
    return bool(wanted) and any(words[k : k + len(wanted)] == wanted for k in starts)


def caption_parts(text: str) -> tuple[str | None, list[str]]:
    """The background and the phrases of a caption of the synthetic world.

    The grammar is that of ``tinygiant.models.world.thought``, which needs torch to be imported; a
    test keeps both equal. (None, []) for any other text.
    """
    match = re.fullmatch(r"Background (\w+)\. First (.+)\.", text.strip())
    return (match[1], match[2].split(", then ")) if match else (None, [])


def _thing(phrase: str) -> str:
    """What a caption's phrase names, without its attributes: dog bark, violin, a woman says."""
    if " says " in phrase:
        return phrase.partition(" says ")[0] + " says"
    if phrase.endswith((" near", " far")):
        return phrase.rpartition(" ")[0]
    return phrase.partition(" ")[0]


def _words(text: str) -> list[str]:
    return re.findall(r"\b\w+\b", text.lower())


def _token_set(text: str) -> set[str]:
    return set(_words(text))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
