"""The HTTP application: paths around :mod:`engine`.

The memory that a client can make the server use is bounded in advance: a place in the queue comes
before the body, the body is counted while it arrives, and the audio is measured from its header.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import importlib.resources
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..events import Event
from .chat import check_model, parse_chat
from .engine import Start
from .errors import ApiError, api_error
from .guard import Guard
from .http import (
    authorize,
    check_type,
    drain,
    error_response,
    json_response,
    read_body,
    server_sent,
    unless_gone,
)
from .metrics import CONTENT_TYPE
from .replies import ReplyWriter
from .service import Service
from .sounds import last_sounds
from .transcriptions import TranscriptionWriter, parse_transcription

__all__ = ["HttpOptions", "create_app"]

IGNORED_HEADER = "X-TinyGiant-Ignored"


@dataclass(frozen=True)
class HttpOptions:
    """How the server behaves over HTTP.

    Attributes:
        token: what ``Authorization: Bearer`` must hold for ``/v1`` and ``/metrics``; None: nothing.
        allowed_hosts: host names that a request may use, besides the server's own.
        root_path: prefix that the paths of requests may have, without a slash at its end.
        cors_origins: origins whose pages may ask; ``*`` stands for all.
        strict: refuse requests with anything that would be ignored.
        transcription_question: the question that a transcription answers.
        events: the file to which ``tg-listen`` appends its events; None: there is none.
    """

    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    root_path: str = ""
    cors_origins: tuple[str, ...] = ()
    strict: bool = False
    transcription_question: str = "What is said?"
    events: Path | None = None


def create_app(
    service: Service,
    options: HttpOptions,
    *,
    host_names: frozenset[str] | None = None,
    lifespan: Callable[[Starlette], AbstractAsyncContextManager[None]] | None = None,
) -> ASGIApp:
    """The application.

    Args:
        service: what to serve.
        options: how.
        host_names: names a request may call this server; None: any. A loopback server without this
            check could be read by any web page whose owner points its name at 127.0.0.1.
        lifespan: runs around the application.
    """
    page, policy = _page()
    clip = importlib.resources.files(__package__).joinpath("example.mp3").read_bytes()
    token = options.token

    async def index(request: Request) -> Response:
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
        return Response(page, media_type="text/html", headers=headers)

    async def example(request: Request) -> Response:
        return Response(clip, media_type="audio/mpeg", headers={"Cache-Control": "no-cache"})

    async def health(request: Request) -> Response:
        if service.engine.deadline is not None:
            return json_response({"status": "shutting_down"}, 503)
        name = service.model.config.name
        asked_for = {"events": options.events is not None, "token": token is not None}
        return json_response({"status": "ok", "model": name, **asked_for})

    async def events(request: Request) -> Response:
        authorize(request, token)
        if options.events is None:
            raise ApiError(404, "this server was started without --events FILE")
        return json_response({"sounds": await asyncio.to_thread(last_sounds, options.events)})

    async def metrics(request: Request) -> Response:
        authorize(request, token)
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def models(request: Request) -> Response:
        authorize(request, token)
        name = service.model.config.name
        entry = {"id": name, "object": "model", "created": 0, "owned_by": "tinygiant"}
        entry |= {"tinygiant": {"transcription_question": options.transcription_question}}
        asked = request.path_params.get("model")
        if asked is None:
            return json_response({"object": "list", "data": [entry]})
        check_model(asked, name)
        return json_response(entry)

    chat = _Endpoint(service, token, "application/json", _chat(service, strict=options.strict))
    transcribe = _Endpoint(service, token, "multipart/form-data", _transcribe(service, options))
    routes = [
        Route("/", index),
        Route("/events", events),
        Route("/example.mp3", example),
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{model}", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/audio/transcriptions", transcribe, methods=["POST"]),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=options.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[IGNORED_HEADER, "Retry-After"],
    )
    app = Starlette(
        routes=routes,
        middleware=[cors] if options.cors_origins else [],
        exception_handlers={ApiError: _on_error, HTTPException: _on_error, Exception: _on_error},
        lifespan=lifespan,
    )
    return Guard(app, service.metrics, names=host_names, root_path=options.root_path)


class Writer(Protocol):
    """Writes what a request is answered with."""

    async def whole(self, events: AsyncIterator[Event]) -> Response:
        """The answer, once it is complete."""

    def chunks(self, events: AsyncIterator[Event]) -> AsyncIterator[dict[str, Any]]:
        """The answer as server-sent events."""


@dataclass(frozen=True)
class Asked:
    """A request taken apart.

    Attributes:
        start: begins the work.
        writer: writes the answer.
        stream: whether it is to arrive as it is made.
        ignored: the ignored fields of the request, a line each: ``field: why``.
    """

    start: Start
    writer: Writer
    stream: bool
    ignored: tuple[str, ...]

    @property
    def headers(self) -> dict[str, str]:
        """Headers that name what was ignored."""
        names = ", ".join(line.partition(":")[0] for line in self.ignored)
        return {IGNORED_HEADER: names} if names else {}


class _Endpoint:
    """``POST`` of a question: a place in the queue, the body, the answer or its events."""

    def __init__(
        self,
        service: Service,
        token: str | None,
        content_type: str,
        take: Callable[[Request, bytearray], Awaitable[Asked]],
    ) -> None:
        self._service = service
        self._token = token
        self._content_type = content_type
        self._take = take

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            await self._answer(request, send)
        except ApiError as error:
            await drain(request)
            await error_response(error)(scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is left to answer

    async def _answer(self, request: Request, send: Send) -> None:
        service = self._service
        authorize(request, self._token)
        check_type(request, self._content_type)
        with service.engine.place() as place:
            body = await read_body(request, service.limits)
            asked = await self._take(request, body)
            del body  # the clip is decoded from it; waiting needs only that
            async with place.run(asked.start) as job:
                events = service.counted(job)
                try:
                    response = await _response(request, asked, events)
                    await response(request.scope, request.receive, send)
                finally:
                    await events.aclose()


async def _response(request: Request, asked: Asked, events: AsyncIterator[Event]) -> Response:
    if not asked.stream:
        response = await unless_gone(request, asked.writer.whole(events))
        response.headers.update(asked.headers)
        return response
    chunks = asked.writer.chunks(events)
    # With the first chunk at hand the status is known: until then errors have their own.
    first = await unless_gone(request, anext(chunks))
    return StreamingResponse(
        server_sent(first, chunks),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no", **asked.headers},
    )


def _chat(service: Service, *, strict: bool) -> Callable[[Request, bytearray], Awaitable[Asked]]:
    """Takes apart ``POST /v1/chat/completions``."""

    async def take(request: Request, body: bytearray) -> Asked:
        config = service.model.config
        limits = service.limits
        chat = parse_chat(
            body, config.name, limits.max_new_tokens, n_clips=config.n_clips, strict=strict
        )
        options = limits.options(chat.max_new_tokens, think=chat.think)
        start = service.start(chat.clips, chat.question, chat.choices, options)
        return Asked(start, ReplyWriter(config, chat.form), chat.stream, chat.form.ignored)

    return take


def _transcribe(
    service: Service, options: HttpOptions
) -> Callable[[Request, bytearray], Awaitable[Asked]]:
    """Takes apart ``POST /v1/audio/transcriptions``."""

    async def take(request: Request, body: bytearray) -> Asked:
        asked = await parse_transcription(
            request.headers,
            body,
            service.model.config.name,
            options.transcription_question,
            strict=options.strict,
        )
        start = service.start([asked.audio], asked.question)
        return Asked(start, TranscriptionWriter(asked), asked.stream, asked.ignored)

    return take


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        message = {404: f"no such path: {request.url.path[:100]}"}.get(error.status_code)
        allowed: Mapping[str, str] = error.headers or {}
        if error.status_code == 405:
            message = f"{request.method} is not allowed for this path; use {allowed.get('Allow')}"
        error = ApiError(error.status_code, message or error.detail, headers=dict(allowed))
    return error_response(api_error(error))


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
