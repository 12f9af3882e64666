"""Whether there is memory for a bundle: asked before it is loaded, answered in one line.

Native code that runs out of memory may die silently. So :func:`require_memory` compares the least
memory of a bundle with what the system can still give, and refuses only what cannot work:
weights in mapped files need not be in memory, other programs' idle memory can be swapped out, and a
file cache can be dropped. Between that bound and :func:`estimated_bytes`, the usual need of a
question, it may be slow or fail; ``tg-run doctor`` reports both.
"""

from __future__ import annotations

from ..bundle import Bundle
from ..errors import TinyGiantError
from .machine import Machine

__all__ = ["estimated_bytes", "how_many", "least_bytes", "require_memory"]

MIB = 2**20

# Python, onnxruntime and its thread pools before any graph is loaded, and what a graph takes in
# memory for each byte on disk: 0.88 GB were measured for an int8 encoder of 663 MB.
_BASE_BYTES = 120 * MIB
_BYTES_PER_GRAPH_BYTE = 1.3
_TYPICAL_TOKENS = 1_024
_SHARE = (
    8  # of the memory that is left, keys and values of several sequences may take one in so many
)

# After loading, the full-size int4 bundle held 1.02 bytes of anonymous memory for each byte of its
# graphs on x86-64: they are repacked for the processor. Where one of them is not, its weights stay
# in mapped files that the system may read again at need. Half is needed in any case.
_LEAST_RESIDENT = 0.5


def estimated_bytes(bundle: Bundle) -> tuple[int, int]:
    """Estimated peak memory of a question in default and in low-memory mode."""
    token_bytes = bundle.config.decoder.kv_token_bytes(bundle.manifest.kv_cache)
    fixed = _BASE_BYTES + _TYPICAL_TOKENS * token_bytes
    return (
        round(fixed + _BYTES_PER_GRAPH_BYTE * sum(_graph_bytes(bundle, keep=True))),
        round(fixed + _BYTES_PER_GRAPH_BYTE * max(_graph_bytes(bundle, keep=False))),
    )


def least_bytes(bundle: Bundle, *, keep: bool) -> tuple[int, int]:
    """The least that loading needs in addition to what the process has: address space, and memory.

    Every weight is at some time either mapped or copied. ``keep``: all graphs at once.
    """
    graphs = _graph_bytes(bundle, keep=keep)
    weights = sum(graphs) if keep else max(graphs)
    return weights, round(_LEAST_RESIDENT * weights)


def require_memory(bundle: Bundle, *, keep: bool, machine: Machine | None = None) -> None:
    """Refuse to load a bundle for which there cannot be enough memory.

    Args:
        bundle: the opened bundle.
        keep: whether all its graphs are to be in memory at once.
        machine: where to read from.

    Raises:
        TinyGiantError: the address space that is left, or the memory and swap that the machine, or
            the container, can give, are less than the bundle cannot do without.
    """
    machine = machine or Machine()
    address_bytes, resident_bytes = least_bytes(bundle, keep=keep)
    for what, needed, left in (
        ("address space (ulimit -v)", address_bytes, machine.address_space_bytes()),
        ("memory and swap", resident_bytes, machine.obtainable_bytes()),
    ):
        if left is not None and left < needed:
            advice = "--memory low, a smaller recipe" if keep else "a smaller recipe"
            raise TinyGiantError(
                f"the model needs at least {_mib(needed)} MiB of {what}, {left // MIB} are left; "
                f"use {advice}, or end programs (--no-memory-check tries all the same)"
            )


def how_many(most: int, token_bytes: int, machine: Machine | None = None) -> int:
    """How many sequences to have at a time: at most ``most``, at least one.

    ``token_bytes`` are those of the keys and values of a token.
    """
    left = (machine or Machine()).obtainable_bytes()
    if left is None:
        return most
    return max(1, min(most, left // _SHARE // (_TYPICAL_TOKENS * token_bytes)))


def _graph_bytes(bundle: Bundle, *, keep: bool) -> list[int]:
    """Bytes of each graph with its weights; without ``keep``, one for prompts is not used."""
    size = {entry.path: entry.size_bytes for entry in bundle.manifest.files}
    return [
        sum(size[path] for path in (graph.file, *graph.external_data))
        for name, graph in bundle.manifest.graphs.items()
        if keep or name != bundle.manifest.prompt_graph
    ]


def _mib(n_bytes: int) -> int:
    return -(-n_bytes // MIB)
