"""Bundles of format 1 keep opening: what their manifest says, and what it left to the code."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tinygiant.models.config import EBranchformerConfig, TinyGiantConfig, preset
from tinygiant.runtime import bundle as b
from tinygiant.runtime import format1
from tinygiant.runtime.config import ModelConfig, Scope, config_from_dict, config_to_dict
from tinygiant.runtime.errors import BundleError

ROOT = Path(__file__).resolve().parents[1]
# A manifest of format 1 as it was written: nano's, of commit c8d6d8e.
NANO: dict[str, Any] = {
    "audio_context": "clip",
    "clip_margin_s": 1.0,
    "decoder": {
        "eos_token_ids": [2, 0], "ffn_size": 576, "head_dim": 64, "hidden_size": 192,
        "max_positions": 4096, "n_heads": 4, "n_kv_heads": 2, "n_layers": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0, "think_end_token_id": 4, "vocab_size": 1024,
    },
    "event": {
        "anchor_size": 192, "hidden_size": 192, "shared_tower": True, "steps_per_window": 32,
    },
    "name": "tinygiant-nano",
    "projector": {
        "cgmlp_size": 384, "hidden_size": 192, "intent_query": True, "kernel_size": 17,
        "n_heads": 4, "n_layers": 2, "semantic_gate": True,
    },
    "prompt": {
        "audio_marker": "<audio>", "choice_prefix": "- ", "choices_header": "Choices:",
        "system": "Listen, think, then answer.",
    },
    "temporal": {"frames_per_step": 2, "hidden_size": 160},
    "tokens_per_chunk": 300,
}  # fmt: skip


def upgraded(model: Any) -> ModelConfig:
    return config_from_dict(ModelConfig, format1.upgrade(model, where="model"))


def test_nano_is_the_model_that_its_checkpoint_describes() -> None:
    """Two descriptions, one frozen in the reader, one that the exporter writes today."""
    checkpoint = TinyGiantConfig.load(ROOT / "checkpoints" / "nano" / "config.json")
    found = upgraded(NANO)
    assert found == dataclasses.replace(checkpoint.runtime, scope=found.scope)


def test_models_that_hear_clips_alone_were_trained_on_one_world() -> None:
    """The format had no field for it: clips of 3 to 8 s, questions with choices, in English."""
    assert upgraded(NANO).scope == Scope(3.0, 8.0, ("choices",), ("en",))
    assert upgraded(NANO | {"audio_context": "full"}).scope == Scope()


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ({}, preset("full")),
        ({"event": {"shared_tower": True, "anchor_size": 768}},
         dataclasses.replace(preset("full"), clap=None)),
        ({"projector": {"semantic_gate": False, "intent_query": False}},
         dataclasses.replace(preset("full"), projector=EBranchformerConfig(
             semantic_gate=False, intent_query=False))),
    ],
    ids=["two towers", "shared tower", "ablated"],
)  # fmt: skip
def test_what_a_manifest_left_out_was_the_full_model(
    model: dict[str, Any], config: TinyGiantConfig
) -> None:
    assert upgraded(model) == config.runtime


def test_a_bundle_of_format_1_opens_and_is_written_as_2(bundle_copy: Path) -> None:
    path = bundle_copy / b.MANIFEST_NAME
    data = json.loads(path.read_text())
    assert data["format_version"] == 2
    path.write_text(json.dumps(data | {"format_version": 1, "model": NANO}))
    manifest = b.Bundle.open(bundle_copy).manifest
    assert manifest.model == upgraded(NANO)
    written = json.loads(manifest.to_json())
    assert written["format_version"] == 2
    assert written["model"] == json.loads(json.dumps(config_to_dict(manifest.model)))
    assert b.Manifest.from_dict(written) == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tempo": 3}, r"manifest\.model: unknown fields \['tempo'\]"),
        ({"event": {"hidden_size": "192"}}, r"manifest\.model\.event\.hidden_size: expected"),
        ({"tokens_per_chunk": 0}, "rows_per_chunk is 0"),
        ({"tokens_per_chunk": 7}, "7 audio rows do not divide"),
    ],
)
def test_a_bad_manifest_of_format_1_is_refused(
    bundle_copy: Path, change: dict[str, Any], message: str
) -> None:
    path = bundle_copy / b.MANIFEST_NAME
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"format_version": 1, "model": NANO | change}))
    with pytest.raises(BundleError, match=message):
        b.Bundle.open(bundle_copy)
