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
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from .scene import Item, Scene, timeline
from .thought import describe, sentence
from .vocabulary import (
    BACKGROUNDS,
    INSTRUMENTS,
    LEXICON,
    SOUND_CLASSES,
    WORD_CATEGORY,
)
from .wordings import Wordings, word_question

__all__ = ["CATEGORIES", "QUESTION_TYPES", "ask", "question_records"]

_Rng = np.random.Generator


@dataclass(frozen=True)
class Draft:
    """A question before it is put into words; ``wrong`` are at most three wrong choices.

    ``slots`` fill the phrasings of its type. ``plain`` is the answer without choices,
    ``plain_summary`` and ``plain_reasoning`` its thought, where choices make a difference.
    """

    slots: dict[str, str]
    answer: str
    wrong: tuple[str, ...]
    planning: str
    reasoning: str
    summary: str
    plain: str | None = None
    plain_summary: str | None = None
    plain_reasoning: str | None = None


@dataclass(frozen=True)
class _Absent:
    """A question about what is not there: it is asked without choices only."""

    slots: dict[str, str]
    answer: str
    planning: str
    reasoning: str


def _pick(rng: _Rng, pool: list[str] | tuple[str, ...], n: int) -> tuple[str, ...]:
    return tuple(str(c) for c in rng.permutation(list(pool))[:n])


def _n_wrong(rng: _Rng) -> int:
    return int(rng.choice([1, 2, 3], p=[0.1, 0.2, 0.7]))


def _kinds(scene: Scene) -> list[str]:
    return sorted({s.kind for s in scene.sounds})


def _in_order(scene: Scene) -> list[str]:
    """The classes of sounds, each once, by their first start."""
    return list(dict.fromkeys(item.label for item in timeline(scene) if item.sound))


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
        {},
        answer,
        _pick(rng, absent, _n_wrong(rng)),
        "List the sounds and find the one among the choices.",
        f"The list has {answer}.",
        f"The sound is {answer}.",
        plain=" and ".join(_in_order(scene)),
        plain_summary=f"The sounds are {' and '.join(_in_order(scene))}.",
        plain_reasoning=f"The list has {', '.join(_in_order(scene))}.",
    )


def _sound_absent(scene: Scene, rng: _Rng) -> Draft | None:
    kinds = _kinds(scene)
    if len(kinds) < 2:
        return None
    answer = _pick(rng, [c for c in SOUND_CLASSES if c not in kinds], 1)[0]
    heard = _pick(rng, kinds, 3)
    return Draft(
        {},
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
        {},
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
        {"item": item.label},
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
        {},
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
        {},
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
        {},
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
    if not groups:
        return None
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
        {},
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
        {"item": kind},
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
        {},
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
        {},
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
        {},
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
        {"item": anchor},
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
        {"item": a.label, "other": b.label},
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
        {"where": where},
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
        {"item": a, "other": b, "word": word},
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
        {"item": a, "other": b},
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
        {},
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
        {},
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
        {},
        answer,
        _pick(rng, pool, _n_wrong(rng)),
        "Write down the words and find the one among the choices.",
        f"The words are {', '.join(words)}.",
        f"The word is {answer}.",
        plain=" ".join(words),
        plain_summary=f"The words are {' '.join(words)}.",
    )


def _word_named(scene: Scene, rng: _Rng) -> Draft | None:
    if scene.speech is None:
        return None
    answer = _pick(rng, scene.speech.words, 1)[0]
    category = WORD_CATEGORY[answer]
    pool = [w for w in LEXICON[category] if w != answer]
    return Draft(
        {"category": category},
        answer,
        _pick(rng, pool, _n_wrong(rng)),
        f"Write down the words and find the {category}.",
        f"The words are {', '.join(scene.speech.words)}. The {category} is {answer}.",
        f"The {category} is {answer}.",
    )


# --- without choices ----------------------------------------------------------------------------


def _yes_no(slots: dict[str, str], yes: bool, subject: str) -> Draft:
    """A yes-or-no question about ``subject``, which the list has or has not."""
    answer, other = ("yes", "no") if yes else ("no", "yes")
    return Draft(
        slots,
        answer,
        (other,),
        f"List what is heard and look for {subject}.",
        f"The list has {'' if yes else 'no '}{subject}.",
        f"The answer is {answer}.",
    )


def _presence(scene: Scene, rng: _Rng) -> Draft | None:
    """Something that is heard, or as often something of the same sort that is not."""
    present: dict[str, list[str]] = {"sound": _kinds(scene)}
    pools = {"sound": SOUND_CLASSES, "instrument": INSTRUMENTS, "background": BACKGROUNDS}
    present["instrument"] = [scene.music.instrument] if scene.music else []
    present["background"] = [scene.background.kind] if scene.background else []
    present["word"] = list(scene.speech.words) if scene.speech else []
    present["speaker"] = [scene.speech.gender] if scene.speech else []
    pools |= {"word": tuple(WORD_CATEGORY), "speaker": ("woman", "man")}
    sorts = ("sound", "sound", "sound", "instrument", "background", "word", "speaker")
    sort = sorts[int(rng.integers(len(sorts)))]
    yes = rng.random() < 0.5
    if yes and not present[sort]:
        sort = _pick(rng, [name for name in present if present[name]] or ["sound"], 1)[0]
        yes = bool(present[sort])
    pool = present[sort] if yes else [x for x in pools[sort] if x not in present[sort]]
    if not pool:
        return None
    name = _pick(rng, pool, 1)[0]
    thing = f"the word {name}" if sort == "word" else _with_article(name)
    return _yes_no({"thing": thing}, yes, name)


def _anybody(scene: Scene, rng: _Rng) -> Draft | None:
    return _yes_no({}, scene.speech is not None, "speech")


def _any_music(scene: Scene, rng: _Rng) -> Draft | None:
    return _yes_no({}, scene.music is not None, "music")


def _silent(scene: Scene, rng: _Rng) -> Draft | None:
    nothing = scene.background is None and not timeline(scene)
    # Nearly no clip is silent: asking the others rarely keeps the answers even.
    if not nothing and rng.random() > 0.15:
        return None
    answer, other = ("yes", "no") if nothing else ("no", "yes")
    return Draft(
        {},
        answer,
        (other,),
        "List what is heard.",
        "The list is empty." if nothing else "The list is not empty.",
        f"The answer is {answer}.",
    )


def _description(scene: Scene, rng: _Rng) -> Draft | None:
    text = sentence(scene)
    return Draft(
        {},
        text,
        (),
        "List what is heard in order and put it into a sentence.",
        "The list has all that is heard.",
        "The sentence has all that is heard.",
    )


def _with_article(name: str) -> str:
    if name in _UNCOUNTED:
        return name
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"


_UNCOUNTED = ("thunder", "applause", *BACKGROUNDS[:2])


def _absent(scene: Scene, kind: str, rng: _Rng) -> _Absent | None:
    """A question of type ``kind`` whose premise does not hold of the scene."""
    if kind in ("instrument", "tempo", "mode", "meter", "direction") and scene.music is None:
        return _Absent({}, "there is no music", "Listen to the music.", "The list has no music.")
    if kind in ("speaker", "word heard", "word order") and scene.speech is None:
        slots = {"where": "first" if rng.random() < 0.5 else "last"}
        return _Absent(slots, "nobody speaks", "Listen to the voice.", "The list has no speech.")
    if kind == "word count" and scene.speech is None:
        return _Absent({}, "0", "Write down the words and count them.", "The list has no speech.")
    if kind == "word named":
        said = {WORD_CATEGORY[w] for w in scene.speech.words} if scene.speech else set()
        category = _pick(rng, [c for c in LEXICON if c not in said], 1)[0]
        planning = f"Write down the words and find the {category}."
        slots = {"category": category}
        return _Absent(slots, "none", planning, f"The list has no {category}.")
    if kind in ("distance", "sound count"):
        name = _pick(rng, [c for c in SOUND_CLASSES if c not in _kinds(scene)], 1)[0]
        reasoning = f"The list has no {name}."
        if kind == "distance":
            planning = f"Listen to the distance of the {name}."
            return _Absent({"item": name}, f"there is no {name}", planning, reasoning)
        return _Absent({"item": name}, "0", f"List the sounds and count the {name}.", reasoning)
    if kind in ("sound heard", "first", "last") and not timeline(scene):
        return _Absent({}, "nothing", "List what is heard.", "The list is empty.")
    if kind == "sound heard" and not scene.sounds:
        return _Absent({}, "no sound", "List the sounds.", "The list has no sound.")
    labels = [item.label for item in timeline(scene)]
    if kind in ("after", "before") and labels:
        anchor = labels[-1] if kind == "after" else labels[0]
        if labels.count(anchor) > 1:
            return None
        planning = f"List what is heard in order and find the {anchor}."
        reasoning = f"The {'last' if kind == 'after' else 'first'} is {anchor}."
        return _Absent({"item": anchor}, "nothing", planning, reasoning)
    return None


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
    "presence": (_presence, "presence", 1.0),
    "anybody": (_anybody, "presence", 0.3),
    "any music": (_any_music, "presence", 0.3),
    "silent": (_silent, "presence", 0.3),
    "description": (_description, "description", 0.0),
}
# Types that want choices, and those that choices would spoil.
_CHOICES_ONLY = ("sound missing", "pair")
_PLAIN_ONLY = ("description", "silent")
_COUNTING = {"sound count": 0.4, "word count": 0.25}
QUESTION_TYPES: tuple[str, ...] = tuple(_TYPES)
CATEGORIES: dict[str, str] = {name: category for name, (_, category, _) in _TYPES.items()}


def ask(
    scene: Scene,
    kind: str,
    rng: _Rng,
    number: int = 0,
    choices: bool = True,
    absent: bool = False,
    wordings: Wordings | None = None,
) -> dict[str, Any] | None:
    """One question of type ``kind`` as an MMAR record, or None if the scene does not allow it.

    ``thinking`` is a dict of planning, caption, reasoning and summary. Without ``choices`` the
    record is marked ``open``: its choices are for the match alone and hold all that is wrong.
    ``absent`` asks about what is not there. ``wordings`` are those of the scene's split unless
    given.
    """
    function, category, _ = _TYPES[kind]
    if kind in (_PLAIN_ONLY if choices else _CHOICES_ONLY):
        return None
    if absent:
        missing = None if choices else _absent(scene, kind, rng)
        if missing is None:
            return None
        answer = missing.answer
        summary = f"The answer is {answer}."
        draft = Draft(missing.slots, answer, (), missing.planning, missing.reasoning, summary)
    else:
        found = function(scene, rng)
        if found is None:
            return None
        draft = found
    if choices:
        answer, summary, reasoning = draft.answer, draft.summary, draft.reasoning
        options = _pick(rng, (answer, *draft.wrong), 4)
    else:
        answer = draft.plain or draft.answer
        summary = draft.plain_summary or draft.summary
        reasoning = draft.plain_reasoning or draft.reasoning
        options = (answer, *_all_wrong(scene, kind, answer))
    record: dict[str, Any] = {
        "id": f"{scene.id}-{'q' if choices else 'o'}{number}",
        "audio_path": f"audio/{scene.id}.flac",
        "question": word_question(kind, draft.slots, wordings or scene.split, choices, rng),
        "choices": list(options),
        "answer": answer,
        "modality": scene.modality,
        "category": category,
        "sub-category": kind,
        "language": "en",
        "thinking": {
            "planning": draft.planning,
            "caption": describe(scene),
            "reasoning": reasoning,
            "summary": summary,
        },
    }
    if not choices:
        record["open"] = True
    return record


def _all_wrong(scene: Scene, kind: str, answer: str) -> list[str]:
    """Every answer of a type that would be wrong: no word of them may stand in a right one."""
    names: dict[str, tuple[str, ...]] = {
        "background": (*BACKGROUNDS, "none"),
        "instrument": INSTRUMENTS,
        "distance": ("near", "far"),
        "tempo": ("fast", "slow"),
        "mode": ("major", "minor"),
        "meter": ("three", "four"),
        "sound count": ("0", "1", "2", "3", "4"),
        "word count": ("0", "1", "2", "3"),
        "relation": ("before", "after"),
        "direction": ("rising", "falling"),
        "speaker": ("woman", "man"),
        "word heard": tuple(WORD_CATEGORY),
        "word order": tuple(WORD_CATEGORY),
        "word named": tuple(WORD_CATEGORY),
        "presence": ("yes", "no"),
        "anybody": ("yes", "no"),
        "any music": ("yes", "no"),
        "silent": ("yes", "no"),
        "description": (*SOUND_CLASSES, *INSTRUMENTS, *WORD_CATEGORY, *BACKGROUNDS, *_QUALITIES),
    }
    # In "there is no bell" the bell is right; elsewhere every other thing is wrong.
    pool = names.get(kind, (*SOUND_CLASSES, "music", "speech"))
    right = set(answer.lower().replace(",", " ").replace(".", " ").split())
    return [name for name in pool if not right >= set(name.split())]


_QUALITIES = ("near", "far", "fast", "slow", "rising", "falling", "woman", "man")


def question_records(
    scene: Scene, n: int = 4, choices: bool = True, wordings: Wordings | None = None
) -> list[dict[str, Any]]:
    """Up to ``n`` questions of different types about one scene, fixed by the scene's seed.

    Without ``choices``, a quarter of those that can be are about what is not there. ``wordings`` as
    :func:`ask` has them.
    """
    rng = np.random.default_rng([*scene.seed, 2 if choices else 3])
    # Weighted order without replacement: smallest of exponential variables over the weights.
    keys = {
        name: rng.exponential() / weight for name, (_, _, weight) in _TYPES.items() if weight > 0
    }
    # A scene with a large count allows few other types: counting in competition with them would be
    # asked about large counts most. So whether to count is decided first, whatever the scene is.
    for name, probability in _COUNTING.items():
        keys[name] = -1.0 if rng.random() < probability else math.inf
    if not choices:
        keys["description"] = -2.0 if rng.random() < 0.4 else math.inf
    records: list[dict[str, Any]] = []
    for kind in sorted((k for k in keys if keys[k] < math.inf), key=lambda name: keys[name]):
        absent = not choices and rng.random() < 0.25
        asked = partial(ask, scene, kind, rng, len(records), choices, wordings=wordings)
        record = asked(absent=absent)
        if record is None and absent:
            record = asked(absent=False)
        if record is None and not choices and not timeline(scene):
            record = asked(absent=True)
        if record is not None:
            records.append(record)
            if len(records) == n:
                break
    return records
