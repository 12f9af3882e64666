"""Procedural sound events: ``synthesise(kind, params, rng) -> (n,) float32`` at 48 kHz, peak 1.

Each class is a small physical caricature (decaying modes, filtered noise, swept tones) whose
parameters are drawn per event from ``SOUND_PARAMETERS`` by the scene; ``rng`` gives only the fine
grain (noise, phases), so that a scene names every audible choice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .dsp import RATE_HZ, Audio, band, noise, swept

__all__ = ["SOUND_PARAMETERS", "bed", "synthesise"]

_Params = dict[str, float]

# Every class: parameter -> (low, high). "duration_s" is the length of the event.
SOUND_PARAMETERS: dict[str, dict[str, tuple[float, float]]] = {
    "dog bark": {"duration_s": (0.2, 0.32), "pitch_hz": (230, 420), "formant_hz": (700, 1200)},
    "door knock": {"duration_s": (0.16, 0.22), "pitch_hz": (140, 240), "decay_s": (0.02, 0.04)},
    "bell": {"duration_s": (0.55, 0.7), "pitch_hz": (600, 1100), "decay_s": (0.2, 0.32)},
    "siren": {"duration_s": (0.6, 0.75), "pitch_hz": (480, 700), "depth": (1.7, 2.2)},
    "car horn": {"duration_s": (0.35, 0.55), "pitch_hz": (330, 460), "interval": (1.18, 1.28)},
    "clock tick": {"duration_s": (0.24, 0.32), "pitch_hz": (2600, 3800), "decay_s": (0.006, 0.01)},
    "glass break": {"duration_s": (0.4, 0.6), "pitch_hz": (3000, 4500), "decay_s": (0.06, 0.12)},
    "footstep": {"duration_s": (0.2, 0.28), "pitch_hz": (65, 105), "scuff_hz": (500, 1100)},
    "bird chirp": {"duration_s": (0.34, 0.5), "pitch_hz": (3000, 4600), "sweep": (1.2, 1.45)},
    "phone ring": {"duration_s": (0.5, 0.7), "pitch_hz": (850, 1250), "trill_hz": (17, 24)},
    "hand clap": {"duration_s": (0.14, 0.2), "pitch_hz": (1000, 2000), "decay_s": (0.02, 0.035)},
    "water drop": {"duration_s": (0.16, 0.24), "pitch_hz": (480, 850), "sweep": (2.0, 2.8)},
    "alarm beep": {"duration_s": (0.25, 0.4), "pitch_hz": (1900, 2700), "odd": (0.1, 0.35)},
    "engine": {"duration_s": (0.6, 0.75), "pitch_hz": (38, 55), "rise": (1.8, 2.6)},
    "cow": {"duration_s": (0.7, 1.1), "pitch_hz": (110, 190), "formant_hz": (380, 650)},
    "sheep": {"duration_s": (0.5, 0.8), "pitch_hz": (260, 430), "formant_hz": (900, 1500)},
    "duck": {"duration_s": (0.16, 0.28), "pitch_hz": (170, 280), "formant_hz": (1100, 1900)},
    "cat meow": {"duration_s": (0.5, 0.8), "pitch_hz": (480, 760), "formant_hz": (1100, 1800)},
    "insect buzz": {"duration_s": (0.6, 0.9), "pitch_hz": (160, 320), "flutter_hz": (4, 9)},
    "thunder": {"duration_s": (0.9, 1.2), "pitch_hz": (70, 160), "decay_s": (0.25, 0.5)},
    "applause": {"duration_s": (0.8, 1.2), "pitch_hz": (900, 1700), "claps_a_second": (90, 260)},
    "drum": {"duration_s": (0.2, 0.35), "pitch_hz": (60, 180), "snare": (0.1, 0.9)},
    "helicopter": {"duration_s": (0.8, 1.1), "pitch_hz": (9, 15), "tone_hz": (60, 110)},
}


def _time(params: _Params) -> NDArray[np.float64]:
    return np.arange(round(params["duration_s"] * RATE_HZ)) / RATE_HZ


def _harmonics(
    phase: NDArray[np.float64], pitch_hz: float, centre_hz: float, width: float, count: int
) -> NDArray[np.float64]:
    """Sum of harmonics weighted by a resonance: a crude vowel."""
    out = np.zeros_like(phase)
    for k in range(1, count + 1):
        gain = np.exp(-0.5 * (np.log2(k * pitch_hz / centre_hz) / width) ** 2) + 0.05 / k
        out += gain * np.sin(k * phase)
    return out


def _bark(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    x = t / t[-1]
    phase = swept(p["pitch_hz"] * (0.75 + 0.6 * np.sin(np.pi * np.minimum(1, x * 1.15))))
    tone = _harmonics(phase, p["pitch_hz"], p["formant_hz"], 0.8, 12)
    breath = band(noise(rng, t.size), 500, 4000) * 0.6
    return np.asarray((tone + breath) * np.minimum(1, t / 0.015) * (1 - x) ** 0.7)


def _knock(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    out = 0.3 * band(noise(rng, t.size), 300, 2500) * np.exp(-t / 0.006)
    for r, g in ((1, 1.0), (2.3, 0.6), (3.9, 0.35), (6.1, 0.2)):
        decay_s = p["decay_s"] / r**0.5
        out += g * np.sin(2 * np.pi * p["pitch_hz"] * r * t) * np.exp(-t / decay_s)
    return out


def _bell(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    out = np.zeros_like(t)
    for r, g in ((1, 1.0), (2.0, 0.7), (2.76, 0.6), (5.4, 0.4), (8.9, 0.2)):
        jitter = 1 + rng.uniform(-0.01, 0.01)
        out += (
            g
            * np.sin(2 * np.pi * p["pitch_hz"] * r * jitter * t)
            * np.exp(-t / (p["decay_s"] / r**0.3))
        )
    return out * np.minimum(1, t / 0.002)


def _siren(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    phase = swept(p["pitch_hz"] * p["depth"] ** np.sin(np.pi * t / t[-1]))
    tone = np.sin(phase) + 0.4 * np.sin(2 * phase) + 0.25 * np.sin(3 * phase)
    return tone * np.minimum(1, t / 0.03)


def _horn(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    out = np.zeros_like(t)
    for f in (p["pitch_hz"], p["pitch_hz"] * p["interval"]):
        for k in range(1, 13):
            out += np.sin(2 * np.pi * f * k * t + rng.uniform(0, 6.28)) / k**0.7
    return out * np.minimum(1, t / 0.02)


def _tick(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    out = np.zeros_like(t)
    for start, ratio, gain in ((0.0, 1.0, 1.0), (0.6 * p["duration_s"], 0.72, 0.8)):
        u = np.maximum(0, t - start)
        on = (t >= start) * np.exp(-u / p["decay_s"])
        out += gain * on * np.sin(2 * np.pi * p["pitch_hz"] * ratio * u)
        out += gain * 0.4 * on * np.sin(2 * np.pi * p["pitch_hz"] * ratio * 1.73 * u)
    return out


def _glass(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    out = 1.2 * band(noise(rng, t.size), 2500, 14000) * np.exp(-t / 0.03)
    for _ in range(18):
        start = rng.uniform(0, 0.6) ** 1.5 * p["duration_s"]
        f = p["pitch_hz"] * rng.uniform(0.8, 2.6)
        u = np.maximum(0, t - start)
        shard = np.sin(2 * np.pi * f * u) * np.exp(-u / p["decay_s"])
        out += rng.uniform(0.15, 0.5) * (t >= start) * shard
    return out


def _footstep(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    thump = np.sin(swept(p["pitch_hz"] * (1 + np.exp(-t / 0.02)))) * np.exp(-t / 0.045)
    u = np.maximum(0, t - 0.07)
    scuff = band(noise(rng, t.size), p["scuff_hz"], p["scuff_hz"] * 3)
    return thump + 0.7 * scuff * (t >= 0.07) * np.minimum(1, u / 0.02) * np.exp(-u / 0.04)


def _chirp(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    x = (3 * t / t[-1]) % 1.0  # three notes make one chirp
    phase = swept(p["pitch_hz"] * p["sweep"] ** np.sin(2 * np.pi * np.minimum(1, x / 0.7)))
    return np.asarray(np.sin(phase) * np.sin(np.pi * np.minimum(1, x / 0.7)) ** 2)


def _ring(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    high = np.sin(2 * np.pi * p["trill_hz"] * t) > 0
    phase = swept(p["pitch_hz"] * np.where(high, 1.26, 1.0))
    tone = np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.35 * np.sin(3 * phase)
    return tone * np.minimum(1, t / 0.01)


def _clap(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    envelope = np.zeros_like(t)
    for start, decay in ((0, 0.003), (0.009, 0.003), (0.018, 0.003), (0.026, p["decay_s"])):
        envelope += (t >= start) * np.exp(-np.maximum(0, t - start) / decay)
    return band(noise(rng, t.size), p["pitch_hz"] * 0.7, p["pitch_hz"] * 1.8) * envelope


def _drop(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    phase = swept(p["pitch_hz"] * p["sweep"] ** np.minimum(1, t / 0.07))
    return np.sin(phase) * np.minimum(1, t / 0.004) * np.exp(-t / 0.045)


def _beep(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    phase = 2 * np.pi * p["pitch_hz"] * t
    return (np.sin(phase) + p["odd"] * np.sin(3 * phase)) * np.minimum(1, t / 0.005)


def _engine(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    x = t / t[-1]
    phase = swept(p["pitch_hz"] * p["rise"] ** np.sin(np.pi * x * 0.8))
    pulses = np.exp(-6 * ((phase / (2 * np.pi)) % 1.0)) - 0.16
    rumble = band(noise(rng, t.size), 40, 900) * (0.4 + pulses)
    return band(pulses, 30, 1500) + 0.8 * rumble


def _call(
    p: _Params, glide: NDArray[np.float64], width: float, breath: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """An animal's call: a voiced tone of pitch ``glide`` times ``pitch_hz`` through a formant."""
    t = _time(p)
    wobble = 1 + 0.02 * np.cumsum(noise(rng, t.size)) / t.size**0.5
    phase = swept(p["pitch_hz"] * glide * wobble)
    tone = _harmonics(phase, p["pitch_hz"], p["formant_hz"], width, 16)
    air = band(noise(rng, t.size), p["formant_hz"] * 0.6, p["formant_hz"] * 2.5)
    x = t / t[-1]
    return np.asarray((tone + breath * air) * np.minimum(1, x / 0.08) * (1 - x) ** 0.5)


def _cow(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    x = np.linspace(0, 1, _time(p).size)
    return _call(p, 0.85 + 0.3 * np.sin(np.pi * x**0.6), 1.0, 0.15, rng)


def _sheep(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    tremble = np.sin(2 * np.pi * rng.uniform(7, 11) * t)
    return _call(p, 1.0 + 0.05 * tremble, 0.7, 0.25, rng) * (0.65 + 0.35 * tremble)


def _duck(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    return _call(p, np.linspace(1.15, 0.85, _time(p).size), 0.45, 0.35, rng)


def _meow(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    x = np.linspace(0, 1, _time(p).size)
    return _call(p, 0.8 + 0.35 * np.sin(np.pi * x**0.8), 0.6, 0.08, rng)


def _buzz(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    flutter = np.sin(2 * np.pi * p["flutter_hz"] * t + rng.uniform(0, 6.28))
    phase = swept(p["pitch_hz"] * (1 + 0.04 * flutter))
    saw = sum(np.sin(k * phase) / k**0.6 for k in range(1, 20))
    return np.asarray(saw * (0.75 + 0.25 * flutter) * np.abs(np.sin(np.pi * t / t[-1])) ** 0.5)


def _thunder(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    crack = band(noise(rng, t.size), 200, 3000) * np.exp(-t / 0.05)
    rolls = np.interp(t, np.linspace(0, t[-1], 9), rng.uniform(0.3, 1, 9))
    rumble = band(noise(rng, t.size), 25, p["pitch_hz"]) * rolls * np.exp(-t / p["decay_s"])
    return np.asarray(0.4 * crack + 3 * rumble * np.minimum(1, t / 0.03))


def _applause(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    hits = np.zeros(t.size)
    places = rng.integers(0, t.size, int(p["claps_a_second"] * t[-1]))
    hits[places] = rng.uniform(0.3, 1, places.size)
    decay = np.exp(-np.arange(RATE_HZ // 50) / (0.004 * RATE_HZ))
    envelope = np.convolve(hits, decay)[: t.size]
    hands = band(noise(rng, t.size), p["pitch_hz"] * 0.6, p["pitch_hz"] * 2.2)
    return np.asarray(hands * envelope)


def _drum(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    skin = np.sin(swept(p["pitch_hz"] * (1 + 0.7 * np.exp(-t / 0.02)))) * np.exp(-t / 0.09)
    wires = band(noise(rng, t.size), 1200, 9000) * np.exp(-t / 0.06)
    return np.asarray(skin + 0.35 * p["snare"] * wires)


def _helicopter(p: _Params, rng: np.random.Generator) -> NDArray[np.float64]:
    t = _time(p)
    blades = (p["pitch_hz"] * t + rng.uniform()) % 1.0
    thump = np.exp(-5 * blades)
    tone = np.sin(2 * np.pi * p["tone_hz"] * t)
    return np.asarray((band(noise(rng, t.size), 60, 1200) + 0.8 * tone) * (0.15 + thump))


_SYNTHESIS: dict[str, Callable[[_Params, np.random.Generator], NDArray[np.float64]]] = {
    "dog bark": _bark,
    "door knock": _knock,
    "bell": _bell,
    "siren": _siren,
    "car horn": _horn,
    "clock tick": _tick,
    "glass break": _glass,
    "footstep": _footstep,
    "bird chirp": _chirp,
    "phone ring": _ring,
    "hand clap": _clap,
    "water drop": _drop,
    "alarm beep": _beep,
    "engine": _engine,
    "cow": _cow,
    "sheep": _sheep,
    "duck": _duck,
    "cat meow": _meow,
    "insect buzz": _buzz,
    "thunder": _thunder,
    "applause": _applause,
    "drum": _drum,
    "helicopter": _helicopter,
}


def _coloured(x: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """A sound as other sources of its class would have it: a resonance, a tilt, a little grit.

    Without it a class is one formula, and what a model learns of it is that formula.
    """
    if rng.random() < 0.3:
        return x
    peak = float(np.abs(x).max()) + 1e-9
    centre = 10 ** rng.uniform(2.3, 3.7)
    x = x + rng.uniform(-0.5, 1.2) * band(x, centre / 1.3, centre * 1.3)
    drive = rng.uniform(0.0, 2.5)
    x = np.tanh(drive * x / peak) if drive > 1 else x / peak
    follow = band(np.abs(x), 0.1, 40)
    grit = band(noise(rng, x.size), centre / 2, centre * 3)
    return np.asarray(x + rng.uniform(0, 0.25) * grit * np.maximum(0, follow))


def synthesise(kind: str, params: _Params, rng: np.random.Generator) -> Audio:
    """One event of class ``kind``: ``(round(duration_s * 48000),) float32``, peak 1.

    ``params`` holds one value for every name of ``SOUND_PARAMETERS[kind]``.
    """
    out = _coloured(_SYNTHESIS[kind](params, rng), rng)
    fade = min(out.size // 4, RATE_HZ // 50)
    out[-fade:] *= np.linspace(1, 0, fade)
    return (out / max(1e-9, float(np.abs(out).max()))).astype(np.float32)


def bed(kind: str, n_samples: int, rng: np.random.Generator, speech: Audio | None = None) -> Audio:
    """A background bed, ``(n_samples,) float32`` with RMS 0.1.

    ``crowd`` needs ``speech``, some seconds of clean speech that are layered backwards, so that a
    babble of voices is heard and no word of it can be understood.
    """
    t = np.arange(n_samples) / RATE_HZ
    if kind == "rain":
        out = band(noise(rng, n_samples), 900, 11000)
        drops = np.zeros(n_samples)
        drops[rng.integers(0, n_samples, n_samples // 400)] = rng.exponential(1.0, n_samples // 400)
        out = out + 6 * band(drops, 1500, 9000)
    elif kind == "wind":
        gusts = np.arange(0.0, t[-1] + 1.4, 0.7)
        slow = np.interp(t, gusts, rng.uniform(0.2, 1, gusts.size))
        out = (
            band(noise(rng, n_samples), 60, 350) * slow
            + 0.3 * band(noise(rng, n_samples), 350, 900) * slow**3
        )
    elif kind == "hum":
        base = rng.uniform(96, 124)
        out = 0.15 * band(noise(rng, n_samples), 80, 700)
        for k in (1, 2, 3, 4, 6, 8):
            out = out + np.sin(2 * np.pi * base * k * t + rng.uniform(0, 6.28)) / k
    elif kind == "crowd" and speech is not None:
        out = np.zeros(n_samples)
        backwards = speech[::-1]
        for _ in range(10):
            start = int(rng.integers(0, backwards.size))
            out += np.resize(np.roll(backwards, -start), n_samples) * rng.uniform(0.5, 1)
    else:
        raise ValueError(f"background {kind!r}: expected rain, wind, hum, or crowd with speech")
    return (0.1 * out / max(1e-9, float(np.sqrt(np.mean(out**2))))).astype(np.float32)
