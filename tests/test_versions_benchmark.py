"""Two checkouts side by side: what the figures mean."""

from __future__ import annotations

import pytest

from benchmarks import versions


def test_a_ratio_is_that_of_neighbours_and_not_of_medians() -> None:
    """The machine was slow in the second pair of processes, for both alike."""
    old = [{"load_s": 1.0}, {"load_s": 8.0}, {"load_s": 2.0}]
    new = [{"load_s": 0.5}, {"load_s": 4.0}, {"load_s": 3.0}]
    figures = versions.compare(old, new)
    assert figures == {"load_s": {"old": 2.0, "new": 3.0, "ratio": pytest.approx(0.5)}}
