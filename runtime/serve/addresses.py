"""Which addresses and names only this computer reaches."""

from __future__ import annotations

import ipaddress

__all__ = ["LOOPBACK_NAMES", "is_loopback"]

LOOPBACK_NAMES = frozenset({"127.0.0.1", "::1", "localhost"})


def is_loopback(address: str) -> bool:
    """Whether only this computer reaches an IP address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
