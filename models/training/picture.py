"""The learning curve of a run as a picture."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["draw_losses"]


def draw_losses(folder: Path) -> Path | None:
    """Draw every log below a run's folder into ``loss.png``; None if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    logs = sorted(folder.glob("*/log.jsonl"))
    if not logs:
        return None
    figure = Figure(figsize=(5 * len(logs), 3.6), layout="constrained")
    for axis, path in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs, strict=True):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name in ("loss", "validation_loss", "validation_frame_f1", "token_accuracy"):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=name.replace("_", " "))
        axis.set(title=path.parent.name, xlabel="optimizer step", yscale="log")
        axis.legend()
    picture = folder / "loss.png"
    figure.savefig(picture, dpi=110)
    return picture
