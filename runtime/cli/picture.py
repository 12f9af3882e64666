"""A plot of one answer: sound, log-mel spectrograms, intent attention, gate, text.

``draw`` over plain arrays and matplotlib's object interface; nothing is shown on a screen and no
global state of matplotlib is touched.
"""

from __future__ import annotations

import os
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..config import LogMel
from ..errors import MissingDependencyError, StorageError
from ..preprocess import Chunk, preprocess
from ..text import printable
from .interrupt import cleaned_up

if TYPE_CHECKING:
    from ..audio import Audio
    from ..config import EncoderConfig, ModelConfig
    from ..events import Answer, PromptRead

__all__ = ["check", "draw", "save"]

Array = NDArray[np.float32]

_DPI = 120
_WRAP = 100
_MAX_TEXT_LINES = 24
_MAX_PEAKS = 4_000  # of the waveform: more than there are pixels


def check(path: str) -> None:
    """Check, before the model is asked, that a plot can be drawn and written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        StorageError: there is no such folder, or it cannot be written.
    """
    _figure_class()
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(
            f"{printable(path)}: {printable(folder)} is not a writable folder; name another"
        )


def draw(audio: Audio, config: ModelConfig, seen: PromptRead, answer: Answer, question: str) -> Any:
    """A matplotlib figure of an answer.

    Panels, named by their labels: ``waveform``, the log-mels of each encoder under its graph's
    name (once where encoders see the same), ``attention`` (of the question over time) and ``gate``
    (a histogram; both only where the model has them), ``answer``.
    """
    chunks = preprocess(audio, config)
    mels = {e.graph: e for e in config.distinct_encoders if isinstance(e.features, LogMel)}
    names = ["waveform", *mels]
    names += ["attention"] * (seen.intent_attention is not None)
    names += ["gate"] * (seen.gate is not None)
    heights = {"waveform": 1.0, "attention": 1.0, "gate": 1.2}
    text = _text(answer, question)
    ratios = [*(heights.get(name, 1.6) for name in names), 0.28 * (text.count("\n") + 1)]
    figure = _figure_class()(figsize=(10, 1.3 * sum(ratios)), layout="constrained")
    axes = dict(
        zip([*names, "answer"], figure.subplots(len(names) + 1, height_ratios=ratios), strict=True)
    )
    for name, panel in axes.items():
        panel.set_label(name)
        if name not in ("gate", "answer"):
            panel.set_xlim(0.0, audio.used_s)
    figure.suptitle(f"{answer.model}: {printable(audio.source)}", parse_math=False)

    _draw_waveform(axes["waveform"], audio)
    for name, encoder in mels.items():
        _draw_mel(axes[name], encoder, chunks, config)
        axes[name].set_xlim(0.0, audio.used_s)  # the image has set its own
    if seen.intent_attention is not None:
        _draw_attention(axes["attention"], seen.intent_attention, chunks, config)
    if seen.gate is not None:
        for number, gate in enumerate(seen.gate):
            counts, edges = np.histogram(gate, bins=40, range=(0.0, 1.0))
            axes["gate"].stairs(counts, edges, label=str(number))
        axes["gate"].set(xlabel="semantic gate", ylabel="dimensions")
        if len(seen.gate) > 1:
            axes["gate"].legend(title="chunk", fontsize="small")
    axes["answer"].axis("off")
    axes["answer"].text(0.0, 1.0, text, va="top", family="monospace", fontsize=8, parse_math=False)
    return figure


def save(figure: Any, path: str) -> None:
    """Write the figure as a PNG file, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    draft = Path(f"{path}.{os.getpid()}.part")
    try:
        with warnings.catch_warnings(), cleaned_up(lambda: draft.unlink(missing_ok=True)):
            warnings.filterwarnings("ignore", "Glyph .* missing")  # drawn as a box
            figure.savefig(draft, format="png", dpi=_DPI)
        draft.replace(path)
    except OSError as error:
        raise StorageError(
            f"{printable(path)}: the plot cannot be written ({error.strerror}); name another"
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _draw_waveform(panel: Any, audio: Audio) -> None:
    """The largest and smallest sample of each pixel's span."""
    samples = audio.samples
    n_spans = min(_MAX_PEAKS, samples.size)
    starts = np.arange(n_spans) * samples.size // n_spans
    times = starts / audio.sampling_rate_hz
    low, high = np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)
    panel.fill_between(times, low, high, linewidth=0.5)
    panel.set(ylabel="amplitude")


def _draw_mel(
    panel: Any, encoder: EncoderConfig, chunks: Sequence[Chunk], config: ModelConfig
) -> None:
    """Log-mel spectrograms of an encoder's windows, side by side."""
    for index, chunk in enumerate(chunks):
        for number, window in enumerate(chunk.windows[encoder.graph]):
            mel = window[0] if window.ndim == 3 else window[0, 0].T
            start_s = index * config.chunk_s + number * encoder.window_s
            width_s = mel.shape[1] * encoder.window_s / encoder.n_frames
            extent = (start_s, start_s + width_s, 0, mel.shape[0])
            panel.imshow(mel, origin="lower", aspect="auto", extent=extent, interpolation="nearest")
    panel.set(ylabel=f"{encoder.graph}\nmel band")


def _draw_attention(
    panel: Any, attention: Array, chunks: Sequence[Chunk], config: ModelConfig
) -> None:
    """Each row's attention over the time it stands for; chunks add up to 1 each."""
    start = 0
    for index, chunk in enumerate(chunks):
        values = attention[start : start + chunk.n_rows]
        edges = index * config.chunk_s + np.arange(values.size + 1) * config.row_s
        panel.stairs(values, edges, fill=True)
        start += chunk.n_rows
    panel.set(xlabel="seconds", ylabel="attention")


def _text(answer: Answer, question: str) -> str:
    parts = [("Question", question), ("Plan", answer.plan)]
    parts += [("Audio Analysis", answer.audio_analysis), ("Logic", answer.logic)]
    parts += [("Summary", answer.summary), ("Answer", answer.text or "(no answer)")]
    lines = [line for name, text in parts if text for line in _wrapped(f"{name}: {text}")]
    if len(lines) > _MAX_TEXT_LINES:
        lines = [*lines[: _MAX_TEXT_LINES - 2], "...", lines[-1]]
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(printable(" ".join(text.split())), _WRAP, subsequent_indent="  ")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "--picture needs matplotlib; run: pip install 'tinygiant[picture]'"
        ) from error
    return Figure
