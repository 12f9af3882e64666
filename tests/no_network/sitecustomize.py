"""Put this folder on PYTHONPATH and a Python process has no network.

Python's own socket calls are written to the file named by ``NO_NETWORK_LOG`` and refused. On Linux
(x86-64, aarch64) native code that opens an Internet socket gets SIGSYS, which ends the process
after the Python stacks of its threads were written to the log. Sockets within the machine (AF_UNIX)
stay allowed: multiprocessing needs them.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import platform
import signal
import socket
import sys
import traceback

LOOKUPS = {
    "socket.getaddrinfo",
    "socket.gethostbyaddr",
    "socket.gethostbyname",
    "socket.getnameinfo",
}
# machine -> (AUDIT_ARCH constant, number of the socket system call), from the Linux headers
SOCKET_CALL = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}


class Filter(ctypes.Structure):
    """``struct sock_filter``."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("jump_true", ctypes.c_uint8),
        ("jump_false", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_uint16), ("filters", ctypes.POINTER(Filter)))


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: log and refuse whatever would leave the machine."""
    opens = event == "socket.__new__" and arguments[1] in (socket.AF_INET, socket.AF_INET6)
    if not (opens or event in LOOKUPS):
        return
    with open(os.environ["NO_NETWORK_LOG"], "a") as log:
        log.write(f"{event}\n{''.join(traceback.format_stack())}\n")
    raise PermissionError(f"no network here: {event}")


def forbid_internet_sockets() -> None:
    """A seccomp filter: ``socket(AF_INET or AF_INET6, ...)`` raises SIGSYS."""
    arch, call = SOCKET_CALL[platform.machine()]
    load, equal, leave = 0x20, 0x15, 0x06
    allow, trap = 0x7FFF0000, 0x00030000
    program = (Filter * 9)(
        Filter(load, 0, 0, 4),  # seccomp_data.arch
        Filter(equal, 0, 5, arch),
        Filter(load, 0, 0, 0),  # seccomp_data.nr
        Filter(equal, 0, 3, call),
        Filter(load, 0, 0, 16),  # seccomp_data.args[0], the address family
        Filter(equal, 2, 0, socket.AF_INET),
        Filter(equal, 1, 0, socket.AF_INET6),
        Filter(leave, 0, 0, allow),
        Filter(leave, 0, 0, trap),
    )
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, mode_filter = 38, 22, 2
    pointer = ctypes.byref(Program(len(program), program))
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, mode_filter, pointer):
        raise OSError(ctypes.get_errno(), "seccomp filter refused")


# urllib3, which transformers imports, binds a socket to ::1 to learn whether there is IPv6.
socket.has_ipv6 = False
sys.addaudithook(refuse)
if sys.platform == "linux" and platform.machine() in SOCKET_CALL:
    stacks = open(os.environ["NO_NETWORK_LOG"], "a")  # noqa: SIM115 - open as long as the process
    faulthandler.register(signal.SIGSYS, file=stacks, all_threads=True, chain=True)
    forbid_internet_sockets()
