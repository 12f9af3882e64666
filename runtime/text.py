"""Text from outside (paths, model output, other libraries' errors) made fit to show."""

from __future__ import annotations

__all__ = ["counted", "one_line", "printable"]

_MAX_MESSAGE_CHARS = 300


def counted(number: int, thing: str) -> str:
    """``1 clip``, ``2 clips``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def printable(text: object, *, keep: str = "") -> str:
    r"""``str(text)`` with every unprintable character but those in ``keep`` written as ``\x1b``.

    A file name or a model's output cannot then move the cursor, forge a line or break an encoder.
    """
    return "".join(c if c.isprintable() or c in keep else _escape(c) for c in str(text))


def one_line(error: BaseException) -> str:
    """An exception's message on one line of bounded length."""
    message = printable(" ".join(str(error).split())) or type(error).__name__
    if len(message) > _MAX_MESSAGE_CHARS:
        return message[:_MAX_MESSAGE_CHARS] + "..."
    return message


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
