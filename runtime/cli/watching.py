"""A command whose native code may die because address space runs out, and its one line.

Where the system bounds a process's address space (``ulimit -v``), the bound can strike anywhere:
while a library is mapped, in a thread that cannot start, in an allocation nobody checks. No handler
in the same process is sure to run then, so :func:`watched` runs the command in a process of its
own. Without a bound it costs nothing.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from ..errors import TinyGiantError

__all__ = ["watched"]

MIB = 2**20
# Importing Python's and the runtime's packages takes 142 MiB on x86-64.
_LEAST_BYTES = 100 * MIB
_PR_SET_PDEATHSIG = 1
_NATIVE_DEATHS = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGTRAP}


def watched(program: str, command: Callable[[], int]) -> int:
    """The exit code of ``command``, also where native code dies because address space runs out.

    Without a bound on the address space ``command`` is simply called. Call this from the main
    thread before any other thread is started. Signals sent to this process go to the other.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return command()
    from ..ort.machine import Machine

    left = Machine().address_space_bytes()
    if left is None:  # not Linux
        return command()
    if left < _LEAST_BYTES:
        print(
            f"{program}: needs at least {_LEAST_BYTES // MIB} MiB of address space to start, "
            f"{left // MIB} are left; raise ulimit -v",
            file=sys.stderr,
        )
        return TinyGiantError.exit_code
    # numpy's BLAS reserves memory for each of its threads, and interrupts itself if it gets none.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    parent = os.getpid()
    passed_on = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*passed_on, signal.SIGCHLD})
    child = os.fork()
    if child == 0:
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return command() if os.getppid() == parent else TinyGiantError.exit_code
    return _told(program, _wait(child, passed_on))


def _wait(child: int, passed_on: set[signal.Signals]) -> int:
    """How the child ended: its exit code, or a signal's number below zero."""
    while True:
        info = signal.sigwaitinfo({*passed_on, signal.SIGCHLD})
        if info.si_signo != signal.SIGCHLD:
            # A positive code is the terminal's, which tells the child too.
            if info.si_code <= 0:
                os.kill(child, info.si_signo)
            continue
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)


def _told(program: str, code: int) -> int:
    """The exit code for a child that ended with ``code``."""
    if code >= 0:
        return code
    if -code in _NATIVE_DEATHS:
        print(
            f"{program}: ended by {signal.Signals(-code).name} in native code, most likely because "
            "address space ran out; raise ulimit -v, or use --memory low or a smaller recipe",
            file=sys.stderr,
        )
        return TinyGiantError.exit_code
    with suppress(OSError):  # SIGKILL
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
    os.kill(os.getpid(), -code)
    return 128 - code
