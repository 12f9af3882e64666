"""The runtime of TinyGiantALM: questions about sound, answered on a small CPU, offline.

    >>> from tinygiant.runtime import load
    >>> model = load()
    >>> print(model.ask("street.wav", "What is heard?").text)

Names are imported when they are first used: reading the configuration or building a prompt, as
training does, loads neither onnxruntime nor soundfile.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # a command comes through here before it takes care of interrupts: be quick
if TYPE_CHECKING:
    from typing import Any

    from .asking import AskOptions, Query
    from .audio import Audio, read_audio, read_pcm
    from .bundle import Bundle
    from .errors import (
        AudioError,
        AudioTooLongError,
        BundleError,
        QuestionError,
        TinyGiantError,
        UsageError,
    )
    from .events import (
        Answer,
        AudioAccount,
        AudioRead,
        Event,
        Finished,
        PromptRead,
        StreamsReady,
        TextPiece,
        Timings,
        TokenCounts,
    )
    from .loading import load
    from .pipeline import TinyGiant

__all__ = [
    "Answer",
    "AskOptions",
    "Audio",
    "AudioAccount",
    "AudioError",
    "AudioRead",
    "AudioTooLongError",
    "Bundle",
    "BundleError",
    "Event",
    "Finished",
    "PromptRead",
    "Query",
    "QuestionError",
    "StreamsReady",
    "TextPiece",
    "Timings",
    "TinyGiant",
    "TinyGiantError",
    "TokenCounts",
    "UsageError",
    "load",
    "read_audio",
    "read_pcm",
]

_MODULE_OF = (
    {name: "asking" for name in ("AskOptions", "Query")}
    | {name: "audio" for name in ("Audio", "read_audio", "read_pcm")}
    | {name: "bundle" for name in ("Bundle",)}
    | {"load": "loading", "TinyGiant": "pipeline"}
    | {name: "errors" for name in __all__ if name.endswith("Error")}
)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_MODULE_OF.get(name, 'events')}")
    return getattr(module, name)
