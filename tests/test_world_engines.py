"""The real engines: espeak-ng, flite and fluidsynth say and play what the world believes."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tinygiant.models.world import engines
from tinygiant.models.world.engines import check_engines, render_notes, speak
from tinygiant.models.world.recordings import RECORDINGS
from tinygiant.models.world.vocabulary import INSTRUMENT_PROGRAMS
from tinygiant.models.world.voices import VOICES
from tinygiant.runtime.errors import MissingEngineError


def _reason() -> str:
    try:
        check_engines()
    except MissingEngineError as e:
        return str(e)
    return ""


needs_engines = pytest.mark.skipif(bool(_reason()), reason=_reason() or "engines are installed")


def test_a_missing_engine_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "flite" else name)
    with pytest.raises(MissingEngineError, match=r"flite.*install the Debian package flite"):
        check_engines()


def test_a_missing_sound_font_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setitem(engines.SOUND_FONTS, "fluid", tmp_path / "none.sf2")
    with pytest.raises(MissingEngineError, match="Debian package fluid-soundfont-gm"):
        check_engines()


def test_missing_recordings_are_named_with_their_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for font in engines.SOUND_FONTS:
        monkeypatch.setitem(engines.SOUND_FONTS, font, Path(__file__))
    monkeypatch.setattr(engines, "STAMPS", str(tmp_path / "none"))
    with pytest.raises(MissingEngineError, match="Debian package tuxpaint-stamps-default"):
        check_engines()


@needs_engines
def test_every_recording_is_heard_and_no_two_are_the_same(tmp_path) -> None:
    """A bank that lacks a program plays another one without a word: two would then be equal."""
    heard = {}
    for recording in RECORDINGS:
        for samples in engines._recorded(recording, tmp_path):
            assert 0.1 < samples.size / 48_000 <= 1.21, recording
            assert np.abs(samples).max() > 3000, recording
            assert heard.setdefault(samples.tobytes(), recording) == recording


@needs_engines
def test_every_voice_is_its_own_and_has_the_pitch_of_its_gender(tmp_path) -> None:
    """espeak-ng ignores unknown variants without a word: two voices would then be the same."""
    import librosa

    seen = Counter()
    for voices in VOICES.values():
        for voice in voices:
            # The highest of its settings: a creaky end of a low word has no pitch to be found.
            words = [
                speak(voice, len(voice.settings) - 1, w, tmp_path) for w in ("yellow", "seven")
            ]
            samples = np.concatenate(words).astype(np.float32) / 32768
            seen[samples.tobytes()] += 1
            pitch, _, _ = librosa.pyin(
                samples, fmin=60, fmax=400, sr=48_000, frame_length=4096, hop_length=1024
            )
            median = float(np.nanmedian(pitch))
            assert (median > 145) == (voice.gender == "woman"), (voice.name, median)
    assert max(seen.values()) == 1


@needs_engines
@pytest.mark.parametrize("font", ["fluid", "timgm"])
def test_fluidsynth_plays_the_notes_asked_for(font: str, tmp_path) -> None:
    """The strongest harmonic series of each note is that of its MIDI number."""
    for instrument in ("piano", "flute", "violin"):
        program, lowest = INSTRUMENT_PROGRAMS[instrument]
        midis = [lowest, lowest + 7]
        rows = render_notes(font, program, [(m, 100) for m in midis], tmp_path)
        assert rows.shape == (2, round(1.15 * 48_000))
        for midi, row in zip(midis, rows, strict=True):
            spectrum = np.abs(np.fft.rfft(row[4_800:38_400] * np.hanning(33_600)))
            f = np.fft.rfftfreq(33_600, 1 / 48_000)
            expected = 440 * 2 ** ((midi - 69) / 12)
            harmonic = f[np.argmax(spectrum)] / expected
            assert abs(harmonic - round(harmonic)) < 0.04 * round(harmonic), (instrument, midi)


def test_banks_of_another_list_of_recordings_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    """A recording was once taken off the list while old banks, read by position, stayed in use:

    from there on a thunder was heard as a hand clap, in thousands of clips of training.
    """
    made = []
    monkeypatch.setattr(engines, "check_engines", lambda: None)

    def build(folder, *_) -> None:
        made.append(folder.name)
        raise InterruptedError  # only which folder is asked for matters here

    monkeypatch.setattr(engines, "_build", build)
    (tmp_path / engines.banks_name()).mkdir()
    monkeypatch.setattr(engines, "RECORDINGS", engines.RECORDINGS[:14] + engines.RECORDINGS[15:])
    with pytest.raises(InterruptedError):
        engines.load_banks(tmp_path)
    assert made and made != [next(iter(tmp_path.iterdir())).name]
