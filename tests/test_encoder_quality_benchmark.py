"""What the encoders' recipe does to a real encoder: the figures' meaning."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import encoder_quality
from tinygiant.runtime.errors import UsageError


def test_figures_on_hand_made_states() -> None:
    """Three texts in a plane; in the quantized states the third has turned to the other side."""
    wanted = [np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([[3.0, 0.5]]), np.array([[0.0, 1.0]])]
    found = [wanted[0], wanted[1], np.array([[1.0, 0.0]])]
    row = encoder_quality.compare(wanted, found)
    assert row["relative_error"] == pytest.approx((2 / (4 + 9.25 + 1)) ** 0.5)
    assert row["cosine_lowest"] == pytest.approx(0.0)
    assert row["cosine_mean"] == pytest.approx(2 / 3)
    # Nearest in float32: 1, 0, 1. With the third where the first is: 2, 0, 0.
    assert row["same_neighbour"] == pytest.approx(1 / 3)


def test_paragraphs_are_of_the_reference_and_enough() -> None:
    texts = encoder_quality.paragraphs(64)
    assert len({*texts}) == 64
    assert all(200 <= len(text) <= 600 for text in texts)
    with pytest.raises(UsageError, match="there are only"):
        encoder_quality.paragraphs(10**6)


def test_another_folder_is_one_line(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert encoder_quality.main([str(tmp_path)]) == 2
    assert "FOLDER is the package's folder called model" in capsys.readouterr().err
