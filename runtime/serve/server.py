"""Start the server, print its address, stop it cleanly.

SIGTERM and SIGINT: no new request is taken, waiting ones are refused with 503, the running one has
its grace; two seconds later the process ends in any case. A second Ctrl-C ends it at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from .addresses import LOOPBACK_NAMES, is_loopback
from .app import HttpOptions, create_app
from .engine import Engine
from .service import Limits, Model, Service

__all__ = ["Server", "make_server", "serve"]

_MAX_CONNECTIONS = 512
_AFTER_GRACE_S = 2.0


class Server(uvicorn.Server):
    """uvicorn's server, which first stops the engine."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        """Serve ``config``'s application."""
        super().__init__(config)
        self.signals: list[int] = []
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop, at the second SIGINT at once; uvicorn's own would raise it again."""
        self.signals.append(sig)
        self.stop(force=self.should_exit and sig == signal.SIGINT)

    def stop(self, *, force: bool = False) -> None:
        """Begin to stop; for signal handlers and other threads."""
        self._engine.begin_shutdown()
        self.should_exit = True
        self.force_exit = self.force_exit or force


def make_server(
    model: Model,
    listener: socket.socket,
    *,
    limits: Limits,
    n_queued: int = 8,
    parallel: int | None = None,
    grace_s: float = 10.0,
    options: HttpOptions | None = None,
    wyoming: socket.socket | None = None,
) -> tuple[Server, Engine]:
    """A server for ``model`` on a bound socket, not yet running, and its engine."""
    # It warns of every broken form; what clients send is not for the log.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
    engine = Engine(n_queued, grace_s=grace_s, batch=model.batch(parallel))
    service = Service(model, engine, limits)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if wyoming is None:
            yield
            return
        from .wyoming import serving

        async with serving(service, wyoming):
            yield

    options = options or HttpOptions()
    config = uvicorn.Config(
        create_app(
            service,
            options,
            host_names=_host_names(listener.getsockname()[0], options.allowed_hosts),
            lifespan=lifespan,
        ),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        use_colors=None if sys.stdout else False,  # it asks whether that is a terminal
        proxy_headers=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=round(grace_s + _AFTER_GRACE_S),
    )
    return Server(config, engine), engine


def serve(
    model: Model,
    listener: socket.socket,
    *,
    limits: Limits,
    n_queued: int,
    parallel: int | None,
    grace_s: float,
    options: HttpOptions,
    wyoming: socket.socket | None,
) -> int:
    """Serve until a signal; returns the exit code."""
    server, engine = make_server(
        model,
        listener,
        limits=limits,
        n_queued=n_queued,
        parallel=parallel,
        grace_s=grace_s,
        options=options,
        wyoming=wyoming,
    )
    _say(_greeting(model, listener, wyoming, has_token=options.token is not None))
    server.run(sockets=[listener])
    if not server.started:
        return 1
    code = 130 if signal.SIGINT in server.signals else 0
    if not engine.stop(_AFTER_GRACE_S):
        # The worker is inside onnxruntime, which cannot be interrupted; waiting for it at exit
        # could take as long as the longest stage.
        _say(["the running request was cancelled"])
        sys.stderr.flush()
        os._exit(code)
    return code


def _host_names(address: str, allowed: tuple[str, ...]) -> frozenset[str] | None:
    """The names that requests may use; None: any, on a network that was not restricted."""
    if not is_loopback(address) and not allowed:
        return None
    return LOOPBACK_NAMES | {address, *allowed}


def _greeting(
    model: Model, listener: socket.socket, wyoming: socket.socket | None, *, has_token: bool
) -> Iterable[str]:
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    yield f"{model.config.name} at http://{name}:{port} (page, /v1/chat/completions)"
    if wyoming is not None:
        yield f"Wyoming at tcp://{name}:{wyoming.getsockname()[1]}"
    if not is_loopback(host) and not has_token:
        yield f"anybody who reaches {name} can ask: set TINYGIANT_TOKEN to require a token"


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"tg-serve: {line}", file=sys.stderr, flush=True)
