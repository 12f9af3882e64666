"""Mizar and Mellow in PyTorch: what their files must hold, and what the modules compute."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests import public_reference as reference
from tests.public_stub import KINDS, published_names, small_mizar, state_of
from tinygiant.models.mellow import Mellow, MellowConfig
from tinygiant.models.mizar import Mizar, MizarConfig
from tinygiant.models.public import PublicModel, load_public
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.features import mel_filter_bank

BOTH = pytest.mark.parametrize("name", ["mizar", "mellow"])


def load(name: str, path: Path) -> PublicModel:
    return load_public(KINDS[name], path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("public")
    for name, kind in KINDS.items():
        torch.save(state_of(kind.build()), folder / f"{name}.ckpt")
    return {name: folder / f"{name}.ckpt" for name in KINDS}


def test_mizars_census_is_the_published_one() -> None:
    """Its repository states 454 tensors and 187,628,509 elements; 159,299,840 are parameters."""
    with torch.device("meta"):
        model = Mizar(MizarConfig())
    state = model.state_dict()
    assert len(state) == 454
    assert sum(tensor.numel() for tensor in state.values()) == 187_628_509
    assert sum(parameter.numel() for parameter in model.parameters()) == 159_299_840
    assert sum(parameter.numel() for parameter in model.encoder.parameters()) == 21_418_880
    assert sum(parameter.numel() for parameter in model.mapper.parameters()) == 3_365_952


def test_mellows_census_is_479_tensors() -> None:
    with torch.device("meta"):
        state = published_names(Mellow(MellowConfig()).state_dict())
    assert len(state) == 479
    prefix = "audio_encoder.base.htsat."
    assert state[f"{prefix}tscam_conv.weight"].shape == (527, 768, 2, 3)
    assert state["audio_encoder.base.c2l.weight"].shape == (768, 527)
    assert state[f"{prefix}layers.3.blocks.1.attn.qkv.weight"].shape == (2_304, 768)


@BOTH
def test_every_tensor_of_the_file_arrives(name: str, files: dict[str, Path]) -> None:
    """Changing any one of them changes the model (but for classifiers that nothing reads)."""
    state, model = torch.load(files[name]), load(name, files[name])
    held = published_names(model.state_dict()) if name == "mellow" else model.state_dict()
    assert set(held) == set(state)
    for key, tensor in state.items():
        assert torch.equal(held[key], tensor), key


@BOTH
def test_the_prefix_of_parallel_training_is_taken_off(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    prefixed = {f"module.{key}": value for key, value in torch.load(files[name]).items()}
    torch.save(prefixed, tmp_path / "p.ckpt")
    plain, again = load(name, files[name]), load(name, tmp_path / "p.ckpt")
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@BOTH
def test_everything_that_does_not_fit_is_named_at_once(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    state = torch.load(files[name])
    del state["caption_decoder.lm.model.layers.1.mlp.up_proj.weight"]
    state["caption_decoder.lm.model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    state["caption_decoder.lm.model.norm.weight"] = torch.ones(5)
    state[f"{KINDS[name].mark}patch_embed.proj.bias"][0] = float("nan")
    torch.save(state, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError) as caught:
        load(name, tmp_path / "bad.ckpt")
    message = str(caught.value)
    assert "4 problems with its tensors" in message
    assert "missing caption_decoder.lm.model.layers.1.mlp.up_proj.weight" in message
    assert "unknown caption_decoder.lm.model.layers.0.self_attn.q_norm.weight" in message
    assert "caption_decoder.lm.model.norm.weight has shape (5,), expected (72,)" in message
    assert "patch_embed.proj.bias holds NaN" in message
    assert "\n" not in message


def test_another_models_file_is_refused_in_one_line(files: dict[str, Path]) -> None:
    for name, other in (("mizar", "mellow"), ("mellow", "mizar")):
        with pytest.raises(CheckpointError, match="another model's checkpoint") as caught:
            load(name, files[other])
        assert KINDS[name].mark in str(caught.value)
        assert len(str(caught.value)) < 500


@BOTH
def test_truncated_and_forged_files_are_refused(
    name: str, files: dict[str, Path], tmp_path: Path
) -> None:
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(files[name].read_bytes()[:-2_000])
    for path in (cut, _code(tmp_path)):
        with pytest.raises(CheckpointError, match="not a readable PyTorch checkpoint") as caught:
            load(name, path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


class _Payload:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _code(folder: Path) -> Path:
    """A file that runs a command when it is unpickled."""
    path = folder / "code.ckpt"
    torch.save({f"{KINDS['mizar'].mark}x": _Payload(f"touch {folder}/ran")}, path)
    return path


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        ("mizar", "audio_encoder.base.mel_spectrogram.mel_scale.fb",
         mel_filter_bank(512, 64, 0.0, 8_000.0, 16_000)),
        ("mizar", "audio_encoder.base.mel_spectrogram.spectrogram.window", np.hanning(512)),
        ("mizar", "audio_encoder.base.resample.kernel", np.full((1, 1, 28), 1 / 28)),
        ("mellow", "audio_encoder.base.htsat.logmel_extractor.melW",
         mel_filter_bank(1_024, 64, 50.0, 14_000.0, 32_000, scale="htk")),
        ("mellow", "audio_encoder.base.htsat.spectrogram_extractor.stft.conv_imag.weight",
         np.zeros((513, 1, 1_024))),
    ],
)  # fmt: skip
def test_a_checkpoint_with_other_features_is_refused(
    name: str, constant: str, value: np.ndarray, files: dict[str, Path], tmp_path: Path
) -> None:
    state = torch.load(files[name])
    state[constant] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    torch.save(state, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="differs from this project's") as caught:
        load(name, tmp_path / "other.ckpt")
    assert constant in str(caught.value)


@pytest.mark.parametrize("quiet", [False, True], ids=["usual", "tiny activations"])
@pytest.mark.parametrize("n_frames", [2_001, 1_012, 400])
def test_ced_against_a_reading_of_its_definition(
    n_frames: int, quiet: bool, files: dict[str, Path], tmp_path: Path
) -> None:
    """Tiny activations make the norms' epsilon count: 1e-5 in its place would be far off."""
    state = torch.load(files["mizar"])
    if quiet:
        for name in state:
            if any(part in name for part in ("patch_embed", "pos_embed", "attn.proj", "mlp.fc2")):
                state[name] = state[name] * 1e-3
    torch.save(state, tmp_path / "m.ckpt")
    model = load("mizar", tmp_path / "m.ckpt")
    log_mel = torch.randn(n_frames, 64) * 12 - 30
    with torch.no_grad():
        found = model.encoder(log_mel[None, None])[0]
    ced = small_mizar().ced
    wanted = reference.ced(state, log_mel, ced.n_heads)
    assert found.shape == (ced.steps(n_frames), 4 * ced.hidden_size)
    np.testing.assert_allclose(found, wanted.flatten(1), atol=2e-4, rtol=1e-4)


def test_mizars_mapper_against_a_reading_of_its_definition(files: dict[str, Path]) -> None:
    state, model = torch.load(files["mizar"]), load("mizar", files["mizar"])
    grid = torch.randn(126, 4, 48)  # (time, frequency, channel)
    with torch.no_grad():
        found = model.mapper(grid=grid.reshape(1, 126, 4 * 48))
    np.testing.assert_allclose(found[0], reference.mizar_rows(state, grid), atol=1e-4)


def test_mellows_head_and_mapper_take_the_short_cut_of_the_same_result(
    files: dict[str, Path],
) -> None:
    """The original repeats 32 steps to 1024 frames, projects them all and averages 8 at a time."""
    state, model = torch.load(files["mellow"]), load("mellow", files["mellow"])
    log_mel = torch.randn(1_001, 64) * 12 - 30
    with torch.no_grad():
        course, whole = model.encoder(log_mel[None, None])
        found = model.mapper(course=course, whole=whole)
        tower = model.get_submodule("audio_encoder.base.htsat.tower")
        wanted = reference.mellow_rows(state, tower, log_mel)
    assert found.shape == (1, 129, 72)
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)


def test_norms_of_the_public_models_have_their_published_epsilon() -> None:
    """A wrong one hardly shows in outputs: 1e-5 in CED moves Mizar's rows by 4e-5."""
    with torch.device("meta"):
        mizar, mellow = Mizar(MizarConfig()), Mellow(MellowConfig())

    def epsilons(module: nn.Module) -> set[float]:
        return {part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)}

    assert epsilons(mizar.encoder) == {1e-6}
    assert epsilons(mizar.mapper) == {1e-5}
    assert epsilons(mellow) == {1e-5}
    assert mizar.decoder.config.rms_norm_eps == mellow.decoder.config.rms_norm_eps == 1e-5
