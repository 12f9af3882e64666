"""The model inside the package: trained, small, of the committed checkpoint, and it hears."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import soundfile

from tinygiant.runtime import Answer, TinyGiant, load
from tinygiant.runtime.bundle import Bundle, default_bundle_path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "nano"
CLIP = ROOT / "examples" / "tiger-and-birds.flac"
MB = 10**6


@pytest.fixture(scope="module")
def model() -> TinyGiant:
    return load(ROOT / "runtime" / "bundles" / "nano", threads=1)


def test_it_is_the_default() -> None:
    assert default_bundle_path().samefile(ROOT / "runtime" / "bundles" / "nano")


def test_it_was_made_from_the_committed_checkpoint() -> None:
    """``tg-export checkpoints/nano -o runtime/bundles/nano --force`` makes it again."""
    manifest = Bundle.open(ROOT / "runtime" / "bundles" / "nano").manifest
    weights = CHECKPOINT / "model.safetensors"
    assert manifest.source.weights == "trained"
    assert manifest.source.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert sum(file.size_bytes for file in manifest.files) <= 15 * MB
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 30 * MB


@pytest.mark.parametrize(
    ("question", "choices", "answer"),
    [
        ("What animal is heard in the speech?", ["monkey", "tiger", "spider", "rabbit"], "tiger"),
        ("How many times is the bird chirp heard?", ["1", "3", "2"], "3"),
        ("What comes last?", ["bird chirp", "speech"], "bird chirp"),
    ],
)
def test_it_answers_the_questions_of_the_example(
    model: TinyGiant, question: str, choices: list[str], answer: str
) -> None:
    """A clip of the test split, which has no voice and no sound setting of the training split."""
    for order in (choices, choices[::-1]):
        found = model.ask(CLIP, question, order)
        assert found.text == answer
        assert found.finish_reason == "stop"
        # It thinks in four parts, the thought leads to the answer, and nothing is left over.
        assert found.plan and found.logic and found.unparsed == ""
        assert answer in found.summary
        assert "bird chirp" in found.audio_analysis


def test_what_it_says_depends_on_what_it_hears(model: TinyGiant) -> None:
    """The clip's beginning: the word alone, then the word and the first of three chirps."""
    samples, rate_hz = soundfile.read(CLIP, dtype="float32")

    def ask(seconds: float) -> Answer:
        clip = (samples[: round(seconds * rate_hz)], rate_hz)
        return model.ask(clip, "What comes last?", ["bird chirp", "speech"])

    answers = {seconds: ask(seconds) for seconds in (0.9, 1.5, 3.8)}
    assert [a.text for a in answers.values()] == ["speech", "bird chirp", "bird chirp"]
    assert [a.audio_analysis.count("bird chirp") for a in answers.values()] == [0, 1, 3]
    assert all("says tiger" in a.audio_analysis for a in answers.values())
