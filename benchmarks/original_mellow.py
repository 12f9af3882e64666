"""Mellow's own code, from a clone of its repository, as one engine of ``benchmarks.public_models``.

Nothing of the original is replaced but what a machine without network, and today's versions of its
libraries, ask for: the checkpoint, the tokenizer and an empty language model come from files here,
a WAV file is read by soundfile, and the padding option has its new name. So the original hears a
clip twice (its prompt always holds two), computes the logits of all positions, and keeps no keys
and values from token to token. Source: github.com/soham97/mellow, ``wrapper.py``.

The original wants torchaudio, torchlibrosa and importlib_resources, which this project does not.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinygiant.runtime.errors import UsageError

__all__ = ["OriginalMellow"]

# A token that ends nothing here: the original stops at the end token, and a time is wanted.
_NEVER = "<filename>"
_FEW = 5


class OriginalMellow:
    """The original's ``MellowWrapper`` on a checkpoint of the published format."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the clone at ``options.original`` and its checkpoint.

        Raises:
            UsageError: the folder is no clone of the repository, or a package that it wants lacks.
        """
        import torch

        torch.set_num_threads(options.threads)
        sys.path.insert(0, str(options.original.resolve()))
        try:
            wrapper = importlib.import_module("mellow.wrapper")
            decoder = importlib.import_module("mellow.model.decoder")
        except ImportError as error:
            raise UsageError(
                f"{options.original}: Mellow's code cannot be imported ({error}); expected a clone "
                "of github.com/soham97/mellow, and torchaudio, torchlibrosa, importlib_resources"
            ) from error
        _stay_offline(wrapper, decoder, options)
        with contextlib.redirect_stdout(sys.stderr):
            self._model = wrapper.MellowWrapper("v0", "v0", "cpu", use_cuda=False)
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "clip.wav"

    def ask(
        self, clip: tuple[NDArray[np.float32], int] | None, question: str, n_tokens: int
    ) -> tuple[float, float]:
        """Seconds to the first token, and of the others. ``clip`` is None for the last one.

        Every token costs a whole forward pass, so the others are told from a few.
        """
        import soundfile

        if clip is not None:
            soundfile.write(self._path, *clip, subtype="PCM_16")
        steps_s: list[float] = []
        language_model = self._model.model.caption_decoder.lm
        hook = language_model.register_forward_pre_hook(
            lambda *_: steps_s.append(time.perf_counter())
        )
        start_s = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            example = [str(self._path), str(self._path), question]
            self._model.generate([example], _FEW, top_p=0.8, temperature=1.0, stop_token=_NEVER)
        hook.remove()
        # A step begins when the token before it is there.
        each_s = (steps_s[-1] - steps_s[1]) / (len(steps_s) - 2)
        return steps_s[1] - start_s, each_s * (n_tokens - 1)


def _stay_offline(wrapper: Any, decoder: Any, options: argparse.Namespace) -> None:
    """Let the original find its files here instead of on the hub."""
    import soundfile
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from tinygiant.models.family import family

    class _Tokenizer(PreTrainedTokenizerFast):
        def encode_plus(self, *arguments: Any, **named: Any) -> Any:
            if named.pop("pad_to_max_length", False):
                named["padding"] = "max_length"
            return super().encode_plus(*arguments, **named)

    def tokenizer(name: str) -> Any:
        return _Tokenizer(tokenizer_file=str(options.tokenizer))

    def language_model(name: str) -> Any:
        model = family("mellow").open(options.checkpoint, tokenizer=options.tokenizer)
        return LlamaForCausalLM(model.decoder().config)

    def read(path: str) -> tuple[Any, int]:
        samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
        return torch.from_numpy(samples.T), rate_hz

    wrapper.hf_hub_download = lambda repository, name: str(options.checkpoint.resolve())
    wrapper.AutoTokenizer = argparse.Namespace(from_pretrained=tokenizer)
    wrapper.torchaudio.load = read
    decoder.AutoModelForCausalLM = argparse.Namespace(from_pretrained=language_model)
