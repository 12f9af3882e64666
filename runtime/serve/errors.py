"""The failures of a request, as an HTTP status and an error object of OpenAI's shape.

=====  ==========================================================================================
400    not JSON, a field that is missing, wrong, unknown or not supported, a bad question
401    no token, or a wrong one
404    no such path or model
405    wrong method
408    the body did not arrive in time
413    body larger, or audio longer, than the limit
415    the body is not ``application/json``
421    a ``Host`` that this loopback server does not have (a web page rebinding its name)
422    the audio cannot be read
429    the queue is full; ``Retry-After`` says when to come again
500    the bundle fails, or something unforeseen
503    the server is shutting down
=====  ==========================================================================================
"""

from __future__ import annotations

from typing import Any

from ..errors import (
    AudioError,
    AudioTooLongError,
    QuestionError,
    TinyGiantError,
    UsageError,
)
from ..text import one_line, printable

__all__ = ["ApiError", "api_error"]


class ApiError(TinyGiantError):
    """A request that ends with an error status; never leaves the server as an exception."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """``param`` names the field at fault, ``code`` the fault, for programs."""
        super().__init__(printable(message))
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    def to_dict(self) -> dict[str, Any]:
        """The error object of OpenAI's API."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def api_error(error: Exception) -> ApiError:
    """The error a client sees for an exception of the runtime."""
    if isinstance(error, ApiError):
        return error
    message = one_line(error)
    if isinstance(error, AudioTooLongError):
        return ApiError(413, message, code="audio_too_long", param="messages")
    if isinstance(error, AudioError):
        return ApiError(422, message, code="unusable_audio", param="messages")
    if isinstance(error, QuestionError):
        return ApiError(400, message, code="invalid_question", param="messages")
    if isinstance(error, UsageError):
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(error, TinyGiantError):
        return ApiError(500, message, code="model_failed")
    return ApiError(500, f"unforeseen {type(error).__name__}: {message}", code="unforeseen")
