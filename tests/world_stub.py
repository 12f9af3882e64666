"""A stand-in for the engines' banks: pure tones for notes, pulses for words. Needs no engine."""

from __future__ import annotations

import numpy as np

RATE_HZ = 48_000


class ToneBanks:
    """Has the methods of ``tinygiant.models.world.engines.Banks``; every note is one sine."""

    def __init__(self) -> None:
        quiet = np.random.default_rng(0).integers(-2000, 2000, (4, 2, 30 * RATE_HZ), np.int16)
        self.beds = {split: quiet for split in ("train", "validation", "test", "shifted")}

    def word_duration_s(self, voice: str, setting: int, word: str) -> float:
        return 0.3 + 0.02 * len(word) + 0.001 * len(voice) + 0.01 * setting

    def word(self, voice: str, setting: int, word: str) -> np.ndarray:
        t = np.arange(round(self.word_duration_s(voice, setting, word) * RATE_HZ)) / RATE_HZ
        return (0.25 * np.sin(2 * np.pi * 180 * t)).astype(np.float32)

    def recording_duration_s(self, number: int) -> float:
        return 0.3 + 0.01 * number

    def recording(self, number: int, variant: int) -> np.ndarray:
        t = np.arange(round(self.recording_duration_s(number) * RATE_HZ)) / RATE_HZ
        return (0.25 * np.sin(2 * np.pi * (700 + 50 * variant) * t)).astype(np.float32)

    def note(self, font: str, instrument: str, midi: int, accent: bool) -> np.ndarray:
        t = np.arange(round(1.15 * RATE_HZ)) / RATE_HZ
        return (0.28 * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t)).astype(np.float32)
