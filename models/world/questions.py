"""Questions about a scene, in MMAR's record format, with a thought that is true by construction.

Each question type is a function ``(scene, rng) -> Draft | None`` (None: it cannot be asked of this
scene). Answers are balanced by construction: every attribute asked about is sampled uniformly, and
the right choice's position is drawn uniformly here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .scene import Item, Scene, timeline
from .thought import describe
from .vocabulary import (
    BACKGROUNDS,
    INSTRUMENTS,
    LEXICON,
    SOUND_CLASSES,
    WORD_CATEGORY,
)

__all__ = ["CATEGORIES", "QUESTION_TYPES", "ask", "question_records"]

_Rng = np.random.Generator


@dataclass(frozen=True)
class Draft:
    """A question before its choices are shuffled; ``wrong`` are at most three wrong choices."""

    texts: tuple[str, ...]
    answer: str
    wrong: tuple[str, ...]
    planning: str
    reasoning: str
    summary: str


def _pick(rng: _Rng, pool: list[str] | tuple[str, ...], n: int) -> tuple[str, ...]:
    return tuple(str(c) for c in rng.permutation(list(pool))[:n])


def _n_wrong(rng: _Rng) -> int:
    return int(rng.choice([1, 2, 3], p=[0.1, 0.2, 0.7]))


def _kinds(scene: Scene) -> list[str]:
    return sorted({s.kind for s in scene.sounds})


def _unique(scene: Scene) -> list[Item]:
    """Items whose label occurs once, so that they can be referred to."""
    items = timeline(scene)
    counts = Counter(item.label for item in items)
    return [item for item in items if counts[item.label] == 1]


# --- perception ---------------------------------------------------------------------------------


def _sound_heard(scene: Scene, rng: _Rng) -> Draft | None:
    kinds = _kinds(scene)
    if not kinds:
        return None
    answer = _pick(rng, kinds, 1)[0]
    absent = [c for c in SOUND_CLASSES if c not in kinds]
    return Draft(
        (
            "Which of these sounds can be heard?",
            "Which sound is in the recording?",
            "What sound do you hear?",
        ),
        answer,
        _pick(rng, absent, _n_wrong(rng)),
        "List the sounds and find the one among the choices.",
        f"The list has {answer}.",
        f"The sound is {answer}.",
    )


def _sound_absent(scene: Scene, rng: _Rng) -> Draft | None:
    kinds = _kinds(scene)
    if len(kinds) < 2:
        return None
    answer = _pick(rng, [c for c in SOUND_CLASSES if c not in kinds], 1)[0]
    heard = _pick(rng, kinds, 3)
    return Draft(
        (
            "Which of these sounds is not heard?",
            "Which sound is missing from the recording?",
            "Which of these sounds does not occur?",
        ),
        answer,
        heard,
        "List the sounds and find the choice that is missing.",
        f"Heard: {', '.join(heard)}. Not heard: {answer}.",
        f"The missing sound is {answer}.",
    )


def _background(scene: Scene, rng: _Rng) -> Draft | None:
    # Half of the clips are quiet: asking of a quarter of them makes the five answers equal.
    if scene.background is None and rng.random() > 0.25:
        return None
    answer = scene.background.kind if scene.background else "none"
    pool = [b for b in (*BACKGROUNDS, "none") if b != answer]
    return Draft(
        (
            "What is in the background?",
            "Which background noise is there?",
            "What is heard behind everything else?",
        ),
        answer,
        _pick(rng, pool, 3),
        "Listen to what is under the whole clip.",
        f"The background is {answer}.",
        f"The background is {answer}.",
    )


def _distance(scene: Scene, rng: _Rng) -> Draft | None:
    single = [item for item in _unique(scene) if item.sound]
    if not single:
        return None
    item = single[int(rng.integers(len(single)))]
    near = bool(item.sound and item.sound.near)
    answer, other = ("near", "far") if near else ("far", "near")
    return Draft(
        (
            f"Is the {item.label} near or far?",
            f"How far away is the {item.label}?",
            f"Does the {item.label} come from near or far?",
        ),
        answer,
        (other,),
        f"Listen to the distance of the {item.label}.",
        f"The list has {item.label} {answer}.",
        f"The {item.label} is {answer}.",
    )


def _instrument(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.music is None:
        return None
    answer = scene.music.instrument
    return Draft(
        (
            "Which instrument plays?",
            "Which instrument plays the melody?",
            "What is the music played on?",
        ),
        answer,
        _pick(rng, [i for i in INSTRUMENTS if i != answer], _n_wrong(rng)),
        "Listen to the timbre of the music.",
        f"The music is played on {answer}.",
        f"The instrument is {answer}.",
    )


def _tempo(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.music is None:
        return None
    answer, other = ("fast", "slow") if scene.music.fast else ("slow", "fast")
    return Draft(
        ("Is the music fast or slow?", "What is the tempo of the music?", "How fast is the music?"),
        answer,
        (other,),
        "Listen to the speed of the notes.",
        f"The notes are {answer}.",
        f"The tempo is {answer}.",
    )


def _mode(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.music is None:
        return None
    answer, other = ("major", "minor") if scene.music.major else ("minor", "major")
    return Draft(
        (
            "Is the music in major or minor?",
            "Which mode is the music in?",
            "Are the chords major or minor?",
        ),
        answer,
        (other,),
        "Listen to the third of the chords.",
        f"The chords are {answer}.",
        f"The mode is {answer}.",
    )


def _pair(scene: Scene, rng: _Rng) -> Draft | None:
    """Two facts at once: the choices are the four combinations of right and wrong.

    The two facts are from different modalities where there are two.
    """
    groups: list[list[tuple[str, str]]] = []
    if scene.speech:
        genders = ("woman", "man")
        gender = genders if scene.speech.gender == "woman" else genders[::-1]
        word = _pick(rng, scene.speech.words, 1)[0]
        pool = [w for w in LEXICON[WORD_CATEGORY[word]] if w != word]
        groups.append([gender, (word, _pick(rng, pool, 1)[0])])
    if scene.sounds:
        absent = _pick(rng, [c for c in SOUND_CLASSES if c not in _kinds(scene)], 2)
        heard = _pick(rng, _kinds(scene), 2)
        groups.append(list(zip(heard, absent, strict=False)))
    if scene.music:
        name = scene.music.instrument
        tempo, direction = ("fast", "slow"), ("rising", "falling")
        groups.append(
            [
                (name, _pick(rng, [i for i in INSTRUMENTS if i != name], 1)[0]),
                tempo if scene.music.fast else tempo[::-1],
                direction if scene.music.rising else direction[::-1],
            ]
        )
    if len(groups) > 1:
        chosen = sorted(int(k) for k in rng.permutation(len(groups))[:2])
        facts = [groups[k][int(rng.integers(len(groups[k])))] for k in chosen]
    else:
        facts = [groups[0][k] for k in sorted(rng.permutation(len(groups[0]))[:2])]
    if len(facts) < 2:
        return None
    (right_a, wrong_a), (right_b, wrong_b) = facts
    answer = f"{right_a} and {right_b}"
    return Draft(
        (
            "Which pair fits the recording?",
            "Which two are both true of the recording?",
            "Which two belong to what is heard?",
        ),
        answer,
        (f"{right_a} and {wrong_b}", f"{wrong_a} and {right_b}", f"{wrong_a} and {wrong_b}"),
        "List what is heard and check both parts of each choice.",
        f"The list has {right_a}, and it has {right_b}.",
        f"The pair is {answer}.",
    )


# --- counting -----------------------------------------------------------------------------------


def _count(scene: Scene, rng: _Rng) -> Draft | None:
    # Only the class with the uniformly drawn count is asked about, or answers would lean to 1. It
    # is the most frequent one; if all occur once, any of them has the same count.
    counts = Counter(s.kind for s in scene.sounds)
    if not counts:
        return None
    most = max(counts.values())
    kind = _pick(rng, sorted(k for k, c in counts.items() if c == most), 1)[0]
    top = 4 if scene.modality == "sound" else 3
    wrong = tuple(str(k) for k in range(1, top + 1) if k != most)
    each = ", ".join(f"{kind} {k}" for k in range(1, most + 1))
    return Draft(
        (
            f"How many times is the {kind} heard?",
            f"How often does the {kind} occur?",
            f"Count the {kind} sounds. How many are there?",
        ),
        str(most),
        wrong,
        f"List the sounds and count the {kind}.",
        f"{each}. That makes {most}.",
        f"The number of {kind} sounds is {most}.",
    )


def _meter(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.music is None:
        return None
    answer, other = ("three", "four") if scene.music.meter == 3 else ("four", "three")
    return Draft(
        (
            "How many beats are in each bar of the music?",
            "Is the music in three or in four?",
            "How many beats lie from one strong beat to the next?",
        ),
        answer,
        (other,),
        "Count the beats from one chord to the next.",
        f"The music is in {answer}.",
        f"The beats in a bar are {answer}.",
    )


def _word_count(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.speech is None:
        return None
    words = scene.speech.words
    n = len(words)
    each = ", ".join(f"{word} {k}" for k, word in enumerate(words, 1))
    return Draft(
        (
            "How many words are spoken?",
            "How many words does the speaker say?",
            "Count the spoken words.",
        ),
        str(n),
        tuple(str(k) for k in (1, 2, 3) if k != n),
        "Write down the words and count them.",
        f"{each}. That makes {n}.",
        f"The number of words is {n}.",
    )


# --- order --------------------------------------------------------------------------------------


def _end_of_line(scene: Scene, rng: _Rng, first: bool) -> Draft | None:
    items = timeline(scene)
    labels = sorted({item.label for item in items})
    if len(labels) < 2:
        return None
    answer = (items[0] if first else items[-1]).label
    where = "first" if first else "last"
    return Draft(
        (
            f"Which of these starts {where}?",
            f"What comes {where}?",
            f"Which one begins {where} in the recording?",
        ),
        answer,
        _pick(rng, [label for label in labels if label != answer], 3),
        f"List what is heard in order and take the {where}.",
        f"The {where} is {answer}.",
        f"What comes {where} is {answer}.",
    )


def _first(scene: Scene, rng: _Rng) -> Draft | None:
    return _end_of_line(scene, rng, first=True)


def _last(scene: Scene, rng: _Rng) -> Draft | None:
    return _end_of_line(scene, rng, first=False)


def _neighbour(scene: Scene, rng: _Rng, after: bool) -> Draft | None:
    """What comes directly after (before) an item."""
    labels = [item.label for item in timeline(scene)]
    # With a repeated class, that class would be the neighbour more often than the others.
    if len(labels) < 3 or len(set(labels)) < len(labels):
        return None
    pairs = list(pairwise(labels if after else labels[::-1]))
    anchor, answer = pairs[int(rng.integers(len(pairs)))]
    others = sorted(set(labels) - {anchor, answer})
    word = "after" if after else "before"
    return Draft(
        (
            f"What starts right {word} the {anchor}?",
            f"Which one comes directly {word} the {anchor}?",
            f"What is heard next to the {anchor}, {word} it?",
        ),
        answer,
        _pick(rng, others, 3),
        f"List what is heard in order and find the {anchor}.",
        f"{anchor}, then {answer}." if after else f"{answer}, then {anchor}.",
        f"Right {word} the {anchor} comes {answer}.",
    )


def _after(scene: Scene, rng: _Rng) -> Draft | None:
    return _neighbour(scene, rng, after=True)


def _before(scene: Scene, rng: _Rng) -> Draft | None:
    return _neighbour(scene, rng, after=False)


def _relation(scene: Scene, rng: _Rng) -> Draft | None:
    items = _unique(scene)
    if len(items) < 2:
        return None
    a, b = (items[int(k)] for k in rng.permutation(len(items))[:2])
    answer, other = ("before", "after") if a.start_s < b.start_s else ("after", "before")
    order = (a.label, b.label) if answer == "before" else (b.label, a.label)
    return Draft(
        (
            f"Does the {a.label} start before or after the {b.label}?",
            f"When does the {a.label} start, compared with the {b.label}?",
            f"Is the {a.label} before or after the {b.label}?",
        ),
        answer,
        (other,),
        f"List what is heard in order and find the {a.label} and the {b.label}.",
        f"{order[0]}, then {order[1]}.",
        f"The {a.label} starts {answer} the {b.label}.",
    )


def _word_order(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.speech is None or len(scene.speech.words) < 2:
        return None
    words = scene.speech.words
    first = rng.random() < 0.5
    answer = words[0] if first else words[-1]
    where = "first" if first else "last"
    return Draft(
        (
            f"Which word is said {where}?",
            f"What is the {where} word?",
            f"Which word does the speaker say {where}?",
        ),
        answer,
        _pick(rng, [w for w in words if w != answer], 3),
        f"Write down the words and take the {where}.",
        f"The words are {', '.join(words)}.",
        f"The {where} word is {answer}.",
    )


# --- comparison ---------------------------------------------------------------------------------


def _nearer(scene: Scene, rng: _Rng) -> Draft | None:
    single = [item for item in _unique(scene) if item.sound]
    near = [item.label for item in single if item.sound and item.sound.near]
    far = [item.label for item in single if item.sound and not item.sound.near]
    if not near or not far:
        return None
    close, distant = _pick(rng, near, 1)[0], _pick(rng, far, 1)[0]
    nearer = rng.random() < 0.5
    answer, other = (close, distant) if nearer else (distant, close)
    a, b = _pick(rng, (close, distant), 2)
    word = "nearer" if nearer else "farther away"
    return Draft(
        (
            f"Which is {word}, the {a} or the {b}?",
            f"Which sound is {word}: {a} or {b}?",
            f"Of the {a} and the {b}, which is {word}?",
        ),
        answer,
        (other,),
        f"Compare the distance of the {a} and the {b}.",
        f"The list has {close} near and {distant} far.",
        f"The sound that is {word} is {answer}.",
    )


def _more_often(scene: Scene, rng: _Rng) -> Draft | None:
    counts = Counter(s.kind for s in scene.sounds)
    ranked = counts.most_common()
    if len(ranked) < 2 or ranked[0][1] == ranked[1][1]:
        return None
    most = ranked[0][0]
    rare = _pick(rng, sorted(k for k in counts if k != most), 1)[0]
    a, b = _pick(rng, (most, rare), 2)
    return Draft(
        (
            f"Which is heard more often, the {a} or the {b}?",
            f"Which sound occurs more times: {a} or {b}?",
            f"Of the {a} and the {b}, which is heard more often?",
        ),
        most,
        (rare,),
        f"Count the {a} and the {b}.",
        f"{most} {counts[most]}, {rare} {counts[rare]}. The larger number is {counts[most]}.",
        f"The sound heard more often is {most}.",
    )


def _direction(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.music is None:
        return None
    answer, other = ("rising", "falling") if scene.music.rising else ("falling", "rising")
    return Draft(
        (
            "Is the melody rising or falling?",
            "Where does the pitch of the melody go?",
            "How does the melody move?",
        ),
        answer,
        (other,),
        "Compare the first and the last note.",
        f"The melody is {answer}.",
        f"The melody is {answer}.",
    )


# --- speaker and content ------------------------------------------------------------------------


def _speaker(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.speech is None:
        return None
    answer, other = ("woman", "man") if scene.speech.gender == "woman" else ("man", "woman")
    return Draft(
        ("Who is speaking?", "Is the speaker a woman or a man?", "Whose voice is it?"),
        answer,
        (other,),
        "Listen to the pitch of the voice.",
        f"The voice is that of a {answer}.",
        f"The speaker is a {answer}.",
    )


def _word_heard(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.speech is None:
        return None
    words = scene.speech.words
    answer = _pick(rng, words, 1)[0]
    pool = [w for ws in LEXICON.values() for w in ws if w not in words]
    return Draft(
        (
            "Which of these words is said?",
            "Which word does the speaker say?",
            "Which word can be heard?",
        ),
        answer,
        _pick(rng, pool, _n_wrong(rng)),
        "Write down the words and find the one among the choices.",
        f"The words are {', '.join(words)}.",
        f"The word is {answer}.",
    )


def _word_named(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.speech is None:
        return None
    answer = _pick(rng, scene.speech.words, 1)[0]
    category = WORD_CATEGORY[answer]
    pool = [w for w in LEXICON[category] if w != answer]
    return Draft(
        (
            f"Which {category} is named?",
            f"Which {category} does the speaker say?",
            f"What {category} is heard in the speech?",
        ),
        answer,
        _pick(rng, pool, _n_wrong(rng)),
        f"Write down the words and find the {category}.",
        f"The words are {', '.join(scene.speech.words)}. The {category} is {answer}.",
        f"The {category} is {answer}.",
    )


# type -> (function, category, weight). Mode and meter are the hardest to hear: asked less often.
_TYPES: dict[str, tuple[Callable[[Scene, _Rng], Draft | None], str, float]] = {
    "sound heard": (_sound_heard, "perception", 1.0),
    "sound missing": (_sound_absent, "perception", 0.6),
    "background": (_background, "perception", 0.7),
    "distance": (_distance, "perception", 1.2),
    "instrument": (_instrument, "perception", 1.2),
    "tempo": (_tempo, "perception", 0.8),
    "mode": (_mode, "perception", 0.2),
    "pair": (_pair, "perception", 0.8),
    "sound count": (_count, "counting", 1.0),
    "meter": (_meter, "counting", 0.2),
    "word count": (_word_count, "counting", 1.0),
    "first": (_first, "order", 1.0),
    "last": (_last, "order", 1.0),
    "after": (_after, "order", 2.0),
    "before": (_before, "order", 2.0),
    "relation": (_relation, "order", 1.3),
    "word order": (_word_order, "order", 0.9),
    "nearer": (_nearer, "comparison", 3.0),
    "more often": (_more_often, "comparison", 2.0),
    "direction": (_direction, "comparison", 0.9),
    "speaker": (_speaker, "speaker", 1.0),
    "word heard": (_word_heard, "content", 0.8),
    "word named": (_word_named, "content", 1.2),
}
_COUNTING = {"sound count": 0.4, "word count": 0.25}
QUESTION_TYPES: tuple[str, ...] = tuple(_TYPES)
CATEGORIES: dict[str, str] = {name: category for name, (_, category, _) in _TYPES.items()}


def ask(scene: Scene, kind: str, rng: _Rng, number: int = 0) -> dict[str, Any] | None:
    """One question of type ``kind`` as an MMAR record, or None if the scene does not allow it.

    ``thinking`` is a dict of planning, caption, reasoning and summary.
    """
    function, category, _ = _TYPES[kind]
    draft = function(scene, rng)
    if draft is None:
        return None
    choices = _pick(rng, (draft.answer, *draft.wrong), 4)
    return {
        "id": f"{scene.id}-q{number}",
        "audio_path": f"audio/{scene.id}.flac",
        "question": draft.texts[int(rng.integers(len(draft.texts)))],
        "choices": list(choices),
        "answer": draft.answer,
        "modality": scene.modality,
        "category": category,
        "sub-category": kind,
        "language": "en",
        "thinking": {
            "planning": draft.planning,
            "caption": describe(scene),
            "reasoning": draft.reasoning,
            "summary": draft.summary,
        },
    }


def question_records(scene: Scene, n: int = 4) -> list[dict[str, Any]]:
    """Up to ``n`` questions of different types about one scene, fixed by the scene's seed."""
    rng = np.random.default_rng([*scene.seed, 2])
    # Weighted order without replacement: smallest of exponential variables over the weights.
    keys = {name: rng.exponential() / weight for name, (_, _, weight) in _TYPES.items()}
    # A scene with a large count allows few other types: counting in competition with them would be
    # asked about large counts most. So whether to count is decided first, whatever the scene is.
    for name, probability in _COUNTING.items():
        keys[name] = -1.0 if rng.random() < probability else math.inf
    records: list[dict[str, Any]] = []
    for kind in sorted((k for k in keys if keys[k] < math.inf), key=lambda name: keys[name]):
        record = ask(scene, kind, rng, len(records))
        if record is not None:
            records.append(record)
            if len(records) == n:
                break
    return records
