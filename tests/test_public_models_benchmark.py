"""Imported models beside PyTorch: the checkpoint with a real decoder, and the figures' meaning."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import public_models
from benchmarks.original_mellow import OriginalMellow
from tinygiant.runtime.errors import UsageError


def write_language_model(folder: Path, **shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    (folder / "tensors").mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {
        name.replace("__", "."): rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        np.save(folder / "tensors" / f"{name}.npy", tensor)
    return tensors


def test_a_grafted_checkpoint_has_the_decoder_and_keeps_the_rest(tmp_path: Path) -> None:
    real = write_language_model(
        tmp_path / "lm", model__embed_tokens__weight=(7, 4), model__norm__weight=(4,)
    )
    state = {
        "audio.conv.weight": torch.ones(3),
        "lm.model.embed_tokens.weight": torch.zeros(7, 4),
        "lm.model.norm.weight": torch.zeros(4),
        "lm.lm_head.weight": torch.zeros(7, 4),
    }
    torch.save(state, tmp_path / "random.ckpt")
    arguments = ["graft", *(str(tmp_path / name) for name in ("random.ckpt", "lm", "out.ckpt"))]
    assert public_models.main(arguments) == 0
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert set(found) == set(state)
    assert (found["audio.conv.weight"] == 1).all()
    for name, tensor in real.items():
        assert (found[f"lm.{name}"].numpy() == tensor).all()
    assert torch.equal(found["lm.lm_head.weight"], found["lm.model.embed_tokens.weight"])


def test_a_language_model_of_another_size_is_refused(tmp_path: Path) -> None:
    write_language_model(tmp_path / "lm", model__norm__weight=(5,))
    state = {"lm_head.weight": torch.zeros(7, 4), "model.norm.weight": torch.zeros(4)}
    torch.save(state, tmp_path / "random.ckpt")
    with pytest.raises(UsageError, match=r"no place for model.norm.weight \(5,\)"):
        public_models.graft(tmp_path / "random.ckpt", tmp_path / "lm", tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_ratios_are_those_of_the_rounds() -> None:
    def rounds(*first_s: float) -> list[dict[str, float]]:
        return [{"first_token_s": s, "rest_s": 9 * s, "second_question_s": s / 2} for s in first_s]

    torch_row, ours = public_models.summarize(
        {"PyTorch": rounds(1.0, 2.0, 9.0), "int8": rounds(0.25, 1.0, 0.9)},
        new_tokens=10,
        memory={"PyTorch": 800, "int8": 200},
    )
    assert (torch_row["first_token_of_torch"], torch_row["tokens_per_s_of_torch"]) == (1.0, 1.0)
    assert ours["first_token_s"] == 0.9
    assert ours["first_token_of_torch"] == 0.25  # of 0.25, 0.5 and 0.1; not 0.9 of 2
    assert ours["tokens_per_s"] == pytest.approx(9 / (9 * 0.9))
    assert ours["tokens_per_s_of_torch"] == 4.0
    assert ours["peak_rss_of_torch"] == 0.25


def test_the_originals_code_is_a_second_measure() -> None:
    def rounds(*first_s: float) -> list[dict[str, float]]:
        return [{"first_token_s": s, "rest_s": 9 * s, "second_question_s": s / 2} for s in first_s]

    rows = public_models.summarize(
        {"PyTorch": rounds(1.0, 2.0), "original code": rounds(2.0, 4.0), "int8": rounds(0.5, 1.0)},
        new_tokens=10,
        memory={"PyTorch": 800, "original code": 900, "int8": 200},
    )
    assert [row["first_token_of_original"] for row in rows] == [0.5, 1.0, 0.25]
    assert [row["first_token_of_torch"] for row in rows] == [1.0, 2.0, 0.5]


def test_a_folder_that_is_no_clone_of_the_original_is_told(tmp_path: Path) -> None:
    options = argparse.Namespace(threads=1, original=tmp_path)
    with pytest.raises(UsageError, match=r"clone of github.com/soham97/mellow"):
        OriginalMellow(options)


def test_only_mellows_own_code_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "mizar", "m.ckpt", "--tokenizer", "t.json", "--original", "clone"]
    assert public_models.main(command) == 2
    assert "only Mellow's code is known" in capsys.readouterr().err
