"""The synthetic world's scenes, labels, questions and thoughts; no engine is needed here."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import fields

import numpy as np
import pytest

from benchmarks.scoring import string_match
from tinygiant.models.world.dataset import clip_features
from tinygiant.models.world.labels import CLIP_TAGS, FRAME_TAGS, clip_labels, frame_labels
from tinygiant.models.world.questions import CATEGORIES, QUESTION_TYPES, question_records
from tinygiant.models.world.recordings import RECORDINGS
from tinygiant.models.world.scene import (
    draw,
    sample_scene,
    scene_from_dict,
    scene_to_dict,
    timeline,
)
from tinygiant.models.world.sounds import SOUND_PARAMETERS, synthesise
from tinygiant.models.world.thought import describe, format_response, parse_caption, sentence
from tinygiant.models.world.vocabulary import (
    BACKGROUNDS,
    INSTRUMENTS,
    LEXICON,
    MODALITIES,
    SOUND_CLASSES,
    SPLITS,
    WORDS,
)
from tinygiant.models.world.voices import SPEAKERS, VOICES
from tinygiant.models.world.wordings import (
    HELD_OUT_FRAMES,
    TRAINING_FRAMES,
    WORDINGS,
    phrasings,
    word_question,
)


def _duration_s(voice: str, setting: int, word: str) -> float:
    return 0.3 + 0.02 * len(word)


def _scenes(split: str, n: int, seed: int = 0, kind: str = "core") -> list:
    return [
        sample_scene(
            split, i, seed, _duration_s, kind=kind, recording_duration_s=lambda number: 0.5
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def scenes() -> list:
    return _scenes("train", 3500)


@pytest.fixture(scope="module")
def records(scenes: list) -> list:
    return [(scene, record) for scene in scenes for record in question_records(scene)]


# --- scenes -------------------------------------------------------------------------------------


def test_a_scene_is_fixed_by_split_index_and_seed() -> None:
    assert sample_scene("train", 41, 7, _duration_s) == sample_scene("train", 41, 7, _duration_s)
    assert sample_scene("train", 41, 7, _duration_s) != sample_scene("train", 41, 8, _duration_s)
    assert sample_scene("train", 41, 7, _duration_s) != sample_scene("train", 48, 7, _duration_s)


def test_scenes_survive_json() -> None:
    for split in SPLITS:
        for scene in _scenes(split, 14):
            assert scene_from_dict(json.loads(json.dumps(scene_to_dict(scene)))) == scene


def test_each_modality_holds_exactly_what_its_name_says(scenes: list) -> None:
    assert Counter(s.modality for s in scenes) == {m: 500 for m in MODALITIES}
    for scene in scenes:
        assert bool(scene.sounds) == ("sound" in scene.modality)
        assert bool(scene.music) == ("music" in scene.modality)
        assert bool(scene.speech) == ("speech" in scene.modality)


def test_scenes_keep_their_limits(scenes: list) -> None:
    for scene in scenes:
        assert 3.0 <= scene.duration_s <= 10.0
        assert len(scene.sounds) <= 4
        items = timeline(scene)
        assert items[-1].start_s == max(i.start_s for i in items)
        assert max(i.end_s for i in items) <= scene.duration_s
        starts = [i.start_s for i in items]
        assert min(np.diff(starts), default=1.0) >= 0.25  # order is audible
        for a, b in zip(scene.sounds, scene.sounds[1:], strict=False):
            assert b.start_s >= a.end_s + 0.1  # events can be counted


def test_no_voice_is_in_two_splits_and_both_genders_are_in_each() -> None:
    names = [v.name for split in SPLITS for v in VOICES[split]]
    assert len(names) == len(set(names))
    for split in SPLITS:
        assert {v.gender for v in VOICES[split]} == {"woman", "man"}
    assert min(Counter(v.gender for v in VOICES["train"]).values()) >= 8


def test_splits_own_disjoint_parameter_values() -> None:
    """Every band of 1/20 of a range belongs to at most one of the three in-domain splits."""
    rng = np.random.default_rng(0)
    bands = {
        split: {int(draw(rng, split, 10.0, 30.0) - 10.0) for _ in range(2000)}
        for split in ("train", "validation", "test")
    }
    assert not bands["train"] & bands["test"]
    assert not bands["train"] & bands["validation"]
    assert not bands["validation"] & bands["test"]
    assert len(bands["train"]) == 12
    outside = [draw(rng, "shifted", 10.0, 30.0) for _ in range(200)]
    assert all(x <= 10.0 or x >= 30.0 for x in outside)
    below_zero = [draw(rng, "shifted", -5.0, 0.0) for _ in range(200)]
    assert all(x <= -5.0 or x >= 0.0 for x in below_zero)


def test_parameters_of_train_and_test_clips_are_disjoint() -> None:
    def pitches(split: str) -> set[int]:
        # The number of the band: 20 bands of 25 Hz over the bell's 600..1100 Hz.
        return {
            int((e.params["pitch_hz"] - 600) / 25)
            for s in _scenes(split, 700)
            for e in s.sounds
            if e.kind == "bell" and e.recording is None
        }

    train, test = pitches("train"), pitches("test")
    assert train
    assert test
    assert not train & test


def test_shifted_clips_are_copies_with_another_sound_font() -> None:
    scenes = _scenes("shifted", 210)
    copies = Counter(s.copy for s in scenes)
    assert set(copies) == {"8 kHz", "mp3"}
    assert min(copies.values()) > 70
    assert {s.music.font for s in scenes if s.music} == {"timgm"}
    assert {s.music.font for s in _scenes("test", 70) if s.music} == {"fluid"}


def test_attributes_are_balanced(scenes: list) -> None:
    music = [s.music for s in scenes if s.music]
    for share in (
        np.mean([m.fast for m in music]),
        np.mean([m.rising for m in music]),
        np.mean([m.major for m in music]),
        np.mean([m.meter == 3 for m in music]),
        np.mean([s.speech.gender == "man" for s in scenes if s.speech]),
        np.mean([e.near for s in scenes for e in s.sounds]),
    ):
        assert abs(share - 0.5) < 0.05
    kinds = Counter(e.kind for s in scenes for e in s.sounds)
    assert set(kinds) == set(SOUND_CLASSES)
    assert max(kinds.values()) < 1.5 * min(kinds.values())
    assert {m.instrument for m in music} == set(INSTRUMENTS)
    assert {w for s in scenes if s.speech for w in s.speech.words} == set(WORDS)


# --- labels -------------------------------------------------------------------------------------


def test_tag_lists_are_ordered_and_without_repeats() -> None:
    assert len(set(FRAME_TAGS)) == len(FRAME_TAGS)
    assert len(set(CLIP_TAGS)) == len(CLIP_TAGS)


def test_labels_agree_with_the_scene(scenes: list) -> None:
    column = {tag: k for k, tag in enumerate(FRAME_TAGS)}
    for scene in scenes[:210]:
        rows = frame_labels(scene)
        assert rows.shape == (int(np.ceil(scene.duration_s * 10)), len(FRAME_TAGS))
        tags = {CLIP_TAGS[k] for k in np.flatnonzero(clip_labels(scene))}
        heard = {FRAME_TAGS[k] for k in np.flatnonzero(rows.any(axis=0))}
        assert heard & set(CLIP_TAGS) == tags & set(FRAME_TAGS)
        for kind in SOUND_CLASSES:
            events = [e for e in scene.sounds if e.kind == kind]
            onset_rows = np.flatnonzero(rows[:, column[f"onset:{kind}"]])
            assert list(onset_rows) == [int(e.start_s * 10) for e in events]
            assert (f"count:{kind}:{len(events)}" in tags) == bool(events)
            for event in events:
                middle = int((event.start_s + event.end_s) * 5)
                assert rows[middle, column[f"sound:{kind}"]]
                assert rows[middle, column["near" if event.near else "far"]]
        if scene.speech:
            for word, start_s in zip(scene.speech.words, scene.speech.starts_s, strict=True):
                assert rows[int(start_s * 10) + 1, column[f"word:{word}"]]
        if scene.background:
            assert rows[:, column[f"background:{scene.background.kind}"]].all()


# --- questions and thoughts ---------------------------------------------------------------------


def test_records_have_mmars_fields_and_one_right_choice(records: list) -> None:
    names = ["id", "audio_path", "question", "choices", "answer", "modality", "category"]
    names += ["sub-category", "language", "thinking"]
    ids = [record["id"] for _, record in records]
    assert len(ids) == len(set(ids))
    for scene, record in records:
        assert list(record) == names
        assert record["modality"] == scene.modality
        assert 2 <= len(record["choices"]) <= 4
        assert len(set(record["choices"])) == len(record["choices"])
        assert record["choices"].count(record["answer"]) == 1
        assert CATEGORIES[record["sub-category"]] == record["category"]
        assert set(record["thinking"]) == {"planning", "caption", "reasoning", "summary"}
        assert record["thinking"]["caption"] == describe(scene)
        assert re.search(rf"\b{re.escape(record['answer'])}\b", record["thinking"]["summary"])
        assert len(format_response(record).split()) <= 110


def test_every_question_type_is_asked_in_several_wordings(records: list) -> None:
    wordings = defaultdict(set)
    for _, record in records:
        words = record["question"]
        for name in (*SOUND_CLASSES, *LEXICON, "speech", "music"):
            words = re.sub(rf"\b{name}\b", "X", words)
        wordings[record["sub-category"]].add(words)
    assert set(wordings) == set(QUESTION_TYPES) - {"description", "silent"}
    assert min(len(w) for w in wordings.values()) >= 3


def _facts(caption: str) -> dict:
    """What a listener knows who has only the caption; written independently of the questions."""
    background, phrases = parse_caption(caption)
    facts = {"background": background, "labels": [], "near": {}, "music": None, "says": None}
    for phrase in phrases:
        said = re.fullmatch(r"a (woman|man) says (.+)", phrase)
        played = re.fullmatch(r"(\w+) (rising|falling) (fast|slow) (major|minor) in (\w+)", phrase)
        if said:
            facts["says"] = (said[1], said[2].split())
            facts["labels"].append("speech")
        elif played:
            facts["music"] = played.groups()
            facts["labels"].append("music")
        else:
            label, distance = phrase.rsplit(" ", 1)
            facts["labels"].append(label)
            facts["near"][label] = distance
    return facts


_NAMES = (*SOUND_CLASSES, *INSTRUMENTS, *WORDS, *BACKGROUNDS, "woman", "man")


def _filled(question: str, kind: str) -> dict[str, str]:
    """What fills the slots of the phrasing that a question has, in lower case."""
    found = []
    for text in sorted(_PHRASINGS[kind], key=len):
        literal = re.escape(text.lower().rstrip("?."))
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[a-z ]+?)", literal)
        if match := re.search(pattern.replace("recording", _NOUN) + r"(?=$|[?.,:])", question):
            found.append(match.groupdict())
    return found[-1]  # a phrasing may be the end of another


_NOUN = "(?:recording|clip|audio|audio clip|sound file)"
_PHRASINGS = {
    kind: [
        text
        for wordings in ("train", "validation", "test", "fresh")
        for text in phrasings(kind, wordings, False)
    ]
    for kind in ("relation", "presence", "after", "before")
}


def _solve(record: dict) -> str:
    """Answer from the caption, question and choices alone."""
    facts = _facts(record["thinking"]["caption"])
    labels, question, choices = facts["labels"], record["question"].lower(), record["choices"]
    named = sorted(
        (label for label in set(labels) if re.search(rf"\b{label}\b", question)),
        key=lambda label: re.search(rf"\b{label}\b", question).start(),
    )
    music, says = facts["music"], facts["says"]
    true = {*labels, facts["background"]}
    if music:
        true |= set(music[:4])  # the meter is not a fact of any pair; a word can be "four"
    if says:
        true |= {says[0], *says[1]}

    def only(candidates: list) -> str:
        (answer,) = candidates
        return answer

    def item_asked() -> str:
        """A phrasing may name music and speech besides the thing that it asks about."""
        return _filled(question, record["sub-category"])["item"].strip()

    match record["sub-category"]:
        case "sound heard" | "word heard" | "word named":
            return only([c for c in choices if c in true])
        case "sound missing":
            return only([c for c in choices if c not in true])
        case "background":
            return facts["background"]
        case "distance":
            return facts["near"][named[0]]
        case "instrument":
            return music[0]
        case "direction":
            return music[1]
        case "tempo":
            return music[2]
        case "mode":
            return music[3]
        case "meter":
            return music[4]
        case "speaker":
            return says[0]
        case "pair":
            return only([c for c in choices if set(c.split(" and ")) <= true])
        case "sound count":
            return str(labels.count(named[0]))
        case "word count":
            return str(len(says[1]))
        case "first":
            return labels[0]
        case "last":
            return labels[-1]
        case "after":
            return labels[labels.index(item_asked()) + 1]
        case "before":
            return labels[labels.index(item_asked()) - 1]
        case "relation":
            slots = _filled(question, "relation")
            item, other = labels.index(slots["item"]), labels.index(slots["other"])
            return "before" if item < other else "after"
        case "word order":
            return says[1][0 if "first" in question else -1]
        case "nearer":
            wanted = "far" if "farther" in question else "near"
            return only([c for c in choices if facts["near"][c] == wanted])
        case "more often":
            return max(choices, key=labels.count)
        case "presence":
            words = _filled(question, "presence")["thing"]
            (thing,) = {c for c in _NAMES if re.search(rf"\b{c}\b", words)}
            return "yes" if thing in true else "no"
        case "anybody":
            return "yes" if says else "no"
        case "any music":
            return "yes" if music else "no"
        case "silent":
            return "no" if labels or facts["background"] != "none" else "yes"
    raise AssertionError(record["sub-category"])


def test_the_answer_follows_from_the_caption(records: list) -> None:
    for _, record in records:
        assert _solve(record) == record["answer"], record


def test_open_answers_follow_from_the_caption(scenes: list) -> None:
    """Without choices too, and where the question is about what is not there."""
    open_only = {"sound heard", "word heard", "nearer", "more often", "word named", "description"}
    seen, absent = Counter(), Counter()
    for scene in scenes:
        for record in question_records(scene, choices=False):
            kind, answer = record["sub-category"], record["answer"]
            seen[kind] += 1
            facts = _facts(record["thinking"]["caption"])
            assert answer in record["thinking"]["summary"] or kind == "description"
            if (
                answer in ("nothing", "nobody speaks", "there is no music", "no sound", "0")
                or (kind == "word named" and answer == "none")
                or answer.startswith("there is no")
            ):
                absent[kind] += 1
                assert _holds_nothing(record, facts), record
            elif kind not in open_only:
                assert _solve(record) == answer, record
            elif kind == "sound heard":
                assert answer.split(" and ") == [
                    label
                    for label in dict.fromkeys(facts["labels"])
                    if label not in ("music", "speech")
                ]
            elif kind == "word heard":
                assert answer.split() == facts["says"][1]
            elif kind == "word named":
                assert answer in facts["says"][1]
            elif kind == "description":
                place = 0
                for label in facts["labels"]:  # each after the one before
                    place = answer.lower().index(_called(label), place) + 1
            for wrong in record["choices"][1:]:
                assert not string_match(answer, f"{answer} {wrong}", record["choices"]), wrong
            assert string_match(answer, answer, record["choices"])
    assert set(seen) >= set(QUESTION_TYPES) - {"pair", "sound missing"}
    assert min(absent[k] for k in ("instrument", "speaker", "sound count", "word named")) > 20


def _called(label: str) -> str:
    return {"music": "melody", "speech": "who says"}.get(label, label)


def _holds_nothing(record: dict, facts: dict) -> bool:
    """Whether what an absent question is about is really absent."""
    kind, labels = record["sub-category"], facts["labels"]
    if kind in ("instrument", "tempo", "mode", "meter", "direction"):
        return facts["music"] is None
    if kind in ("speaker", "word heard", "word order", "word count"):
        return facts["says"] is None
    if kind == "word named":
        (category,) = {c for c in LEXICON if re.search(rf"\b{c}\b", record["question"].lower())}
        return not facts["says"] or not set(facts["says"][1]) & set(LEXICON[category])
    if kind in ("distance", "sound count"):
        return not any(re.search(rf"\b{k}\b", record["question"].lower()) for k in labels)
    if kind in ("after", "before"):
        return labels.count(labels[-1 if kind == "after" else 0]) == 1
    return not [label for label in labels if label not in ("music", "speech")]


def test_held_out_phrasings_are_none_of_training_s() -> None:
    for kind in QUESTION_TYPES:
        trained = {*phrasings(kind, "train", True), *phrasings(kind, "train", False)}
        held_out = set(phrasings(kind, "test", True))
        assert held_out, kind
        assert held_out == set(phrasings(kind, "shifted", False))
        assert not trained & held_out, kind
        validation = set(phrasings(kind, "validation", True))
        assert validation and not validation & (trained | held_out), kind
        fresh = set(phrasings(kind, "fresh", True))
        assert fresh and not fresh & (trained | held_out), kind
    assert set(HELD_OUT_FRAMES) & set(TRAINING_FRAMES) == {"{q}"}
    rng = np.random.default_rng(0)
    texts = {word_question("speaker", {}, "train", False, rng) for _ in range(2000)}
    assert len(texts) > 800  # hundreds of ways to put one question


def test_no_phrasing_of_training_says_a_held_out_one_in_other_small_words() -> None:
    """Patterns are many: a held-out phrasing without its articles must not come out of them."""
    from tinygiant.models.world.patterns import PATTERNS

    small = {"the", "a", "an", "is", "are", "was", "this", "that", "of", "in"}

    def words(text: str) -> list[str]:
        found = text.lower().rstrip("?.").replace("which", "what").split()
        return [word for word in found if word not in small]

    for kind in QUESTION_TYPES:
        held_out = [
            words(t) for wordings in ("test", "fresh") for t in phrasings(kind, wordings, True)
        ]
        listed = set(WORDINGS[kind][0])  # chosen by hand, one by one
        trained = {*phrasings(kind, "train", True), *phrasings(kind, "train", False)} - listed
        assert not [text for text in trained if words(text) in held_out], kind
        assert len(PATTERNS[kind]) >= 5
        assert len(trained) > 30, kind


def test_patterns_stand_for_all_their_texts_and_leave_a_choice() -> None:
    from tinygiant.models.world.patterns import expand

    assert expand("(Is|Was) it (a bell|a drum)(| here)?") == (
        "Is it a bell?",
        "Is it a bell here?",
        "Is it a drum?",
        "Is it a drum here?",
        "Was it a bell?",
        "Was it a bell here?",
        "Was it a drum?",
        "Was it a drum here?",
    )
    assert expand("Is it (near|far) or (far|near)?") == (
        "Is it near or far?",
        "Is it far or near?",
    )
    for kind in QUESTION_TYPES:
        for text in phrasings(kind, "train", True):
            assert "|" not in text and "(" not in text and "  " not in text
            assert not re.search(r" [?.,:]", text), text
            assert text.endswith(("?", ".")), text


def test_noise_alone_is_nothing_whatever_is_asked() -> None:
    kinds = Counter()
    for scene in _scenes("train", 150, kind="noise"):
        assert describe(scene) == "Background none. First nothing."
        assert sentence(scene) == "Nothing is heard."
        for record in question_records(scene, choices=False):
            kinds[record["sub-category"]] += 1
            assert record["answer"] in {
                "Nothing is heard.",
                "nothing",
                "none",
                "nobody speaks",
                "there is no music",
                "0",
                "no",
                "yes",
            } or record["answer"].startswith("there is no ")
            if record["answer"] == "yes":
                assert record["sub-category"] == "silent"
    assert len(kinds) > 12


@pytest.mark.parametrize(
    ("kind", "shortest_s", "longest_s"),
    [
        ("core", 3, 10),
        ("long", 10, 29),
        ("short", 0.3, 2.2),
        ("empty", 0.5, 20),
        ("noise", 0.3, 29),
    ],
)
def test_each_kind_of_clip_has_its_length(kind: str, shortest_s: float, longest_s: float) -> None:
    scenes = _scenes("train", 300, kind=kind)
    lengths = [scene.duration_s for scene in scenes]
    assert shortest_s <= min(lengths)
    assert max(lengths) <= longest_s
    for scene in scenes:
        assert all(item.end_s <= scene.duration_s + 1e-9 for item in timeline(scene))
        if kind in ("empty", "noise"):
            assert not timeline(scene)
            assert sentence(scene).endswith("is heard.")
        if kind == "short":
            assert len(timeline(scene)) == 1


def test_mixed_clips_are_of_every_kind() -> None:
    kinds = Counter(scene.kind for scene in _scenes("train", 1000, kind="mixed"))
    assert set(kinds) == {"core", "long", "short", "empty", "noise"}
    assert min(kinds.values()) > 45


def test_splits_share_no_recording_and_no_person() -> None:
    def heard(split: str, kind: str) -> set:
        events = [e for scene in _scenes(split, 700, kind=kind) for e in scene.sounds]
        return {e.recording for e in events if e.recording is not None}

    trained, real = heard("train", "mixed"), heard("test", "real")
    assert len(trained) > 25
    assert len(real) > 15
    assert not trained & real
    sources = [(r.source, r.split) for r in RECORDINGS]
    assert len({source for source, _ in sources}) == len(sources)
    assert heard("test", "core") == set()
    assert SPEAKERS["train"] != SPEAKERS["test"]
    for scene in _scenes("test", 70, kind="real"):
        assert all(e.recording is not None for e in scene.sounds)
        assert scene.speech is None or scene.speech.voice == SPEAKERS["test"].name


def test_the_caption_can_be_read_back(scenes: list) -> None:
    for scene in scenes[:500]:
        facts = _facts(describe(scene))
        assert facts["labels"] == [item.label for item in timeline(scene)]
        if scene.speech:
            assert facts["says"] == (scene.speech.gender, list(scene.speech.words))
    assert parse_caption("I hear a dog.") is None


def test_response_has_the_four_parts_in_order(records: list) -> None:
    text = format_response(records[0][1])
    pattern = (
        r"<think>\n<PLANNING>\n.+</PLANNING>\n<CAPTION>\n.+</CAPTION>\n"
        r"<REASONING>\n.+</REASONING>\n<SUMMARY>\n.+</SUMMARY>\n</think>\n"
        r"<RESPONSE>\n(.+)</RESPONSE>"
    )
    assert re.fullmatch(pattern, text)[1] == records[0][1]["answer"]


def test_a_guesser_that_reads_only_the_text_stays_near_chance(scenes: list) -> None:
    """The majority choice of each question type, learnt on other clips, gains nothing."""
    learnt = defaultdict(lambda: [1.0, 3.0])

    def key(record: dict, choice: str) -> tuple:
        return (record["sub-category"], len(record["choices"]), choice)

    for scene in _scenes("train", 7000, seed=1):
        for record in question_records(scene):
            for choice in record["choices"]:
                seen = learnt[key(record, choice)]
                seen[0] += choice == record["answer"]
                seen[1] += 1
    gains = defaultdict(list)
    for scene in scenes:
        for record in question_records(scene):
            rates = [np.divide(*learnt[key(record, c)]) for c in record["choices"]]
            guess = record["choices"][int(np.argmax(rates))]
            gains[record["sub-category"]].append(
                (guess == record["answer"]) - 1 / len(record["choices"])
            )
    assert abs(np.mean([g for gain in gains.values() for g in gain])) < 0.02
    for kind, gain in gains.items():
        assert np.mean(gain) < 0.04 + 2 * np.std(gain) / np.sqrt(len(gain)), kind


def test_the_position_of_the_answer_is_uniform(records: list) -> None:
    for n in (2, 3, 4):
        at = Counter(r["choices"].index(r["answer"]) for _, r in records if len(r["choices"]) == n)
        assert max(at.values()) < 1.12 * min(at.values())


def test_no_two_sound_names_share_a_word() -> None:
    """MMAR's scoring compares sets of words."""
    words = [w for name in (*SOUND_CLASSES, *INSTRUMENTS, "speech", "music") for w in name.split()]
    assert len(words) == len(set(words))


# --- audio --------------------------------------------------------------------------------------


def _quiet(scene):
    """The scene without background, noise and copies, so that events can be measured."""
    values = {f.name: getattr(scene, f.name) for f in fields(scene)}
    return type(scene)(**{**values, "background": None, "noise_db": -90.0, "copy": "none"})


@pytest.fixture(scope="module")
def banks():
    from tests.world_stub import ToneBanks

    return ToneBanks()


@pytest.mark.parametrize("copy", ["none", "8 kHz", "mp3", "vorbis", "telephone", "laptop"])
def test_a_copy_is_as_long_as_the_clip_and_loud_enough(copy: str, banks) -> None:
    from dataclasses import replace

    from tinygiant.models.world.render import render

    scene = replace(sample_scene("train", 6, 0, banks.word_duration_s), copy=copy, gain_db=-3.0)
    samples = render(scene, banks)
    assert samples.shape == (round(scene.duration_s * 48_000),)
    assert np.isfinite(samples).all()
    assert 0.05 < np.abs(samples).max() <= 1.0
    power = np.abs(np.fft.rfft(samples)) ** 2
    above = power[np.fft.rfftfreq(samples.size, 1 / 48_000) > 4500].sum() / power.sum()
    assert (above < 1e-3) == (copy in ("8 kHz", "telephone")), above


def test_an_empty_clip_is_silent_hiss_or_a_background(banks) -> None:
    from tinygiant.models.world.render import render

    silent = 0
    for index in range(40):
        scene = sample_scene("train", index, 0, banks.word_duration_s, kind="empty")
        samples = render(scene, banks)
        if scene.noise_db < -100 and scene.copy == "none" and scene.background is None:
            assert np.abs(samples).max() < 2 / 32768
            silent += 1
        elif scene.background is not None:
            assert np.abs(samples).max() > 1e-4
    assert silent > 2


def test_noise_falls_with_frequency_as_its_scene_says(banks) -> None:
    from scipy.signal import welch

    from tinygiant.models.world.render import render

    slopes = []
    for index in range(40):
        scene = sample_scene("train", index, 0, banks.word_duration_s, kind="noise")
        if scene.copy != "none" or scene.duration_s < 2 or scene.gain_db < -40:
            continue
        f, power = welch(render(scene, banks), 48_000, nperseg=4096)
        inside = (f > 100) & (f < 15_000)
        measured = -np.polyfit(np.log(f[inside]), np.log(power[inside]), 1)[0]
        assert measured == pytest.approx(scene.hiss_slope, abs=0.1)
        slopes.append(measured)
    assert len(slopes) > 5 and min(slopes) < 0.5 and max(slopes) > 1.5  # white to brown


def test_every_sound_is_finite_and_at_full_level() -> None:
    """The buzz once had the root of a number just below zero as its last sample: a clip of NaN."""
    rng = np.random.default_rng(0)
    for kind, ranges in SOUND_PARAMETERS.items():
        for _ in range(12):
            params = {name: rng.uniform(low, high) for name, (low, high) in ranges.items()}
            samples = synthesise(kind, params, rng)
            assert np.abs(samples).max() == pytest.approx(1, abs=1e-3), kind


def test_audio_has_the_scenes_length_and_the_same_bytes_each_time(banks) -> None:
    from tinygiant.models.world.render import render

    for split in ("train", "shifted"):
        for index in range(7):
            scene = sample_scene(split, index, 0, banks.word_duration_s)
            samples = render(scene, banks)
            assert samples.dtype == np.float32
            assert samples.shape == (round(scene.duration_s * 48_000),)
            assert 0.05 < np.abs(samples).max() <= 1.0
            assert np.array_equal(samples, render(scene, banks))


def test_features_cover_the_clip_and_a_second_of_zeros(banks) -> None:
    from tinygiant.models.world.render import render

    scene = sample_scene("train", 3, 0, banks.word_duration_s)
    whisper, clap = clip_features(render(scene, banks), scene)
    assert whisper.shape == (10 * (frame_labels(scene).shape[0] + 10), 128)
    assert clap.shape == (1, 1001, 64)
    assert whisper.dtype == clap.dtype == np.float16
    assert np.ptp(whisper[-80:].astype(np.float32)) == 0  # nothing but the floor


def test_onsets_can_be_counted_in_the_audio(banks) -> None:
    """librosa's onset strength rises where, and as often as, knocks are in the scene."""
    import librosa

    from tinygiant.models.world.render import render

    checked = 0
    for index in range(0, 2800, 7):
        scene = _quiet(sample_scene("test", index, 0, banks.word_duration_s))
        if {e.kind for e in scene.sounds} - {"door knock", "hand clap"}:
            continue
        samples = librosa.resample(render(scene, banks), orig_sr=48_000, target_sr=16_000)
        strength = librosa.onset.onset_strength(y=samples, sr=16_000, hop_length=160)
        peaks = librosa.util.peak_pick(
            strength, pre_max=12, post_max=12, pre_avg=30, post_avg=30, delta=1.0, wait=20
        )
        expected = [e.start_s for e in scene.sounds]
        assert len(peaks) == len(expected), scene.id
        assert np.allclose(peaks / 100, expected, atol=0.08), scene.id
        checked += 1
    assert checked >= 5


def test_the_melody_goes_where_the_scene_says(banks) -> None:
    """librosa's pitch of off-beat notes (no chord under them but its tail) rises or falls."""
    import librosa

    from tinygiant.models.world.render import render

    checked = 0
    for index in range(1, 85, 7):
        scene = _quiet(sample_scene("test", index, 0, banks.word_duration_s))
        music = scene.music
        samples = librosa.resample(render(scene, banks), orig_sr=48_000, target_sr=16_000)
        for beat in (1, music.meter + 1):
            middle = round((music.start_s + (beat + 0.5) * music.beat_s) * 16_000)
            spectrum = np.abs(np.fft.rfft(samples[middle - 512 : middle + 512], 16_384))
            f = np.fft.rfftfreq(16_384, 1 / 16_000)
            expected = librosa.midi_to_hz(music.pitches[beat]) * music.detune
            above = f > librosa.midi_to_hz(music.tonic - 3)  # over the chord, an octave below
            heard = f[above][np.argmax(spectrum[above])]
            assert abs(12 * np.log2(heard / expected)) < 0.4, (scene.id, beat)
            checked += 1
        assert np.sign(music.pitches[-1] - music.pitches[0]) == (1 if music.rising else -1)
    assert checked >= 20


def test_far_is_duller_and_longer_than_near(banks) -> None:
    from dataclasses import replace

    import librosa

    from tinygiant.models.world.render import render

    for index in (0, 7, 14, 21, 28):
        scene = _quiet(sample_scene("train", index, 0, banks.word_duration_s))
        tails = []
        for near in (True, False):
            event = replace(scene.sounds[0], near=near, kind="hand clap", start_s=0.2)
            event = replace(event, params={"duration_s": 0.16, "pitch_hz": 1500.0, "decay_s": 0.03})
            samples = render(replace(scene, sounds=(event,), gain_db=0.0), banks)
            tail = np.sum(samples[round(0.45 * 48_000) :] ** 2) / np.sum(samples**2)
            dull = librosa.feature.spectral_centroid(y=samples[:24_000], sr=48_000).mean()
            tails.append((tail, -dull))
        assert tails[1][0] > 5 * tails[0][0]
