"""One engine with one model, loaded in a process of its own and measured when it is told to.

    python -m benchmarks.peer_workers NAME [--model FOLDER] [--threads N] [--tiny]

Lines of JSON. When it is loaded and warm the worker writes ``{"load_s", ...}``; for each line
``{"seed": 1, ...}`` that it reads it does one round of its task and writes what that took; it ends
when its input does. Every line it writes has ``peak_rss_bytes``. Between two lines it waits for
input and no thread of it runs. ``NAME`` is one of :data:`WORKERS`; ``--model`` is a bundle for this
project's own, and a folder of ``benchmarks.peer_models`` for the others.

``python -m benchmarks.peer_workers probe`` writes the version of each module in :data:`PACKAGES`
that this Python has.

Imports the standard library and numpy, and in each worker the engine that it runs: a peer's Python
need not hold the project. The peers are imported by name, for no extra of the project brings them.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.peer_models import (
    QWEN3,
    TINY_QWEN3,
    TINY_WHISPER,
    WHISPER,
    Qwen3Size,
    WhisperSize,
    qwen3_config,
    whisper_config,
)

if TYPE_CHECKING:
    from tinygiant.runtime.config import ModelConfig
    from tinygiant.runtime.decoder import Decoder

__all__ = ["PACKAGES", "WORKERS", "Settings", "main", "peak_rss_bytes", "serve"]

# Module -> the package that has its version.
PACKAGES = {
    "ctranslate2": "ctranslate2",
    "gguf": "gguf",
    "llama_cpp": "llama-cpp-python",
    "numpy": "numpy",
    "onnx_ir": "onnx-ir",
    "onnxruntime": "onnxruntime",
    "onnxruntime_genai": "onnxruntime-genai",
    "onnxscript": "onnxscript",
    "optimum.onnxruntime": "optimum-onnx",
    "pywhispercpp": "pywhispercpp",
    "tinygiant": "tinygiant",
    "torch": "torch",
    "transformers": "transformers",
}
_RATE_HZ = 16_000
_CLIP_S = 10.0

Array = NDArray[np.float32]
Round = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a worker is started with."""

    model: Path
    threads: int
    tiny: bool

    @property
    def whisper(self) -> WhisperSize:
        """Dimensions of the encoder."""
        return TINY_WHISPER if self.tiny else WHISPER

    @property
    def qwen3(self) -> Qwen3Size:
        """Dimensions of the decoder."""
        return TINY_QWEN3 if self.tiny else QWEN3


class _Worker(Protocol):
    """Loads in its constructor, which takes :class:`Settings`.

    May have ``built_with``: for which processor features its engine was compiled.
    """

    def round(self, request: Round) -> Round: ...


# Encoders: one window of features to the encoder's output.


class _Encoder:
    """Times ``encode``, which takes ``(1, n_mels, n_frames)`` and returns something finite."""

    n_mels: int
    n_frames: int

    def encode(self, features: Array) -> Any:
        raise NotImplementedError

    def round(self, request: Round) -> Round:
        features = np.random.default_rng(request["seed"]).standard_normal(
            (1, self.n_mels, self.n_frames), np.float32
        )
        start_s = time.perf_counter()
        output = self.encode(features)
        seconds = time.perf_counter() - start_s
        if not np.isfinite(np.asarray(output)).all():
            raise ArithmeticError("the encoder's output is not finite")
        return {"encode_s": seconds, "frames": self.n_frames}


class OurEncoder(_Encoder):
    """The bundle's graph through the runtime, on a whole window."""

    def __init__(self, settings: Settings) -> None:
        from tinygiant.runtime.bundle import Bundle
        from tinygiant.runtime.ort.pool import GraphPool
        from tinygiant.runtime.ort.sessions import SessionSettings

        bundle = Bundle.open(settings.model, verify=False)
        pool = GraphPool(bundle, SessionSettings(threads=settings.threads))
        self._encoder = bundle.config.encoders[0]
        with pool.use(self._encoder.graph) as graph:
            self._graph = graph
        self._pool = pool
        self.n_mels = self._encoder.features.n_mels
        self.n_frames = self._frames(bundle.config)

    def _frames(self, config: ModelConfig) -> int:
        return self._encoder.n_frames

    def encode(self, features: Array) -> Any:
        return self._graph.run({self._encoder.input: features})[self._encoder.outputs[0].name]


class OurEncoderClip(OurEncoder):
    """The same on the frames of a 10 s clip, as ``clip`` audio context cuts them."""

    def _frames(self, config: ModelConfig) -> int:
        as_clip = dataclasses.replace(config, audio_context="clip")
        return as_clip.frames(self._encoder, _CLIP_S)


class CTranslate2(_Encoder):
    """CTranslate2's Whisper, int8: the engine of faster-whisper."""

    def __init__(self, settings: Settings) -> None:
        ctranslate2: Any = importlib.import_module("ctranslate2")
        self._model = ctranslate2.models.Whisper(
            str(settings.model),
            device="cpu",
            compute_type="int8",
            intra_threads=settings.threads,
            inter_threads=1,
        )
        self._view = ctranslate2.StorageView.from_array
        self.n_mels, self.n_frames = settings.whisper.n_mels, settings.whisper.n_frames

    def encode(self, features: Array) -> Any:
        return self._model.encode(self._view(features), to_cpu=True)


class WhisperCpp(_Encoder):
    """whisper.cpp through pywhispercpp's bindings: a given mel spectrogram, the encoder alone.

    The bindings do not hand out the encoder's output: whether it succeeded is all that is checked.
    """

    def __init__(self, settings: Settings) -> None:
        whisper_cpp: Any = importlib.import_module("_pywhispercpp")
        self._library, self._threads = whisper_cpp, settings.threads
        parameters = whisper_cpp.whisper_context_default_params()
        parameters.use_gpu = False
        self._context = whisper_cpp.whisper_init_from_file_with_params(
            str(settings.model / "model.bin"), parameters
        )
        if self._context is None:
            raise RuntimeError("whisper.cpp cannot load the model")
        self.built_with = whisper_cpp.whisper_print_system_info()
        self.n_mels, self.n_frames = settings.whisper.n_mels, settings.whisper.n_frames

    def encode(self, features: Array) -> Any:
        library, context = self._library, self._context
        mel = np.ascontiguousarray(features[0]).ravel()
        if library.whisper_set_mel(context, mel, self.n_frames, self.n_mels):
            raise RuntimeError("whisper.cpp refuses the spectrogram")
        if library.whisper_encode(context, 0, self._threads):
            raise RuntimeError("whisper.cpp cannot encode")
        return 0.0


class OnnxRuntimeEncoder(_Encoder):
    """Plain onnxruntime on the unquantized graph."""

    def __init__(self, settings: Settings) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        self._session = onnxruntime.InferenceSession(
            str(settings.model / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.n_mels, self.n_frames = settings.whisper.n_mels, settings.whisper.n_frames

    def encode(self, features: Array) -> Any:
        return self._session.run(None, {"input_features": features})[0]


class TorchEncoder(_Encoder):
    """PyTorch, float32, transformers' module with PyTorch's own attention."""

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        torch.set_num_threads(settings.threads)
        torch.manual_seed(0)
        config = WhisperConfig(**whisper_config(settings.whisper), attn_implementation="sdpa")
        self._torch, self._model = torch, WhisperEncoder(config).eval()
        self.n_mels, self.n_frames = settings.whisper.n_mels, settings.whisper.n_frames

    def encode(self, features: Array) -> Any:
        with self._torch.inference_mode():
            return self._model(self._torch.from_numpy(features)).last_hidden_state.numpy()


# Decoders: a prompt of tokens, then greedy steps of one token.


class _Decoder:
    """Times ``prefill`` of a new sequence and the steps after it; both return the next token."""

    vocab_size: int
    capacity: int  # positions that this round needs

    def prefill(self, token_ids: list[int]) -> int:
        raise NotImplementedError

    def step(self, token: int) -> int:
        raise NotImplementedError

    def round(self, request: Round) -> Round:
        n_prompt, n_steps = request["prompt_tokens"], request["steps"]
        self.capacity = n_prompt + n_steps + 1
        generator = np.random.default_rng(request["seed"])
        token_ids = generator.integers(0, self.vocab_size, n_prompt).tolist()
        start_s = time.perf_counter()
        token = self.prefill(token_ids)
        read_s = time.perf_counter()
        for _ in range(n_steps):
            token = self.step(token)
        end_s = time.perf_counter()
        return {"prefill_s": read_s - start_s, "decode_s": end_s - read_s}


class RuntimeDecoder(_Decoder):
    """A decoder graph through the runtime's engine, without drafts."""

    def __init__(self, new_sequence: Callable[[int], Decoder], vocab_size: int) -> None:
        """``new_sequence`` gives an empty sequence of at most so many tokens."""
        self._new_sequence, self.vocab_size = new_sequence, vocab_size

    def prefill(self, token_ids: list[int]) -> int:
        self._decoder = self._new_sequence(self.capacity)
        return _greedy(self._decoder.read(token_ids))

    def step(self, token: int) -> int:
        return _greedy(self._decoder.step([token])[-1])


class OurDecoder(RuntimeDecoder):
    """The bundle's decoder."""

    def __init__(self, settings: Settings) -> None:
        from tinygiant.runtime.bundle import Bundle
        from tinygiant.runtime.decoder import Decoder
        from tinygiant.runtime.embeddings import TokenEmbeddings
        from tinygiant.runtime.ort.pool import GraphPool
        from tinygiant.runtime.ort.sessions import SessionSettings

        bundle = Bundle.open(settings.model, verify=False)
        self._pool = GraphPool(bundle, SessionSettings(threads=settings.threads))
        config, prompt_graph = bundle.config.decoder, bundle.manifest.prompt_graph
        with self._pool.use(config.graph) as graph:
            pass
        prompts = None
        if prompt_graph:
            with self._pool.use(prompt_graph) as prompts:
                pass
        embeddings, kv_type = TokenEmbeddings.open(bundle), bundle.manifest.kv_cache
        super().__init__(
            lambda capacity: Decoder(
                graph, embeddings, config, capacity, kv_type=kv_type, prompts=prompts
            ),
            config.vocab_size,
        )


class LlamaCpp(_Decoder):
    """llama.cpp through llama-cpp-python's bindings, its low-level functions."""

    flash_attention = False

    def __init__(self, settings: Settings) -> None:
        llama_cpp: Any = importlib.import_module("llama_cpp")
        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            os.fsencode(settings.model / "model.gguf"), llama_cpp.llama_model_default_params()
        )
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = 1_024
        parameters.n_batch = parameters.n_ubatch = 512
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.flash_attn_type = int(self.flash_attention)
        self._context = model and llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp cannot load the model")
        self.built_with = llama_cpp.llama_print_system_info().decode()
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def prefill(self, token_ids: list[int]) -> int:
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_clear(memory, False)
        return self._read(token_ids)

    def step(self, token: int) -> int:
        return self._read([token])

    def _read(self, token_ids: list[int]) -> int:
        library, n_tokens = self._library, len(token_ids)
        tokens = (library.llama_token * n_tokens)(*token_ids)
        batch = library.llama_batch_get_one(tokens, n_tokens)
        if library.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        logits = library.llama_get_logits_ith(self._context, -1)
        return _greedy(np.ctypeslib.as_array(ctypes.cast(logits, _FLOATS), (self.vocab_size,)))


class LlamaCppFlash(LlamaCpp):
    """The same with flash attention."""

    flash_attention = True


class OnnxRuntimeGenAI(_Decoder):
    """onnxruntime-genai: its own graph and its own loop, which picks the tokens itself."""

    def __init__(self, settings: Settings) -> None:
        onnxruntime_genai: Any = importlib.import_module("onnxruntime_genai")
        self._library = onnxruntime_genai
        options = {"intra_op_num_threads": settings.threads}
        config = onnxruntime_genai.Config(str(settings.model))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = onnxruntime_genai.Model(config)
        self.vocab_size = settings.qwen3.vocab_size

    def prefill(self, token_ids: list[int]) -> int:
        parameters = self._library.GeneratorParams(self._model)
        # As long as the least length is not reached, the end of the text is not picked.
        length = self.capacity + 1
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        self._generator = self._library.Generator(self._model, parameters)
        self._generator.append_tokens(np.array(token_ids, np.int32))
        return self.step(0)  # reads nothing: the logits of the prompt are there

    def step(self, token: int) -> int:
        self._generator.generate_next_token()
        return int(self._generator.get_next_tokens()[0])


class _Transformers(_Decoder):
    """A model with transformers' interface: PyTorch tensors and a growing cache."""

    _model: Any
    _torch: Any

    def prefill(self, token_ids: list[int]) -> int:
        self._cache = None
        return self._read(token_ids)

    def step(self, token: int) -> int:
        return self._read([token])

    def _read(self, token_ids: list[int]) -> int:
        torch = self._torch
        known = self._cache
        length = len(token_ids) + (0 if known is None else self._length)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([token_ids]),
                attention_mask=torch.ones(1, length, dtype=torch.int64),
                position_ids=torch.arange(length - len(token_ids), length)[None],
                past_key_values=known,
                use_cache=True,
                **self._more,
            )
        self._cache, self._length = output.past_key_values, length
        return _greedy(output.logits[0, -1].numpy())

    _more: dict[str, Any] = {}  # noqa: RUF012


class TorchDecoder(_Transformers):
    """PyTorch, float32; the LM head reads the last position only."""

    _more = {"logits_to_keep": 1}  # noqa: RUF012

    def __init__(self, settings: Settings) -> None:
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.set_num_threads(settings.threads)
        torch.manual_seed(0)
        config = Qwen3Config(**qwen3_config(settings.qwen3), attn_implementation="sdpa")
        self._torch, self._model = torch, Qwen3ForCausalLM(config).eval()
        self.vocab_size = settings.qwen3.vocab_size


class OptimumDecoder(_Transformers):
    """optimum's ORTModelForCausalLM on its own export, float32: logits of every position."""

    def __init__(self, settings: Settings) -> None:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime
        import torch
        from optimum.onnxruntime import ORTModelForCausalLM

        torch.set_num_threads(settings.threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        self._torch = torch
        self._model = ORTModelForCausalLM.from_pretrained(
            settings.model, provider="CPUExecutionProvider", session_options=options
        )
        # optimum-onnx 0.1 takes hidden size by heads for it, which Qwen3's is not.
        self._model.embed_size_per_head = settings.qwen3.head_dim
        self.vocab_size = settings.qwen3.vocab_size


# The whole question.


class OurQuestion:
    """A question about a clip of 10 s, from samples in memory to the last token of the answer.

    Without drafts: a model of random weights repeats itself, which is easy to guess.
    """

    def __init__(self, settings: Settings) -> None:
        from tinygiant.runtime import load
        from tinygiant.runtime.prompt import build_prompt
        from tinygiant.runtime.tokenizer import Tokenizer

        self._model = load(settings.model, threads=settings.threads, verify=False, speculate=False)
        bundle = self._model.bundle
        tokenizer = Tokenizer.from_file(bundle.file(bundle.manifest.tokenizer))
        prompt = build_prompt("What?", None, tokenizer, bundle.config.prompt)
        self._n_kept = len(prompt.prefix_ids)  # read by the first question, then kept

    def round(self, request: Round) -> Round:
        noise = np.random.default_rng(request["seed"]).standard_normal(round(_CLIP_S * _RATE_HZ))
        clip = ((0.1 * noise).astype(np.float32), _RATE_HZ)
        answer = self._model.ask(
            clip, request["question"], think=True, max_new_tokens=request["new_tokens"], raw=True
        )
        config, tokens = self._model.config, answer.tokens
        read = tokens.prompt - self._n_kept
        stages = ("audio_s", "encode_s", "project_s", "prefill_s", "decode_s", "total_s")
        return {stage: getattr(answer.timings, stage) for stage in stages} | {
            "audio_context": config.audio_context,
            "prompt_tokens": tokens.prompt,
            "read_tokens": read,
            "full_read_tokens": read + config.rows_per_chunk - tokens.audio,
            "generated": tokens.generated,
        }


WORKERS: dict[str, Callable[[Settings], _Worker]] = {
    "our-encoder": OurEncoder,
    "our-encoder-clip": OurEncoderClip,
    "ctranslate2": CTranslate2,
    "whisper.cpp": WhisperCpp,
    "onnxruntime-encoder": OnnxRuntimeEncoder,
    "torch-encoder": TorchEncoder,
    "our-decoder": OurDecoder,
    "llama.cpp": LlamaCpp,
    "llama.cpp-flash": LlamaCppFlash,
    "onnxruntime-genai": OnnxRuntimeGenAI,
    "torch-decoder": TorchDecoder,
    "optimum-decoder": OptimumDecoder,
    "our-question": OurQuestion,
}

_FLOATS = ctypes.POINTER(ctypes.c_float)


def _greedy(logits: NDArray[Any]) -> int:
    token = int(logits.argmax())
    if not np.isfinite(logits[token]):
        raise ArithmeticError("the best logit is not finite")
    return token


def peak_rss_bytes() -> int:
    """The most that this process has held resident; not what its parent held, as getrusage may."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1_024 * int(peak.split()[1])


def serve(
    load: Callable[[], _Worker], read: Callable[[], str], write: Callable[[Round], None]
) -> None:
    """Load a worker, then answer each line with a round until there is none."""
    start_s = time.perf_counter()
    worker = load()
    loaded = {"load_s": time.perf_counter() - start_s, "peak_rss_bytes": peak_rss_bytes()}
    write(loaded | {"built_with": getattr(worker, "built_with", None)})
    while line := read():
        answer = worker.round(json.loads(line))
        write(answer | {"peak_rss_bytes": peak_rss_bytes()})


def _versions() -> dict[str, str]:
    found = {}
    for module, package in PACKAGES.items():
        try:
            if importlib.util.find_spec(module) is not None:
                found[module] = importlib.metadata.version(package)
        except (ImportError, ValueError):
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one worker; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_workers")
    parser.add_argument("name", choices=[*WORKERS, "probe"])
    parser.add_argument("--model", type=Path, default=Path())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    # What engines print must not get between the lines: it goes where errors go.
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)

        def write(answer: Round) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        if options.name == "probe":
            write(_versions())
            return 0
        settings = Settings(options.model, options.threads, options.tiny)
        serve(lambda: WORKERS[options.name](settings), sys.stdin.readline, write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
