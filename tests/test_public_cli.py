"""``tg-export --mizar`` and ``--mellow`` with input that will not do: one line, and no folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch

from tests.public_stub import KINDS, small_tokenizer, state_of
from tinygiant.export import cli
from tinygiant.models import mellow, mizar
from tinygiant.models.public import open_public


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small checkpoints of both models, a tokenizer, and everything that may go wrong."""
    found = tmp_path_factory.mktemp("cli")
    for name, kind in KINDS.items():
        torch.save(state_of(kind.build()), found / f"{name}.ckpt")
    (found / "tokenizer.json").write_text(small_tokenizer())
    (found / "other.json").write_text(small_tokenizer().replace('"!":17,', '"!":299,'))
    content = (found / "mizar.ckpt").read_bytes()
    (found / "cut.ckpt").write_bytes(content[: len(content) // 2])
    (found / "text.ckpt").write_text("not a checkpoint")
    torch.save({KINDS["mizar"].mark + "x": print}, found / "code.ckpt")
    (found / "pointer.ckpt").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mizar, "open_checkpoint", partial(open_public, KINDS["mizar"]))
    monkeypatch.setattr(mellow, "open_checkpoint", partial(open_public, KINDS["mellow"]))


CASES = {
    "cut off": (["--mizar", "cut.ckpt"], 6, "not a readable PyTorch checkpoint"),
    "no checkpoint": (["--mizar", "text.ckpt"], 6, "not a readable PyTorch checkpoint"),
    "code inside": (["--mizar", "code.ckpt"], 6, "not a readable PyTorch checkpoint"),
    "git-lfs pointer": (["--mizar", "pointer.ckpt"], 6, "git-lfs pointer"),
    "the other model": (["--mizar", "mellow.ckpt"], 6, "another model's checkpoint"),
    "and the other way": (["--mellow", "mizar.ckpt"], 6, "another model's checkpoint"),
    "no such file": (["--mizar", "nothing.ckpt"], 6, "no such file"),
    "a hub name without permission": (["--mellow", "soham97/mellow"], 6, "add --allow-download"),
    "two models": (["--mizar", "mizar.ckpt", "--mellow", "mellow.ckpt"], 2, "several; give one"),
    "context": (["--mizar", "mizar.ckpt", "--audio-context", "clip"], 2, "--audio-context"),
    "recipe": (["--mizar", "mizar.ckpt", "--recipe", "int3"], 2, "int3"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_an_exit_code_and_no_folder(
    case: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: pytest.fail("fetched"))
    words, code, complaint = CASES[case]
    command = [*words, "--tokenizer", "tokenizer.json", "-o", str(tmp_path / "out")]
    assert cli.main(command) == code
    _one_line(capsys, complaint)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tokenizer", "code", "complaint"),
    [
        ("other.json", 6, "another model's tokenizer"),
        ("text.ckpt", 6, "not a tokenizer"),
        ("missing.json", 6, "no such file"),
        (None, 2, "the model's tokenizer is missing"),
    ],
)
def test_a_tokenizer_of_another_model_or_none(
    tokenizer: str | None,
    code: int,
    complaint: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    words = [] if tokenizer is None else ["--tokenizer", tokenizer]
    assert cli.main(["--mizar", "mizar.ckpt", *words, "-o", str(tmp_path / "out")]) == code
    _one_line(capsys, complaint)
    assert list(tmp_path.iterdir()) == []


def _one_line(capsys: pytest.CaptureFixture[str], complaint: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("] source")]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert lines[0].startswith("tg-export: ")
