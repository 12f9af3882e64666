"""Ctrl-C that ends a command with one line and 130, at whatever moment it comes.

``KeyboardInterrupt`` is not enough for that. Inside an import, a finalizer or a callback of native
code it is turned into another error or printed and lost; and while native code computes, which
takes seconds, nothing is raised at all. So the signal's handler ends the process itself, after the
calls that :func:`cleaned_up` holds, and a thread does the same where the handler does not get to
run. A conversation, which goes on after an interrupt, takes this back.

A command sets this up before it imports anything else, so this module imports as little as it can.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "INTERRUPTED",
    "cleaned_up",
    "exit_from_native_code",
    "exit_on_interrupt",
    "raise_on_interrupt",
]

INTERRUPTED = 130  # 128 + SIGINT, as shells expect

_GRACE_S = 0.3
_clean_ups: list[Callable[[], object]] = []
_line: bytes | None = None  # what is said; None while an interrupt is somebody else's business
_is_leaving = False


def exit_on_interrupt(program: str) -> None:
    """From now on SIGINT ends this process with ``program: interrupted`` on standard error.

    Call it from the main thread. Nothing changes where SIGINT is ignored, as in a background job,
    or handled by somebody else.
    """
    global _line
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        _line = f"{program}: interrupted\n".encode()
        signal.signal(signal.SIGINT, lambda *_: _leave())


def exit_from_native_code() -> None:
    """Let SIGINT end this process also while native code keeps the main thread.

    Call it from the main thread, after :func:`exit_on_interrupt` and after any fork.
    """
    if _line is None:
        return
    import threading

    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(signals,), daemon=True).start()


def raise_on_interrupt() -> None:
    """Take both back: SIGINT raises ``KeyboardInterrupt`` again. Call it from the main thread."""
    global _line
    if _line is not None:
        _line = None
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def cleaned_up(call: Callable[[], object]) -> Iterator[None]:
    """Within, an interrupt that ends the process makes this call first. It has to be short."""
    _clean_ups.append(call)
    try:
        yield
    finally:
        _clean_ups.remove(call)


def _leave() -> None:
    global _is_leaving
    if _is_leaving or _line is None:
        return
    _is_leaving = True
    for clean_up in reversed(_clean_ups):
        with suppress(BaseException):
            clean_up()
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            os.write(sys.stderr.fileno(), _line)
    os._exit(INTERRUPTED)


def _watch(signals: int) -> None:
    import time

    while os.read(signals, 1) != bytes([signal.SIGINT]):
        pass
    time.sleep(_GRACE_S)
    if sys.is_finalizing():
        return
    _leave()
    time.sleep(2 * _GRACE_S)  # the handler is cleaning up
    if _line is not None:
        os._exit(INTERRUPTED)
