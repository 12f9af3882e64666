"""Verification, and the way from a checkpoint to a bundle that is whole or not there."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import (
    ClapAudioConfig,
    ClapAudioModel,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperModel,
)

from tests.model_stub import use_traced_graphs
from tinygiant.export import exporter
from tinygiant.export.bundle import staged_folder
from tinygiant.export.cli import main
from tinygiant.export.verify import (
    Agreement,
    OutputError,
    Verification,
    _judge_tokens,
    output_error,
)
from tinygiant.models.checkpoint import save
from tinygiant.models.config import TinyGiantConfig
from tinygiant.models.sources import _settle
from tinygiant.models.tinygiant import TinyGiantALM
from tinygiant.quantize import RECIPES, load_graph, quantize_graph
from tinygiant.runtime import Bundle, load
from tinygiant.runtime.errors import StorageError, UsageError, VerificationError


@pytest.fixture(scope="session")
def checkpoint(
    tiny_model: TinyGiantALM, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model with a decoder that decides: 4 bits change tokens of one that nearly ties."""
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        _settle(model.decoder)
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save(model, path, tokenizer=tokenizer_file)
    return path


@pytest.fixture
def traced(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders and projector are traced once for all tests: the tiny bundle holds their graphs."""
    use_traced_graphs(monkeypatch, tiny_bundle, [exporter])


def run(*arguments: str | Path) -> int:
    return main([*map(str, arguments), "--threads", "1"])


def nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("recipe", ["fp32", "int8", "int8-rows", "int4", "int4-b32"])
def test_every_recipe_makes_a_verified_bundle(
    checkpoint: Path,
    tmp_path: Path,
    recipe: str,
    tone: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / recipe
    notes = "## What it hears\n\nTwelve sounds.\n"
    (checkpoint / "notes.md").write_text(notes)
    assert run(checkpoint, "-o", target, "--recipe", recipe) == 0
    shown = capsys.readouterr()
    assert "decoder_model" in shown.out
    assert "verified" in shown.out
    assert all(line.startswith("tg-export: ") for line in shown.err.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == [recipe]

    bundle = Bundle.open(target)
    assert bundle.manifest.recipe.name == recipe
    assert bundle.manifest.source.weights == "trained"
    listed = {entry.path for entry in bundle.manifest.files}
    present = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    assert listed == present - {"manifest.json"}

    kv_type = "int8" if recipe.startswith("int4") else "fp32"
    assert bundle.manifest.kv_cache == kv_type
    model = load(target, threads=1)
    assert bundle.manifest.graphs["decoder_model"].scheme.endswith("-kv8") == (kv_type == "int8")

    report = json.loads((target / "verification.json").read_text())
    assert report["passed"] is True
    assert set(report["graphs"]) == {*bundle.manifest.graphs, "embed_tokens"}
    if recipe == "fp32":
        assert report["end_to_end"]["agreement"] == 1.0
        assert report["end_to_end"]["free_running"] == 1.0
        errors = [e["relative_error"] for g in report["graphs"].values() for e in g.values()]
        assert max(errors) <= 1e-4

    card = (target / "README.md").read_text()
    assert card.startswith("---\n")
    assert "pipeline_tag: audio-text-to-text" in card
    assert notes in card
    answer = model.ask(
        (tone(1.0), 16_000), "What is heard?", ["a dog", "a siren"], max_new_tokens=4
    )
    assert answer.text in ("a dog", "a siren")


@pytest.fixture(scope="module")
def public_parts(
    tiny_config: TinyGiantConfig, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Small checkpoints as Hugging Face has them: Whisper, two CLAPs, Qwen3."""
    root = tmp_path_factory.mktemp("public")
    torch.manual_seed(5)
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    ids = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    WhisperModel(
        WhisperConfig(**tiny_config.whisper, **decoder, **ids, decoder_start_token_id=1)
    ).save_pretrained(root / "whisper")
    for name, width in (("htsat", 16), ("clap", 24)):
        tower = tiny_config.htsat | {"patch_embeds_hidden_size": width, "hidden_size": 4 * width}
        ClapAudioModel(ClapAudioConfig(**tower)).save_pretrained(root / name)
    Qwen3ForCausalLM(tiny_config.decoder_config).save_pretrained(root / "qwen3")
    shutil.copyfile(tokenizer_file, root / "qwen3" / "tokenizer.json")
    return {name: root / name for name in ("whisper", "htsat", "clap", "qwen3")}


def test_public_checkpoints_become_a_bundle(public_parts: dict[str, Path], tmp_path: Path) -> None:
    """Two towers, no projector yet, every graph traced anew."""
    options = [word for name, path in public_parts.items() for word in (f"--{name}", path)]
    assert run(*options, "-o", tmp_path / "bundle", "--recipe", "int8") == 0
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert "clap_encoder" in manifest.graphs
    assert manifest.model.outputs["clap_encoder.anchor"][1].size == 96
    assert manifest.source.weights == "seeded-random"  # the projector's are


@pytest.mark.usefixtures("traced")
def test_a_damaged_weight_leaves_no_bundle(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def quantize_and_damage(source: Path, target: Path, *options: Any) -> Any:
        report = quantize_graph(source, target, *options)
        if target.stem == "whisper_encoder":
            model = load_graph(target)
            weight = model.graph.initializers["whisper.layers.0.fc2.weight"]
            array = weight.const_value.numpy().copy()
            array[:, 3] *= -1.0
            weight.const_value = ir.Tensor(array, name=weight.name)
            ir.save(model, target, external_data=f"{target.name}.data", size_threshold_bytes=1024)
        return report

    monkeypatch.setattr(exporter, "quantize_graph", quantize_and_damage)
    assert run(checkpoint, "-o", tmp_path / "bundle", "--recipe", "fp32") == 7
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "not reproduce" in x]
    assert "whisper_encoder.temporal: relative error" in line
    assert nothing_left(tmp_path)


@pytest.mark.usefixtures("traced")
def test_a_full_disk_is_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        code = run(checkpoint, "-o", tmp_path / "bundle", "--recipe", "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == StorageError.exit_code
    assert "cannot be written (File too large)" in capsys.readouterr().err.splitlines()[-1]
    assert nothing_left(tmp_path)


def test_an_existing_folder_is_refused_at_once(
    checkpoint: Path, bundle_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (bundle_copy / "manifest.json").read_bytes()
    assert run(checkpoint, "-o", bundle_copy) == UsageError.exit_code
    assert "--force" in capsys.readouterr().err
    assert (bundle_copy / "manifest.json").read_bytes() == before
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    assert run(checkpoint, "-o", other, "--force") == UsageError.exit_code
    assert (other / "cat.jpg").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nowhere"], 6),
        ([], 2),
        (["--preset", "nano"], 2),
        (["--preset", "pico", "--random-weights", "0"], 2),
        (["nowhere", "--recipe", "int3"], 2),
        (["--whisper", "nowhere"], 2),
        (["--whisper", "nowhere", "--htsat", "nowhere", "--qwen3", "nowhere"], 6),
    ],
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "-o", tmp_path / "bundle") == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tg-export: ")
    assert nothing_left(tmp_path)


def test_force_replaces_the_whole_folder(bundle_copy: Path) -> None:
    (bundle_copy / "stale").touch()
    with staged_folder(bundle_copy, force=True) as folder:
        (folder / "manifest.json").write_text("new")
        assert (bundle_copy / "stale").exists()  # until the new one is whole
    assert [path.name for path in bundle_copy.iterdir()] == ["manifest.json"]
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


def test_an_error_while_replacing_keeps_the_old_bundle(bundle_copy: Path) -> None:
    before = sorted(path.name for path in bundle_copy.iterdir())
    with (
        pytest.raises(StorageError, match="No space left"),
        staged_folder(bundle_copy, force=True) as folder,
    ):
        (folder / "half").touch()
        raise OSError(28, "No space left on device")
    assert sorted(path.name for path in bundle_copy.iterdir()) == before
    assert [path.name for path in bundle_copy.parent.iterdir()] == [bundle_copy.name]


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Path]:
    """The target of a process that was killed (SIGKILL) while it wrote a bundle."""
    target = tmp_path / "bundle"
    program = (
        "import sys, time; from pathlib import Path\n"
        "from tinygiant.export.bundle import staged_folder\n"
        f"with staged_folder(Path({str(target)!r})) as folder:\n"
        "    (folder / 'weights').write_bytes(bytes(1000))\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    yield target
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_folder_in_use_is_left_alone_and_a_dead_one_removed(killed: Path) -> None:
    parent = killed.parent
    (alive,) = parent.iterdir()
    with staged_folder(killed) as folder:  # another export to the same name, at the same time
        assert alive.exists()
        (folder / "manifest.json").touch()
    assert killed.exists()
    assert alive.exists()


def test_kill_leaves_no_bundle_and_the_next_run_works(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    program = (
        "import os, signal; from pathlib import Path\n"
        "from tinygiant.export.bundle import staged_folder\n"
        f"with staged_folder(Path({str(target)!r})) as folder:\n"
        "    (folder / 'weights').write_bytes(bytes(1000))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    code = subprocess.run([sys.executable, "-c", program], check=False).returncode
    assert code == -signal.SIGKILL
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    with staged_folder(target) as folder:
        assert not left.exists()
        (folder / "manifest.json").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match="cannot be written"),
        staged_folder(tmp_path / "file" / "bundle"),
    ):
        pass


def test_output_error_on_hand_made_arrays() -> None:
    wanted = np.array([[3.0, 4.0]], np.float32)
    found = np.array([[3.0, 3.0]], np.float32)
    error = output_error([(wanted, wanted), (found, wanted)])
    assert error.max_abs_error == pytest.approx(1.0)
    assert error.relative_error == pytest.approx(0.2)
    assert error.shapes == ((1, 2),)
    broken = output_error([(wanted, wanted), (np.full_like(wanted, np.nan), wanted)])
    assert np.isnan(broken.relative_error)
    with pytest.raises(ValueError, match="shape"):
        output_error([(wanted[0], wanted)])


def agreement(**changes: float) -> Agreement:
    """What a perfect bundle gets, but for ``changes``."""
    none = OutputError((), 0.0, 0.0)
    perfect = Agreement(
        n_steps=10,
        agreement=1.0,
        n_decided=10,
        decided_agreement=1.0,
        logits=none,
        free_running=1.0,
    )
    return dataclasses.replace(perfect, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({}, None),
        ({"decided_agreement": 0.5}, "50.0% of 10 decided tokens are PyTorch's"),
        # A runtime whose own path differs from the one that was verified.
        ({"free_running": 0.3}, "left alone writes 30.0% of PyTorch's text"),
        # Where a near tie went the other way, the texts may part.
        ({"free_running": 0.3, "agreement": 0.9}, None),
        ({"free_running": 0.3, "n_decided": 9}, None),
    ],
)
def test_tokens_are_judged(changes: dict[str, float], failure: str | None) -> None:
    result = Verification(RECIPES["fp32"])
    _judge_tokens(result, agreement(**changes))
    assert len(result.failures) == (failure is not None)
    assert failure is None or failure in result.failures[0]


def test_all_failures_are_raised_at_once() -> None:
    result = Verification(RECIPES["fp32"])
    result.require()
    result.failures += ["projector.gate: too far", "end to end: no tokens"]
    with pytest.raises(VerificationError, match=r"projector\.gate: too far; end to end: no tokens"):
        result.require()
