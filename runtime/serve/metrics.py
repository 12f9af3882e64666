"""The metrics for Prometheus. No text of a question or an answer is kept."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from ..events import Answer
from .engine import Engine

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PATHS = (
    "/",
    "/events",
    "/example.mp3",
    "/health",
    "/metrics",
    "/v1/audio/transcriptions",
    "/v1/chat/completions",
    "/v1/models",
)


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine, model: str) -> None:
        """Register everything in a registry of its own."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = Counter(
            "tinygiant_http_requests",
            "HTTP requests by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self._jobs = Counter(
            "tinygiant_jobs", "Inferences by outcome", ["outcome"], registry=self.registry
        )
        self._tokens = Counter(
            "tinygiant_tokens", "Tokens by kind", ["kind"], registry=self.registry
        )
        self._audio = Counter(
            "tinygiant_audio_seconds", "Audio by fate", ["fate"], registry=self.registry
        )
        self._stages = Histogram(
            "tinygiant_stage_seconds",
            "Time by stage of an inference",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        taken = Gauge(
            "tinygiant_requests_in_progress",
            "Requests that hold a place: running, waiting or arriving",
            registry=self.registry,
        )
        taken.set_function(lambda: engine.n_taken)
        places = Gauge("tinygiant_places", "Places there are", registry=self.registry)
        places.set(engine.n_places)
        loaded = Gauge("tinygiant_model_info", "The model", ["model"], registry=self.registry)
        loaded.labels(model).set(1)

    def request(self, path: str, status: int) -> None:
        """Count a request; paths that do not exist share one label."""
        known = path if path in _PATHS or path.startswith("/v1/models/") else "other"
        known = "/v1/models" if known.startswith("/v1/models") else known
        self._requests.labels(known, str(status)).inc()

    def job(self, outcome: str, waited_s: float) -> None:
        """Count an inference: ``finished``, ``cancelled`` or ``failed``."""
        self._jobs.labels(outcome).inc()
        self._stages.labels("queue").observe(waited_s)

    def answer(self, answer: Answer) -> None:
        """Count what an answer took."""
        tokens, timings, audio = answer.tokens, answer.timings, answer.audio
        for kind, count in (
            ("audio", tokens.audio),
            ("text", tokens.prompt - tokens.audio),
            ("generated", tokens.generated),
        ):
            self._tokens.labels(kind).inc(count)
        for fate, seconds in (("used", audio.used_s), ("dropped", audio.dropped_s)):
            self._audio.labels(fate).inc(max(seconds, 0.0))
        for stage, seconds in (
            ("audio", timings.audio_s),
            ("encode", timings.encode_s),
            ("prefill", timings.project_s + timings.prefill_s),
            ("decode", timings.decode_s),
            ("total", timings.total_s),
        ):
            self._stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self.registry)
