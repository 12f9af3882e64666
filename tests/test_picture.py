"""--picture: the panels hold the model's own numbers, and the file is a picture."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.runtime import Finished, PromptRead, TinyGiant, loading, read_audio
from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.cli.picture import draw, save
from tinygiant.runtime.preprocess import preprocess

Tone = Callable[[float, int], NDArray[np.float32]]
MELS = ("whisper_encoder", "htsat_encoder")
Drawn = tuple[Any, Any, PromptRead, Any]


@pytest.fixture(scope="module")
def drawn(tiny: TinyGiant, tone: Tone) -> Drawn:
    """A figure of an answer about two chunks, and what it was drawn from."""
    audio = read_audio((tone(34.0, 16_000), 16_000))
    events = list(tiny.stream(audio, "What costs $5 or $6?", ["a $", "b"], max_new_tokens=4))
    seen = next(event for event in events if isinstance(event, PromptRead))
    answer = next(event.answer for event in events if isinstance(event, Finished))
    return draw(audio, tiny.config, seen, answer, "What costs $5 or $6?"), audio, seen, answer


def panels(figure: Any) -> dict[str, Any]:
    return {axes.get_label(): axes for axes in figure.axes}


def test_the_panels(drawn: Drawn) -> None:
    figure, audio, _, answer = drawn
    found = panels(figure)
    assert [*found] == ["waveform", *MELS, "attention", "gate", "answer"]
    for name in ("waveform", *MELS, "attention"):
        assert found[name].get_xlim() == (0.0, audio.used_s)
    [text] = found["answer"].texts
    assert text.get_text().splitlines()[0] == "Question: What costs $5 or $6?"
    assert text.get_text().splitlines()[-1] == f"Answer: {answer.text}"


def test_the_waveform_spans_its_extremes(drawn: Drawn) -> None:
    figure, audio, _, _ = drawn
    [shape] = panels(figure)["waveform"].collections
    points = shape.get_paths()[0].vertices
    assert points[:, 1].max() == audio.samples.max()
    assert points[:, 1].min() == audio.samples.min()


def test_spectrograms_are_the_encoders_inputs(drawn: Drawn, tiny: TinyGiant) -> None:
    figure, audio, _, _ = drawn
    chunks = preprocess(audio, tiny.config)
    temporal, event = (panels(figure)[name].images for name in MELS)
    seen = [chunk.windows["whisper_encoder"][0][0] for chunk in chunks]
    heard = [window[0, 0].T for chunk in chunks for window in chunk.windows["htsat_encoder"]]
    for images, mels in ((temporal, seen), (event, heard)):
        for image, mel in zip(images, mels, strict=True):
            np.testing.assert_array_equal(image.get_array(), mel)
    assert [image.get_extent()[0] for image in temporal] == [0.0, 30.0]
    # the second chunk's 4 s: one window of 10 s, and the frames that hold audio and the margin
    assert [image.get_extent()[:2] for image in event] == [
        pytest.approx((start, start + 10.0)) for start in (0.0, 10.0, 20.0, 30.0)
    ]
    n_frames = seen[1].shape[1]
    assert temporal[1].get_extent()[1] == pytest.approx(30.0 + n_frames * 0.01)


def test_attention_stands_where_its_sound_is(drawn: Drawn) -> None:
    figure, _, seen, _ = drawn
    patches = panels(figure)["attention"].patches
    values = np.concatenate([patch.get_data().values for patch in patches])
    np.testing.assert_array_equal(values, seen.intent_attention)
    assert patches[0].get_data().edges[[0, -1]] == pytest.approx([0.0, 30.0])
    assert patches[1].get_data().edges[[0, -1]] == pytest.approx([30.0, 34.0])


def test_the_histogram_counts_every_dimension_of_the_gate(drawn: Drawn) -> None:
    figure, _, seen, _ = drawn
    assert seen.gate is not None
    for patch, gate in zip(panels(figure)["gate"].patches, seen.gate, strict=True):
        counts, edges, _ = patch.get_data()
        assert counts.sum() == gate.size
        for count, low, high in zip(counts, edges, edges[1:], strict=False):
            assert count == ((gate >= low) & (gate < high)).sum()


def test_ablated_parts_have_no_panel(drawn: Drawn, tiny: TinyGiant, tone: Tone) -> None:
    _, _, seen, answer = drawn
    audio = read_audio((tone(1.0, 16_000), 16_000))
    figure = draw(audio, tiny.config, PromptRead(seen.n_tokens, None, None), answer, "What?")
    assert [*panels(figure)] == ["waveform", *MELS, "answer"]


def test_the_command_writes_a_png(
    tiny: TinyGiant,
    tone: Tone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soundfile.write(tmp_path / "clip.wav", tone(1.0, 16_000), 16_000)
    monkeypatch.setattr(loading, "load", lambda *_, **__: tiny)
    asked = [str(tmp_path / "clip.wav"), "\u97f3?", "--max-new-tokens", "2", "--picture"]
    assert cli.main([*asked, str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = matplotlib.image.imread(tmp_path / "out.png").shape
    assert (width, height > 500) == (1_200, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.wav", "out.png"]
    assert "Warning" not in capsys.readouterr().err
    for target, code in (("no/out.png", 8), ("out.jpg", 2)):
        assert cli.main([*asked, str(tmp_path / target)]) == code
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_picture_is_written_whole_or_not_at_all(drawn: Drawn, tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(OSError, match="cannot be written"):
        save(drawn[0], str(tmp_path / "taken.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_without_matplotlib_nothing_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code = cli.main(["missing.wav", "What?", "--picture", str(tmp_path / "out.png")])
    assert code == 9
    assert "pip install 'tinygiant[picture]'" in capsys.readouterr().err
