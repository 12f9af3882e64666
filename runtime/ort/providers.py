"""Where graphs run: names for onnxruntime's execution providers, and their assignment.

The contract: :func:`assign` reads what the user asked for, one name for everything or one for each
part, and :func:`require_available` refuses what the installed onnxruntime lacks, naming the
available providers and the wheel to install. Nothing is chosen silently: parts that are not named
run on the CPU. This module imports the standard library alone;
:mod:`tinygiant.runtime.ort.sessions` asks onnxruntime.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ..config import Role
from ..errors import UsageError
from ..text import printable

__all__ = ["CPU", "PROVIDERS", "Provider", "assign", "available_names", "require_available"]


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    Attributes:
        name: as the user writes it.
        ort_name: as onnxruntime calls it.
        wheel: the package to install if it is missing.
        device: onnxruntime's name of the memory it computes in; None for the computer's own.
        options: onnxruntime's options for it.
        then: providers for the operators that it does not know, before the CPU.
    """

    name: str
    ort_name: str
    wheel: str = ""
    device: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    then: tuple[str, ...] = ()


_GPU_WHEEL = "onnxruntime-gpu (on a Jetson: NVIDIA's wheel of it)"

CPU = Provider("cpu", "CPUExecutionProvider", "onnxruntime")
PROVIDERS = {
    provider.name: provider
    for provider in (
        CPU,
        # TF32 rounds the factors of matrix products to 10 bits; the proof of a bundle is in fp32.
        Provider("cuda", "CUDAExecutionProvider", _GPU_WHEEL, "cuda", {"use_tf32": "0"}),
        Provider("tensorrt", "TensorrtExecutionProvider", _GPU_WHEEL, "cuda", {}, ("cuda",)),
        Provider("openvino", "OpenVINOExecutionProvider", "onnxruntime-openvino"),
        Provider("coreml", "CoreMLExecutionProvider", "onnxruntime for macOS"),
    )
}
"""By name. Only these are offered: for each it is known where the decoder's memory must lie."""

_GROUPS: Mapping[str, Role] = {
    "encoders": "encoder",
    "projector": "projector",
    "decoder": "decoder",
}


def assign(wanted: str, graphs: Mapping[str, Role]) -> dict[str, Provider]:
    """Which provider runs each of ``graphs``.

    Args:
        wanted: a provider for everything (``cuda``), or parts and providers
            (``encoders=tensorrt,decoder=cuda``). Parts are ``encoders``, ``projector``,
            ``decoder``, or a graph by its own name; parts not named run on the CPU, or on the
            provider that stands alone among them (``cuda,projector=cpu``).
        graphs: the model's graphs and their roles.

    Raises:
        UsageError: an unknown provider or part, or a part named twice.
    """
    default: Provider | None = None
    chosen: dict[str, Provider] = {}
    for word in wanted.split(","):
        part, equals, name = (piece.strip() for piece in word.rpartition("="))
        provider = PROVIDERS.get(name.lower())
        if provider is None:
            raise UsageError(
                f"provider {printable(name)!r:.60} is unknown: choose from {', '.join(PROVIDERS)}"
            )
        if not equals:
            if default is not None:
                raise UsageError(f"{printable(wanted):.80} names two providers for everything")
            default = provider
            continue
        members = [
            graph for graph, role in graphs.items() if part == graph or _GROUPS.get(part) == role
        ]
        if not members:
            parts = ", ".join((*_GROUPS, *sorted(graphs.keys() - _GROUPS.keys())))
            raise UsageError(f"part {printable(part)!r:.60} is unknown: choose from {parts}")
        for graph in members:
            if graph in chosen:
                raise UsageError(f"{printable(wanted):.80} names {graph} twice")
            chosen[graph] = provider
    return {graph: chosen.get(graph, default or CPU) for graph in graphs}


def available_names(available: Collection[str]) -> tuple[str, ...]:
    """Those of :data:`PROVIDERS` that an onnxruntime with these providers has."""
    return tuple(name for name, provider in PROVIDERS.items() if provider.ort_name in available)


def require_available(providers: Iterable[Provider], available: Collection[str]) -> None:
    """Refuse providers that this onnxruntime does not have.

    Raises:
        UsageError: one is missing; the message names those available and the wheel to install.
    """
    for provider in providers:
        if provider.ort_name not in available:
            raise UsageError(
                f"the installed onnxruntime has no {provider.name}, only "
                f"{', '.join(available_names(available))}; replace onnxruntime by "
                f"{provider.wheel}; never install both"
            )
