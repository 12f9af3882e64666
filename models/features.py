"""The features of the public encoders Whisper and CLAP, as data."""

from __future__ import annotations

from dataclasses import dataclass

from tinygiant.runtime.config import LogMel

__all__ = ["WHISPER", "ClapFeatures"]

WHISPER = LogMel(
    sampling_rate_hz=16_000,
    n_fft=400,  # 25 ms
    hop_length=160,  # 10 ms a frame
    n_mels=128,
    f_min_hz=0.0,
    f_max_hz=8_000.0,
    log="whisper",
    dynamic_range=8.0,
)
"""``WhisperFeatureExtractor`` of transformers; 3,000 frames in 30 s."""


@dataclass(frozen=True)
class ClapFeatures:
    """Log-mel features of HTS-AT and CLAP (``ClapFeatureExtractor``: rand_trunc, repeatpad).

    The original HTS-AT checkpoints use 32 kHz and hop 320, which gives the same frame geometry.
    """

    sampling_rate_hz: int = 48_000
    n_fft: int = 1_024
    hop_length: int = 480  # 10 ms a frame
    n_mels: int = 64
    f_min_hz: float = 50.0
    f_max_hz: float = 14_000.0
    window_s: float = 10.0

    @property
    def log_mel(self) -> LogMel:
        """As the runtime computes them: 1,001 frames a window, both edges included."""
        return LogMel(
            sampling_rate_hz=self.sampling_rate_hz,
            n_fft=self.n_fft,
            hop_length=self.hop_length,
            n_mels=self.n_mels,
            f_min_hz=self.f_min_hz,
            f_max_hz=self.f_max_hz,
            log="db",
            dynamic_range=None,
            last_frame=True,
            padding="repeat",
            layout="image",
        )
