"""The windowed-sinc resampler against torchaudio's algorithm written in PyTorch.

torchaudio is not a dependency, so its algorithm is written down again, with a convolution.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.public_reference import resample, resampling_kernel
from tinygiant.runtime.resampling import sinc_kernel, sinc_resample

RATES = [
    (44_100, 32_000), (48_000, 32_000), (16_000, 32_000), (32_000, 16_000), (22_050, 16_000),
    (8_000, 32_000), (11_025, 32_000), (96_000, 32_000), (192_000, 16_000),
]  # fmt: skip


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
@pytest.mark.parametrize("n_samples", [1, 7, 4_411])
def test_equals_torchaudios_algorithm(from_hz: int, to_hz: int, n_samples: int) -> None:
    samples = np.random.default_rng(n_samples).standard_normal(n_samples).astype(np.float32)
    wanted = resample(torch.from_numpy(samples), from_hz, to_hz)
    found = sinc_resample(samples, from_hz, to_hz)
    assert found.shape == tuple(wanted.shape)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=2e-6)


@pytest.mark.parametrize(("from_hz", "to_hz"), RATES)
def test_the_kernel_is_equal_to_the_bit_almost(from_hz: int, to_hz: int) -> None:
    """A checkpoint may carry this kernel; the phases' rounding shows at 44.1 kHz (7e-6)."""
    wanted, _ = resampling_kernel(from_hz, to_hz)
    np.testing.assert_allclose(sinc_kernel(from_hz, to_hz), wanted.numpy(), atol=6e-8)


def test_single_precision_phases_are_kept() -> None:
    """Exact phases give another kernel, and log-mel features up to 0.16 dB away."""
    kernel = sinc_kernel(44_100, 32_000)
    cutoff = 0.99 * 320
    t = (-np.arange(320)[:, None] / 320 + np.arange(-9, 450)[None] / 441) * cutoff
    t = np.clip(t, -6, 6)
    exact = np.sinc(t) * np.cos(np.pi * t / 12) ** 2 * cutoff / 441
    assert 2e-6 < np.abs(kernel - exact).max() < 2e-5


def test_rates_without_a_common_divisor_cost_no_gigabytes() -> None:
    """The kernel of 44,101 to 32,000 Hz as a whole has 1.4 thousand million taps."""
    t = np.arange(4_410) / 44_101
    found = sinc_resample(np.sin(2 * np.pi * 440 * t).astype(np.float32), 44_101, 32_000)
    wanted = np.sin(2 * np.pi * 440 * np.arange(found.size) / 32_000)
    np.testing.assert_allclose(found[100:-100], wanted[100:-100], atol=2e-3)


def test_equal_rates_change_nothing() -> None:
    samples = np.ones(5, np.float32)
    assert sinc_resample(samples, 16_000, 16_000) is samples
