"""Putting a TinyGiantALM together from public checkpoints on disk.

Reads the published forms:

- Whisper: a Hugging Face folder (``WhisperForConditionalGeneration`` or ``WhisperModel``); its
  encoder is used.
- HTS-AT and CLAP: a Hugging Face CLAP folder (``ClapModel`` or ``ClapAudioModel[WithProjection]``);
  its audio tower is used. HTS-AT may also be an original Lightning ``.ckpt`` (32 kHz).
- Qwen3: a Hugging Face folder with ``tokenizer.json``.
- The projector: a safetensors file with this project's tensor names, or none, for training.

Nothing is downloaded. All parts that do not fit are named at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import ClapAudioConfig, Qwen3Config, WhisperConfig

from tinygiant.runtime.config import AudioContext, config_from_dict
from tinygiant.runtime.errors import BundleError, CheckpointError

from .config import EBranchformerConfig, TinyGiantConfig, preset, upstream_fields
from .features import ClapFeatures
from .tensors import PrefixedTensors, load_into, open_tensors, read_json, undrawn_weights
from .tinygiant import COMPONENTS, TinyGiantALM, build_component

__all__ = [
    "PROJECTOR_CONFIG_KEY",
    "Parts",
    "assemble",
    "config_fields",
    "load_part",
    "parts_config",
]

# Where a projector file keeps its configuration: the header's metadata, as JSON.
PROJECTOR_CONFIG_KEY = "projector_config"

# What an original HTS-AT checkpoint holds besides the tower: the waveform front end (the features
# are computed outside the model) and the AudioSet classification heads.
_HTSAT_DROPPED = (
    "tscam_conv.",
    "head.",
    "spectrogram_extractor.",
    "logmel_extractor.",
)
_HTSAT_FEATURES = ClapFeatures(sampling_rate_hz=32_000, hop_length=320)


@dataclass(frozen=True)
class Parts:
    """Paths of the public checkpoints; ``clap = None`` lets HTS-AT's tower give the anchor too.

    ``audio_context`` is how the projector was, or is to be, trained to see short clips.
    """

    whisper: Path
    htsat: Path
    qwen3: Path
    clap: Path | None = None
    projector: Path | None = None
    audio_context: AudioContext = "full"


def parts_config(parts: Parts) -> TinyGiantConfig:
    """The configuration of the parts together; values that they leave open are the full preset's.

    Raises:
        CheckpointError: a part is not what it should be, or the parts do not fit together.
    """
    full = preset("full")
    htsat, event_features = _tower_config(parts.htsat)
    clap, anchor_features = (None, event_features)
    if parts.clap is not None:
        clap, anchor_features = _tower_config(parts.clap)
    qwen3 = Qwen3Config(**config_fields(parts.qwen3, "qwen3"))
    tokenizer = read_json(parts.qwen3 / "tokenizer.json")
    ids = {
        token["content"]: token["id"]
        for token in tokenizer.get("added_tokens", [])
        if isinstance(token, dict)
    }
    wanted = ("<|im_end|>", "<|endoftext|>", "</think>")
    if missing := [token for token in wanted if token not in ids]:
        raise CheckpointError(
            f"{parts.qwen3}/tokenizer.json: no control tokens {', '.join(missing)}; "
            "a Qwen3 tokenizer is expected"
        )
    projector = dataclasses.replace(full.projector, hidden_size=qwen3.hidden_size)
    if parts.projector is not None:
        projector = _projector_config(parts.projector)
    config = dataclasses.replace(
        full,
        name=f"tinygiant-{parts.qwen3.resolve().name}",
        whisper=upstream_fields(WhisperConfig(**config_fields(parts.whisper, "whisper"))),
        htsat=upstream_fields(htsat),
        clap=None if clap is None else upstream_fields(clap),
        decoder=upstream_fields(qwen3),
        projector=projector,
        eos_token_ids=(ids["<|im_end|>"], ids["<|endoftext|>"]),
        think_end_token_id=ids["</think>"],
        audio_context=parts.audio_context,
        event_features=event_features,
        anchor_features=anchor_features,
    )
    try:
        config.runtime  # noqa: B018  (checks that the sizes fit together)
    except BundleError as error:
        raise CheckpointError(f"the parts do not fit together: {error}") from error
    return config


def load_part(parts: Parts, config: TinyGiantConfig, name: str, *, seed: int) -> nn.Module | None:
    """One component, in evaluation mode, without touching the other checkpoints.

    Args:
        parts: where the checkpoints are.
        config: :func:`parts_config` of them.
        name: a key of :data:`~tinygiant.models.tinygiant.COMPONENTS`.
        seed: of the projector's weights if there is no projector file.

    Raises:
        CheckpointError: tensors that do not fit, all named.
    """
    path = getattr(parts, "qwen3" if name == "decoder" else name)
    if name == "projector" and path is None:
        return build_component(config, name, seed)
    with undrawn_weights():
        module = COMPONENTS[name](config)
    if module is None:
        return None
    tensors = open_tensors(path)
    if name == "whisper":
        tensors = _part_of(tensors, ("model.encoder.", "encoder."), path, "a Whisper encoder")
    elif name in ("htsat", "clap"):
        tensors = _tower_tensors(tensors, path)
    load_into(module, tensors, where=f"{path} ({name})")
    return module.eval()


def assemble(parts: Parts, *, seed: int = 0) -> TinyGiantALM:
    """The whole model from its parts, in evaluation mode.

    Raises:
        CheckpointError: naming every part that does not fit, and what is wrong with it.
    """
    config = parts_config(parts)
    with undrawn_weights():
        model = TinyGiantALM(config)
    problems = []
    for name in COMPONENTS:
        try:
            setattr(model, name, load_part(parts, config, name, seed=seed))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(" | ".join(problems))
    return model.eval()


def htsat_to_clap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an original HTS-AT state dict to transformers' ``ClapAudioEncoder``.

    ``tensors`` are named as in the Lightning checkpoint, without ``sed_model.``. The fused
    ``attn.qkv`` is split into query, key and value.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(_HTSAT_DROPPED) or name.endswith("attn_mask"):
            continue
        new = name.replace("bn0.", "batch_norm.")
        new = new.replace("attn.relative_position", "attention.self.relative_position")
        new = new.replace("attn.proj.", "attention.output.dense.")
        new = new.replace("mlp.fc1.", "intermediate.dense.").replace("mlp.fc2.", "output.dense.")
        new = re.sub(r"(blocks\.\d+)\.norm1\.", r"\1.layernorm_before.", new)
        new = re.sub(r"(blocks\.\d+)\.norm2\.", r"\1.layernorm_after.", new)
        if ".attn.qkv." in new:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[new.replace("attn.qkv", f"attention.self.{part}")] = piece
        else:
            renamed[new] = tensor
    return renamed


def htsat_config(tensors: Mapping[str, Tensor], where: str) -> ClapAudioConfig:
    """The tower's configuration, read off the shapes of an original HTS-AT state dict.

    Raises:
        CheckpointError: it is not an HTS-AT.
    """
    try:
        patch = tensors["patch_embed.proj.weight"]
        depths: list[int] = []
        heads: list[int] = []
        while f"layers.{len(depths)}.blocks.0.norm1.weight" in tensors:
            stage = f"layers.{len(depths)}.blocks"
            heads.append(tensors[f"{stage}.0.attn.relative_position_bias_table"].shape[1])
            depth = 0
            while f"{stage}.{depth}.norm1.weight" in tensors:
                depth += 1
            depths.append(depth)
        table = tensors["layers.0.blocks.0.attn.relative_position_bias_table"]
        n_mels = tensors["bn0.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{where}: no tensor {error} in it; an HTS-AT checkpoint is expected"
        ) from error
    embed = patch.shape[0]
    return ClapAudioConfig(
        patch_embeds_hidden_size=embed,
        depths=depths,
        num_attention_heads=heads,
        hidden_size=embed * 2 ** (len(depths) - 1),
        num_mel_bins=n_mels,
        patch_size=patch.shape[2],
        patch_stride=[patch.shape[2], patch.shape[2]],
        window_size=(round(table.shape[0] ** 0.5) + 1) // 2,
    )


def _tower_config(path: Path) -> tuple[ClapAudioConfig, ClapFeatures]:
    if path.is_file() and not (path.parent / "config.json").is_file():
        tensors = PrefixedTensors(open_tensors(path), "sed_model.")
        return htsat_config(tensors, str(path)), _HTSAT_FEATURES
    folder = path if path.is_dir() else path.parent
    fields = config_fields(folder, "clap", "clap_audio_model")
    config = ClapAudioConfig(**fields.get("audio_config", fields))
    if config.enable_fusion:
        raise CheckpointError(
            f"{folder}: a fusion CLAP, whose features are not supported; use an unfused one "
            "(laion/clap-htsat-unfused, laion/larger_clap_general)"
        )
    return config, ClapFeatures()


def _tower_tensors(tensors: Mapping[str, Tensor], path: Path) -> Mapping[str, Tensor]:
    if any(name.startswith("sed_model.") for name in tensors):
        return htsat_to_clap(PrefixedTensors(tensors, "sed_model."))
    return _part_of(
        tensors, ("audio_model.audio_encoder.", "audio_encoder."), path, "a CLAP audio tower"
    )


def _part_of(
    tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], path: Path, what: str
) -> Mapping[str, Tensor]:
    for prefix in prefixes:
        part = PrefixedTensors(tensors, prefix)
        if part:
            return part
    some = ", ".join(sorted(tensors)[:3])
    raise CheckpointError(
        f"{path}: {what} is expected, with tensors named {prefixes[0]}*; found {some} ..."
    )


def config_fields(folder: Path, *model_types: str) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        CheckpointError: there is none, or it is of none of ``model_types``.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a Hugging Face checkpoint")
    fields = read_json(folder / "config.json")
    found = fields.get("model_type")
    if found not in model_types:
        raise CheckpointError(f"{folder}: model_type is {found!r}, expected {model_types[0]!r}")
    return fields


def _projector_config(path: Path) -> EBranchformerConfig:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return config_from_dict(
            EBranchformerConfig, json.loads(metadata[PROJECTOR_CONFIG_KEY]), where=str(path)
        )
    except KeyError as error:
        raise CheckpointError(
            f"{path}: no {PROJECTOR_CONFIG_KEY!r} in the file's metadata; save it with tg-train"
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable projector file ({error})") from error
