"""Bundles: what the manifest says, and every way a bundle can be bad."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tinygiant.models.config import EBranchformerConfig, preset
from tinygiant.runtime import bundle as b
from tinygiant.runtime import load
from tinygiant.runtime.config import ModelConfig
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import BundleError, TinyGiantError, UsageError
from tinygiant.runtime.ort.memory import estimated_bytes
from tinygiant.runtime.ort.pool import GraphPool
from tinygiant.runtime.ort.sessions import (
    Graph,
    SessionSettings,
    require_onnxruntime,
)

FULL = preset("full").runtime
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def write(root: Path, model: ModelConfig | None = None) -> Path:
    """A bundle whose files hold a few bytes each: enough for the reader, not for onnxruntime."""
    model = model or FULL
    (root / "onnx").mkdir(parents=True)
    names = tuple(model.graphs)
    for path in ("tokenizer.json", "embed_tokens.npy", *(f"onnx/{name}.onnx" for name in names)):
        (root / path).write_bytes(f"contents of {path}".encode())
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    manifest = b.Manifest(
        model=model,
        graphs={name: b.GraphEntry(f"onnx/{name}.onnx", (), "fp32", ()) for name in names},
        embeddings=b.EmbeddingsEntry("embed_tokens.npy", "fp32", None),
        tokenizer="tokenizer.json",
        recipe=b.RecipeEntry("fp32", {"decoder": {"bits": 32}}),
        opset=21,
        min_onnxruntime="1.20.0",
        source=b.SourceEntry("test", "0" * 64, "seeded-random", 1),
        created={"tinygiant": "0.1.0"},
        verification={"passed": True},
        files=tuple(b.describe_file(root, path) for path in files),
    )
    (root / b.MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "bundle")


def edit(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = root / b.MANIFEST_NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refusal(root: Path, **options: bool) -> str:
    with pytest.raises(BundleError) as caught:
        b.Bundle.open(root, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert caught.value.exit_code == 4
    return message


def test_a_good_bundle_opens(root: Path) -> None:
    opened = b.Bundle.open(root)
    assert opened.config == FULL
    assert opened.graph("projector") == root.resolve() / "onnx/projector.onnx"
    assert opened.manifest.recipe.details == {"decoder": {"bits": 32}}
    with pytest.raises(BundleError, match="no graph nonsense"):
        opened.graph("nonsense")


def test_the_manifest_survives_a_round_trip_and_is_reproducible(root: Path) -> None:
    text = (root / b.MANIFEST_NAME).read_text()
    manifest = b.Manifest.from_dict(json.loads(text))
    assert manifest.to_json() == text
    assert b.Manifest.from_dict(json.loads(manifest.to_json())) == manifest


def test_what_a_manifest_does_not_say_of_the_kv_cache_is_float32(root: Path) -> None:
    edit(root, lambda data: data.pop("kv_cache"))
    opened = b.Bundle.open(root).manifest
    assert opened.kv_cache == "fp32"
    int8 = dataclasses.replace(opened, kv_cache="int8")
    assert json.loads(int8.to_json())["kv_cache"] == "int8"
    assert b.Manifest.from_dict(json.loads(int8.to_json())) == int8


@pytest.mark.parametrize("value", ["int4", None, 8])
def test_another_kv_cache_is_refused(root: Path, value: Any) -> None:
    edit(root, lambda data: data.update(kv_cache=value))
    assert "manifest.kv_cache" in refusal(root)


def test_an_int8_cache_is_estimated_at_a_quarter(root: Path) -> None:
    before = estimated_bytes(b.Bundle.open(root))
    edit(root, lambda data: data.update(kv_cache="int8"))
    after = estimated_bytes(b.Bundle.open(root))
    saved = 1_024 * (224 - 56) * 2**10
    assert [x - y for x, y in zip(before, after, strict=True)] == [saved, saved]


@pytest.mark.parametrize("memory", ["default", "low"])
def test_a_graph_with_another_cache_than_the_manifest_says(bundle_copy: Path, memory: Any) -> None:
    edit(bundle_copy, lambda data: data.update(kv_cache="int8"))
    with pytest.raises(BundleError) as caught:
        model = load(bundle_copy, threads=1, memory=memory)
        tone = np.sin(np.arange(8_000, dtype=np.float32))
        model.ask((tone, 16_000), "What?", max_new_tokens=1)
    assert "as tensor(float), but the manifest's kv_cache is int8" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "has_clap"),
    [
        (FULL, True),
        (dataclasses.replace(preset("full"), clap=None).runtime, False),
        (
            dataclasses.replace(
                preset("full"), projector=EBranchformerConfig(semantic_gate=False)
            ).runtime,
            False,
        ),
    ],
)
def test_required_graphs_follow_the_model(
    tmp_path: Path, model: ModelConfig, has_clap: bool
) -> None:
    assert ("clap_encoder" in model.graphs) == has_clap
    assert b.Bundle.open(write(tmp_path / "bundle", model)).config == model


def test_default_path_is_the_package_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(b.BUNDLE_VARIABLE, raising=False)
    assert b.default_bundle_path().parts[-3:] == ("runtime", "bundles", "nano")
    monkeypatch.setenv(b.BUNDLE_VARIABLE, "/somewhere/else")
    assert b.default_bundle_path() == Path("/somewhere/else")


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such bundle" in refusal(tmp_path / "nothing")


def test_a_file_is_not_a_bundle(root: Path) -> None:
    assert "not a folder" in refusal(root / "tokenizer.json")


def test_a_hostile_name_stays_on_one_line(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a\nb\x1b[2J")
    assert message.isprintable()


def test_a_name_no_system_takes() -> None:
    assert r"a\x00b" in refusal(Path("a\0b"))


def test_no_manifest(root: Path) -> None:
    (root / b.MANIFEST_NAME).unlink()
    assert "not a bundle" in refusal(root)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b'{"format": "tinygiant-bundle", "format": "tinygiant-bundle"}',
        b"1" * 10_000,
    ],
    ids=["empty", "truncated", "not utf-8", "nested", "twice", "digits"],
)
def test_damaged_manifest(root: Path, content: bytes) -> None:
    (root / b.MANIFEST_NAME).write_bytes(content)
    assert "is damaged" in refusal(root)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"format": "gguf"}'])
def test_a_json_file_that_is_not_ours(root: Path, content: bytes) -> None:
    (root / b.MANIFEST_NAME).write_bytes(content)
    assert "not a tinygiant-bundle" in refusal(root)


def test_every_truncation_of_the_manifest_is_refused(root: Path) -> None:
    content = (root / b.MANIFEST_NAME).read_bytes()
    for size in range(0, len(content) - 2, 97):
        (root / b.MANIFEST_NAME).write_bytes(content[:size])
        refusal(root)


def test_enormous_manifest(root: Path) -> None:
    (root / b.MANIFEST_NAME).write_bytes(b" " * (4 * 2**20 + 1))
    assert "larger than" in refusal(root)


@pytest.mark.parametrize("version", [3, 0, "1", None, True, 10**400])
def test_unknown_format_version_says_what_to_do(root: Path, version: object) -> None:
    edit(root, lambda data: data.update(format_version=version))
    assert "update tinygiant" in refusal(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(surprise=1),
        lambda data: data.pop("opset"),
        lambda data: data.update(opset="21"),
        lambda data: data.update(files=3),
        lambda data: data.update(graphs=[]),
        lambda data: data["graphs"].update(extra=data["graphs"]["projector"]),
        lambda data: data["graphs"].pop("decoder_model"),
        lambda data: data["graphs"]["projector"].update(file=7),
        lambda data: data["model"]["decoder"].update(n_layers="28"),
        lambda data: data["model"].update(tokens_per_chunk=7),
        lambda data: data["embeddings"].update(dtype="fp8"),
        lambda data: data["embeddings"].update(dtype="int8"),
        lambda data: data["recipe"].update(name=None),
        lambda data: data["source"].update(weights="stolen"),
        lambda data: data["created"].update(torch=2),
        lambda data: data["files"].pop(),
        lambda data: data["files"].append(data["files"][0]),
        lambda data: data["files"][0].update(sha256="0"),
        lambda data: data["files"][0].update(size_bytes=-1),
        lambda data: data.update(min_onnxruntime="newest"),
    ],
)
def test_wrong_fields(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    edit(root, change)
    assert re.search("manifest|model config", refusal(root))


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "onnx/../../outside",
        "/etc/hostname",
        "onnx\\..\\..\\outside",
        "C:/outside",
        "onnx//projector.onnx",
        "./tokenizer.json",
        ".hidden",
        "",
        "a\nb",
        "tokenizer.json\n",
        "manifest.json",
        "a/" * 200 + "a",
        "\u202etxt",
    ],
)
def test_paths_are_contained(root: Path, path: str) -> None:
    (root.parent / "outside").write_bytes(b"secret")

    def change(data: dict[str, Any]) -> None:
        data["tokenizer"] = path
        data["files"].append({"path": path, "sha256": "0" * 64, "size_bytes": 6})

    edit(root, change)
    assert "is not allowed" in refusal(root)


def test_a_link_that_leaves_the_folder(root: Path) -> None:
    outside = root.parent / "outside.json"
    (root / "tokenizer.json").rename(outside)
    (root / "tokenizer.json").symlink_to(outside)
    assert "link that leaves" in refusal(root)


def test_a_linked_folder_that_leaves(root: Path) -> None:
    shutil.move(root / "onnx", root.parent / "elsewhere")
    (root / "onnx").symlink_to(root.parent / "elsewhere")
    assert "link that leaves" in refusal(root)


def test_a_link_inside_and_a_linked_bundle_are_fine(root: Path) -> None:
    (root / "tokenizer.json").rename(root / "blob")
    (root / "tokenizer.json").symlink_to("blob")
    alias = root.parent / "alias"
    alias.symlink_to(root)
    assert b.Bundle.open(alias).root == root.resolve()


def test_a_link_in_a_circle(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    (root / "tokenizer.json").symlink_to("tokenizer.json")
    refusal(root)


def test_a_folder_or_a_pipe_in_place_of_a_file(root: Path) -> None:
    (root / "tokenizer.json").unlink()
    (root / "tokenizer.json").mkdir()
    assert "not a regular file" in refusal(root)
    (root / "tokenizer.json").rmdir()
    os.mkfifo(root / "tokenizer.json")
    assert "not a regular file" in refusal(root)


def test_a_missing_file(root: Path) -> None:
    (root / "onnx/projector.onnx").unlink()
    assert "onnx/projector.onnx is missing" in refusal(root, verify=False)


def test_a_truncated_file_is_seen_without_hashing(root: Path) -> None:
    path = root / "onnx/projector.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    assert "the manifest says" in refusal(root, verify=False)


def test_one_changed_bit(root: Path) -> None:
    path = root / "onnx/projector.onnx"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    assert "onnx/projector.onnx was changed" in refusal(root)
    b.Bundle.open(root, verify=False)


@pytest.mark.parametrize("name", ["manifest.json", "onnx/decoder_model.onnx"])
def test_git_lfs_pointers_are_recognised(root: Path, name: str) -> None:
    (root / name).write_bytes(LFS_POINTER)
    assert "git lfs pull" in refusal(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_bundle(root: Path) -> None:
    (root / b.MANIFEST_NAME).chmod(0)
    assert "cannot be read" in refusal(root)


# --- onnxruntime


def identity(path: Path, location: str | None = None) -> Path:
    """A graph that adds a weight of one float, which may lie in another file."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], np.ones(1, np.float32).tobytes(), True)
    if location is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "4"}.items():
            weight.external_data.add(key=key, value=value)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [value("x", TensorProto.FLOAT, ["n"])],
        [value("y", TensorProto.FLOAT, ["n"])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_graph_runs_and_reads_its_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(np.array([2.0], np.float32).tobytes())
    graph = Graph(identity(tmp_path / "g.onnx", "w.data"), SessionSettings(threads=1))
    assert graph.input_names == ("x",)
    assert graph.run({"x": np.array([1.0, 5.0], np.float32)})["y"].tolist() == [3.0, 7.0]


def test_bound_arrays_are_read_and_written_in_place(tmp_path: Path) -> None:
    graph = Graph(identity(tmp_path / "g.onnx"), SessionSettings(threads=1))
    shared = np.array([1.0, 2.0], np.float32)
    binding = graph.bind()
    binding.input("x", shared)
    binding.output("y", shared)
    binding.run()
    binding.run()
    assert shared.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("escape", ["../w.data", "absolute", "link"])
def test_weights_cannot_lie_outside_the_folder(tmp_path: Path, escape: str) -> None:
    outside = tmp_path / "w.data"
    outside.write_bytes(np.ones(1, np.float32).tobytes())
    folder = tmp_path / "bundle"
    folder.mkdir()
    location = escape
    if escape == "absolute":
        location = str(outside)
    elif escape == "link":
        location = "w.data"
        (folder / "w.data").symlink_to(outside)
    with pytest.raises(BundleError, match="cannot be loaded"):
        Graph(identity(folder / "g.onnx", location), SessionSettings(threads=1))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a\x12\xff\xff\xff"])
def test_what_is_not_a_graph(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(BundleError) as caught:
        Graph(tmp_path / "g.onnx", SessionSettings(threads=1))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_failing_run_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    graph = Graph(identity(tmp_path / "g.onnx"), SessionSettings(threads=1))
    for inputs in ({}, {"x": np.ones(2)}, {"x": np.ones((2, 2), np.float32)}, {"z": np.ones(2)}):
        with pytest.raises(BundleError, match="graph g failed") as caught:
            graph.run(inputs)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_an_older_onnxruntime_is_refused(root: Path) -> None:
    for fine in ("1.20", "1.20.0", "1.9.9"):
        require_onnxruntime(fine)
    edit(root, lambda data: data.update(min_onnxruntime="99.1"))
    with pytest.raises(BundleError, match=r"needs onnxruntime 99\.1"):
        GraphPool(b.Bundle.open(root), SessionSettings())


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_impossible_threads(threads: int) -> None:
    with pytest.raises(UsageError, match="threads"):
        SessionSettings(threads=threads)


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    runtime = Path(b.__file__).parent
    source = (runtime / "ort" / "sessions.py").read_text()
    assert source.index("ORT_DISABLE_TELEMETRY") < source.index("import onnxruntime\n")
    others = [p for p in runtime.rglob("*.py") if p.name != "sessions.py"]
    imports = re.compile(r"^\s*(import|from) onnxruntime", re.MULTILINE)
    assert not [p.name for p in others if imports.search(p.read_text())]


# --- embeddings

EMBEDDINGS = {
    "fp32": (np.float32, 0.0),
    "fp16": (np.float16, 1e-3),
    "int8": (np.int8, 2e-2),
}


def with_embeddings(
    tmp_path: Path, dtype: str, table: Any, scales: Any = None
) -> tuple[b.Bundle, Path]:
    root = write(tmp_path / "embeddings")
    np.save(root / "embed_tokens.npy", table)
    if scales is not None:
        np.save(root / "scales.npy", scales)

    def change(data: dict[str, Any]) -> None:
        scale_file = "scales.npy" if scales is not None else None
        data["embeddings"] = {"file": "embed_tokens.npy", "dtype": dtype, "scale_file": scale_file}
        data["model"]["decoder"] |= {"vocab_size": 11, "hidden_size": 6}
        listed = [e["path"] for e in data["files"]] + ([scale_file] if scale_file else [])
        data["files"] = [vars(b.describe_file(root, path)) for path in listed]

    edit(root, change)
    return b.Bundle.open(root), root


@pytest.mark.parametrize("dtype", EMBEDDINGS)
def test_rows_are_looked_up_as_float32(tmp_path: Path, dtype: str) -> None:
    kind, tolerance = EMBEDDINGS[dtype]
    rows = np.random.default_rng(0).standard_normal((11, 6)).astype(np.float32)
    table, scales = rows.astype(kind), None
    if dtype == "int8":
        scales = (np.abs(rows).max(axis=1) / 127).astype(np.float32)
        table = np.round(rows / scales[:, None]).astype(np.int8)
    opened, _ = with_embeddings(tmp_path, dtype, table, scales)
    found = TokenEmbeddings.open(opened).lookup([3, 0, 3, 10])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rows[[3, 0, 3, 10]], rtol=0, atol=tolerance)
    assert TokenEmbeddings.open(opened).lookup([]).shape == (0, 6)


@pytest.mark.parametrize(
    "table",
    [
        np.zeros((10, 6), np.float32),
        np.zeros((11, 6), np.float64),
        np.zeros(66, np.float32),
        np.array([["x"] * 6] * 11, dtype=object),
    ],
    ids=["shape", "type", "flat", "pickle"],
)
def test_other_embeddings_than_the_manifest_says(tmp_path: Path, table: Any) -> None:
    opened, _ = with_embeddings(tmp_path, "fp32", table)
    with pytest.raises(TinyGiantError) as caught:
        TokenEmbeddings.open(opened)
    assert isinstance(caught.value, BundleError)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_array(tmp_path: Path) -> None:
    opened, root = with_embeddings(tmp_path, "fp32", np.zeros((11, 6), np.float32))
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00\x10\x00{'descr': os.system}"):
        (root / "embed_tokens.npy").write_bytes(content)
        with pytest.raises(BundleError):
            TokenEmbeddings.open(opened)


def test_onnx_checks_our_identity_graph(tmp_path: Path) -> None:
    onnx.checker.check_model(onnx.load(identity(tmp_path / "g.onnx")))
