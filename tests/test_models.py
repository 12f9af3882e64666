"""The PyTorch reference against transformers, against its own definition, and its checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.clap.modeling_clap import ClapAudioEncoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tinygiant.models import (
    COMPONENTS,
    Projector,
    TinyGiantALM,
    TinyGiantConfig,
    build,
    build_component,
    encode_audio,
    greedy,
    input_embeddings,
    load,
    load_component,
    preset,
    save,
)
from tinygiant.models.config import EBranchformerConfig
from tinygiant.models.tinygiant import encode_event, encode_temporal
from tinygiant.models.training.tokenizer import train_tokenizer
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.errors import CheckpointError
from tinygiant.runtime.tokenizer import Tokenizer

NANO = preset("nano")


@pytest.fixture(scope="module")
def model() -> TinyGiantALM:
    return build(NANO, seed=1)


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(["What sound is heard? a dog barks twice, then a bell"] * 3, 400, path)
    return path


def test_full_size_has_the_published_parameter_counts() -> None:
    """The paper says 732 M for the encoders; only this combination of checkpoints sums to it."""
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in make(preset("full")).parameters())
            for name, make in COMPONENTS.items()
        }
    assert counts["whisper"] == 636_968_960
    assert counts["htsat"] == 27_534_488
    assert counts["clap"] == 67_824_408
    assert counts["whisper"] + counts["htsat"] + counts["clap"] == 732_327_856
    assert counts["decoder"] == 596_049_920
    assert 25e6 < counts["projector"] < 35e6  # "about 30 M"


def test_full_size_contract_has_the_published_shapes() -> None:
    runtime = preset("full").runtime
    assert (runtime.chunk_s, runtime.rows_per_chunk) == (30.0, 300)
    assert preset("full").stream_size == 2048
    outputs = {name: (output.rows, output.size) for name, (_, output) in runtime.outputs.items()}
    assert outputs == {
        "whisper_encoder.temporal": (300, 1280),
        "htsat_encoder.events": (32, 768),
        "clap_encoder.anchor": (None, 1024),
    }
    assert runtime.decoder.kv_values_per_token == 57_344
    assert runtime.audio_context == "full"


def test_temporal_stream_is_whispers_encoder_averaged_over_five_steps() -> None:
    whisper = build_component(NANO, "whisper", 0)
    assert isinstance(whisper, WhisperEncoder)
    features = torch.randn(2, 128, 3000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whisper(features).last_hidden_state  # (2, 1500, hidden)
        expected = torch.nn.functional.adaptive_avg_pool1d(expected.transpose(1, 2), 300)
        found = encode_temporal(whisper, features, 5)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_event_stream_is_the_tower_averaged_over_frequency() -> None:
    tower = build_component(NANO, "htsat", 0)
    assert isinstance(tower, ClapAudioEncoder)
    features = torch.randn(2, 1, 1001, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = tower(features)
        events, anchor = encode_event(tower, features)
    assert events.shape == (2, NANO.runtime.outputs["htsat_encoder.events"][1].rows, 192)
    # The pooled output is the mean over both axes, so the events' mean over time is the anchor.
    torch.testing.assert_close(events.mean(1), output.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(anchor, output.pooler_output)


def _projector_inputs(n_tokens: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(n_tokens)
    return (
        torch.randn(1, n_tokens, 24, generator=generator),
        torch.randn(1, 8, generator=generator),
        torch.randn(1, 5, 32, generator=generator),
        torch.ones(1, 5),
    )


def _projector(**switches: bool) -> Projector:
    torch.manual_seed(0)
    config = EBranchformerConfig(hidden_size=32, n_heads=4, cgmlp_size=64, **switches)
    projector = Projector(config, stream_size=24, anchor_size=8).eval()
    for block in projector.blocks:  # the gate starts as a pass-through, which would hide mistakes
        torch.nn.init.normal_(block.cgmlp.conv.weight, std=0.3)
    return projector


@torch.no_grad()
def test_padding_in_a_batch_changes_nothing() -> None:
    """Training pads short clips to the longest of a batch; the runtime runs each alone."""
    projector = _projector()
    short, long = _projector_inputs(11), _projector_inputs(40)
    streams = torch.zeros(2, 40, 24)
    streams[0, :11], streams[1] = short[0][0], long[0][0]
    streams[0, 11:] = 7.0  # what a mask must hide
    token_mask = torch.zeros(2, 40, dtype=torch.bool)
    token_mask[0, :11] = token_mask[1] = True
    instruction = torch.cat((short[2], long[2]))
    batch = projector(
        streams, torch.cat((short[1], long[1])), instruction, torch.ones(2, 5), token_mask
    )
    for row, inputs in enumerate((short, long)):
        alone = projector(*inputs)
        n_tokens = inputs[0].shape[1]
        torch.testing.assert_close(
            batch.audio_embeds[row, :n_tokens], alone.audio_embeds[0], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            batch.intent_attention[row, :n_tokens], alone.intent_attention[0], rtol=1e-4, atol=1e-6
        )


@torch.no_grad()
def test_projector_reads_the_instruction_only_through_its_masked_mean() -> None:
    projector = _projector()
    streams, anchor, instruction, _ = _projector_inputs(20)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    mean = instruction[:, :3].mean(1, keepdim=True)
    masked = projector(streams, anchor, instruction, mask)
    averaged = projector(streams, anchor, mean, torch.ones(1, 1))
    torch.testing.assert_close(masked.audio_embeds, averaged.audio_embeds, rtol=1e-5, atol=1e-5)
    assert masked.intent_attention is not None
    assert masked.intent_attention.sum() == pytest.approx(1.0, abs=1e-5)


@torch.no_grad()
def test_semantic_gate_scales_by_a_half_to_one() -> None:
    inputs = _projector_inputs(20)
    gated = _projector()
    output = gated(*inputs)
    gate_layer, gated.gate = gated.gate, None
    ungated = gated(*inputs).audio_embeds
    assert gate_layer is not None and output.gate is not None
    expected = torch.sigmoid(inputs[1] @ gate_layer.proj.weight.T + gate_layer.proj.bias)
    torch.testing.assert_close(output.gate, expected)
    torch.testing.assert_close(output.audio_embeds, ungated * (0.5 * expected + 0.5)[:, None])


@torch.no_grad()
@pytest.mark.parametrize(
    ("intent", "gate"), [(False, False), (True, False), (False, True), (True, True)]
)
def test_ablations_ignore_what_they_leave_out(intent: bool, gate: bool) -> None:
    projector = _projector(intent_query=intent, semantic_gate=gate)
    streams, anchor, instruction, mask = _projector_inputs(20)
    base = projector(streams, anchor, instruction, mask).audio_embeds
    other_question = projector(streams, anchor, instruction + 1, mask).audio_embeds
    other_anchor = projector(streams, anchor + 1, instruction, mask).audio_embeds
    assert torch.equal(base, other_question) is not intent
    assert torch.equal(base, other_anchor) is not gate


def test_a_new_cgmlp_gate_passes_its_input_through() -> None:
    """Reference E-Branchformer: the gating convolution starts at about 0 with bias 1."""
    torch.manual_seed(0)
    config = EBranchformerConfig(hidden_size=32, n_heads=4, cgmlp_size=64)
    block = Projector(config, 24, 8).blocks[0]
    x = torch.randn(1, 30, 32)
    with torch.no_grad():
        found = block.cgmlp(x, None)
        half = torch.nn.functional.gelu(block.cgmlp.channel_proj1(x))[..., :32]
        expected = block.cgmlp.channel_proj2(half)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_components_do_not_depend_on_what_is_built_beside_them(model: TinyGiantALM) -> None:
    alone = build_component(NANO, "projector", 1)
    assert alone is not None
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, model.projector.state_dict()[name]), name


def test_greedy_with_and_without_cache_agree(model: TinyGiantALM, tokenizer_path: Path) -> None:
    rng = np.random.default_rng(0)
    audio = read_audio((rng.standard_normal(16_000).astype(np.float32) * 0.1, 16_000))
    tokenizer = Tokenizer.from_file(tokenizer_path)
    embeds = input_embeddings(model, encode_audio(model, audio), "What?", ["a", "b"], tokenizer)
    assert greedy(model, embeds, 12) == greedy(model, embeds, 12, use_cache=False)


def test_checkpoint_round_trip(model: TinyGiantALM, tokenizer_path: Path, tmp_path: Path) -> None:
    save(model, tmp_path / "c", tokenizer=tokenizer_path)
    again = load(tmp_path / "c")
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert again.decoder.lm_head.weight is again.decoder.model.embed_tokens.weight
    projector = load_component(tmp_path / "c", "projector")
    assert projector is not None
    assert torch.equal(
        projector.state_dict()["input_proj.weight"], model.projector.input_proj.weight
    )


def test_a_head_of_its_own_is_kept(tokenizer_path: Path, tmp_path: Path) -> None:
    """It was neither saved nor loaded, so a decoder came back with whatever memory held."""
    decoder = NANO.decoder | {"tie_word_embeddings": False}
    model = build(dataclasses.replace(NANO, decoder=decoder), 0)
    assert not torch.equal(model.decoder.lm_head.weight, model.decoder.model.embed_tokens.weight)
    save(model, tmp_path / "c", tokenizer=tokenizer_path)
    again = load(tmp_path / "c")
    assert torch.equal(model.decoder.lm_head.weight, again.decoder.lm_head.weight)
    weights = load_file(tmp_path / "c" / "model.safetensors")
    del weights["decoder.lm_head.weight"]
    save_file(weights, tmp_path / "c" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing decoder\.lm_head\.weight"):
        load(tmp_path / "c")


def test_a_head_that_differs_from_the_table_it_is_tied_to_is_refused(
    model: TinyGiantALM, tokenizer_path: Path, tmp_path: Path
) -> None:
    save(model, tmp_path / "c", tokenizer=tokenizer_path)
    file = tmp_path / "c" / "model.safetensors"
    weights = load_file(file)
    head = weights["decoder.model.embed_tokens.weight"].clone()
    save_file(weights | {"decoder.lm_head.weight": head}, file)
    load(tmp_path / "c")
    head[3, 2] += 0.5
    save_file(weights | {"decoder.lm_head.weight": head}, file)
    with pytest.raises(CheckpointError, match=r"decoder\.lm_head\.weight is not decoder\.model"):
        load(tmp_path / "c")


def test_every_tensor_that_does_not_fit_is_named_at_once(
    model: TinyGiantALM, tokenizer_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "c"
    save(model, folder, tokenizer=tokenizer_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["projector.input_proj.bias"]
    tensors["whisper.layer_norm.weight"] = torch.ones(3)
    tensors["decoder.model.norm.weight"][0] = float("nan")
    tensors["surplus"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "4 problems with its tensors" in message and "\n" not in message
    for part in (
        "missing projector.input_proj.bias",
        "unknown surplus",
        "whisper.layer_norm.weight has shape (3,), expected (160,)",
        "decoder.model.norm.weight holds NaN",
    ):
        assert part in message


def test_config_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    NANO.save(path)
    assert TinyGiantConfig.load(path) == NANO
    path.write_text(path.read_text().replace('"name"', '"nome"'))
    with pytest.raises(CheckpointError, match=r"unknown fields \['nome'\]"):
        TinyGiantConfig.load(path)
    path.write_text("not json")
    with pytest.raises(CheckpointError, match="not a readable"):
        TinyGiantConfig.load(path)


def test_projector_and_decoder_must_agree() -> None:
    wrong = dataclasses.replace(NANO.projector, hidden_size=64)
    with pytest.raises(ValueError, match="the projector gives 64 features, the decoder takes 192"):
        _ = dataclasses.replace(NANO, projector=wrong).runtime
