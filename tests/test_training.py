"""Training: schedule, order, masking, exact resume, and the paper's data format."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.world_stub import ToneBanks
from tinygiant.models import build, load, preset, save
from tinygiant.models.training import cli
from tinygiant.models.training.augmentation import Augmentation, augment
from tinygiant.models.training.batching import LengthBatches
from tinygiant.models.training.cota import CotaSet, recipe_task
from tinygiant.models.training.encoders import _spans, span_means
from tinygiant.models.training.loop import LoopConfig, ParameterGroup, schedule, train
from tinygiant.models.training.reasoning import (
    DrawnBatches,
    ReasoningTask,
    Sample,
    collate,
    response_loss,
)
from tinygiant.models.training.tokenizer import train_tokenizer
from tinygiant.models.world.scene import sample_scene
from tinygiant.models.world.vocabulary import WORDS
from tinygiant.runtime.errors import CheckpointError, TinyGiantError
from tinygiant.runtime.tokenizer import Tokenizer

CPU = torch.device("cpu")


def test_schedule_rises_linearly_and_falls_along_a_cosine() -> None:
    config = LoopConfig(steps=110, warmup_steps=10, final_fraction=0.1)
    assert schedule(config, 0) == pytest.approx(0.1)
    assert schedule(config, 9) == pytest.approx(1.0)
    assert schedule(config, 60) == pytest.approx(0.1 + 0.9 * 0.5)
    assert schedule(config, 110) == pytest.approx(0.1)


def test_an_epoch_sees_every_sample_once_in_batches_of_like_length() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(10, 100, 333)]
    batches = LengthBatches(lengths, 8, seed=1)
    for epoch in range(2):
        first = epoch * batches.batches_per_epoch
        seen = [i for b in range(batches.batches_per_epoch) for i in batches[first + b]]
        assert sorted(seen) == list(range(333))
    spreads = [np.ptp([lengths[i] for i in batches[b]]) for b in range(batches.batches_per_epoch)]
    assert np.mean(spreads) < 10  # at random it would be about 70
    assert batches[0] == LengthBatches(lengths, 8, seed=1)[0]
    assert batches[0] != LengthBatches(lengths, 8, seed=2)[0]


class _Drawn:
    """Samples whose length is drawn with them; each response begins with its index."""

    def lengths(self) -> list[int]:
        return [100] * 90

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        sample = _sample(rng, 12, int(rng.integers(5, 200)))
        return dataclasses.replace(sample, response_ids=[index, *sample.response_ids])


def test_samples_drawn_ahead_share_batches_by_their_true_length() -> None:
    def batches(**settings: int) -> DrawnBatches:
        task = ReasoningTask(loop=LoopConfig(steps=1, seed=3), batch_size=8, **settings)
        return DrawnBatches(_Drawn(), task)

    def padding(drawn: DrawnBatches) -> float:
        lengths = [[sample.length for sample in drawn[n]] for n in range(12)]
        padded = sum(len(batch) * max(batch) for batch in lengths)
        return 1 - sum(map(sum, lengths)) / padded

    ahead = batches(draw_ahead=6)
    assert padding(ahead) < 0.15 < 0.3 < padding(batches())
    # 90 samples are 12 batches, the last of which is short: an epoch sees every one once.
    seen = [sample.response_ids[0] for n in range(12) for sample in ahead[n]]
    assert sorted(seen) == list(range(90))
    # A run that resumes in the middle of what was drawn sees the same.
    resumed = batches(draw_ahead=6)[9]
    assert [s.response_ids for s in resumed] == [s.response_ids for s in ahead[9]]


def _regression(folder: Path, steps: int) -> torch.nn.Linear:
    """A small problem with a known answer; the batch is a pure function of its number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
    truth = torch.tensor([[1.0, -2.0, 3.0, 0.5]])

    def batch_at(number: int) -> torch.Tensor:
        return torch.randn(32, 4, generator=torch.Generator().manual_seed(number))

    def loss_of(x: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        return ((model(x) - x @ truth.T) ** 2).mean(), {}

    train(
        LoopConfig(
            steps=steps,
            warmup_steps=5,
            save_every=7,
            log_every=1,
            precision="float32",
            weight_decay=0.0,
        ),
        modules={"model": model},
        groups=[ParameterGroup("all", list(model.parameters()), 0.1)],
        batch_at=batch_at,
        loss_of=loss_of,
        folder=folder,
        device=CPU,
    )
    return model


def test_training_finds_the_answer(tmp_path: Path) -> None:
    model = _regression(tmp_path, 200)
    torch.testing.assert_close(
        model.weight, torch.tensor([[1.0, -2.0, 3.0, 0.5]]), atol=0.02, rtol=0
    )
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").open()]
    assert steps == list(range(1, 201))


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """kill -9 in the middle of a run, then the same command: bit for bit the same result."""
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_training
        from pathlib import Path
        from tinygiant.models.training import loop
        write = loop._write_log
        def killing(log, numbers):
            write(log, numbers)
            if numbers.get("step") == 17:
                os.kill(os.getpid(), signal.SIGKILL)
        loop._write_log = killing
        test_training._regression(Path({str(tmp_path / "killed")!r}), 30)
        """
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert result.returncode == -signal.SIGKILL
    state = torch.load(tmp_path / "killed" / "state.pt", weights_only=True)
    assert state["step"] == 14  # at most one interval of 7 steps is lost
    resumed = _regression(tmp_path / "killed", 30)
    straight = _regression(tmp_path / "straight", 30)
    assert torch.equal(resumed.weight, straight.weight)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").open()]
        for name in ("killed", "straight")
    ]
    assert logs[0] == logs[1]


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    torch.save({"step": 3, "modules": {"other": {}}, "optimizer": {}}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="of another run"):
        _regression(tmp_path, 10)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(TinyGiantError, match="the loss is nan at step 0"):
        train(
            LoopConfig(steps=3),
            modules={"model": model},
            groups=[ParameterGroup("all", list(model.parameters()), 0.1)],
            batch_at=lambda number: torch.full((1, 1), float("nan")),
            loss_of=lambda x: (model(x).sum(), {}),
            folder=tmp_path,
            device=CPU,
        )


def _sample(rng: np.random.Generator, n_rows: int, n_response: int) -> Sample:
    nano = preset("nano")
    return Sample(
        streams=rng.standard_normal((n_rows, nano.stream_size)).astype(np.float32),
        anchor=rng.standard_normal(nano.anchor_size).astype(np.float32),
        prefix_ids=[1, 2, 3],
        suffix_ids=[4, 5],
        instruction_ids=[4],
        response_ids=[int(i) for i in rng.integers(10, 1000, n_response)],
    )


@torch.no_grad()
def test_the_loss_is_that_of_the_response_alone_but_for_what_is_given() -> None:
    """Against the definition: each sample by itself, unpadded, through the whole decoder."""
    model = build(preset("nano"), seed=0)
    rng = np.random.default_rng(0)
    samples = [_sample(rng, 12, 6), dataclasses.replace(_sample(rng, 30, 17), given=(4, 9))]
    loss, _ = response_loss(model, collate(samples, CPU))
    total = count = 0.0
    for s in samples:
        instruction = model.embed_tokens(torch.tensor([s.instruction_ids]))
        audio = model.projector(
            torch.from_numpy(s.streams)[None],
            torch.from_numpy(s.anchor)[None],
            instruction,
            torch.ones(1, 1),
        ).audio_embeds
        before, after, response = (
            model.embed_tokens(torch.tensor([ids]))
            for ids in (s.prefix_ids, s.suffix_ids, s.response_ids)
        )
        logits = model.decoder(inputs_embeds=torch.cat((before, audio, after, response), 1)).logits[
            0
        ]
        first = 3 + len(s.streams) + 2
        log_probabilities = logits[first - 1 : -1].log_softmax(-1)
        learnt = [k for k in range(len(s.response_ids)) if not s.given[0] <= k < s.given[1]]
        total -= sum(float(log_probabilities[k, s.response_ids[k]]) for k in learnt)
        count += len(learnt)
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


@pytest.fixture
def cota(tmp_path: Path) -> tuple[Path, Path]:
    """A nano checkpoint with seeded weights, and a small parquet file in CoTA's format."""
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(["what is it? a bell"], 400, tokenizer)
    save(build(preset("nano"), seed=0), tmp_path / "start", tokenizer=tokenizer)
    rng = np.random.default_rng(0)
    rows = [
        {
            "audio": {
                "array": (0.1 * rng.standard_normal(n)).astype(np.float32).tolist(),
                "sampling_rate": 16_000,
            },
            "user": "<audio>What is it?",
            "assistant": "<THINK>\n<PLANNING>\nListen.</PLANNING>\n</THINK>\n<RESPONSE>\n"
            "a bell</RESPONSE>",
        }
        for n in (8_000, 16_000, 12_000, 31 * 16_000)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "cota.parquet", row_group_size=3)
    return tmp_path / "start", tmp_path / "cota.parquet"


def test_cota_rows_become_samples(cota: tuple[Path, Path]) -> None:
    model = load(cota[0])
    tokenizer = Tokenizer.from_file(cota[0] / "tokenizer.json")
    dataset = CotaSet([cota[1]], model, tokenizer, max_text_tokens=2048)
    assert len(dataset) == len(dataset.lengths()) == 4
    sample = dataset.sample(0, np.random.default_rng(0))
    assert sample.streams.shape == (5, model.config.stream_size)  # half a second
    text = tokenizer.decode(sample.response_ids)
    assert text.startswith("<think>\n<PLANNING>") and text.endswith("</RESPONSE><|im_end|>")
    assert model.config.think_end_token_id in sample.response_ids
    assert tokenizer.decode(sample.instruction_ids) == "What is it?"
    assert dataset.cut_audio == 0
    assert len(dataset.sample(3, np.random.default_rng(0)).streams) == 300
    assert dataset.cut_audio == 1  # 31 s: said, not silent


def test_the_papers_recipe_as_published() -> None:
    recipe = cli.read_recipe(None, "paper")["reasoning"]
    recipe.pop("max_text_tokens")
    task = recipe_task(recipe, 558_423, seed=0)
    assert task.projector_learning_rate == 1e-4 and task.decoder_learning_rate == 5e-5
    assert task.batch_size * task.loop.accumulate == 32
    assert task.loop.steps == 52_353  # 3 epochs
    assert task.loop.precision == "bfloat16"


def test_cota_command_trains_projector_and_decoder_only(
    cota: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "quick.toml"
    recipe.write_text(
        "[reasoning]\nepochs = 2\nbatch_size = 2\naccumulate = 2\n"
        "projector_learning_rate = 1e-3\ndecoder_learning_rate = 1e-3\nwarmup_fraction = 0.5\n"
        'precision = "float32"\nmax_text_tokens = 2048\n'
    )
    out = tmp_path / "run"
    threads = str(torch.get_num_threads())
    arguments = ["cota", str(cota[1]), "--checkpoint", str(cota[0]), "-o", str(out)]
    code = cli.main([*arguments, "--recipe", str(recipe), "--threads", threads])
    torch.use_deterministic_algorithms(False)
    assert code == 0
    # One row of four is longer than a chunk, and it is read once in each of two epochs.
    assert "2 samples had their audio cut" in capsys.readouterr().err
    before, after = load(cota[0]), load(out / "checkpoint")
    for name, tensor in before.state_dict().items():
        same = torch.equal(tensor, after.state_dict()[name])
        if name.startswith(("whisper.", "htsat.")):
            assert same, name
    assert not torch.equal(before.decoder.model.norm.weight, after.decoder.model.norm.weight)
    assert not torch.equal(before.projector.input_proj.weight, after.projector.input_proj.weight)


def test_a_file_that_is_no_parquet_ends_in_one_line(
    cota: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"nothing")
    code = cli.main(
        ["cota", str(bad), "--checkpoint", str(cota[0]), "-o", str(tmp_path / "x"),
         "--threads", str(torch.get_num_threads())]
    )  # fmt: skip
    torch.use_deterministic_algorithms(False)
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not a readable parquet file" in error


@pytest.mark.parametrize("arguments", [[], ["nano"], ["cota"], ["nano", "-o", "x", "--seed", "y"]])
def test_wrong_options_end_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("tg-train: ") and error.count("\n") == 1
    assert "--help" in error


def test_span_means_average_only_their_rows() -> None:
    rows = torch.arange(24.0).reshape(2, 6, 2)
    spans = torch.tensor([[0, 1, 3], [1, 5, 6]])
    expected = torch.stack([rows[0, 1:3].mean(0), rows[1, 5]])
    torch.testing.assert_close(span_means(rows, spans), expected)


def test_a_moved_voice_has_its_formants_elsewhere_and_a_melody_stays() -> None:
    """One band sounds; it may move by 12 % of its place, and no energy comes from nowhere."""
    features = torch.full((400, 128, 3), -1.0)
    features[:, 60] = 1.0
    melodies = set(range(200))
    augment(features, Augmentation(0, warp=0.12), np.random.default_rng(0), 1, melodies)
    assert torch.equal(features[:200], features[:1].expand(200, -1, -1))
    places = ((features[200:] + 1) * torch.arange(128.0)[:, None]).sum(1) / (
        features[200:] + 1
    ).sum(1)
    assert places.min() >= 60 / 1.12 - 1 and places.max() <= 60 / 0.88 + 1
    moved = (places[:, 0] - 60).abs() > 1
    assert 60 < moved.sum() < 100  # every second one, of which a sixth moves by less than a band
    assert (places[:, 0] > 61).sum() > 20 < (places[:, 0] < 59).sum()
    assert features.min() == -1 and features.max() <= 1


@pytest.mark.parametrize("mel_axis", [1, 3])
def test_bands_get_louder_or_quieter_smoothly_and_silence_stays(mel_axis: int) -> None:
    """The gain is the clip's, the same at all times, bounded, and differs from band to band."""
    features = torch.zeros(50, 64, 40) if mel_axis == 1 else torch.zeros(50, 1, 40, 64)
    rows = features if mel_axis == 1 else features[:, 0].transpose(1, 2)  # (clips, bands, frames)
    rows[:, :, 30:] = -2.0
    augment(features, Augmentation(0, band_gain=0.5), np.random.default_rng(0), mel_axis)
    gains = rows[:, :, 0]
    assert torch.equal(rows[:, :, :30], gains[..., None].expand(-1, -1, 30))
    assert gains.abs().max() <= 0.5 and gains.std(1).min() > 0
    assert gains.diff(dim=1).abs().median() < 0.05
    assert gains.min() < -0.3 and gains.max() > 0.3
    assert features.min() == -2  # the floor


def test_spans_say_where_words_and_notes_are() -> None:
    scene = sample_scene("train", 11, 0, ToneBanks().word_duration_s, modality="mix-music-speech")
    assert scene.speech is not None and scene.music is not None
    word_spans, words, pitches, music_spans, music = _spans([scene], n_rows=90)
    assert [WORDS[i] for i in words] == list(scene.speech.words)
    for (clip, first, stop), start_s, end_s in zip(
        word_spans.tolist(), scene.speech.starts_s, scene.speech.ends_s, strict=True
    ):
        assert clip == 0
        assert first * 0.1 <= start_s < (first + 1) * 0.1
        assert (stop - 1) * 0.1 < end_s <= stop * 0.1 + 1e-9
    # The middle of every beat carries the beat's own note.
    for beat, pitch in enumerate(scene.music.pitches):
        middle_s = scene.music.start_s + (beat + 0.5) * scene.music.beat_s
        around = {int(p) for p in pitches[0, int(middle_s * 10) : int(middle_s * 10) + 2]}
        assert pitch in around
    assert music_spans.shape == (1, 3)
    expected = [scene.music.rising, scene.music.major, scene.music.fast, scene.music.meter == 3]
    assert music.tolist() == [[float(x) for x in expected]]
