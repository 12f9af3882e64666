"""From a scene to audio: ``render(scene, banks) -> (n_samples,) float32`` at 48 kHz, peak <= 1."""

from __future__ import annotations

import io

import numpy as np
import soundfile as sf

from tinygiant.runtime.audio import resample

from .dsp import RATE_HZ, Audio, band, coloured, convolve, loudness, muffle, room_response
from .engines import Banks
from .scene import Copy, Music, Scene, SoundEvent, Speech
from .sounds import synthesise
from .vocabulary import BACKGROUNDS

__all__ = ["render"]

_FULL_LEVEL = 0.2  # RMS of the loudest 50 ms of a layer at 0 dB
_RELEASE = RATE_HZ * 6 // 100


def render(scene: Scene, banks: Banks) -> Audio:
    """The clip's audio: ``(round(duration_s * 48000),) float32``.

    The only randomness left is the fine grain of noise and rooms, seeded by the scene.
    """
    rng = np.random.default_rng([*scene.seed, 1])
    n = round(scene.duration_s * RATE_HZ)
    mix = np.zeros(n, np.float32)
    near_room = room_response(scene.room.rt60_s, scene.room.wet_near, 6000, rng)
    # Far sounds lose their highs on the way, in air and walls; the direct path too.
    cutoff_hz = scene.room.far_cutoff_hz
    far_room = room_response(scene.room.rt60_s + 0.2, scene.room.wet_far, cutoff_hz, rng)
    far_room = muffle(far_room, cutoff_hz)
    dry = np.zeros(n, np.float32)  # music and speech share one convolution
    if scene.music:
        _add(dry, _play(scene.music, banks), scene.music.start_s, scene.music.level_db)
    if scene.speech:
        _add_speech(dry, scene.speech, banks)
    if scene.music or scene.speech:
        mix += convolve(dry, near_room)[:n]
    for event in scene.sounds:
        sound = _sound(event, banks)
        heard = convolve(sound, near_room if event.near else far_room)
        _add(mix, heard, event.start_s, event.level_db)
    if scene.background:
        recordings = banks.beds[scene.split][BACKGROUNDS.index(scene.background.kind)]
        which, offset = divmod(scene.background.offset * len(recordings), 1.0)
        recording = recordings[int(which)]
        first = int(offset * max(0, recording.size - n))
        layer = recording[first : first + n].astype(np.float32) * np.float32(1 / 32768)
        mix += layer * np.float32(10 * _FULL_LEVEL * 10 ** (scene.background.level_db / 20))
    hiss = coloured(rng.standard_normal(n, np.float32), scene.hiss_slope)
    mix += hiss * np.float32(_FULL_LEVEL * 10 ** (scene.noise_db / 20))
    mix *= np.float32(0.9 / max(1e-6, float(np.abs(mix).max())) * 10 ** (scene.gain_db / 20))
    return _copy(mix, scene.copy)


def _sound(event: SoundEvent, banks: Banks) -> Audio:
    rng = np.random.default_rng(event.grain)
    if event.recording is None:
        return synthesise(event.kind, event.params, rng)
    recorded = banks.recording(event.recording, int(rng.integers(3)))
    rate = event.params["rate"]
    positions = np.arange(max(1, int(recorded.size / rate))) * rate
    return np.asarray(np.interp(positions, np.arange(recorded.size), recorded), np.float32)


def _add(mix: Audio, layer: Audio, start_s: float, level_db: float) -> None:
    """Add ``layer`` at ``start_s``, its loudest 50 ms at ``level_db``."""
    first = round(start_s * RATE_HZ)
    layer = layer[: mix.size - first]
    gain = _FULL_LEVEL * 10 ** (level_db / 20) / loudness(layer)
    mix[first : first + layer.size] += np.float32(gain) * layer


def _play(music: Music, banks: Banks) -> Audio:
    """Melody, one note a beat, with the tonic triad an octave below on every downbeat."""
    beat = music.beat_s * music.detune  # stretched back by the detuning below
    n = round((len(music.pitches) + 0.6) * beat * RATE_HZ)
    out = np.zeros(n, np.float32)
    triad = (0, 4 if music.major else 3, 7)
    for k, pitch in enumerate(music.pitches):
        downbeat = k % music.meter == 0
        first = round(k * beat * RATE_HZ)
        last = k == len(music.pitches) - 1
        hold_s = beat * (1.5 if last else 0.95)
        note = banks.note(music.font, music.instrument, pitch, downbeat)
        _strike(out, first, note, hold_s, 1.0 if downbeat else 0.75)
        if downbeat:
            hold_s = beat * (1.5 if last else 0.85 * music.meter)
            for interval in triad:
                note = banks.note(music.font, music.instrument, music.tonic - 12 + interval, True)
                _strike(out, first, note, hold_s, 0.55)
    positions = np.arange(round(n / music.detune)) * music.detune
    return np.asarray(np.interp(positions, np.arange(n), out), np.float32)


def _strike(out: Audio, first: int, note: Audio, hold_s: float, gain: float) -> None:
    note = note[: min(note.size, round(hold_s * RATE_HZ), out.size - first)]
    release = min(_RELEASE, note.size)
    out[first : first + note.size - release] += gain * note[: note.size - release]
    fade = np.linspace(gain, 0, release, dtype=np.float32)
    out[first + note.size - release : first + note.size] += fade * note[note.size - release :]


def _add_speech(mix: Audio, speech: Speech, banks: Banks) -> None:
    """The words, each played ``rate`` times as fast, at one level for the whole utterance."""
    gain = np.float32(10 ** (speech.level_db / 20))
    for word, start_s in zip(speech.words, speech.starts_s, strict=True):
        audio = banks.word(speech.voice, speech.setting, word)
        positions = np.arange(int(audio.size / speech.rate)) * speech.rate
        audio = np.interp(positions, np.arange(audio.size), audio).astype(np.float32)
        first = round(start_s * RATE_HZ)
        audio = audio[: mix.size - first]
        mix[first : first + audio.size] += gain * audio


def _copy(samples: Audio, copy: Copy) -> Audio:
    """The clip as the other end has it, as many samples, peak at most 1."""
    if copy == "8 kHz":
        back = resample(resample(samples, RATE_HZ, 8000), 8000, RATE_HZ)
    elif copy == "telephone":
        narrow = band(samples.astype(np.float64), 300, 3400).astype(np.float32)
        back = resample(_coded(resample(narrow, RATE_HZ, 8000), 8000, "WAV", "ULAW"), 8000, RATE_HZ)
    elif copy == "laptop":
        # A small capsule: 200 Hz to 9 kHz, a peak near 4 kHz, soft clipping.
        x = samples.astype(np.float64)
        x = band(x, 200, 9000) + 0.6 * band(x, 3000, 5000)
        back = np.tanh(1.5 * x).astype(np.float32)
    elif copy == "mp3":
        back = _coded(samples, RATE_HZ, "MP3", "MPEG_LAYER_III")
    elif copy == "vorbis":
        back = _coded(samples, RATE_HZ, "OGG", "VORBIS")
    else:
        return samples
    out = np.zeros_like(samples)
    out[: back.size] = back[: out.size]
    return np.clip(out, -1, 1)


def _coded(samples: Audio, rate_hz: int, container: str, subtype: str) -> Audio:
    buffer = io.BytesIO()
    sf.write(buffer, samples, rate_hz, format=container, subtype=subtype)
    buffer.seek(0)
    return np.asarray(sf.read(buffer, dtype="float32")[0])
