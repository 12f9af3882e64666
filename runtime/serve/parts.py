"""Clips as clients write them into JSON: base64, with line breaks or not, bare or as a data URI.

The format of a clip is recognised by its content: the field ``format`` and the type in a data URI
are ignored.
"""

from __future__ import annotations

import binascii
import re
from typing import Any

from .errors import ApiError

__all__ = ["decode_clip"]

_SPACE = b" \t\r\n"
_DATA_URI = re.compile(r"data:(?P<attributes>[^,]{0,256}),", re.IGNORECASE)


def decode_clip(part: dict[str, Any]) -> bytes:
    """The bytes of an ``input_audio`` or ``audio_url`` part.

    Raises:
        ApiError: 400, the part has no such bytes.
    """
    if part["type"] == "audio_url":
        url = part["audio_url"]
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str) or not _DATA_URI.match(url):
            raise _error(
                "audio_url must be a data: URI; this server fetches nothing, so send the clip "
                "itself"
            )
        return _decode(url)
    clip = part["input_audio"]
    if not isinstance(clip, dict) or not isinstance(clip.get("data"), str):
        raise _error("input_audio must be an object whose data is the clip in base64")
    return _decode(clip["data"])


def _decode(text: str) -> bytes:
    start = 0
    if uri := _DATA_URI.match(text):
        if not uri["attributes"].lower().rstrip().endswith(";base64"):
            raise _error("the data: URI is not in base64; expected data:audio/...;base64,...")
        start = uri.end()
    try:
        encoded = text[start:].encode("ascii").translate(None, _SPACE)
        return binascii.a2b_base64(encoded, strict_mode=True)
    except ValueError as error:  # binascii.Error, or characters beyond ASCII
        reason = str(error)[:80]
        message = f"the clip is not base64 ({reason}); send the file's bytes in base64, alone"
        raise ApiError(400, message, code="invalid_base64", param="messages") from error


def _error(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_value", param="messages")
