"""Loading a bundle: how many threads it gets, whether its memory is there, a model out of it."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

from .bundle import Bundle, default_bundle_path
from .errors import UsageError
from .ort.memory import require_memory
from .ort.pool import GraphPool, is_small
from .ort.sessions import SessionSettings
from .pipeline import TinyGiant

__all__ = ["Memory", "load"]

Memory = Literal["default", "low"]


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    threads: int | None = None,
    memory: Memory = "default",
    verify: bool = True,
    spin: bool = True,
    provider: str = "cpu",
    check_memory: bool = True,
    speculate: bool = True,
    many: bool = False,
) -> TinyGiant:
    """Load a bundle and make it ready for questions.

    Args:
        path: the bundle's folder; the environment variable ``TINYGIANT_BUNDLE``, else the model
            that is installed with this package, if None.
        threads: threads to compute with; the physical cores if None.
        memory: ``default`` keeps every graph loaded; ``low`` loads each when it is needed and
            releases it, so that peak memory is that of the largest.
        verify: compare the sha256 of every file with the manifest's.
        spin: let waiting threads spin for a moment; faster, but busy.
        provider: what computes: ``cpu``, ``cuda``, ``tensorrt``, ..., or one for each part, such as
            ``encoders=tensorrt,decoder=cuda``.
        check_memory: refuse a bundle for which there cannot be enough memory; on the CPU alone.
        speculate: guess the next tokens from the question and from earlier text, and check several
            in one step where that pays. The answers are the same.
        many: questions will come by the dozen (:meth:`TinyGiant.ask_many`). The products of a small
            bundle gain nothing by a second thread; they then get one, and as many threads as there
            are to compute with hear the clips of the next questions.

    Raises:
        TinyGiantError: there cannot be enough memory, or it runs out.
        BundleError: the bundle is missing, damaged or of an unknown format.
        UsageError: an impossible number of threads, an unknown ``memory``, or a provider that this
            onnxruntime does not have or that does not come up.
    """
    if memory not in ("default", "low"):
        raise UsageError(f"memory {memory!r} is unknown: choose default or low")
    keep = memory == "default"
    settings = SessionSettings(threads=threads, spin=spin)
    bundle = Bundle.open(default_bundle_path() if path is None else path, verify=verify)
    workers = 0
    if many and is_small(bundle):
        workers = settings.n_threads if settings.n_threads > 1 else 0
        settings = dataclasses.replace(settings, threads=1)
    if check_memory and provider == "cpu":
        require_memory(bundle, keep=keep)
    pool = GraphPool(bundle, settings, keep=keep, provider=provider)
    model = TinyGiant(bundle, pool, speculate=speculate, workers=workers)
    pool.load_all()
    pool.release()
    return model
