"""The HTTP application: paths, limits and headers around :mod:`engine`.

What a client can make the server hold is bounded before it is held: a place in the queue comes
before the body, the body is counted while it arrives, and the audio is measured from its header.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import importlib.resources
import io
import re
import sys
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import soundfile
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..audio import MAX_AUDIO_S
from ..config import ModelConfig
from ..errors import AudioError
from ..events import Event, Finished
from ..pipeline import MAX_NEW_TOKENS
from .chat import ALIAS, ChatRequest, parse_chat
from .engine import Engine, Job
from .errors import ApiError, api_error
from .metrics import CONTENT_TYPE, Metrics
from .replies import ReplyWriter, to_json

__all__ = ["LOOPBACK_NAMES", "Limits", "Model", "Service", "create_app"]

LOOPBACK_NAMES = frozenset({"127.0.0.1", "::1", "localhost"})
_T = TypeVar("_T")


class Model(Protocol):
    """What is served: :class:`~tinygiant.runtime.pipeline.TinyGiant`, or a stand-in."""

    @property
    def config(self) -> ModelConfig:
        """The model's constants."""

    def stream(
        self,
        audio: bytes,
        question: str,
        choices: Sequence[str] | None,
        *,
        max_new_tokens: int,
        max_audio_s: float,
    ) -> Iterator[Event]:
        """Answer a question about a clip."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    ``max_rate_hz`` and ``max_channels`` bound what ``max_audio_s`` seconds take when decoded:
    4 bytes a sample at the clip's own rate, 220 MiB at the defaults.
    """

    max_body_bytes: int = 48 << 20
    max_audio_s: float = MAX_AUDIO_S
    max_new_tokens: int = 2_048
    max_rate_hz: int = 192_000
    max_channels: int = 8
    body_timeout_s: float = 60.0


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
        audio: bytes,
        question: str,
        choices: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
    ) -> Callable[[], Iterator[Event]]:
        """The work of one question, for :meth:`~tinygiant.runtime.serve.engine.Place.run`."""

        def events() -> Iterator[Event]:
            _check_header(audio, self.limits)
            return self.model.stream(
                audio,
                question,
                choices,
                max_new_tokens=max_new_tokens or min(MAX_NEW_TOKENS, self.limits.max_new_tokens),
                max_audio_s=self.limits.max_audio_s,
            )

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


def create_app(
    service: Service,
    *,
    token: str | None = None,
    host_names: frozenset[str] | None = None,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
) -> ASGIApp:
    """The application.

    Args:
        service: what to serve.
        token: what ``Authorization: Bearer`` must hold for ``/v1`` and ``/metrics``; None: nothing.
        host_names: names a request may call this server; None: any. A loopback server without this
            check could be read by any web page whose owner points its name at 127.0.0.1.
        lifespan: runs around the application.
    """
    page, policy = _page()

    async def index(request: Request) -> Response:
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
        return Response(page, media_type="text/html", headers=headers)

    async def health(request: Request) -> Response:
        if service.engine.deadline is not None:
            return _json({"status": "shutting_down"}, 503)
        return _json({"status": "ok", "model": service.model.config.name})

    async def metrics(request: Request) -> Response:
        _authorize(request, token)
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(request: Request) -> Response:
        _authorize(request, token)
        name = service.model.config.name
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "tinygiant"}
        asked = request.path_params.get("model")
        if asked is None:
            return _json({"object": "list", "data": [entry]})
        if asked not in (name, ALIAS):
            message = f"model {asked[:100]!r} does not exist; this server has {name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return _json(entry)

    routes = [
        Route("/", index),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{model}", models),
        Route("/v1/chat/completions", _ChatEndpoint(service, token), methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: _on_error, HTTPException: _on_error, Exception: _on_error},
        lifespan=lifespan,
    )
    return _Guard(app, service.metrics, host_names)


class _Guard:
    """Around every request: the host's name, headers for browsers, the count."""

    def __init__(self, app: ASGIApp, metrics: Metrics, names: frozenset[str] | None) -> None:
        self._app = app
        self._metrics = metrics
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.request(scope["path"], message["status"])
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers["Cross-Origin-Opener-Policy"] = "same-origin"
                headers.setdefault("Cache-Control", "no-store")
                headers.setdefault("Content-Security-Policy", "default-src 'none'; sandbox")
            await send(message)

        host = Request(scope).headers.get("host", "")
        if self._names is not None and _name(host) not in self._names:
            message = f"host {host[:100]!r} is not this server; use localhost or --host"
            response = _error(ApiError(421, message, code="wrong_host"))
            await response(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


class _ChatEndpoint:
    """``POST /v1/chat/completions``."""

    def __init__(self, service: Service, token: str | None) -> None:
        self._service = service
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            await self._answer(request, send)
        except ApiError as error:
            await _drain(request)
            await _error(error)(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is left to answer

    async def _answer(self, request: Request, send: Send) -> None:
        service = self._service
        _authorize(request, self._token)
        _check_type(request)
        with service.engine.place() as place:
            body = await _read_body(request, service.limits)
            chat = parse_chat(body, service.model.config.name, service.limits.max_new_tokens)
            del body  # the clip is decoded from it; waiting needs only that
            start = service.start(chat.audio, chat.question, chat.choices, chat.max_new_tokens)
            async with place.run(start) as job:
                writer = ReplyWriter(
                    service.model.config, has_choices=chat.choices is not None, events=chat.events
                )
                events = service.counted(job)
                try:
                    response = await self._response(request, chat, writer, events)
                    await response(request.scope, request.receive, send)
                finally:
                    await events.aclose()

    async def _response(
        self,
        request: Request,
        chat: ChatRequest,
        writer: ReplyWriter,
        events: AsyncIterator[Event],
    ) -> Response:
        if not chat.stream:
            return _json(await _unless_gone(request, writer.whole(events)))
        chunks = writer.chunks(events, include_usage=chat.include_usage)
        # With the first chunk at hand the status is known: until then errors have their own.
        first = await _unless_gone(request, anext(chunks))
        return StreamingResponse(
            _server_sent(first, chunks),
            media_type="text/event-stream",
            headers={"X-Accel-Buffering": "no"},
        )


async def _server_sent(
    first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[bytes]:
    yield _data(first)
    try:
        async for chunk in chunks:
            yield _data(chunk)
    except ApiError as error:
        yield _data(error.to_dict())
        return
    yield b"data: [DONE]\n\n"


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """The result of ``work``, which is cancelled if the client leaves before it is there.

    Raises:
        ClientDisconnect: the client left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _read_body(request: Request, limits: Limits) -> bytearray:
    """The body, counted while it arrives.

    Raises:
        ApiError: 413 beyond the limit, 408 when it takes too long.
        ClientDisconnect: the client left.
    """
    too_large = ApiError(
        413,
        f"the body is larger than {limits.max_body_bytes / 2**20:g} MiB, the limit of this server; "
        "send a shorter or compressed clip (flac, mp3, ogg)",
        code="body_too_large",
    )
    announced = request.headers.get("content-length", "0")
    if not announced.isascii() or not announced.isdigit() or len(announced) > 15:
        raise ApiError(400, "Content-Length is no number", code="invalid_header")
    if int(announced) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for block in request.stream():
                if len(body) + len(block) > limits.max_body_bytes:
                    raise too_large
                body += block
    except TimeoutError as error:
        message = f"the body did not arrive within {limits.body_timeout_s:g} s"
        raise ApiError(408, message, code="timeout", headers={"Connection": "close"}) from error
    return body


async def _drain(request: Request) -> None:
    """Let go by what a refused client is still sending: most read no answer before it is sent.

    Nothing is kept. Who sends for longer than two seconds loses the connection.
    """
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(2.0):
            async for _ in request.stream():
                pass


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


def _check_type(request: Request) -> None:
    # Also what keeps web pages out: a browser asks before it sends JSON to another origin.
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        message = f"Content-Type is {kind[:60]!r}, expected application/json"
        raise ApiError(415, message, code="unsupported_media_type")


def _authorize(request: Request, token: str | None) -> None:
    if token is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    same = hmac.compare_digest(given.strip().encode("utf-8"), token.encode("utf-8"))
    if scheme.lower() != "bearer" or not same:
        raise ApiError(
            401,
            "the token is missing or wrong; send Authorization: Bearer TOKEN",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _name(host: str) -> str | None:
    """The name in a ``Host`` header, without port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = {404: f"no such path: {request.url.path[:100]}"}.get(error.status_code)
        allowed: Mapping[str, str] = error.headers or {}
        if error.status_code == 405:
            message = f"{request.method} is not for this path; use {allowed.get('Allow')}"
        error = ApiError(error.status_code, message or error.detail, headers=dict(allowed))
    return _error(api_error(error))


def _error(error: ApiError) -> Response:
    return _json(error.to_dict(), error.status, error.headers)


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(data), status, headers, "application/json")


def _page() -> tuple[bytes, str]:
    """The page, and the policy that lets run exactly the script and the style inside it."""
    page = importlib.resources.files(__package__).joinpath("page.html").read_bytes()
    (style,) = re.findall(rb"<style>(.*?)</style>", page, re.DOTALL)
    (script,) = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    policy = {
        "default-src": "'none'",
        "script-src": _hash_source(script),
        "style-src": _hash_source(style),
        "connect-src": "'self'",
        "media-src": "blob:",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash_source(text: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
