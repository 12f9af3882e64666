"""Ultravox from checkpoint to answer, at a reduced size, against a second implementation."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests import ultravox_reference as reference
from tests.ultravox_stub import (
    END,
    EOT,
    LLAMA,
    N_HEADS,
    llama_config,
    small_sizes,
    write_checkpoints,
)  # fmt: skip
from tinygiant.export import cli as export_cli
from tinygiant.export.decoder import RopeScaling
from tinygiant.models import ultravox
from tinygiant.models.ultravox import UltravoxConfig, UltravoxProjector, open_checkpoint
from tinygiant.runtime import TinyGiant, load
from tinygiant.runtime.cli import main as run_cli
from tinygiant.runtime.errors import BundleError
from tinygiant.runtime.preprocess import chunks_s
from tinygiant.runtime.scope import longest_clip_s, positions_left

N_TOKENS = 12
RATE_HZ = 16_000
BEFORE = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n"
)
AFTER = "\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


@dataclass
class World:
    """The checkpoints, the bundle made of them, and clips."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "ultravox.safetensors"

    @property
    def llama(self) -> Path:
        return self.folder / "llama"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def clip(self, n_samples: int) -> Path:
        path = self.folder / f"clip-{n_samples}.wav"
        t = np.arange(n_samples) / RATE_HZ
        tone = 0.3 * np.sin(2 * np.pi * (200 + 90 * t) * t)
        noise = np.random.default_rng(n_samples).standard_normal(t.size)
        soundfile.write(path, tone + 0.05 * noise, RATE_HZ, subtype="FLOAT")
        return path

    def rows(self, clip: Path) -> torch.Tensor:
        samples = soundfile.read(clip, dtype="float32")[0]
        return reference.rows(load_file(self.checkpoint), reference.log_mel(samples, 128), N_HEADS)

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_file(str(self.llama / "tokenizer.json"))

    def ids(self, text: str) -> tuple[list[int], list[int]]:
        """The conversation, split where the sound is, then encoded."""
        before, after = (
            self.tokenizer.encode(part, add_special_tokens=False).ids
            for part in (BEFORE, AFTER.format(text))
        )
        return before, after

    def answer(self, clip: Path, text: str) -> str:
        before, after = self.ids(text)
        state = {k: v.float() for k, v in load_file(self.llama / "model.safetensors").items()}
        written = reference.answer(
            state, llama_config(), [before, self.rows(clip), after], N_TOKENS, (EOT, END)
        )
        return str(self.tokenizer.decode(written, skip_special_tokens=False))


@pytest.fixture(autouse=True, scope="module")
def small() -> object:
    """The reduced sizes in the place of the published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ultravox, "open_checkpoint", partial(open_checkpoint, sizes=small_sizes()))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small: object) -> World:
    found = World(tmp_path_factory.mktemp("ultravox"))
    write_checkpoints(found.folder)
    command = ["--ultravox", str(found.checkpoint), "--llama", str(found.llama)]
    options = ["--recipe", "fp32", "--threads", "1", "-o", str(found.bundle)]
    assert export_cli.main([*command, *options]) == 0
    return found


@pytest.fixture(scope="module")
def model(world: World) -> TinyGiant:
    return load(world.bundle, threads=1, verify=False)


def test_census_is_the_published_one() -> None:
    """The published file has 1,366,237,184 bytes of bfloat16; 487 tensors are Whisper's encoder's.

    491 names are those that other readers of the file list.
    """
    with torch.device("meta"):
        encoder = WhisperEncoder(UltravoxConfig().whisper)
        projector = UltravoxProjector(UltravoxConfig(), 2_048)
    assert [len(part.state_dict()) for part in (encoder, projector)] == [487, 4]
    n_elements = [sum(p.numel() for p in part.parameters()) for part in (encoder, projector)]
    assert n_elements == [636_968_960, 46_149_632]
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "ln_pre.weight": (10_240,),
        "linear_1.weight": (4_096, 10_240),
        "ln_mid.weight": (2_048,),
        "linear_2.weight": (2_048, 2_048),
    }
    assert (projector.ln_pre.variance_epsilon, projector.ln_mid.variance_epsilon) == (1e-6, 1e-6)


@pytest.mark.parametrize(
    "n_samples",
    [1_000, 2_560, 2_561, 8_000, 25_837, 160_000, 474_880, 479_999, 480_000],
)
def test_rows_are_the_references(n_samples: int, world: World, model: TinyGiant) -> None:
    """As many frames as the clip has, odd or even; a last row that is not full; all of 30 s."""
    clip = world.clip(n_samples)
    [projection] = model.prepare(clip, "What is said?").projections
    wanted = world.rows(clip).numpy()
    assert projection.audio_embeds[0].shape == wanted.shape == (-(-n_samples // 2_560), 64)
    np.testing.assert_allclose(projection.audio_embeds[0], wanted, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("n_samples", [25_837, 160_000])
def test_greedy_text_is_the_references(n_samples: int, world: World, model: TinyGiant) -> None:
    clip, text = world.clip(n_samples), "What is said? <|eot_id|>?"
    plain = "What is said?"
    for asked in (plain, "Is anybody angry?"):
        answer = model.ask(clip, asked, max_new_tokens=N_TOKENS, raw=True)
        assert answer.raw_text == world.answer(clip, asked)
        assert len(set(answer.raw_text)) > 4  # not one token again and again
        before, after = world.ids(asked)
        first, sound, *rest = model.prepare(clip, asked).asked.prompt.parts
        assert (list(first or ()), sound) == (before, None)
        assert [token for ids in rest for token in ids or ()] == after
        assert (answer.plan, answer.summary, answer.unparsed) == ("", "", "")
    # What a user writes ends no turn.
    prompt = model.prepare(clip, text).asked.prompt
    assert sum(ids.count(EOT) for ids in prompt.parts if ids) == 2


def test_a_second_question_reads_the_sound_no_more(world: World, model: TinyGiant) -> None:
    clip = world.clip(48_000)
    first, second = (model.ask(clip, text, max_new_tokens=4) for text in ("What?", "Who?"))
    assert not first.timings.encode_cached
    assert second.timings.encode_cached


def test_longer_clips_are_heard_in_chunks_of_30_s(world: World, model: TinyGiant) -> None:
    answer = model.ask(world.clip(32 * RATE_HZ), "What is said?", max_new_tokens=2)
    assert answer.audio.n_chunks == 2
    assert answer.audio.dropped_s == 0
    assert answer.tokens.audio == 188 + 13


@pytest.mark.parametrize("n_samples", [480_100, 512_163])
def test_chunks_are_cut_from_the_spectrogram_of_the_whole(
    n_samples: int, world: World, model: TinyGiant
) -> None:
    """The second chunk is quiet: its scale is the first one's, its edge no edge of the sound."""
    samples = soundfile.read(world.clip(n_samples), dtype="float32")[0]
    samples[480_000:] *= 0.01
    found = model.prepare((samples, RATE_HZ), "What is said?").projections
    state, whole = load_file(world.checkpoint), reference.log_mel(samples, 128)
    for projection, piece in zip(found, whole.split(3_000, dim=1), strict=True):
        wanted = reference.rows(state, piece, N_HEADS).numpy()
        np.testing.assert_allclose(projection.audio_embeds[0], wanted, atol=5e-4, rtol=1e-3)


def test_choices_are_answered_exactly(world: World, model: TinyGiant) -> None:
    choices = ["a Question", "an order"]
    answer = model.ask(world.clip(16_000), "What is it?", choices)
    assert answer.text in choices
    assert answer.choice_probabilities is not None
    assert sum(answer.choice_probabilities) == pytest.approx(1.0)


def test_every_tensor_arrives(world: World) -> None:
    source = open_checkpoint(world.checkpoint, None, world.llama, sizes=small_sizes())
    state = load_file(world.checkpoint)
    held = source.part("whisper_encoder").module.state_dict()
    for name, tensor in source.part("projector").module.state_dict().items():
        held[f"multi_modal_projector.{name}"] = tensor
    assert set(held) == set(state)
    for name, tensor in state.items():
        assert torch.equal(held[name], tensor.float()), name
    llama = source.decoder().state_dict()
    for name, tensor in load_file(world.llama / "model.safetensors").items():
        assert torch.equal(llama[name], tensor.float()), name


def test_manifest_and_card_say_where_it_comes_from(world: World) -> None:
    source = json.loads((world.bundle / "manifest.json").read_text())["source"]
    assert source["origin"] == "https://huggingface.co/fixie-ai/ultravox-v0_5-llama-3_2-1b"
    assert "Llama 3.2 Community License" in source["licence"]
    assert "Built with Llama" in (world.bundle / "README.md").read_text()


def test_the_command_line_answers(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--bundle", str(world.bundle), "--threads", "1", "--max-new-tokens", "6"]
    assert run_cli.main([str(world.clip(16_000)), "What is said?", "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "ultravox-0.5-1b"


def test_frequencies_are_llama_3s() -> None:
    """Published values, and transformers' own: 8,192 positions, factor 32, base 500,000."""
    scaling = {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8_192,
    }  # fmt: skip
    config = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, head_dim=64, rope_theta=500_000.0, rope_scaling=scaling,
    )  # fmt: skip
    wanted = LlamaForCausalLM(config).model.rotary_emb.inv_freq.numpy()
    found = RopeScaling.of(scaling)
    assert found is not None
    plain = (1.0 / 500_000.0 ** (np.arange(0, 64, 2) / 64)).astype(np.float32)
    np.testing.assert_allclose(found.applied(plain), wanted, rtol=2e-6)
    assert (found.applied(plain) == plain).sum() == 15  # quick enough to be kept


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("cut", "not a readable safetensors file"),
        ("other", "another model's checkpoint"),
        ("old", "another version of Ultravox"),
        ("no encoder", "another version of Ultravox"),
        ("names", "missing audio_tower.layers.1.fc1.bias; unknown audio_tower.layers.7.fc1.bias"),
        ("shape", "linear_2.weight has shape (72, 80), expected (64, 80)"),
        ("nan", "linear_1.weight holds NaN"),
        ("no llama", "no such folder"),
        ("qwen", "model_type is 'qwen3', expected 'llama'"),
        ("untied", "its head is not tied"),
        ("base", "<|eot_id|> is 5, which ends no text"),
        ("no tokenizer", "not a tokenizer"),
        ("other tokenizer", "no control tokens <|begin_of_text|>"),
        ("larger tokenizer", "more tokens than the language model's 280"),
        ("cut llama", "missing model.norm.weight"),
    ],
)
def test_what_does_not_fit_is_one_line(
    change: str,
    complaint: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, llama = write_checkpoints(tmp_path)
    state, config = load_file(checkpoint), dict(LLAMA)
    projector = "multi_modal_projector"
    if change == "cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:3_000])
    elif change == "other":
        state = {name: v for name, v in state.items() if not name.startswith(projector)}
    elif change == "old":
        state[f"{projector}.ln_post.weight"] = state.pop(f"{projector}.ln_mid.weight")
    elif change == "no encoder":
        state = {name: v for name, v in state.items() if name.startswith(projector)}
    elif change == "names":
        name = "audio_tower.layers.{}.fc1.bias"
        state[name.format(7)] = state.pop(name.format(1))
    elif change == "shape":
        state[f"{projector}.linear_2.weight"] = torch.zeros(72, 80)
    elif change == "nan":
        state[f"{projector}.linear_1.weight"][0, 0] = float("nan")
    elif change == "no llama":
        llama = tmp_path / "nothing"
    elif change == "qwen":
        config["model_type"] = "qwen3"
    elif change == "untied":
        config["tie_word_embeddings"] = False
    elif change == "base":
        config["eos_token_id"] = 1
    elif change == "no tokenizer":
        (llama / "tokenizer.json").unlink()
    elif change == "other tokenizer":
        text = (llama / "tokenizer.json").read_text()
        (llama / "tokenizer.json").write_text(text.replace("<|begin_of_text|>", "<|bos|>"))
    elif change == "larger tokenizer":
        tokenizer = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|audio|>"])
        (llama / "tokenizer.json").write_text(tokenizer.to_str())
    elif change == "cut llama":
        kept = load_file(llama / "model.safetensors")
        del kept["model.norm.weight"]
        save_file(kept, llama / "model.safetensors")
    if change != "cut":
        save_file(state, checkpoint)
    if llama.is_dir():
        (llama / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    command = ["--ultravox", str(checkpoint), "--llama", str(llama), "-o", str(out)]
    assert export_cli.main(command) == 6
    lines = [line for line in capsys.readouterr().err.splitlines() if " s] " not in line]
    assert len(lines) == 1
    assert complaint in lines[0]
    assert len(lines[0]) < 500
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--ultravox", "model.safetensors"], 2, "folder of Llama-3.2-1B-Instruct with --llama"),
        (["--mizar", "m.ckpt", "--llama", "llama"], 2, "--llama goes with --ultravox"),
        (["--ultravox", "m", "--llama", "l", "--audio-context", "clip"], 2, "--audio-context"),
        (["--ultravox", "fixie-ai/ultravox-v0_5-llama-3_2-1b", "--llama", "l"], 6,
         "add --allow-download"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    words: list[str], code: int, complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert export_cli.main([*words, "-o", str(tmp_path / "out")]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_partial_rows_are_checked(world: World) -> None:
    """The contract refuses windows that do not fill their rows."""
    config = open_checkpoint(world.checkpoint, None, world.llama, sizes=small_sizes()).config
    assert config.row_s == pytest.approx(0.16)
    assert (config.rows_per_chunk, config.encoders[0].n_frames) == (188, 3_000)
    [encoder] = config.encoders
    for seconds, frames, rows in (
        (0.001, 2, 1),
        (1.0, 100, 7),
        (1.0001, 101, 7),
        (30.0, 3_000, 188),
    ):
        assert config.frames(encoder, seconds) == frames
        assert config.audio_rows(seconds) == rows
    for change, complaint in (
        ({"variable_length": False}, "partial rows need variable length"),
        ({"partial_rows": False}, "features of the whole clip need partial rows"),
        ({"features": dataclasses.replace(encoder.features, last_frame=True)}, "a last frame"),
    ):
        with pytest.raises(BundleError, match=complaint):
            dataclasses.replace(config, encoders=(dataclasses.replace(encoder, **change),))
    with pytest.raises(BundleError, match="3000 frames of whisper_encoder do not fill 180 audio"):
        output = dataclasses.replace(encoder.outputs[0], rows=180)
        shorter = dataclasses.replace(encoder, outputs=(output,))
        dataclasses.replace(config, rows_per_chunk=180, encoders=(shorter,))


def test_the_longest_clip_that_is_named_fits(world: World) -> None:
    """The last row of each chunk of 30 s stands for 0.08 s: 381 rows are two chunks and 0.8 s."""
    config = open_checkpoint(world.checkpoint, None, world.llama, sizes=small_sizes()).config
    n_others = config.decoder.max_positions - 381
    longest_s = longest_clip_s(config, n_others)
    assert longest_s == pytest.approx(60.8)
    assert positions_left(config, chunks_s(longest_s, config), n_others) == 0
