"""Building a split on disk and reading it back, with a stand-in for the engines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from tests.world_stub import ToneBanks
from tinygiant.models.world import dataset
from tinygiant.models.world.__main__ import main
from tinygiant.models.world.dataset import WorldDataset, build, clip_features
from tinygiant.models.world.labels import clip_labels, frame_labels
from tinygiant.models.world.questions import question_records
from tinygiant.runtime.errors import StorageError


@pytest.fixture(autouse=True)
def small_shards_without_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    banks = ToneBanks()
    monkeypatch.setattr(dataset, "load_banks", lambda *_: banks)
    monkeypatch.setattr(dataset, "SHARD_CLIPS", 4)


def _build(tmp_path: Path, name: str, clips: int = 10) -> Path:
    return build("test", clips, tmp_path / name, tmp_path / "cache", workers=1, audio=True)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_seed_gives_the_same_bytes_also_when_resumed(tmp_path: Path) -> None:
    whole = _build(tmp_path, "whole")
    resumed = _build(tmp_path, "resumed")
    shutil.rmtree(resumed / "shards" / "0001")
    (resumed / "shards" / "0001.building").mkdir()  # as a killed build leaves it
    (resumed / "shards" / "0001.building" / "whisper.npy").write_bytes(b"half")
    _build(tmp_path, "resumed")
    assert _bytes(whole) == _bytes(resumed)
    assert len(_bytes(whole)) == 10 + 3 * 8 + 5


def test_the_reader_gives_what_the_scene_implies(tmp_path: Path) -> None:
    folder = _build(tmp_path, "out")
    data = WorldDataset(folder)
    assert len(data) == 10
    assert [len(WorldDataset(folder, n)) for n in (4, 5, 100)] == [4, 8, 10]  # whole shards
    for i in range(len(data)):
        scene = data.scene(i)
        whisper, clap = data.features(i)
        rows = data.frame_labels(i)
        assert whisper.shape == (128, 10 * (len(rows) + 10)) == (128, data.n_frames(i))
        assert np.array_equal(rows, frame_labels(scene))
        assert np.array_equal(data.clip_labels(i), clip_labels(scene))
        assert data.records(i) == question_records(scene)
        samples, rate_hz = sf.read(folder / data.records(i)[0]["audio_path"], dtype="float32")
        assert rate_hz == 48_000
        from_file = clip_features(samples, scene)  # the FLAC is exactly what was learnt from
        assert np.array_equal(whisper.T, from_file[0])
        assert np.array_equal(clap, from_file[1])
    with pytest.raises(IndexError):
        data.features(10)


def test_joined_files_hold_every_shard_in_order(tmp_path: Path) -> None:
    folder = _build(tmp_path, "out")
    scenes = [json.loads(line)["scene"]["id"] for line in (folder / "clips.jsonl").open()]
    assert scenes == [f"test-{i:06d}" for i in range(10)]
    records = [json.loads(line) for line in (folder / "meta.jsonl").open()]
    data = WorldDataset(folder)
    assert records == [r for i in range(10) for r in data.records(i)]
    plain = [json.loads(line) for line in (folder / "open.jsonl").open()]
    wanted = [r for i in range(10) for r in question_records(data.scene(i), choices=False)]
    assert plain == wanted
    assert all(record["open"] for record in plain)
    fresh = [json.loads(line) for line in (folder / "fresh.jsonl").open()]
    assert [r["id"] for r in fresh] == [r["id"] for r in plain]
    assert not {r["question"] for r in fresh} & {r["question"] for r in plain}


def test_a_long_clip_has_a_window_of_features_for_every_ten_seconds(tmp_path: Path) -> None:
    folder = build("test", 6, tmp_path, tmp_path / "cache", workers=1, audio=True, kind="long")
    assert folder.name == "test-long"
    data = WorldDataset(folder)
    for i in range(len(data)):
        scene = data.scene(i)
        assert 10 < scene.duration_s < 30
        _, windows = data.features(i)
        assert windows.shape == (-(-scene.duration_s // 10), 1001, 64)
        samples, _ = sf.read(folder / "audio" / f"{scene.id}.flac", dtype="float32")
        assert np.array_equal(windows, clip_features(samples, scene)[1])


def test_other_settings_are_refused_in_the_same_folder(tmp_path: Path) -> None:
    _build(tmp_path, "out", clips=8)
    with pytest.raises(StorageError, match="other settings"):
        build("test", 8, tmp_path / "out", tmp_path / "cache", workers=1, seed=1, audio=True)
    assert len(WorldDataset(_build(tmp_path, "out", clips=10))) == 10  # growing is fine


def test_an_empty_folder_names_the_command_that_fills_it(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"python -m tinygiant.models.world --split train"):
        WorldDataset(tmp_path / "train")


def test_the_command_reports_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _build(tmp_path, "out", clips=8)
    capsys.readouterr()
    given = (
        f"--split test --clips 8 --out {tmp_path / 'out'} --seed 3 --cache {tmp_path} --workers 1"
    )
    code = main(given.split())
    assert code == StorageError.exit_code
    assert capsys.readouterr().err.count("\n") == 1
