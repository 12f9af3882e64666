"""Audio longer than one chunk: nothing is lost without a word, and nothing is encoded twice."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tinygiant.runtime import (
    AudioRead,
    AudioTooLongError,
    Finished,
    PromptRead,
    StreamsReady,
    TinyGiant,
    UsageError,
)
from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.ort.sessions import Graph

Tone = Callable[[float, int], NDArray[np.float32]]
RATE_HZ = 8_000


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many clips' worth of input each graph was given: the batch dimension counts."""
    counted: Counter[str] = Counter()
    run = Graph.run

    def count(self: Graph, inputs: dict[str, Any]) -> dict[str, Any]:
        counted[self.name] += next(iter(inputs.values())).shape[0]
        return run(self, inputs)

    monkeypatch.setattr(Graph, "run", count)
    return counted


@pytest.mark.parametrize(
    ("seconds", "n_chunks", "n_tokens"),
    [
        (29.9, 1, 299),
        (30.0, 1, 300),
        (30.1, 2, 301),
        (31.0, 2, 310),
        (61.0, 3, 610),
        (299.0, 10, 2_990),
    ],
)
def test_every_second_is_heard_once(
    tiny: TinyGiant,
    tone: Tone,
    runs: Counter[str],
    seconds: float,
    n_chunks: int,
    n_tokens: int,
) -> None:
    # A level of its own, so that no other test's clip is in the cache.
    samples = tone(seconds, RATE_HZ) * np.float32(0.9 + seconds / 10_000)
    events = list(tiny.stream((samples, RATE_HZ), "What is heard?", max_new_tokens=2))
    read = next(event.audio for event in events if isinstance(event, AudioRead))
    seen = next(event for event in events if isinstance(event, PromptRead))
    answer = next(event.answer for event in events if isinstance(event, Finished))

    assert (read.received_s, read.used_s, read.dropped_s) == (seconds, seconds, 0.0)
    assert (read.n_chunks, answer.audio) == (n_chunks, read)
    assert answer.tokens.audio == n_tokens
    assert runs["whisper_encoder"] == n_chunks
    assert runs["htsat_encoder"] == math.ceil(seconds / 10.0)
    assert runs["projector"] == n_chunks

    assert seen.intent_attention is not None
    assert seen.intent_attention.shape == (n_tokens,)
    chunks = np.split(seen.intent_attention, range(300, n_tokens, 300))
    assert len(chunks) == n_chunks
    for chunk in chunks:  # each chunk has rows, and a distribution, of its own
        assert chunk.sum() == pytest.approx(1.0, rel=1e-3)
    text_tokens = answer.tokens.prompt - n_tokens
    runs.clear()
    again = tiny.ask((samples, RATE_HZ), "What is heard?", max_new_tokens=2)
    assert again.tokens.prompt - n_tokens == text_tokens
    assert (again.raw_text, again.timings.encode_cached) == (answer.raw_text, True)
    assert set(runs) == {"projector"}


def test_the_text_around_the_audio_does_not_grow_with_it(tiny: TinyGiant, tone: Tone) -> None:
    around = set()
    for seconds in (1.0, 30.0, 61.0):
        tokens = tiny.ask((tone(seconds, RATE_HZ), RATE_HZ), "What?", max_new_tokens=1).tokens
        around.add(tokens.prompt - tokens.audio)
    assert len(around) == 1


def test_the_limit_is_exact_and_named(tiny: TinyGiant, tone: Tone) -> None:
    one_more = np.zeros(300 * RATE_HZ + 1, np.float32)
    with pytest.raises(AudioTooLongError, match=r"the limit is 300 s; .* --max-audio"):
        tiny.ask((one_more, RATE_HZ), "What?")
    limit = 31.0
    clip = tone(limit, RATE_HZ)
    answer = tiny.ask((clip, RATE_HZ), "What?", max_new_tokens=1, max_audio_s=limit)
    assert answer.audio.used_s == limit
    with pytest.raises(AudioTooLongError, match=r"holds 31\.000125 s, the limit is 31 s"):
        tiny.ask((np.append(clip, np.float32(0)), RATE_HZ), "What?", max_audio_s=limit)
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="--max-audio"):
            tiny.ask((clip, RATE_HZ), "What?", max_audio_s=bad)


def test_more_audio_than_the_decoder_has_positions(tiny: TinyGiant, tone: Tone) -> None:
    """420 s were encoded before the refusal, which gave no length that would do."""
    with pytest.raises(AudioTooLongError, match=r"holds 420 s, this model has room for") as told:
        tiny.ask((tone(420.0, 1_000), 1_000), "What?", max_new_tokens=1, max_audio_s=500)
    longest_s = float(re.search(r"room for ([\d.]+) s", str(told.value))[1])
    events = tiny.stream(
        (tone(longest_s, 1_000), 1_000), "What?", max_new_tokens=1, max_audio_s=500
    )
    assert isinstance(next(events), AudioRead)
    assert isinstance(next(events), StreamsReady)
    with pytest.raises(UsageError, match="no room for sound"):
        tiny.ask((tone(1.0, 8_000), 8_000), "What?", max_new_tokens=100_000)


def test_the_option_raises_the_limit(
    tiny_bundle: object, tmp_path: object, tone: Tone, capsys: pytest.CaptureFixture[str]
) -> None:
    import soundfile

    path = f"{tmp_path}/clip.wav"
    soundfile.write(path, tone(2.0, RATE_HZ), RATE_HZ)
    asked = [path, "What?", "--bundle", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "1"]
    assert cli.main([*asked, "--max-audio", "1.5"]) == 3
    assert "holds 2 s, the limit is 1.5 s" in capsys.readouterr().err
    assert cli.main([*asked, "--max-audio", "2"]) == 0
