"""HTTP for every endpoint: bodies within limits, tokens, JSON and events out."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from .errors import ApiError
from .service import Limits

__all__ = [
    "authorize",
    "check_type",
    "drain",
    "error_response",
    "json_response",
    "read_body",
    "server_sent",
    "to_json",
    "unless_gone",
]

_T = TypeVar("_T")


async def server_sent(
    first: dict[str, Any], chunks: AsyncIterator[dict[str, Any]]
) -> AsyncIterator[bytes]:
    """Server-sent events: ``first``, the other chunks, ``[DONE]``; an error ends them."""
    yield _event(first)
    try:
        async for chunk in chunks:
            yield _event(chunk)
    except ApiError as error:
        yield _event(error.to_dict())
        return
    yield b"data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + to_json(chunk) + b"\n\n"


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
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


async def read_body(request: Request, limits: Limits) -> bytearray:
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
        raise ApiError(400, "Content-Length is not a number", code="invalid_header")
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


async def drain(request: Request) -> None:
    """Let go by what a refused client is still sending: most read no answer before it is sent.

    Nothing is kept. A client that sends for longer than two seconds loses the connection.
    """
    with suppress(TimeoutError, ClientDisconnect, RuntimeError):
        async with asyncio.timeout(2.0):
            async for _ in request.stream():
                pass


def check_type(request: Request, expected: str) -> None:
    """Check ``Content-Type``.

    For JSON it is also what keeps web pages out: a browser asks before it sends JSON to another
    origin.

    Raises:
        ApiError: 415, another type.
    """
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != expected:
        message = f"Content-Type is {kind[:60]!r}, expected {expected}"
        raise ApiError(415, message, code="unsupported_media_type")


def authorize(request: Request, token: str | None) -> None:
    """Check the token, where there is one.

    Raises:
        ApiError: 401, it is missing or wrong.
    """
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


def error_response(error: ApiError) -> Response:
    """The error object, with its status."""
    return json_response(error.to_dict(), error.status, error.headers)


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON."""
    return Response(to_json(data), status, headers, "application/json")


def to_json(data: Any) -> bytes:
    """JSON in ASCII: text from outside may hold halves of surrogate pairs."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).encode("ascii")
