"""systemd's notification protocol: ready, reloading, stopping, and the watchdog's sign of life.

Datagrams to the socket that ``NOTIFY_SOCKET`` names (sd_notify(3)); without it nothing happens.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

__all__ = ["Notifier"]


class Notifier:
    """Tells the service manager how this process is."""

    def __init__(self) -> None:
        """Read where to tell it from the environment."""
        path = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path

    def ready(self, status: str) -> None:
        """Everything is up, after the start or after settings were read again."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Settings are being read again."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1_000}")

    def stopping(self) -> None:
        """The end has begun."""
        self._send("STOPPING=1")

    def alive(self, status: str) -> None:
        """The watchdog may wait for the next sign."""
        self._send(f"WATCHDOG=1\nSTATUS={status}")

    def _send(self, message: str) -> None:
        if self._address:
            # A manager that does not listen is no reason to stop.
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto(message.encode(), self._address)
