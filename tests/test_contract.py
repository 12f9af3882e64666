"""The contract grows without breaking what exists: the rule, and today's files under it.

The story: one new field with a default (``qk_norm: bool = True`` in the decoder's configuration)
made the bundle that ships with the runtime unreadable, and every checkpoint with it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tinygiant.runtime import bundle as b
from tinygiant.runtime import config as c
from tinygiant.runtime.errors import BundleError, CheckpointError

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class _Inner:
    size: int
    norm: bool = True


@dataclass(frozen=True)
class _Outer:
    inner: _Inner
    names: tuple[str, ...] = ("a",)
    notes: dict[str, str] = field(default_factory=dict)


def test_a_missing_field_takes_its_default_at_every_depth() -> None:
    assert c.config_from_dict(_Outer, {"inner": {"size": 3}}) == _Outer(_Inner(3))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"size": 3, "bias": False}}, r"config\.inner: unknown fields \['bias'\]"),
        ({"inner": {}}, r"config\.inner: .*missing fields \['size'\]"),
        ({}, r"config: .*missing fields \['inner'\]"),
        ({"inner": {"size": "3"}}, r"config\.inner\.size: expected"),
        ({"inner": {"size": 3}, "notes": {"a": 1}}, r"config\.notes\.a: expected"),
    ],
)
def test_unknown_mistyped_and_required_fields_are_refused(data: Any, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        c.config_from_dict(_Outer, data)


def test_todays_bundle_opens_after_the_decoder_gets_a_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = b.default_bundle_path()
    grown = dataclasses.make_dataclass(
        "DecoderConfig",
        [("another_flag", bool, field(default=True))],
        bases=(c.DecoderConfig,),
        frozen=True,
    )
    grown.__module__ = c.__name__
    monkeypatch.setattr(c, "DecoderConfig", grown)
    opened = b.Bundle.open(before)
    decoder: Any = opened.config.decoder
    assert type(decoder) is grown
    assert decoder.another_flag is True
    assert (decoder.hidden_size, decoder.n_layers) == (192, 4)


def test_todays_bundle_opens_after_the_manifest_gets_a_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grown = dataclasses.make_dataclass(
        "Manifest",
        [("languages", "tuple[str, ...]", field(default=("en",)))],
        bases=(b.Manifest,),
        frozen=True,
    )
    grown.__module__ = b.__name__
    monkeypatch.setattr(b, "Manifest", grown)
    opened: Any = b.Bundle.open(b.default_bundle_path()).manifest
    assert opened.languages == ("en",)
    assert opened.model.name == "tinygiant-nano"


def test_checkpoints_follow_the_same_rule(tmp_path: Path) -> None:
    from tinygiant.models.config import TinyGiantConfig

    written = ROOT / "checkpoints" / "nano" / "config.json"
    data = json.loads(written.read_text())
    path = tmp_path / "config.json"

    for name in ("clip_margin_s", "anchor_features"):  # as if they had not existed then
        del data[name]
    del data["prompt"]["choice_prefix"]
    path.write_text(json.dumps(data))
    assert TinyGiantConfig.load(path) == TinyGiantConfig.load(written)

    path.write_text(json.dumps(data | {"from_the_future": 1}))
    with pytest.raises(CheckpointError, match=r"unknown fields \['from_the_future'\]"):
        TinyGiantConfig.load(path)

    del data["eos_token_ids"]
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"missing fields \['eos_token_ids'\]"):
        TinyGiantConfig.load(path)
