"""A stand-in for the model whose pace a test decides, and a live server around any model."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import soundfile
from numpy.typing import NDArray

from tests.shipped import NANO
from tinygiant.runtime.answer import AnswerParser
from tinygiant.runtime.asking import AskOptions, Query
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.events import (
    Answer,
    AudioAccount,
    AudioRead,
    Event,
    Finished,
    PromptRead,
    StreamsReady,
    TextPiece,
    Timings,
    TokenCounts,
)
from tinygiant.runtime.prompt import check_choices, check_question
from tinygiant.runtime.serve.app import HttpOptions
from tinygiant.runtime.serve.cli import listen
from tinygiant.runtime.serve.engine import Engine
from tinygiant.runtime.serve.server import make_server
from tinygiant.runtime.serve.service import Limits

THOUGHT = (
    "<think><PLANNING>\nListen first.\n</PLANNING>\n<CAPTION>A dog barks,\n then rain.</CAPTION>\n"
    "<REASONING>Barking is a dog's.</REASONING><SUMMARY> A dog. </SUMMARY></think>\n<RESPONSE>\n"
)

# Intent attention and gate.
LISTENING: tuple[NDArray[np.float32] | None, NDArray[np.float32] | None] = (
    np.array([0.1, 0.2, 0.7], np.float32),
    np.array([[0.25, 0.5]], np.float32),
)


class FakeModel:
    """Answers every question with the same thought; ``tick`` is called before each token.

    ``started``, ``finished`` and ``closed`` hold the questions whose work began, was done to its
    end, and is over, finished or not; ``options`` how they were to be answered. The model writes
    ``text``, or the thought and a dog.
    """

    def __init__(self, tick: Callable[[], object] = lambda: None, text: str | None = None) -> None:
        self.config = dataclasses.replace(NANO, name="fake")
        self.tick = tick
        self.text = text
        self.listening = LISTENING
        self.started: list[str] = []
        self.finished: list[str] = []
        self.closed: list[str] = []
        self.options: list[AskOptions] = []

    def stream(
        self,
        audio: list[bytes],
        question: str,
        choices: Sequence[str] | None = None,
        options: AskOptions = AskOptions(),  # noqa: B008 - frozen
    ) -> Iterator[Event]:
        self.options.append(options)
        check_question(question)
        if choices is not None:
            check_choices(choices)
        return self._events(audio, question, choices, options)

    def batch(self, size: int | None) -> None:
        """One at a time."""

    def events(self, query: Query, batch: None) -> Iterator[Event | None]:
        assert isinstance(query.audio, list)
        return self.stream(query.audio, query.question, query.choices, query.options)

    def _events(
        self,
        sources: list[bytes],
        question: str,
        choices: Sequence[str] | None,
        options: AskOptions,
    ) -> Iterator[Event]:
        self.started.append(question)
        try:
            [audio] = [read_audio(clip, max_audio_s=options.max_audio_s) for clip in sources]
            account = AudioAccount(
                audio.source,
                audio.received_s,
                audio.used_s,
                audio.dropped_s,
                audio.sampling_rate_hz,
                audio.channels,
                1,
                audio.notes,
            )
            yield AudioRead(account)
            yield StreamsReady(False, 0.25)
            yield PromptRead(20, *self.listening)
            answer = "a dog" if choices is None else choices[-1]
            text = self.text or f"{THOUGHT}{answer}</RESPONSE>"
            tokens = [text[i : i + 5] for i in range(0, len(text), 5)][: options.max_new_tokens]
            parser = AnswerParser()
            for token in tokens:
                self.tick()
                for piece in parser.feed(token):
                    yield TextPiece(piece.text, piece.section, piece.markup)
            for piece in parser.finish():
                yield TextPiece(piece.text, piece.section, piece.markup)
            parsed = parser.result()
            self.finished.append(question)
            yield Finished(
                Answer(
                    text=parsed.answer if choices is None else answer,
                    plan=parsed.plan,
                    audio_analysis=parsed.audio_analysis,
                    logic=parsed.logic,
                    summary=parsed.summary,
                    unparsed=parsed.unparsed,
                    raw_text=text,
                    choice_index=None if choices is None else len(choices) - 1,
                    finish_reason="stop" if "".join(tokens) == text else "length",
                    model="fake",
                    timings=Timings(0, 0.25, 0, 0, 0.5, 0.3, 0.75, False, 20.0),
                    audio=account,
                    tokens=TokenCounts(prompt=20, audio=3, generated=len(tokens)),
                )
            )
        finally:
            self.closed.append(question)


@dataclass
class Live:
    """A running server."""

    url: str
    engine: Engine
    wyoming_port: int | None
    stop: Callable[[], None]

    @property
    def n_waiting(self) -> int:
        """Requests whose bodies are read and that the worker has not taken."""
        return len(self.engine._pending)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the worker from its next request until the block ends."""
        end = threading.Event()
        self.engine._executor.submit(end.wait, 60)
        try:
            yield
        finally:
            end.set()

    def post(self, body: Any = None, **options: Any) -> httpx.Response:
        """Ask once; ``body`` is JSON-ready, or use ``content``."""
        headers = {"Content-Type": "application/json"} | options.pop("headers", {})
        content = options.pop("content", None)
        return httpx.post(
            f"{self.url}/v1/chat/completions",
            content=json.dumps(body) if content is None else content,
            headers=headers,
            timeout=60,
            **options,
        )

    @contextmanager
    def client(self, body: Any) -> Iterator[None]:
        """A client that has sent ``body``, reads nothing, and leaves when the block ends."""
        content = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(content)
            )
            raw.sendall(content)
            yield


@contextmanager
def live(
    model: Any,
    *,
    limits: Limits | None = None,
    n_queued: int = 8,
    parallel: int | None = None,
    options: HttpOptions | None = None,
    grace_s: float = 5.0,
    wyoming: bool = False,
) -> Iterator[Live]:
    """A server on a free port of this computer, in a thread."""
    listener = listen("127.0.0.1", 0)
    wyoming_socket = listen("127.0.0.1", 0) if wyoming else None
    server, engine = make_server(
        model,
        listener,
        limits=limits or Limits(),
        n_queued=n_queued,
        parallel=parallel,
        grace_s=grace_s,
        options=options,
        wyoming=wyoming_socket,
    )
    port = listener.getsockname()[1]
    wyoming_port = wyoming_socket.getsockname()[1] if wyoming_socket else None
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield Live(f"http://127.0.0.1:{port}", engine, wyoming_port, server.stop)
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()
        assert engine.stop(10)


def wait_for(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait until something is so; a slow machine may take its time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def clip(seconds: float = 0.5, rate_hz: int = 16_000, kind: str = "WAV", channels: int = 1) -> str:
    """Quiet noise, encoded, in base64."""
    sound = 0.1 * np.random.default_rng(5).standard_normal((round(seconds * rate_hz), channels))
    encoded = io.BytesIO()
    soundfile.write(encoded, sound, rate_hz, format=kind)
    return base64.b64encode(encoded.getvalue()).decode()


def chat(
    question: str = "What is heard?", data: str | None = None, **fields: Any
) -> dict[str, Any]:
    """A request's body."""
    audio = {"data": clip() if data is None else data, "format": fields.pop("format", "wav")}
    content = [
        {"type": "input_audio", "input_audio": audio},
        {"type": "text", "text": question},
    ]
    return {"model": "fake", "messages": [{"role": "user", "content": content}]} | fields
