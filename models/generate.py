"""Reference greedy generation in PyTorch, which the runtime must reproduce token for token."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tinygiant.runtime.audio import Audio
from tinygiant.runtime.preprocess import preprocess
from tinygiant.runtime.prompt import build_prompt
from tinygiant.runtime.tokenizer import Tokenizer

from .tinygiant import TinyGiantALM

__all__ = ["encode_audio", "greedy", "greedy_tokens", "input_embeddings"]


def encode_audio(model: TinyGiantALM, audio: Audio) -> list[tuple[Tensor, Tensor]]:
    """Encoder outputs of every chunk: rows ``(1, N, stream_size)``, anchor ``(1, anchor_size)``."""
    return [model.encode_chunk(chunk) for chunk in preprocess(audio, model.config.runtime)]


@torch.no_grad()
def input_embeddings(
    model: TinyGiantALM,
    encoded: Sequence[tuple[Tensor, Tensor]],
    question: str,
    choices: Sequence[str] | None,
    tokenizer: Tokenizer,
) -> Tensor:
    """The decoder's input for one question, ``(1, T, D)``: prefix, audio rows, suffix."""
    prompt = build_prompt(question, choices, tokenizer, model.config.runtime.prompt)
    prefix, suffix, instruction = (
        model.embed_tokens(torch.tensor([ids]))
        for ids in (prompt.prefix_ids, prompt.suffix_ids, prompt.instruction_ids)
    )
    mask = torch.ones(instruction.shape[:2])
    audio = [
        model.projector(streams, anchor, instruction, mask).audio_embeds
        for streams, anchor in encoded
    ]
    return torch.cat((prefix, *audio, suffix), dim=1)


@torch.no_grad()
def greedy(
    model: TinyGiantALM, embeds: Tensor, max_new_tokens: int, *, use_cache: bool = True
) -> list[int]:
    """The most likely token at every step, until an end token (left out) or the limit.

    Args:
        model: in evaluation mode.
        embeds: ``(1, T, D)`` from :func:`input_embeddings`.
        max_new_tokens: the limit.
        use_cache: False recomputes the whole sequence each step, the definition itself.
    """
    return greedy_tokens(
        model.decoder, embeds, max_new_tokens, model.config.eos_token_ids, use_cache=use_cache
    )


@torch.no_grad()
def greedy_tokens(
    decoder: nn.Module,
    embeds: Tensor,
    max_new_tokens: int,
    stop_ids: Collection[int],
    *,
    use_cache: bool = True,
) -> list[int]:
    """:func:`greedy` of any causal language model of transformers."""
    lookup = cast(PreTrainedModel, decoder).get_input_embeddings()
    ids: list[int] = []
    cache = DynamicCache() if use_cache else None
    sequence = step_input = embeds
    while len(ids) < max_new_tokens:
        output = decoder(
            inputs_embeds=step_input if use_cache else sequence,
            past_key_values=cache,
            use_cache=use_cache,
            logits_to_keep=1,
        )
        token = int(output.logits[0, -1].argmax())
        if token in stop_ids:
            break
        ids.append(token)
        step_input = lookup(torch.tensor([[token]]))
        sequence = torch.cat((sequence, step_input), dim=1)
    return ids
