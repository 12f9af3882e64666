"""Small checkpoints in the public models' file format, with weights that show every mistake."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tokenizers
import torch
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as Sequence_
from torch import Tensor
from transformers import ClapAudioConfig, LlamaConfig

from tinygiant.models.ced import CedConfig
from tinygiant.models.mellow import MELLOW, Mellow, MellowConfig
from tinygiant.models.mizar import MIZAR, Mizar, MizarConfig
from tinygiant.models.public import PublicModel

VOCABULARY = 300


def small_llama() -> LlamaConfig:
    """The decoder's proportions: an odd group of three query heads to a key/value head, tied."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=1_024,
        rms_norm_eps=1e-5,
        rope_theta=100_000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )


def small_mizar() -> MizarConfig:
    return MizarConfig(
        ced=CedConfig(hidden_size=48, n_layers=2, n_heads=3, ffn_size=64),
        decoder=small_llama(),
        max_rows=160,
    )


def small_mellow() -> MellowConfig:
    htsat = ClapAudioConfig(
        patch_embeds_hidden_size=8, hidden_size=64, depths=[2, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 2],
    )  # fmt: skip
    return MellowConfig(htsat=htsat, decoder=small_llama(), n_classes=21)


def state_of(model: PublicModel, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint of ``model``'s sizes, in the public naming; constants have their true values."""
    generator = torch.Generator().manual_seed(seed)
    constants = {name: ours for name, (_, ours) in model.constants().items()}
    state = {}
    for name, tensor in model.state_dict().items():
        if name in constants:
            state[name] = torch.from_numpy(np.array(constants[name], dtype=np.float32))
        elif not tensor.dtype.is_floating_point:
            state[name] = tensor
        else:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_mean"):
                state[name] = 4.0 * noise - 30.0
            elif name.endswith("running_var"):
                state[name] = 200.0 * torch.exp(0.2 * noise)
            elif tensor.dim() == 1 and name.endswith("weight"):
                state[name] = 1.0 + 0.2 * noise
            elif tensor.dim() == 1:
                state[name] = 0.1 * noise
            else:
                state[name] = 1.5 * noise / tensor[0].numel() ** 0.5
    state["caption_decoder.lm.lm_head.weight"] = state[
        "caption_decoder.lm.model.embed_tokens.weight"
    ]
    return published_names(state) if isinstance(model, Mellow) else state


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """HTS-AT as its authors name it: one fused qkv, the shifted windows' masks in the file."""
    base = "audio_encoder.base.htsat."
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name.replace(f"{base}tower.", base).replace("batch_norm.", "bn0.")
        new = new.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
        new = new.replace("attention.self.relative", "attn.relative")
        new = new.replace("attention.output.dense", "attn.proj")
        new = new.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        if fused := re.fullmatch(r"(.*)attention\.self\.query\.(weight|bias)", new):
            parts = [
                state[name.replace("self.query", f"self.{part}")]
                for part in ("query", "key", "value")
            ]
            out[f"{fused[1]}attn.qkv.{fused[2]}"] = torch.cat(parts)
        elif not re.search(r"attention\.self\.(key|value)\.", new):
            out[new] = tensor
        if new.endswith("relative_position_index"):
            layer, block = map(int, re.findall(r"layers\.(\d+)\.blocks\.(\d+)", new)[0])
            side = 64 // 2**layer
            if block % 2 and side > 8:
                mask = torch.zeros((side // 8) ** 2, 64, 64, device=tensor.device)
                out[new.replace("attn.relative_position_index", "attn_mask")] = mask
    return out


KINDS = {
    "mizar": dataclasses.replace(MIZAR, build=lambda: Mizar(small_mizar()), probe=None),
    "mellow": dataclasses.replace(MELLOW, build=lambda: Mellow(small_mellow()), probe=None),
}
"""The models at a size for tests."""


def small_tokenizer(added: Sequence[str] = ()) -> str:
    """A tokenizer of SmolLM2's kind: 17 control tokens, then bytes, digits one by one, no NFC.

    As SmolLM2's, it has no tokens for bytes that its texts never held.
    """
    control = ["<|endoftext|>", *(f"<control-{index}>" for index in range(1, 17))]
    rare = {*"ĄÀÁñõÿ"}  # the bytes 04 C0 C1 F1 F5 FF, as byte-level BPE spells them
    alphabet = sorted({*ByteLevel.alphabet()} - rare)
    vocabulary = {token: index for index, token in enumerate([*control, *alphabet, *added])}
    while len(vocabulary) < VOCABULARY:
        vocabulary[f"unused{len(vocabulary)}"] = len(vocabulary)
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = Sequence_([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(control)
    return str(tokenizer.to_str())
