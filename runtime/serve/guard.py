"""Around every request: the host's name, the path's prefix, headers for browsers, the count."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .http import error_response
from .metrics import Metrics

__all__ = ["Guard"]


class Guard:
    """The outermost layer; see the module."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, *, names: frozenset[str] | None, root_path: str
    ) -> None:
        """Let in requests to ``names`` (None: to any), with or without the prefix ``root_path``."""
        self._app = app
        self._metrics = metrics
        self._names = names
        self._root = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # A proxy may pass the prefix on or take it away: both reach the same paths.
        path: str = scope["path"]
        if self._root and path.startswith(self._root + "/"):
            path = path.removeprefix(self._root)
            scope = {**scope, "path": path}

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.request(path, message["status"])
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
            message = (
                f"host {host[:100]!r} is not this server; use localhost, or start tg-serve with "
                "--allowed-host NAME"
            )
            response = error_response(ApiError(421, message, code="wrong_host"))
            await response(scope, receive, guarded)
            return
        if self._root and path == self._root:  # the page's paths are relative to a folder
            await RedirectResponse(self._root + "/", 308)(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)


def _name(host: str) -> str | None:
    """The name in a ``Host`` header, without port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
