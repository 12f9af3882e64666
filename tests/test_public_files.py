"""Files of public models: the tokenizer that belongs to them, and what comes from the hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tokenizers
from huggingface_hub.hf_api import RepoFile

from tests.public_stub import VOCABULARY, small_tokenizer
from tinygiant.models.hub import HubFile, locate
from tinygiant.models.smollm2 import SMOLLM2_PROBE, read_tokenizer
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(small_tokenizer())
    return tmp_path


def test_exclamation_marks_become_control_tokens(folder: Path) -> None:
    """Both models pad with them: they are cut out of words, each one by itself."""
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert plain.get_added_tokens_decoder().keys() == set(range(17))
    path = folder / "ours.json"
    path.write_text(read_tokenizer(folder, VOCABULARY, probe=None))
    ours = tokenizers.Tokenizer.from_file(str(path))
    assert ours.get_added_tokens_decoder()[17].content == "!"
    assert ours.get_vocab_size() == plain.get_vocab_size()
    text = "Wow! Two bangs!! and a Pause !"
    assert ours.encode(text).ids == plain.encode(text).ids  # nothing to merge in this vocabulary
    runtime = Tokenizer.from_file(path)
    assert runtime.encode(text) == ours.encode(text).ids
    assert runtime.encode(text).count(17) == 4
    assert runtime.decode(runtime.encode(text)) == text
    assert read_tokenizer(folder / "tokenizer.json", VOCABULARY, None) == path.read_text()
    assert read_tokenizer(path, VOCABULARY, None) == path.read_text()


def test_a_vocabulary_without_rare_bytes_is_read(folder: Path) -> None:
    """SmolLM2's lacks 21 bytes; none of them occurs in a question."""
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    text = "na\u00efve caf\u00e9 \u2013 \u201cquoted\u201d \u65e5\u672c\u8a9e \U0001f600\n\t~"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    data = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["unused-e"] = vocabulary.pop("e")
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(Exception, match="1 bytes of text have no token"):
        Tokenizer.from_file(folder / "tokenizer.json")


def test_another_models_tokenizer_is_refused(folder: Path, tokenizer_file: Path) -> None:
    with pytest.raises(CheckpointError, match="another model's tokenizer") as caught:
        read_tokenizer(tokenizer_file, VOCABULARY, None)
    assert "! is 5, expected 17; it has 403 tokens" in str(caught.value)
    with pytest.raises(CheckpointError, match=f"it has {VOCABULARY} tokens, the decoder 49152"):
        read_tokenizer(folder, 49_152, None)
    with pytest.raises(CheckpointError, match="it splits text differently"):
        read_tokenizer(folder, VOCABULARY, SMOLLM2_PROBE)


def test_no_tokenizer_at_all(folder: Path) -> None:
    for content in ("", "{}", "[]", "\x00"):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match="not a tokenizer") as caught:
            read_tokenizer(folder, VOCABULARY)
        assert "\n" not in str(caught.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no such tokenizer"):
        read_tokenizer(folder, VOCABULARY)


CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
USUAL = HubFile("someone/model-1", "files/model.ckpt", SHA256)


class Hub:
    """Stands in for huggingface_hub's two calls."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.fetched: list[tuple[str, str]] = []
        self.published: str | None = SHA256
        self.content = CONTENT
        self.fails: Exception | None = None
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", self.infos)

    def infos(self, repo_id: str, paths: list[str]) -> list[RepoFile]:
        entry: dict[str, Any] = {"size": len(self.content), "oid": "0"}
        if self.published is not None:
            entry["lfs"] = {"size": entry["size"], "oid": self.published, "pointerSize": 1}
        return [RepoFile(path=path, **entry) for path in paths]

    def download(self, repo_id: str, filename: str) -> str:
        if self.fails is not None:
            raise self.fails
        self.fetched.append((repo_id, filename))
        path = self.folder / "fetched"
        path.write_bytes(self.content)
        return str(path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path, monkeypatch)


def test_a_path_is_a_path_and_nothing_is_fetched(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "someone"
    file.write_bytes(b"")
    for allow in (False, True):
        assert locate(str(file), USUAL, allow_download=allow) == file
        with pytest.raises(CheckpointError, match="no such file or folder"):
            locate(str(tmp_path / "nothing"), USUAL, allow_download=allow)
        with pytest.raises(CheckpointError, match="no such file or folder"):
            locate("../x/y", USUAL, allow_download=allow)
    assert hub.fetched == []


def test_nothing_is_fetched_without_permission(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="add --allow-download to fetch files"):
        locate("someone/model-1", USUAL, allow_download=False)
    assert hub.fetched == []


def test_the_usual_file_or_a_named_one_is_fetched(hub: Hub) -> None:
    assert locate("someone/model-1", USUAL, allow_download=True).read_bytes() == CONTENT
    assert locate("other/fork:v0_s.ckpt", USUAL, allow_download=True).read_bytes() == CONTENT
    assert hub.fetched == [("someone/model-1", "files/model.ckpt"), ("other/fork", "v0_s.ckpt")]


def test_a_file_that_is_not_the_published_one_is_refused(hub: Hub) -> None:
    hub.content = b"something else"
    with pytest.raises(CheckpointError, match=f"not the published file: .*{SHA256}"):
        locate("someone/model-1", USUAL, allow_download=True)
    hub.published = hashlib.sha256(hub.content).hexdigest()  # the hub agrees, the authors do not
    with pytest.raises(CheckpointError, match=f"published is {SHA256}"):
        locate("someone/model-1", USUAL, allow_download=True)
    assert locate("other/fork", USUAL, allow_download=True).read_bytes() == hub.content
    hub.published = None  # a small file without a published sum
    assert locate("other/fork", USUAL, allow_download=True).read_bytes() == hub.content


@pytest.mark.parametrize(
    "error", [OSError("Connection\nrefused"), ValueError("Repo id must be shorter")]
)
def test_a_download_that_fails_says_so_in_one_line(hub: Hub, error: Exception) -> None:
    hub.fails = error
    with pytest.raises(CheckpointError, match="cannot be fetched from the Hugging Face") as caught:
        locate("someone/model-1", USUAL, allow_download=True)
    assert "\n" not in str(caught.value)
