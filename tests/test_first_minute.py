"""A newcomer's first minute with the model inside: their question, their recording, one command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.runtime import TinyGiant, load
from tinygiant.runtime.cli.main import main
from tinygiant.runtime.cli.records import event_record

CLIP = Path(__file__).resolve().parents[1] / "examples" / "tiger-and-birds.flac"
SOUND, RATE_HZ = soundfile.read(CLIP, dtype="float32")
QUESTION, CHOICES = "What animal is heard in the speech?", ["monkey", "tiger", "spider", "rabbit"]


@pytest.fixture(scope="module")
def model() -> TinyGiant:
    return load(CLIP.parents[1] / "runtime" / "bundles" / "nano", threads=1)


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """``tg-run`` on samples written to a file: its standard output and error."""

    def run(samples: NDArray[np.float32], question: str, *options: str) -> tuple[str, str]:
        path = tmp_path / "clip.wav"
        soundfile.write(path, samples, RATE_HZ, subtype="PCM_16")
        assert main([str(path), question, *options]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.mark.parametrize("options", [(), ("--no-think",), ("--max-new-tokens", "5")])
@pytest.mark.parametrize(
    "question",
    [QUESTION, "What is heard?", "Describe the recording.", "Is there a bird?", "Was?", "Why not?"],
)
def test_a_plain_question_on_the_command_line(ask, question: str, options: tuple[str, ...]) -> None:
    """Of 40 such questions all printed raw tags as the answer, with empty parts before it."""
    out, _ = ask(SOUND, question, "--json", *options)
    answer = json.loads(out)
    thought = [answer[part] for part in ("plan", "audio_analysis", "logic", "summary")]
    for text in [answer["text"], *thought]:
        assert not re.search(r"</?[A-Za-z]|<\|", text)
    assert answer["text"].strip() and answer["unparsed"] == ""
    if not options:
        assert all(thought)
    text_out, _ = ask(SOUND, question, *options)
    assert "<" not in text_out and text_out.endswith(f"Answer:\n{answer['text']}\n")


def test_raw_text_is_shown_where_it_is_asked_for(ask, model: TinyGiant) -> None:
    raw = json.loads(ask(SOUND, QUESTION, "--json", "--raw")[0])["raw_text"]
    kept = model.ask(CLIP, QUESTION)
    assert raw.startswith("<think>")
    assert kept.raw_text.count("</RESPONSE>") == 1


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        (np.zeros(3 * RATE_HZ), "silent"),
        (np.full(3 * RATE_HZ, 0.05), "silent"),
        (np.full(1, 0.5), "too short"),
        (np.zeros((RATE_HZ, 2)), "silent"),
    ],
    ids=["zeros", "offset", "one-sample", "stereo"],
)
def test_of_silence_the_model_is_not_asked(ask, samples: NDArray[np.float32], why: str) -> None:
    """It answered "a woman says elephant", without a word about the clip."""
    out, err = ask(samples, "What is heard?")
    assert out == f"Answer:\nNothing is heard: the clip is {why}.\n"
    assert f"tg-run: note: {why}" in err
    assert "listened" not in err and "tokens" not in err
    out, _ = ask(samples, "What is heard?", "--json", "--choices", "a dog", "nothing", "a siren")
    answer = json.loads(out)
    assert (answer["text"], answer["choice_index"]) == ("nothing", 1)
    assert answer["tokens"]["prompt"] == answer["tokens"]["generated"] == 0
    assert any(note.startswith(why) for note in answer["audio"]["notes"])


@pytest.mark.parametrize("level_db", [-60, -40, -25])
@pytest.mark.parametrize("slope", [0, 1, 2], ids=["white", "pink", "brown"])
def test_of_noise_the_model_says_nothing_is_heard(
    model: TinyGiant, slope: int, level_db: int
) -> None:
    """It once heard rain or wind in the hiss of a quiet recording: six times of six."""
    n = 3 * RATE_HZ
    rng = np.random.default_rng(slope)
    frequency_hz = np.maximum(np.fft.rfftfreq(n, 1 / RATE_HZ), 30.0)
    noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(n)) * frequency_hz ** (-slope / 2), n)
    noise *= 10 ** (level_db / 20) / noise.std()
    for question in ("What is heard?", "Describe the recording."):
        answer = model.ask((noise.astype(np.float32), RATE_HZ), question)
        assert "nothing" in answer.text.lower(), answer.text
        assert answer.audio_analysis == "Background none. First nothing."


def test_choices_that_do_not_name_silence_are_still_chosen_from(ask) -> None:
    out, _ = ask(np.zeros(RATE_HZ), QUESTION, "--json", "--choices", *CHOICES)
    answer = json.loads(out)
    assert answer["text"] == CHOICES[answer["choice_index"]]
    notes = answer["audio"]["notes"]
    assert notes[0] == "silent: no sample is above -70 dBFS"
    assert notes[-1] == "one of the choices must be given: the model guesses"


def test_silence_goes_through_the_same_events(model: TinyGiant) -> None:
    events = list(model.stream((np.zeros(RATE_HZ, np.float32), RATE_HZ), "What is heard?"))
    kinds = [event_record(event)["event"] for event in events]
    assert kinds == ["audio_read", "streams_ready", "prompt_read", "text", "answer"]


def test_a_cable_in_reverse_is_heard(ask) -> None:
    """The mean of the channels is silence."""
    out, err = ask(np.stack([SOUND, -SOUND], axis=1), QUESTION, "--choices", *CHOICES)
    mono, _ = ask(SOUND, QUESTION, "--choices", *CHOICES)
    assert out == mono and out.endswith("Answer:\ntiger\n")
    assert "note: the channels cancel each other" in err
    assert "channel 1 was used" in err


def test_an_offset_changes_nothing_but_the_notes(ask) -> None:
    """5 % of full scale became "Background hum"."""
    out, err = ask(0.9 * SOUND + 0.05, QUESTION, "--choices", *CHOICES)
    mono, quiet_err = ask(0.9 * SOUND, QUESTION, "--choices", *CHOICES)
    assert out == mono
    assert "note: an offset of 5 % of full scale was removed" in err
    assert "note" not in quiet_err


def test_a_recording_sixty_decibels_down_is_asked_about_with_a_note(ask) -> None:
    out, err = ask(0.001 * SOUND / np.abs(SOUND).max(), QUESTION, "--choices", *CHOICES)
    assert out.splitlines()[-1] in CHOICES
    assert "note: very quiet: it peaks at -60 dBFS" in err


@pytest.mark.parametrize("seconds", [16.0, 30.0, 31.0])
def test_what_training_did_not_have_is_noted(ask, model: TinyGiant, seconds: float) -> None:
    """16 s became commas, without a word."""
    padded = np.pad(SOUND, (0, round(seconds * RATE_HZ) - SOUND.size))
    out, err = ask(padded, "What is heard?", "--json")
    answer = json.loads(out)
    longest_s = model.config.scope.longest_s
    assert longest_s is not None
    is_long = seconds > 1.1 * longest_s
    assert (f"the clip has {seconds:g} s, and this model was trained on clips" in err) == is_long
    assert any("trained on clips" in note for note in answer["audio"]["notes"]) == is_long
    assert answer["text"].strip()
