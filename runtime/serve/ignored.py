"""The ignored fields of a request, and why."""

from __future__ import annotations

import re

from .errors import ApiError

__all__ = ["Ignored"]


class Ignored:
    """Collects ignored fields of a request; when ``strict``, each is an error instead."""

    MOST = 32  # what a client can make the reply repeat is bounded

    def __init__(self, *, strict: bool = False) -> None:
        """Nothing is left out yet."""
        self.strict = strict
        self._why: dict[str, str] = {}

    def add(self, field: str, why: str) -> None:
        """Leave ``field`` out.

        Raises:
            ApiError: 400, when strict.
        """
        name = re.sub(r"[^\w.\[\]-]", "?", field[:60], flags=re.ASCII)
        if self.strict:
            message = f"{name} cannot be honoured ({why}); remove it"
            raise ApiError(400, message, code="unsupported_value", param=name)
        if len(self._why) < self.MOST:
            self._why.setdefault(name, why)

    def lines(self) -> tuple[str, ...]:
        """The ignored fields, a line each: ``field: why``."""
        return tuple(f"{name}: {why}" for name, why in self._why.items())
