"""What many tests share: a tiny model with seeded weights, its tokenizer, its exported bundle."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# Before any numeric library starts its threads: the tests share the machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some tests import onnxruntime themselves.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from tinygiant.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tinygiant.models.config import TinyGiantConfig
    from tinygiant.models.tinygiant import TinyGiantALM
    from tinygiant.runtime.pipeline import TinyGiant

# The same examples every time, however busy the machine is.
settings.register_profile(
    "project", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")

VOCAB_SIZE = 512
TEXTS = (
    "Listen to the audio, think step by step, then answer. What is heard? Which sound comes first?",
    "<PLANNING>\n<CAPTION>\n<REASONING>\n<SUMMARY>\n</PLANNING>\n</CAPTION>\n</REASONING>",
    "</SUMMARY>\n<RESPONSE>\na dog barks</RESPONSE>",
    "Choices:\n- a dog\n- a siren\n- the bell rings\n- a door closes\n- somebody is speaking",
    "system\nuser\nassistant\n",
)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``tokenizer.json`` of Qwen's kind with few merges."""
    from tinygiant.models.training.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(TEXTS, VOCAB_SIZE, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file)


@pytest.fixture(scope="session")
def tiny_config() -> TinyGiantConfig:
    """Nano's architecture at sizes that run in milliseconds."""
    from tinygiant.models.config import ChatPrompt, EBranchformerConfig, preset

    nano = preset("nano")
    return dataclasses.replace(
        nano,
        name="tiny",
        whisper=nano.whisper
        | {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
        },
        htsat=nano.htsat
        | {
            "patch_embeds_hidden_size": 16,
            "depths": [1, 1, 1],
            "num_attention_heads": [1, 2, 4],
            "hidden_size": 64,
        },
        decoder=nano.decoder
        | {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "intermediate_size": 64,
        },
        projector=EBranchformerConfig(hidden_size=48, n_layers=1, n_heads=4, cgmlp_size=64),
        prompt=ChatPrompt(system="Listen, think, then answer."),
        choice_temperature=2.0,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_config: TinyGiantConfig) -> TinyGiantALM:
    """Seeded weights, large enough that logits do not nearly tie."""
    import torch

    from tinygiant.models.tinygiant import build

    model = build(tiny_config, seed=7)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(8)
        for parameter in model.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as an fp32 bundle. Tests must not write into it; see ``bundle_copy``.

    Exporting takes seconds, so the processes of one run share one bundle, and so do runs until
    the code that makes it changes (``pytest --cache-clear`` forgets it).
    """
    cache = request.config.cache
    assert cache is not None
    folder = cache.mkdir("tiny-bundle")
    bundle = folder / _export_digest()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not bundle.exists():
            model = request.getfixturevalue("tiny_model")
            tokenizer_file = request.getfixturevalue("tokenizer_file")
            draft = write_bundle(model, tokenizer_file, tmp_path_factory.mktemp("draft") / "tiny")
            for outdated in folder.glob("*/"):
                shutil.rmtree(outdated)
            shutil.copytree(draft, folder / "draft")
            (folder / "draft").rename(bundle)
    return bundle


def _export_digest() -> str:
    """A name for what decides the tiny bundle's contents: code and versions of the libraries."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    sources = [
        *root.glob("export/*.py"),
        *root.glob("models/*.py"),
        *root.glob("quantize/*.py"),
        *(root / "runtime" / name for name in ("bundle.py", "config.py")),
        root / "models" / "training" / "tokenizer.py",
        Path(__file__),
    ]
    for path in sorted(sources):
        digest.update(path.read_bytes())
    for package in ("torch", "transformers", "onnx", "onnxscript", "tokenizers"):
        digest.update(importlib.metadata.version(package).encode())
    return digest.hexdigest()[:16]


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture(scope="session")
def tiny(tiny_bundle: Path) -> TinyGiant:
    from tinygiant.runtime import load

    return load(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def tone() -> Callable[[float, int], NDArray[np.float32]]:
    """Seconds and rate in Hz -> a swelling tone with some noise, ``(n_samples,)``."""

    def make(seconds: float, rate_hz: int = 16_000) -> NDArray[np.float32]:
        t = np.arange(round(seconds * rate_hz)) / rate_hz
        noise = np.random.default_rng(3).standard_normal(t.size)
        swell = 0.4 * np.sin(2 * np.pi * 0.7 * t) * np.sin(2 * np.pi * 440.0 * t)
        return np.asarray(swell + 0.02 * noise, dtype=np.float32)

    return make


def write_bundle(model: TinyGiantALM, tokenizer_file: Path, root: Path) -> Path:
    """``model`` as an fp32 bundle, written by the exporter and not verified."""
    from tinygiant.export.exporter import write_bundle as write
    from tinygiant.quantize import recipe

    from .model_stub import MemorySource

    root.mkdir(parents=True)
    write(MemorySource(model, tokenizer_file), root, recipe("fp32"))
    return root
