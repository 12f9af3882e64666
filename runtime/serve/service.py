"""The model, its queue, its limits and its counters, shared by HTTP and Wyoming."""

from __future__ import annotations

import io
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import soundfile

from ..asking import MAX_NEW_TOKENS, AskOptions, Query
from ..audio import MAX_AUDIO_S
from ..batch import Batch
from ..config import ModelConfig
from ..errors import AudioError
from ..events import Event, Finished
from .engine import Engine, Job, Start
from .errors import ApiError
from .metrics import Metrics

__all__ = ["Limits", "Model", "Service"]


class Model(Protocol):
    """What is served: :class:`~tinygiant.runtime.pipeline.TinyGiant`, or a stand-in."""

    @property
    def config(self) -> ModelConfig:
        """The model's constants."""

    def batch(self, size: int | None) -> Batch | None:
        """Room for several answers in work at a time."""

    def events(self, query: Query, batch: Batch | None) -> Iterator[Event | None]:
        """Answer a question about a clip, or about as many as the model hears at once."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    ``max_rate_hz`` and ``max_channels`` bound what ``max_audio_s`` seconds take when decoded:
    4 bytes a sample at the clip's own rate, 220 MiB at the defaults.
    """

    max_body_bytes: int = 48 << 20
    max_audio_s: float = MAX_AUDIO_S
    max_new_tokens: int = 2_048
    max_rate_hz: int = 192_000
    max_channels: int = 8
    body_timeout_s: float = 60.0

    def options(self, max_new_tokens: int | None = None, *, think: bool = True) -> AskOptions:
        """How a question is answered within these limits."""
        return AskOptions(
            think=think,
            max_new_tokens=max_new_tokens or min(MAX_NEW_TOKENS, self.max_new_tokens),
            max_audio_s=self.max_audio_s,
            fit=True,
        )


class Service:
    """A model, its queue and its counters: what HTTP and Wyoming share."""

    def __init__(self, model: Model, engine: Engine, limits: Limits) -> None:
        """Serve ``model`` through ``engine``."""
        self.model = model
        self.engine = engine
        self.limits = limits
        self.metrics = Metrics(engine, model.config.name)

    def start(
        self,
        clips: Sequence[bytes],
        question: str,
        choices: Sequence[str] | None = None,
        options: AskOptions | None = None,
    ) -> Start:
        """The work of one question, for :meth:`~tinygiant.runtime.serve.engine.Place.run`."""

        def events(batch: Batch | None) -> Iterator[Event | None]:
            for clip in clips:
                _check_header(clip, self.limits)
            chosen = options or self.limits.options()
            return self.model.events(Query([*clips], question, choices, chosen), batch)

        return events

    async def counted(self, job: Job) -> AsyncGenerator[Event, None]:
        """A job's events; how it ended is counted."""
        outcome = "cancelled"
        try:
            async for event in job:
                if isinstance(event, Finished):
                    self.metrics.answer(event.answer)
                yield event
            outcome = "finished"
        except ApiError as error:
            outcome = "failed"
            if error.status == 500:
                print(f"tg-serve: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            self.metrics.job(outcome, job.waited_s)


def _check_header(encoded: bytes, limits: Limits) -> None:
    """Refuse rates and channels that would make a permitted length a large one.

    Raises:
        AudioError: beyond the limits.
    """
    try:
        with soundfile.SoundFile(io.BytesIO(encoded)) as sound:
            rate_hz, channels = sound.samplerate, sound.channels
    except (soundfile.LibsndfileError, OSError, ValueError):
        return  # what is wrong with it, reading it will tell
    if rate_hz > limits.max_rate_hz or channels > limits.max_channels:
        raise AudioError(
            f"audio bytes: {rate_hz} Hz and {channels} channels, this server takes at most "
            f"{limits.max_rate_hz} Hz and {limits.max_channels}; convert it, e.g. to 48000 Hz mono"
        )
