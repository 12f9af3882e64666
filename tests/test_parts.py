"""Assembling a model from checkpoints in the formats they are published in.

The checkpoints are small, but written by transformers' own ``save_pretrained``; the original HTS-AT
form is synthesised with its own tensor names.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.clap.modeling_clap import ClapAudioEncoder

from tinygiant.models import Parts, assemble, load_part, parts_config
from tinygiant.models.parts import PROJECTOR_CONFIG_KEY
from tinygiant.models.projector import Projector
from tinygiant.models.training.tokenizer import train_tokenizer
from tinygiant.runtime.config import config_to_dict
from tinygiant.runtime.errors import CheckpointError

TOWER = {
    "patch_embeds_hidden_size": 8,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "hidden_size": 16,
    "patch_size": 8,
    "patch_stride": [8, 8],
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Parts, dict[str, torch.nn.Module]]:
    """Small public-format checkpoints, and the modules they were saved from."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    whisper = WhisperForConditionalGeneration(
        WhisperConfig(
            d_model=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=16,
            num_mel_bins=128,
            vocab_size=100,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ).eval()
    # Half precision, as openai/whisper-large-v3-turbo is published.
    whisper.half().save_pretrained(root / "whisper")
    text = ClapTextConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=20,
    )  # fmt: skip
    clap = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=dict(TOWER))).eval()
    clap.save_pretrained(root / "clap")
    htsat = ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=dict(TOWER))).eval()
    htsat.save_pretrained(root / "htsat")
    qwen3 = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=48, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    qwen3.save_pretrained(root / "qwen3", max_shard_size="20KB")  # several shards and an index
    assert (root / "qwen3" / "model.safetensors.index.json").is_file()
    train_tokenizer(["which sound is it"], 400, root / "qwen3" / "tokenizer.json")
    parts = Parts(root / "whisper", root / "htsat", root / "qwen3", clap=root / "clap")
    modules = {"whisper": whisper.float(), "htsat": htsat, "clap": clap, "decoder": qwen3}
    return parts, modules


Originals = tuple[Parts, dict[str, torch.nn.Module]]


@torch.no_grad()
def test_every_part_computes_what_its_checkpoint_computes(originals: Originals) -> None:
    parts, modules = originals
    model = assemble(parts, seed=3)
    mel = torch.randn(1, 128, 3000, generator=torch.Generator().manual_seed(0))
    expected = modules["whisper"].model.encoder(mel).last_hidden_state
    pooled = expected.unflatten(1, (300, 5)).mean(2)
    torch.testing.assert_close(model.encode_temporal(mel), pooled, rtol=1e-4, atol=1e-5)
    clap_mel = torch.randn(1, 1, 1001, 64, generator=torch.Generator().manual_seed(1))
    for name, found in (
        ("htsat", model.encode_event(clap_mel)[1]),
        ("clap", model.encode_anchor(clap_mel)),
    ):
        tower = modules[name].audio_model
        torch.testing.assert_close(found, tower(clap_mel).pooler_output, rtol=1e-5, atol=1e-6)
    ids = torch.tensor([[5, 77, 300, 12]])
    torch.testing.assert_close(
        model.decoder(ids).logits, modules["decoder"](ids).logits, rtol=1e-5, atol=1e-6
    )


def test_configuration_comes_from_the_parts(originals: Originals) -> None:
    config = parts_config(originals[0])
    runtime = config.runtime
    assert config.stream_size == 16 + 16
    assert config.projector.hidden_size == runtime.decoder.hidden_size == 32
    assert config.eos_token_ids == (2, 0)  # <|im_end|>, <|endoftext|> of this tokenizer
    assert runtime.audio_context == "full"
    one_tower = dataclasses.replace(originals[0], clap=None)
    towers = parts_config(one_tower).runtime.encoders[1:]
    assert [[output.name for output in tower.outputs] for tower in towers] == [["events", "anchor"]]


def _as_original_htsat(tower: ClapAudioEncoder) -> dict[str, Tensor]:
    """The tower's weights under the names of the original HTS-AT code."""
    state = tower.state_dict()
    out = {
        f"patch_embed.{rest}": state[f"patch_embed.{rest}"]
        for rest in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    }
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        out[f"bn0.{name}"] = state[f"batch_norm.{name}"]
    for name in ("weight", "bias"):
        out[f"norm.{name}"] = state[f"norm.{name}"]
        for i, depth in enumerate(tower.config.depths):
            for j in range(depth):
                theirs, ours = f"layers.{i}.blocks.{j}.", f"layers.{i}.blocks.{j}."
                out[f"{ours}norm1.{name}"] = state[f"{theirs}layernorm_before.{name}"]
                out[f"{ours}norm2.{name}"] = state[f"{theirs}layernorm_after.{name}"]
                out[f"{ours}mlp.fc1.{name}"] = state[f"{theirs}intermediate.dense.{name}"]
                out[f"{ours}mlp.fc2.{name}"] = state[f"{theirs}output.dense.{name}"]
                out[f"{ours}attn.proj.{name}"] = state[f"{theirs}attention.output.dense.{name}"]
                out[f"{ours}attn.qkv.{name}"] = torch.cat(
                    [state[f"{theirs}attention.self.{p}.{name}"] for p in ("query", "key", "value")]
                )
                table = "relative_position_bias_table"
                out[f"{ours}attn.{table}"] = state[f"{theirs}attention.self.{table}"]
                index = "relative_position_index"
                out[f"{ours}attn.{index}"] = state[f"{theirs}attention.self.{index}"]
    for i in range(len(tower.config.depths) - 1):
        for rest in ("norm.weight", "norm.bias", "reduction.weight"):
            out[f"layers.{i}.downsample.{rest}"] = state[f"layers.{i}.downsample.{rest}"]
    # What the original holds beside the tower.
    out["tscam_conv.weight"] = torch.zeros(527, 16, 2, 3)
    out["head.weight"] = torch.zeros(527, 527)
    out["spectrogram_extractor.stft.conv_real.weight"] = torch.zeros(513, 1, 1024)
    out["logmel_extractor.melW"] = torch.zeros(513, 64)
    out["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 64, 64)
    return out


@torch.no_grad()
def test_original_htsat_checkpoint(originals: Originals, tmp_path: Path) -> None:
    torch.manual_seed(5)
    tower = ClapAudioEncoder(ClapAudioConfig(**TOWER)).eval()
    tower.batch_norm.running_mean.normal_()
    path = tmp_path / "HTSAT_AudioSet_Saved_1.ckpt"
    prefixed = {f"sed_model.{name}": t for name, t in _as_original_htsat(tower).items()}
    torch.save({"state_dict": prefixed, "epoch": 3}, path)
    parts = dataclasses.replace(originals[0], htsat=path)
    config = parts_config(parts)
    # 32 kHz and hop 320: the same 1001 frames.
    assert config.event_features.sampling_rate_hz == 32_000
    assert config.event_features.log_mel.n_frames(10.0) == 1001
    assert config.anchor_features.sampling_rate_hz == 48_000
    loaded = load_part(parts, config, "htsat", seed=0)
    assert loaded is not None
    mel = torch.randn(2, 1, 1001, 64, generator=torch.Generator().manual_seed(2))
    expected, found = tower(mel), loaded(mel)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state)


def test_projector_file(originals: Originals, tmp_path: Path) -> None:
    config = parts_config(originals[0])
    small = dataclasses.replace(config.projector, n_heads=4, cgmlp_size=32, intent_query=False)
    torch.manual_seed(0)
    projector = Projector(small, config.stream_size, config.anchor_size)
    path = tmp_path / "projector.safetensors"
    metadata = {PROJECTOR_CONFIG_KEY: json.dumps(config_to_dict(small))}
    save_file(projector.state_dict(), path, metadata=metadata)
    model = assemble(dataclasses.replace(originals[0], projector=path))
    assert model.config.projector == small
    assert model.projector.intent is None
    weight = projector.input_proj.weight
    assert torch.equal(model.projector.input_proj.weight, weight)
    save_file(projector.state_dict(), path)  # no metadata
    with pytest.raises(CheckpointError, match="no 'projector_config'"):
        assemble(dataclasses.replace(originals[0], projector=path))


def test_all_parts_that_do_not_fit_are_named(originals: Originals, tmp_path: Path) -> None:
    parts = originals[0]
    for name in ("whisper", "clap"):
        folder = tmp_path / name
        folder.mkdir()
        source = getattr(parts, name)
        (folder / "config.json").write_text((source / "config.json").read_text())
        tensors = load_file(source / "model.safetensors")
        victim = next(n for n in tensors if n.endswith("layers.1.fc1.bias") or "bn" in n
                      or n.endswith("audio_encoder.norm.bias"))  # fmt: skip
        del tensors[victim]
        save_file(tensors, folder / "model.safetensors")
    broken = dataclasses.replace(parts, whisper=tmp_path / "whisper", clap=tmp_path / "clap")
    with pytest.raises(CheckpointError) as caught:
        assemble(broken)
    assert "missing layers.1.fc1.bias" in str(caught.value)
    assert "missing norm.bias" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"whisper": Path("/nonexistent")}, "no such folder"),
        ({"whisper": "qwen3"}, "model_type is 'qwen3', expected 'whisper'"),
        ({"clap": "whisper"}, "model_type is 'whisper', expected 'clap'"),
    ],
)
def test_a_wrong_folder_is_told_from_the_right_one(
    originals: Originals, change: dict[str, object], message: str
) -> None:
    parts = originals[0]
    fixed = {
        name: getattr(parts, value) if isinstance(value, str) else value
        for name, value in change.items()
    }
    with pytest.raises(CheckpointError, match=message):
        parts_config(dataclasses.replace(parts, **fixed))  # type: ignore[arg-type]


def test_a_fusion_clap_is_refused(originals: Originals, tmp_path: Path) -> None:
    data = json.loads((originals[0].clap / "config.json").read_text())  # type: ignore[operator]
    data["audio_config"]["enable_fusion"] = True
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="fusion"):
        parts_config(dataclasses.replace(originals[0], clap=tmp_path))


def test_shards_cannot_name_files_elsewhere(originals: Originals, tmp_path: Path) -> None:
    folder = tmp_path / "qwen3"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text((originals[0].qwen3 / name).read_text())
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file name in this folder"):
        assemble(dataclasses.replace(originals[0], qwen3=folder))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, originals: Originals) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (__import__("os").system, (f"touch {marker}",))

    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"x": Hostile()}}, path)
    with pytest.raises(CheckpointError, match="not a readable PyTorch checkpoint"):
        parts_config(dataclasses.replace(originals[0], htsat=path))
    assert not marker.exists()
