"""``tg-serve``: serve the model on this computer, until it is stopped.

Ends with 0 after SIGTERM and 130 after Ctrl-C; a failure before that is one line and an
exit code of :mod:`tinygiant.runtime.errors`. The log has no line for a request: what is asked, and
by whom, is nobody else's business; ``/metrics`` counts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli.options import OneLineParser
from ..cli.watching import watched
from ..errors import MissingDependencyError, TinyGiantError, UsageError
from ..prompt import check_question
from ..text import one_line
from .addresses import is_loopback

__all__ = ["main"]

TOKEN_VARIABLE = "TINYGIANT_TOKEN"
DEBUG_VARIABLE = "TINYGIANT_DEBUG"
REQUIRED = ("starlette", "uvicorn", "prometheus_client", "python_multipart")

_DESCRIPTION = """\
Serve the model with OpenAI's API (POST /v1/chat/completions with input_audio, and
/v1/audio/transcriptions), a page to try it (/), /v1/models, /health and /metrics. Only this
computer can reach it, unless --host is given."""

_EPILOG = """\
examples:
  tg-serve                                       then open http://127.0.0.1:8517
  curl -F file=@street.wav -F "question=What is heard?" -F response_format=text \\
    http://127.0.0.1:8517/v1/audio/transcriptions
  TINYGIANT_TOKEN=$(cat token) tg-serve --host 0.0.0.0
  tg-serve --wyoming-port 10400                  also for Home Assistant

docs/serving.md has more examples, and what of OpenAI's API is honoured.

exit codes:
  0 SIGTERM · 1 unforeseen failure · 2 wrong options, or a port that is taken · 4 bundle missing or
  damaged · 9 an extra is not installed · 130 interrupted

environment:
  TINYGIANT_TOKEN    token that clients must send; unlike --token, other users cannot see it
  TINYGIANT_BUNDLE   bundle to use where --bundle is not given
  TINYGIANT_DEBUG=1  show the traceback of a failure
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tg-serve``; returns the exit code."""
    if arguments is None:
        return watched("tg-serve", _process)
    return _main(arguments)


def _process() -> int:
    """The command in a process of its own."""
    from ..cli.streams import prepare_streams

    prepare_streams()
    return _main()


def _main(arguments: Sequence[str] | None = None) -> int:
    debug = os.environ.get(DEBUG_VARIABLE) == "1"
    try:
        return _run(_parser().parse_args(arguments))
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except TinyGiantError as error:
        if debug:
            raise
        return _fail(one_line(error), error.exit_code)
    except Exception as error:
        if debug:
            raise
        message = f"unforeseen {type(error).__name__}: {one_line(error)}"
        return _fail(f"{message}; set {DEBUG_VARIABLE}=1 to see where", TinyGiantError.exit_code)


def _run(options: argparse.Namespace) -> int:
    token = _check(options)
    require(dict.fromkeys(REQUIRED, "serve"))
    if options.wyoming_port is not None:
        require({"wyoming": "wyoming"})
    listener = listen(options.host, options.port)
    wyoming = None
    if options.wyoming_port is not None:
        wyoming = listen(options.host, options.wyoming_port)
        if token is not None and not is_loopback(wyoming.getsockname()[0]):
            raise UsageError(
                "Wyoming has no token: with --token it is served on this computer alone; leave out "
                "--wyoming-port, or use a loopback --host"
            )

    # Imported here: these need the extra, and --help does not.
    from ..loading import load
    from .app import HttpOptions
    from .server import serve
    from .service import Limits

    limits = Limits(
        max_body_bytes=round(options.max_body_mb * 2**20),
        max_audio_s=options.max_audio,
        max_new_tokens=options.max_new_tokens,
    )
    model = load(
        options.bundle,
        threads=options.threads,
        memory=options.memory,
        provider=options.provider,
        check_memory=not options.no_memory_check,
    )
    return serve(
        model,
        listener,
        limits=limits,
        n_queued=options.queue,
        parallel=options.parallel,
        grace_s=options.grace,
        options=HttpOptions(
            token=token,
            allowed_hosts=tuple(name.lower() for name in options.allowed_host),
            root_path=options.root_path.rstrip("/"),
            cors_origins=tuple(options.cors_origin),
            strict=options.strict,
            transcription_question=options.transcription_question,
            events=options.events,
        ),
        wyoming=wyoming,
    )


def _check(options: argparse.Namespace) -> str | None:
    """The token, once all options are possible."""
    for name, value, least in (
        ("--max-body-mb", options.max_body_mb, 0.001),
        ("--max-audio", options.max_audio, 0.001),
        ("--max-new-tokens", options.max_new_tokens, 1),
        ("--queue", options.queue, 0),
        *([] if options.parallel is None else [("--parallel", options.parallel, 1)]),
        ("--grace", options.grace, 0),
    ):
        if not least <= value <= 1e6:
            raise UsageError(f"{name} is {value:g}, expected a number from {least} to a million")
    for name, port in (("--port", options.port), ("--wyoming-port", options.wyoming_port or 0)):
        if not 0 <= port <= 65_535:
            raise UsageError(f"{name} is {port}, expected a number from 0 to 65535")
    check_question(options.transcription_question)
    for name in options.allowed_host:
        if not name.isascii() or not name or set(name) & set("/:* "):
            raise UsageError(
                f"--allowed-host is {name!r}, expected a host name without port, such as "
                "sounds.example"
            )
    if options.root_path and not options.root_path.startswith("/"):
        raise UsageError(f"--root-path is {options.root_path!r}, expected a path such as /sounds")
    for origin in options.cors_origin:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise UsageError(
                f"--cors-origin is {origin!r}, expected scheme, host and port alone, such as "
                "http://localhost:3000, or *"
            )
    token: str | None = options.token
    source = "--token"
    if token is None:
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if token is not None and not (token.strip() == token != "" and token.isascii()):
        raise UsageError(f"{source} is empty or not plain ASCII; give a token or leave it out")
    return token


def require(modules: dict[str, str]) -> None:
    """Check that the modules of an extra are there, without importing them.

    Raises:
        MissingDependencyError: one is not; names the extra.
    """
    for module, extra in modules.items():
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(
                f"tg-serve needs {module}; run: pip install 'tinygiant[{extra}]'"
            )


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host``; connections wait until it is served.

    It listens at once: two sockets may be bound to one port, and the second is refused only when
    it listens.

    Raises:
        UsageError: no such address, or it is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot listen on {host} port {port} ({reason}); choose another --host or --port"
        ) from error
    return listener


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="tg-serve",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--bundle", metavar="DIR", help="model to serve; default: the built-in one")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8517, help="port; 0 takes a free one (%(default)s)")
    add("--token", metavar="T", help=f"token that clients must send; see also {TOKEN_VARIABLE}")
    add(
        "--max-body-mb", type=float, default=48, metavar="MB",
        help="largest request, in MiB of JSON (%(default)g)",
    )  # fmt: skip
    add(
        "--max-audio", type=float, default=300, metavar="S",
        help="longest clip, in seconds (%(default)g)",
    )  # fmt: skip
    add(
        "--max-new-tokens", type=int, default=2048, metavar="N",
        help="most tokens a request may ask for (%(default)s)",
    )  # fmt: skip
    add(
        "--queue", type=int, default=8, metavar="N",
        help="requests that may wait for others; more are refused with 429 (%(default)s)",
    )  # fmt: skip
    add(
        "--parallel", type=int, metavar="N",
        help="requests answered at a time, with the same answers; default: 4, fewer if memory is "
        "short",
    )  # fmt: skip
    add(
        "--grace", type=float, default=10, metavar="S",
        help="time the running request has to finish when the server is stopped (%(default)g)",
    )  # fmt: skip
    add("--threads", type=int, metavar="N", help="threads to compute with; default: physical cores")
    add(
        "--memory", choices=("default", "low"), default="default",
        help="low: load each part when it is needed and release it (%(default)s)",
    )  # fmt: skip
    add(
        "--provider", default="cpu", metavar="P",
        help="what computes: cpu, cuda, tensorrt, openvino, coreml; or one for each part, such as "
        "encoders=tensorrt,decoder=cuda (%(default)s)",
    )  # fmt: skip
    add(
        "--no-memory-check", action="store_true",
        help="load the model even if memory is too small for it",
    )  # fmt: skip
    add(
        "--transcription-question", default="What is said?", metavar="Q",
        help="the question that /v1/audio/transcriptions answers (%(default)s)",
    )  # fmt: skip
    add(
        "--events", type=Path, metavar="FILE",
        help="show the last sounds of this file on the page; tg-listen --events writes it",
    )  # fmt: skip
    add(
        "--strict", action="store_true",
        help="refuse requests with anything that would be ignored, such as temperature or tools",
    )  # fmt: skip
    add(
        "--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="allow pages of this origin, such as http://localhost:3000; * for all; repeatable",
    )  # fmt: skip
    add(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a host name that requests may use, such as that of a proxy; repeatable",
    )  # fmt: skip
    add(
        "--root-path", default="", metavar="PATH",
        help="path under which a proxy offers this server, such as /sounds",
    )  # fmt: skip
    add(
        "--wyoming-port", type=int, metavar="PORT",
        help="also serve Wyoming's handle domain on this port (Home Assistant)",
    )  # fmt: skip
    return parser


def _fail(message: str, code: int) -> int:
    print(f"tg-serve: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
