"""The benchmark: the official match, statistics, resumable runs, both models behind it, tables."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import figures, mmar
from benchmarks.answering import Question, Reply, RuntimeAnswerer, thought_of
from benchmarks.predictions import RunLog, read_items, read_predictions
from benchmarks.report import read_results, write_result
from benchmarks.scoring import (
    Comparison,
    Item,
    agreement,
    breakdown,
    calibration_error,
    caption_parts,
    compare,
    names,
    string_match,
    tally,
    well_formed,
    wilson_interval,
)
from tinygiant.runtime.errors import BundleError, StorageError, UsageError

ROOT = Path(__file__).resolve().parents[1]
Tone = Callable[[float, int], NDArray[np.float32]]

CAPTION = "Background rain. First dog bark near, then a woman says red tiger, then bell far."
THOUGHT = "<PLANNING>\nListen.</PLANNING>\n<CAPTION>\n{}</CAPTION>\n<SUMMARY>\n{}</SUMMARY>"


# --- the match ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "prediction", "choices", "right"),
    [
        ("a dog", "a dog", ["a dog", "a cat"], True),
        ("a dog", "A DOG!", ["a dog", "a cat"], True),
        ("a dog", "dog, a", ["a dog", "a cat"], True),
        ("a dog", "I hear a dog, surely", ["a dog", "a cat"], True),
        ("a dog", "dog", ["a dog", "a cat"], False),  # a token of the answer is missing
        ("a dog", "a dog or a cat", ["a dog", "a cat"], False),  # a token of another choice only
        ("a dog", "a cat", ["a dog", "a cat"], False),
        ("a dog", "", ["a dog", "a cat"], False),
        ("a dog", " .?! ", ["a dog", "a cat"], False),
        ("a dog", "A", ["a dog", "a cat"], False),  # a bare letter never matches
        ("a dog", "(A)", ["a dog", "a cat"], False),
        ("a dog", "A. a dog", ["a dog", "a cat"], True),
        ("a dog", "a dog barks", ["a dog", "a dog barks"], False),
        ("a dog barks", "a dog", ["a dog", "a dog barks"], False),
        ("dog then cat", "cat then dog", ["dog then cat", "cat then dog"], True),  # sets, no order
        ("2", "2", ["2", "12"], True),
        ("2", "12", ["2", "12"], False),
        ("音乐", "音乐", ["音乐", "语音"], True),
        ("don't know", "dont know", ["don't know", "no"], False),  # don, t
        ("...", "...", ["...", "a"], False),  # no word at all
        ("snake_case", "SNAKE_CASE", ["snake_case", "snake"], True),
    ],
)
def test_string_match(answer: str, prediction: str, choices: list[str], right: bool) -> None:
    assert string_match(answer, prediction, choices) is right


WORDS = ["a", "the", "dog", "cat", "3", "bark", "Über", "猫", "it's"]
phrases = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join)


def token_set(phrase: str) -> set[str]:
    return set(phrase.lower().replace("'", " ").split())


@given(choices=st.lists(phrases, min_size=2, max_size=6, unique=True), data=st.data())
def test_an_exact_choice_is_right_if_and_only_if_it_has_the_answers_words(
    choices: list[str], data: st.DataObject
) -> None:
    answer, prediction = (data.draw(st.sampled_from(choices)) for _ in range(2))
    same = token_set(answer) == token_set(prediction)
    assert string_match(answer, prediction, choices) is same


@given(
    answer=st.text(max_size=12),
    prediction=st.text(max_size=12),
    choices=st.lists(st.text(max_size=12), max_size=4),
)
def test_match_ignores_case_order_of_choices_and_punctuation(
    answer: str, prediction: str, choices: list[str]
) -> None:
    right = string_match(answer, prediction, choices)
    assert string_match(answer, f"  {prediction} ?!", choices[::-1]) is right
    assert string_match(answer, prediction, [*choices, answer, *choices]) is right


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341), (464, 1000, 0.43329, 0.49498)],
)
def test_wilson_interval_on_published_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=2e-5)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_solves_its_definition(counts: tuple[int, int]) -> None:
    correct, n = counts
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= correct / n <= high
    for bound in (low, high):
        if n and 0 < bound < 1:  # where the score statistic is exactly z
            z = (correct / n - bound) / np.sqrt(bound * (1 - bound) / n)
            assert abs(z) == pytest.approx(1.959964, rel=1e-4)


def make_item(item_id: str, answer: str = "a", **changes: Any) -> Item:
    values: dict[str, Any] = {
        "id": item_id,
        "audio_path": f"audio/{item_id}.wav",
        "question": "What is heard?",
        "choices": ("a", "b", "c", "d"),
        "answer": answer,
        "modality": "sound",
        "category": "perception",
        "sub_category": "heard",
        "caption": None,
    }
    return Item(**values | changes)


def test_tally_and_breakdown() -> None:
    items = [
        make_item("1", modality="speech"),
        make_item("2", "b", choices=("a", "b"), modality="sound"),
        make_item("3", modality="zoo"),
        make_item("4"),
    ]
    answers = {"1": "a", "2": "a", "3": "a"}  # 4 has no prediction: it does not count
    whole = tally(items, answers)
    assert (whole.n, whole.correct) == (3, 2)
    assert whole.chance == pytest.approx((0.25 + 0.5 + 0.25) / 3)
    groups = breakdown(items, answers, "modality")
    assert list(groups) == ["sound", "speech", "zoo"]  # MMAR's order first
    assert {name: (g.n, g.correct) for name, g in groups.items()} == {
        "sound": (1, 0),
        "speech": (1, 1),
        "zoo": (1, 1),
    }


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        ("two", True),
        ("A bell near, then a man who says red.", True),
        ("x < y and y > z", True),
        ("", False),
        ("  ", False),
        ("<CAPTION>\nBackground none.</CAPTION>", False),
        ("two</RESPONSE>", False),
        ("<|im_end|>", False),
        ("dog " * 61, False),
    ],
)
def test_well_formed(answer: str, good: bool) -> None:
    assert well_formed(answer) is good


def test_calibration_error_by_hand() -> None:
    """Two bins: of 0.9 half is right (0.4 off, two of four), of 0.5 half is right (0 off)."""
    assert calibration_error([0.9, 0.9, 0.5, 0.5], [True, False, True, False]) == pytest.approx(0.2)
    assert calibration_error([1.0] * 3, [True] * 3) == 0
    assert calibration_error([1.0] * 3, [False] * 3) == 1
    assert calibration_error([], []) == 0


def test_silence_is_counted() -> None:
    items = [make_item(str(k), "Nothing is heard.", open=True) for k in range(3)]
    said = {"0": "Nothing is heard.", "1": "A bell near.", "2": "nothing is heard: it is silent"}
    assert mmar.score(items, said, {})["silence"] == {"n": 3, "says_nothing": 2}


def test_comparison_counts_discordant_pairs() -> None:
    items = [make_item(str(k)) for k in range(6)]
    a = {"0": "a", "1": "a", "2": "b", "3": "a", "4": "b"}
    b = {"0": "a", "1": "b", "2": "b", "3": "b", "4": "a", "5": "a"}
    paired = compare(items, a, b)
    assert (paired.n, paired.only_a, paired.only_b) == (5, 2, 1)
    assert paired.difference_points == pytest.approx(-20.0)
    assert paired.p_value == 1.0


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 6), (10, 3), (70, 100), (600, 500)])
def test_mcnemar_is_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    from scipy.stats import binomtest

    n = only_a + only_b
    expected = binomtest(only_a, n, 0.5).pvalue if n else 1.0
    assert Comparison(n or 1, 0, 0, only_a, only_b).p_value == pytest.approx(expected, rel=1e-9)


# --- thoughts -----------------------------------------------------------------------------------


def test_names_wants_whole_words_in_order() -> None:
    assert names("The first is Dog bark.", "dog bark")
    assert not names("The first is dogbark.", "dog bark")
    assert not names("The bark of a dog.", "dog bark")
    assert names("That makes 3.", "3")
    assert not names("That makes 13.", "3")
    assert not names("", "3")
    assert not names("anything", "")


@pytest.mark.parametrize(
    "text",
    [CAPTION, "Background none. First bell near.", "Background a b. First bell.", "bell.", ""],
)
def test_caption_parts_is_the_worlds_own_grammar(text: str) -> None:
    from tinygiant.models.world.thought import parse_caption

    assert caption_parts(text) == (parse_caption(text) or (None, []))


def test_agreement_by_hand() -> None:
    choices = ("dog bark", "bell")
    items = [make_item(k, "dog bark", choices=choices, caption=CAPTION) for k in ("1", "2")]
    items.append(make_item("3"))  # no caption: not counted
    wrong = "Background wind. First dog bark near, then dog bark near."
    found = agreement(
        items,
        {"1": "dog bark", "2": "bell", "3": "a"},
        {
            "1": THOUGHT.format(CAPTION, "It is a dog bark."),
            "2": THOUGHT.format(wrong, "It is a dog bark."),
        },
    )
    assert found == {
        "n": 2,
        "summary_names_answer": 0.5,
        "caption_exact": 0.5,
        "scene_named": 0.5,
        "background": 0.5,
        "item_precision": (3 + 1) / (3 + 2),
        "item_recall": (3 + 1) / (3 + 3),
        "accuracy_if_caption_exact": 1.0,
        "accuracy_otherwise": 0.0,
    }
    assert agreement(items[2:], {"3": "a"}, {}) is None
    # A model without thoughts has none that could disagree.
    assert agreement(items, {"1": "a", "2": "b"}, {"1": "", "2": ""}) is None


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("Background rain. First dog bark far, then a man says one, then violin rising.", True),
        ("Background none. First dog bark near, then a man says two, then violin falling.", False),
        ("Background rain. First a man says two, then dog bark near, then violin falling.", False),
        ("Background rain. First dog bark near, then a woman says two, then violin fast.", False),
        ("Background rain. First dog bark near, then a man says two, then cello falling.", False),
        ("Background rain. First dog bark near, then a man says two.", False),
    ],
)
def test_a_scene_is_named_whatever_is_said_of_its_attributes(said: str, named: bool) -> None:
    caption = "Background rain. First dog bark near, then a man says two, then violin falling."
    item = make_item("1", "dog bark", choices=("dog bark", "bell"), caption=caption)
    found = agreement([item], {"1": "dog bark"}, {"1": THOUGHT.format(said, "It is a dog bark.")})
    assert found is not None and found["scene_named"] == named


def test_the_worlds_records_agree_with_themselves() -> None:
    """What the data says counts as full agreement, or nobody could reach it."""
    from tinygiant.models.world.questions import question_records
    from tinygiant.models.world.scene import sample_scene
    from tinygiant.models.world.thought import format_response

    scenes = [sample_scene("test", index, 0, lambda *_: 0.4) for index in range(40)]
    records = [record for scene in scenes for record in question_records(scene, 8)]
    items = [
        make_item(
            r["id"], r["answer"], choices=tuple(r["choices"]), caption=r["thinking"]["caption"]
        )
        for r in records
    ]
    answers = {r["id"]: r["answer"] for r in records}
    found = agreement(items, answers, {r["id"]: thought_of(format_response(r)) for r in records})
    assert found is not None and found.pop("n") == len(records)
    assert found.pop("accuracy_otherwise") is None
    assert set(found.values()) == {1.0}


def test_thought_of_a_raw_text() -> None:
    assert thought_of("<think>\nPlan: x\n</think>\n<RESPONSE>\na</RESPONSE>") == "Plan: x"
    assert thought_of("cut sho") == "cut sho"


# --- runs ---------------------------------------------------------------------------------------


class FakeAnswerer:
    """Answers with the last choice; fails on questions that say so."""

    def __init__(self, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self.identity = "fake-1"
        self.about = {"name": "fake", "recipe": "none", "size_bytes": 1}
        self.asked: list[list[str]] = []

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        self.asked.append([q.audio.stem for q in questions])
        for question in questions:
            if "fail" in question.question:
                raise ValueError("cannot\nhear")
            if "damaged" in question.question:
                raise BundleError("damaged")
        return [Reply(q.choices[-1], "Plan: listen") for q in questions]


@pytest.fixture
def items(tmp_path: Path) -> list[Item]:
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "0.wav").touch()
    return [make_item(str(k), question="fail" if k == 2 else "ok") for k in range(5)]


def open_log(tmp_path: Path, **changes: str) -> RunLog:
    return RunLog(tmp_path / "out" / "p.jsonl", {"model": "fake-1", "questions": "q"} | changes)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_item_gets_one_official_line(
    items: list[Item], tmp_path: Path, batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    log = open_log(tmp_path)
    mmar.answer_items(items, tmp_path, FakeAnswerer(batch_size), log)
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    for line, item in zip(lines, items, strict=True):
        assert line.keys() == {"id", "thinking_prediction", "answer_prediction"}
        assert line["answer_prediction"] in item.choices
    assert lines[2]["answer_prediction"] == items[2].choices[0]
    errors = capsys.readouterr().err
    assert "mmar: 2 failed: cannot hear" in errors and "1 failed" not in errors
    assert [d["error"] for d in log.details.values()] == [None, None, "cannot hear", None, None]


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_run_that_was_killed_goes_on(items: list[Item], tmp_path: Path, cut: int) -> None:
    whole = open_log(tmp_path)
    mmar.answer_items(items, tmp_path, FakeAnswerer(), whole)
    expected = whole.path.read_text()
    whole.path.write_text(expected[: len(expected) - cut])

    again, answerer = open_log(tmp_path), FakeAnswerer()
    done = set(again.answers)
    mmar.answer_items(items, tmp_path, answerer, again)
    assert {stem for batch in answerer.asked for stem in batch} == {i.id for i in items} - done
    assert whole.path.read_text() == expected
    assert list(again.details) and set(again.details) == {i.id for i in items}
    assert again.answers == whole.answers and again.thoughts == whole.thoughts


def test_an_output_of_another_run_is_refused(items: list[Item], tmp_path: Path) -> None:
    mmar.answer_items(items[:1], tmp_path, FakeAnswerer(), open_log(tmp_path))
    with pytest.raises(UsageError, match="another model:"):
        open_log(tmp_path, model="fake-2")
    with pytest.raises(UsageError, match="another questions:"):
        open_log(tmp_path, questions="other")
    (tmp_path / "out" / "p.run.jsonl").unlink()
    with pytest.raises(UsageError, match="choose another output"):
        open_log(tmp_path)


def test_what_stops_a_run(items: list[Item], tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(UsageError, match="none of the 5 audio files"):
        mmar.answer_items(items, tmp_path / "elsewhere", FakeAnswerer(), log)
    with pytest.raises(BundleError):
        mmar.answer_items(
            [make_item("0", question="damaged")], tmp_path, FakeAnswerer(batch_size=2), log
        )
    assert log.answers == {}
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        RunLog(tmp_path / "file" / "p.jsonl", {})


def test_unusual_text_survives_the_files(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.add("\u2028", "a\u2029b \x85 音", 'say "x"\n\u2028', seconds=1.0, error=None)
    log.add("2", "b", "", seconds=1.0, error=None)
    answers, thoughts = read_predictions(log.path)
    assert answers == {"\u2028": "a\u2029b \x85 音", "2": "b"}
    assert thoughts["\u2028"] == 'say "x"\n\u2028'
    assert len(open_log(tmp_path).answers) == 2


RECORD = {
    "id": "x1",
    "audio_path": "./audio/x1.wav",
    "question": "What is heard?",
    "choices": ["a dog barks", "a siren"],
    "answer": "a dog barks",
    "modality": "mix-sound-speech",
    "category": "Signal Layer",
    "sub-category": "Acoustic Quality",
    "language": "en",
    "thinking": "one text",
    "cue": [],
    "rubric": [],
}


def write_meta(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_official_and_synthetic_records(tmp_path: Path) -> None:
    synthetic = RECORD | {"id": "x2", "thinking": {"caption": CAPTION}}
    write_meta(tmp_path / "meta.jsonl", RECORD, synthetic)
    official, own = read_items(tmp_path)  # a split's folder
    assert official == read_items(tmp_path / "meta.jsonl")[0]
    assert official.choices == ("a dog barks", "a siren")
    assert (official.sub_category, official.caption) == ("Acoustic Quality", None)
    assert own.caption == CAPTION


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no question"),
        ([RECORD, RECORD], "comes twice"),
        ([{k: v for k, v in RECORD.items() if k != "choices"}], "choices"),
        ([RECORD | {"choices": [1, 2]}], "texts"),
        ([["a list"]], "not a question"),
    ],
)
def test_damaged_questions(records: list[Any], message: str, tmp_path: Path) -> None:
    meta = write_meta(tmp_path / "meta.jsonl", *records)
    with pytest.raises(UsageError, match=message):
        read_items(meta)


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    lines = [{"id": "x1", "thinking_prediction": "", "answer_prediction": "a siren"}]
    return write_meta(tmp_path / "p.jsonl", *lines)


def test_score_and_compare_commands(
    tmp_path: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = write_meta(tmp_path / "meta.jsonl", RECORD, RECORD | {"id": "x2"})
    right = write_meta(tmp_path / "r.jsonl", {"id": "x1", "answer_prediction": "a dog barks"})
    assert mmar.main(["score", str(predictions), "--meta", str(meta)]) == 0
    output = capsys.readouterr().out
    scored = json.loads(output.splitlines()[-1])
    assert (scored["n"], scored["correct"], scored["chance"]) == (1, 0, 0.5)
    assert scored["by_modality"]["mix-sound-speech"]["n"] == 1
    assert "1 of 2 have no prediction" in output
    assert mmar.main(["compare", str(predictions), str(right), "--meta", str(meta)]) == 0
    compared = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert compared["all"]["difference_points"] == 100.0
    assert compared["mix-sound-speech"]["only_b"] == 1


def test_failures_are_one_line(
    tmp_path: Path, predictions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = write_meta(tmp_path / "meta.jsonl", RECORD | {"id": "other"})
    calls = [
        (["score", str(predictions), "--meta", str(meta)], "unknown questions"),
        (["score", str(predictions), "--meta", str(tmp_path / "no")], "cannot be read"),
        (["--meta", str(meta), "--bundle", str(tmp_path / "no")], "no such bundle"),
    ]
    for call, message in calls:
        assert mmar.main(call) in (UsageError.exit_code, BundleError.exit_code)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory, tone: Tone) -> Path:
    """Four questions about two clips, one of which is longer than a chunk, and one broken file."""
    folder = tmp_path_factory.mktemp("set") / "test"
    (folder / "audio").mkdir(parents=True)
    choices = ["a dog", "a siren", "the bell rings", "a door closes"]
    records = []
    for number, seconds in enumerate((1.3, 2.2)):
        path = f"audio/clip{number}.flac"
        sf.write(folder / path, tone(seconds, 16_000), 16_000)
        for question in ("What is heard?", "Which sound comes first?"):
            texts = {"question": question, "choices": choices[number:], "answer": "a siren"}
            item_id = f"{number}-{len(records)}"
            records.append(RECORD | texts | {"id": item_id, "audio_path": path})
    (folder / "audio" / "broken.wav").write_bytes(b"RIFF")
    records.append(RECORD | {"id": "broken", "audio_path": "audio/broken.wav"})
    write_meta(folder / "meta.jsonl", *records)
    return folder


def test_a_bundle_from_end_to_end(
    small_set: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("benchmarks.mmar.write_result", _write_to(tmp_path))
    command = [
        "--meta", str(small_set), "--bundle", str(tiny_bundle), "--threads", "1",
        "--max-new-tokens", "20", "-o", str(tmp_path / "p.jsonl"), "--save", "tiny",
    ]  # fmt: skip
    assert mmar.main([*command, "--limit", "2"]) == 0
    first = (tmp_path / "p.jsonl").read_text()
    assert mmar.main(command) == 0
    captured = capsys.readouterr()
    assert (tmp_path / "p.jsonl").read_text().startswith(first)
    printed = json.loads(captured.out.splitlines()[-1])
    assert (printed["n"], printed["questions"]["name"], printed["failed"]) == (
        5,
        "synthetic test",
        1,
    )
    assert "mmar: broken failed:" in captured.err
    answers, _ = read_predictions(tmp_path / "p.jsonl")
    assert all(answers[item.id] in item.choices for item in read_items(small_set))
    assert printed["wall_s"] > 0

    [result] = read_results([tmp_path / "tiny.json"], "mmar")
    assert result["result"]["correct"] == printed["correct"]
    assert result["command"].startswith("python -m benchmarks.mmar --meta ")
    assert result["model"]["weights"] == "seeded-random"
    assert result["machine"]["cores"] >= 1 and "numpy" in result["versions"]
    assert "| synthetic test | 5 |" in figures.accuracy_table([result])


def test_open_questions_show_no_choices_and_failures_of_them_are_wrong(
    small_set: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choices of an open record begin with its answer: an item that failed once got that."""
    records = [RECORD | {"open": True, "audio_path": p, "id": p, "answer": "a dog barks"}
               for p in ("audio/0.wav", "audio/broken.wav")]  # fmt: skip
    meta = write_meta(small_set / "open.jsonl", *records)
    seen = []

    class Watched(RuntimeAnswerer):
        def answer(self, questions: Sequence[Question]) -> list[Reply]:
            seen.extend(questions)
            return super().answer(questions)

    answerer = Watched(tiny_bundle, max_new_tokens=12, threads=1)
    log = RunLog(tmp_path / "p.jsonl", {"model": "m"})
    items = read_items(meta)
    mmar.answer_items(items, small_set, answerer, log)
    assert all(question.open for question in seen)
    failed = log.answers["audio/broken.wav"]
    assert failed == "" and log.details["audio/broken.wav"]["error"]
    result = mmar.score(items, log.answers, log.thoughts)
    assert result["correct"] == 0 and result["chance"] == 0
    assert result["well_formed"] <= 0.5
    capsys.readouterr()


def test_answers_without_a_thought_have_a_calibration_error(
    small_set: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--meta", str(small_set), "--bundle", str(tiny_bundle), "--threads", "1"]
    output = tmp_path / "p.jsonl"
    assert mmar.main([*command, "--no-think", "-o", str(output)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = (tmp_path / "p.run.jsonl").read_text().splitlines()[1:]
    sure = [json.loads(line)["confidence"] for line in lines if '"broken"' not in line]
    assert len(sure) == 4 and all(1 / 4 < value <= 1 for value in sure)
    assert 0 <= result["calibration_error"] <= 1
    assert mmar.main([*command, "-o", str(output)]) == UsageError.exit_code  # another run's file


def _write_to(folder: Path) -> Callable[..., Path]:
    def write(name: str, benchmark: str, command: str, data: dict[str, Any]) -> Path:
        return write_result(name, benchmark, command, data, folder)

    return write


def test_torch_answers_as_the_runtime_does(
    small_set: Path,
    tiny_bundle: Path,
    tiny_model: Any,
    tokenizer_file: Path,
    tmp_path: Path,
) -> None:
    """One by one, and in batches padded to one length."""
    from benchmarks.torch_reference import TorchReference
    from tinygiant.models import save

    checkpoint = tmp_path / "checkpoint"
    save(tiny_model, checkpoint, tokenizer=tokenizer_file)
    questions = [
        Question(small_set / item.audio_path, item.question, item.choices)
        for item in read_items(small_set)[:4]
    ]
    for budget in (1, 24):
        free = RuntimeAnswerer(tiny_bundle, max_new_tokens=budget, threads=1, raw=True)
        expected = free.answer(questions)
        single = TorchReference(checkpoint, max_new_tokens=budget)
        assert [single.answer([question])[0] for question in questions] == expected
        batched = TorchReference(checkpoint, max_new_tokens=budget, batch_size=4)
        assert batched.answer(questions) == expected


def test_questions_in_work_at_a_time_change_no_score(
    small_set: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clip is broken: its question fails by itself, the others of its dozen are asked again."""
    command = ["--meta", str(small_set), "--bundle", str(tiny_bundle), "--threads", "1"]
    found = []
    for parallel in ("1", "3"):
        output = tmp_path / f"{parallel}.jsonl"
        assert mmar.main([*command, "--parallel", parallel, "-o", str(output)]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        found.append((output.read_text(), result["failed"], result["correct"]))
    assert found[0] == found[1]
    assert found[0][1] == 1
    assert mmar.main([*command, "--parallel", "2", "--torch", "x"]) == UsageError.exit_code


def test_bundles_are_measured_without_torch() -> None:
    """As on a board, where only the runtime is installed."""
    code = "import sys, benchmarks.mmar; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- tables and the picture ---------------------------------------------------------------------


def make_result(
    sha: str, correct: int, intent: bool = True, gate: bool = True, questions: str = "q"
) -> dict[str, Any]:
    def group(correct: int, n: int) -> dict[str, Any]:
        low, high = wilson_interval(correct, n)
        return {"n": n, "correct": correct, "accuracy": correct / n, "ci95": [low, high]}

    return {
        "questions": {"name": "test", "sha256": questions},
        "model": {
            "name": "nano",
            "recipe": "int8",
            "checkpoint_sha256": sha,
            "intent_query": intent,
            "semantic_gate": gate,
            "size_bytes": 9_000_000,
        },
        "result": group(correct + 10, 40)
        | {"chance": 0.3, "s_per_question": 0.5}
        | {"by_modality": {"sound": group(10, 20), "mix-sound-speech": group(correct, 20)}},
    }


def test_ablation_table() -> None:
    results = [
        make_result("1", 10),
        make_result("2", 12),
        make_result("3", 5, intent=False),
        make_result("4", 4, intent=False, gate=False),
    ]
    table = figures.ablation_table(results)
    assert "| S-Sp | 20 | 20.00 | 25.00 | – | 55.00 ± 7.07 |" in table
    assert "| mixtures | 20 | 20.00 | 25.00 | – | 55.00 ± 7.07 |" in table
    assert "| overall | 40 | 35.00 | 37.50 | – | 52.50 ± 3.54 |" in table
    assert "| seeds | | 1 | 1 | 0 | 2 |" in table
    assert "| S-M | 9.09 | 18.18 | 36.36 | 45.45 |" in table  # the paper's
    with pytest.raises(UsageError, match="same checkpoint"):
        figures.ablation_table([results[0], results[0]])
    with pytest.raises(UsageError, match="different questions"):
        figures.ablation_table([results[0], make_result("9", 1, questions="other")])


def test_the_papers_table_adds_up() -> None:
    """MMAR's counts by modality give each variant's overall accuracy, but for one.

    Without the intent query the modalities make 394 right answers; the paper says 39.70 %.
    """
    n = np.array([165, 206, 294, 11, 218, 82, 24])
    sums = {
        variant: int(np.round(np.array(row[:-1]) * n / 100).sum())
        for variant, row in figures.PAPER.items()
    }
    assert sums == {"vanilla": 380, "no intent query": 394, "no CLAP gate": 427, "full": 464}


def test_picture_and_results_on_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = write_result("nano.int8", "mmar", "python -m x", make_result("1", 10), tmp_path)
    other = write_result("speed", "speed", "python -m y", {}, tmp_path)
    picture = tmp_path / "docs" / "size.png"
    assert figures.main(["size", str(path), str(other), "-o", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert figures.main(["accuracy", str(other)]) == UsageError.exit_code
    assert "no result of benchmark mmar" in capsys.readouterr().err
    with pytest.raises(UsageError, match="result name"):
        write_result("../up", "mmar", "", {}, tmp_path)


def test_the_temperature_of_choices_is_found_again() -> None:
    """A model twice as sure as it may be: answers come from the roots of what it says."""
    from benchmarks.calibrate import fit_temperature

    rng = np.random.default_rng(0)
    said, right = [], []
    for n in rng.integers(2, 5, 4000):
        row = rng.dirichlet(np.full(n, 0.5)) + 1e-6
        said.append(row / row.sum())
        roots = np.sqrt(row)
        right.append(int(rng.choice(n, p=roots / roots.sum())))
    hits = [int(row.argmax()) == k for row, k in zip(said, right, strict=True)]
    temperature, sure = fit_temperature(said, right)
    assert temperature == pytest.approx(2.0, rel=0.06)
    assert calibration_error(sure, hits) < 0.03 < calibration_error([max(r) for r in said], hits)
