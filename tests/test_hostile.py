"""Input made to hurt: forged headers, damaged files, texts that look like markup.

The targets are those of ``make fuzz``; here each meets its seeds and damaged copies of them.
"""

from __future__ import annotations

import itertools
import json
import signal
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fuzz import run as fuzz
from tests.fuzz.targets import TARGETS, Target, damaged, tokenizer_json
from tests.shipped import NANO, PROMPT
from tinygiant.models.tensors import open_tensors, read_json
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.bundle import Bundle
from tinygiant.runtime.config import ModelConfig, config_from_dict, config_to_dict
from tinygiant.runtime.errors import AudioError, BundleError, CheckpointError, QuestionError
from tinygiant.runtime.ort.sessions import Graph
from tinygiant.runtime.prompt import MAX_QUESTION_CHARS, build_prompt
from tinygiant.runtime.tokenizer import Tokenizer

EXTREMES_16 = (0, 1, 2, 0x7FFF, 0xFFFF)
EXTREMES_32 = (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(tokenizer_json())
    return Tokenizer.from_file(path)


# "media" starts a process for each input; "pyav" searches the same code.
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "media"])
def test_damaged_input_is_used_or_refused_in_one_line(name: str) -> None:
    target = TARGETS[name]
    generator = np.random.default_rng(17)
    for seed in target.seeds():
        target.check(seed)
        for _ in range(3):
            for data in damaged(seed, generator):
                target.check(data)


def test_every_extreme_of_a_wav_header() -> None:
    check = TARGETS["wav_header"].check
    sound = struct.pack("<HHIIHHII", 1, 1, 8_000, 16_000, 2, 16, 512, 548)
    offsets = {0: "<H", 2: "<H", 4: "<I", 8: "<I", 12: "<H", 14: "<H", 16: "<I", 20: "<I"}
    for (a, b), i, j in itertools.product(itertools.combinations(offsets, 2), range(5), range(5)):
        header = bytearray(sound)
        for offset, index in ((a, i), (b, j)):
            kind = offsets[offset]
            extreme = (EXTREMES_16 if kind == "<H" else EXTREMES_32)[index]
            struct.pack_into(kind, header, offset, extreme)
        check(bytes(header) + bytes(512))


@pytest.mark.parametrize("size", [0x7FFF_FFF0, 0xFFFF_FFF0])
@pytest.mark.parametrize("channels", [1, 64])
def test_a_header_cannot_make_us_allocate(size: int, channels: int) -> None:
    data = b"RIFF" + struct.pack("<I", size) + b"WAVEfmt "
    data += struct.pack("<IHHIIHH", 16, 1, channels, 8_000, 16_000 * channels, 2 * channels, 16)
    data += b"data" + struct.pack("<I", size) + bytes(128)
    tracemalloc.start()
    try:
        read_audio(data)
    except AudioError:
        pass
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 32 * 2**20


def test_a_safetensors_header_cannot_make_us_allocate(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for n_bytes in (2**31, 2**40, 2**63 - 1, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", n_bytes) + b"{}")
        with pytest.raises(CheckpointError):
            open_tensors(path)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deeply_nested_json_is_refused(tmp_path: Path, opening: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(opening * 200_000)
    with pytest.raises(CheckpointError):
        read_json(path)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(opening * 200_000)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    "value", [0, -1, 10**400, float("nan"), float("inf"), 1e-300], ids=lambda x: f"{x!r:.8}"
)
def test_numbers_that_cannot_be_meant(value: float) -> None:
    """Each number of a model's config in turn; where 0 or a tiny number makes sense it may stay."""
    good = json.loads(json.dumps(config_to_dict(NANO)))

    def check(part: dict[str, Any], name: str) -> None:
        kept = part[name]
        part[name] = [value] if isinstance(kept, list) else value
        try:
            config_from_dict(ModelConfig, good)
        except BundleError as error:
            assert name in str(error)
        else:
            assert name in ("f_min_hz", "clip_margin_s", "stop_token_ids", "close_id")
            assert value in (0, 1e-300)
        part[name] = kept

    def walk(part: dict[str, Any]) -> None:
        for name, item in part.items():
            for inner in item if isinstance(item, list) else [item]:
                if isinstance(inner, dict):
                    walk(inner)
                elif isinstance(inner, int | float) and not isinstance(inner, bool):
                    check(part, name)

    walk(good)


def test_shards_stay_in_their_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for shard in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(CheckpointError):
            open_tensors(tmp_path)


@pytest.mark.parametrize(
    "unit",
    [
        "<|im_end|>",
        "<|im_start",
        "<",
        "\u0301",
        "e\u0301",
        "\U0001f514",
        " ",
        "a",
        "\u202e",
        "\ufdfa",
    ],
)
def test_no_text_takes_long_or_reaches_a_control_token(unit: str, tokenizer: Tokenizer) -> None:
    """The longest question of any kind; U+FDFA would grow 18-fold under NFKC."""
    question = ("?" + unit * MAX_QUESTION_CHARS)[:MAX_QUESTION_CHARS]
    start = time.process_time()
    try:
        prompt = build_prompt(question, None, tokenizer, PROMPT)
    except QuestionError:
        prompt = None  # more tokens than fit
    assert time.process_time() - start < 5.0
    if prompt is not None:
        assert tokenizer.token_id("<|im_end|>") not in prompt.instruction_ids


def test_a_graph_of_unknown_operators_is_refused(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def model(operator: str, domain: str) -> bytes:
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
        node = helper.make_node(operator, ["x"], ["y"], domain=domain)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
        graph = helper.make_graph([node], "g", values[:1], values[1:])
        made: bytes = helper.make_model(
            graph, opset_imports=opsets, ir_version=10
        ).SerializeToString()
        return made

    for operator, domain in (("PyOp", "ai.onnx.contrib"), ("Shell", "evil"), ("Exec", "")):
        path = tmp_path / "graph.onnx"
        path.write_bytes(model(operator, domain))
        with pytest.raises(BundleError):
            Graph(path)


def test_the_unguided_search_finds_and_keeps_what_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(data: bytes) -> None:
        assert len(data) < 700, "too long for this parser"

    monkeypatch.setitem(fuzz.TARGETS, "fragile", Target(lambda: [bytes(300)], check))
    monkeypatch.setattr(fuzz, "CACHE", tmp_path)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(bytes(300))
    (tmp_path / "fragile").mkdir()
    before = signal.getsignal(signal.SIGALRM)
    try:
        with pytest.raises(AssertionError, match="too long for this parser"):
            fuzz._damage("fragile", 20, corpus)
    finally:
        signal.signal(signal.SIGALRM, before)
    [kept] = (tmp_path / "fragile").iterdir()
    assert len(kept.read_bytes()) >= 700
