"""Ctrl-C that ends a command at once, even while native code computes.

Python raises ``KeyboardInterrupt`` only between its own instructions, and one run of a large
encoder takes seconds. So a thread waits for the signal too and ends the process if the interpreter
has not done so after a moment. For commands that have nothing to clean up; one that goes on after
an interrupt, as a conversation does, takes it back.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

__all__ = ["INTERRUPTED", "exit_on_interrupt", "raise_on_interrupt"]

INTERRUPTED = 130  # 128 + SIGINT, as shells expect

_GRACE_S = 0.3


def exit_on_interrupt(message: str) -> None:
    """From now on SIGINT ends this process within a moment, with ``message`` on standard error.

    Call it from the main thread. ``KeyboardInterrupt`` is still raised where Python can.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, as in a background job, or handled by somebody else
    signals, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(signals, message), daemon=True).start()


def raise_on_interrupt() -> None:
    """Take :func:`exit_on_interrupt` back: SIGINT only raises ``KeyboardInterrupt`` again.

    Call it from the main thread.
    """
    signal.set_wakeup_fd(-1)


def _watch(signals: int, message: str) -> None:
    main = threading.main_thread()
    while os.read(signals, 1) != bytes([signal.SIGINT]):
        pass
    time.sleep(_GRACE_S)
    if main.is_alive() and not sys.is_finalizing():
        os.write(2, message.encode())
        os._exit(INTERRUPTED)
