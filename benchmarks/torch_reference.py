"""The PyTorch model answering the same questions by the same procedure as the runtime.

It thinks greedily until it closes the thought, ends its text or has spent its tokens; the thought
is then closed and the answer decoded along the choices' trie (``tinygiant.runtime.choices``). Items
can be thought about in batches, which a CPU does several times faster: prompts are padded on the
left, and each item's part of the KV cache is cut out for its answer. Needs torch.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from benchmarks.answering import Question, Reply, thought_of
from benchmarks.predictions import file_sha256
from tinygiant.models.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE, load
from tinygiant.models.generate import encode_audio
from tinygiant.runtime.audio import read_audio
from tinygiant.runtime.choices import ChoiceTrie
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.prompt import build_prompt
from tinygiant.runtime.tokenizer import Tokenizer

__all__ = ["TorchReference"]

_T = TypeVar("_T")


class TorchReference:
    """A checkpoint, ready for questions; an :class:`~benchmarks.answering.Answerer`."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        max_new_tokens: int,
        batch_size: int = 1,
        device: str = "cpu",
    ) -> None:
        """Load ``checkpoint``.

        Args:
            checkpoint: the folder.
            max_new_tokens: bound of the thought.
            batch_size: questions thought about together.
            device: of torch.
        """
        self.batch_size = batch_size
        self._model = load(checkpoint).to(torch.device(device))
        self._runtime = self._model.config.runtime
        self._device = torch.device(device)
        self._tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER_FILE)
        self._max_new_tokens = max_new_tokens
        self._heard: tuple[Path, list[tuple[Tensor, Tensor]]] | None = None
        projector = self._model.config.projector
        self.about: dict[str, Any] = {
            "kind": "torch",
            "name": self._model.config.name,
            "recipe": "torch-fp32",
            "checkpoint_sha256": file_sha256(checkpoint / WEIGHTS_FILE),
            "intent_query": projector.intent_query,
            "semantic_gate": projector.semantic_gate,
            "size_bytes": (checkpoint / WEIGHTS_FILE).stat().st_size,
        }
        self.identity = str(self.about["checkpoint_sha256"])

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Answer a batch of questions with choices.

        Raises:
            UsageError: a question is open.
        """
        if any(question.open for question in questions):
            raise UsageError("questions without choices are answered by bundles: leave out --torch")
        form, stop_id = self._runtime.answer, self._runtime.decoder.stop_token_ids[0]
        tries = [
            ChoiceTrie.of_choices(q.choices, self._tokenizer, form, stop_id) for q in questions
        ]
        thoughts, caches = self._think([self._embeds(q) for q in questions])
        replies = []
        for question, trie, thought, cache in zip(questions, tries, thoughts, caches, strict=True):
            read = functools.partial(self._read, cache)
            choice = _result(trie.decode(read, [self._model.config.think_end_token_id]))
            text = thought_of(self._tokenizer.decode(thought))
            replies.append(Reply(question.choices[choice], text))
        return replies

    def _embeds(self, question: Question) -> Tensor:
        """The decoder's input, ``(T, D)``."""
        model = self._model
        prompt = build_prompt(
            question.question, question.choices, self._tokenizer, self._runtime.prompt
        )
        prefix, suffix, instruction = (
            self._embed(ids)
            for ids in (prompt.prefix_ids, prompt.suffix_ids, prompt.instruction_ids)
        )
        mask = torch.ones(instruction.shape[:2], device=self._device)
        audio = [
            model.projector(streams, anchor, instruction, mask).audio_embeds
            for streams, anchor in self._listen(question.audio)
        ]
        return torch.cat((prefix, *audio, suffix), dim=1)[0]

    def _listen(self, path: Path) -> list[tuple[Tensor, Tensor]]:
        """Streams and anchor of every chunk; questions about one clip mostly follow one another."""
        if self._heard is None or self._heard[0] != path:
            self._heard = (path, encode_audio(self._model, read_audio(path)))
        return self._heard[1]

    def _think(self, embeds: Sequence[Tensor]) -> tuple[list[list[int]], list[DynamicCache]]:
        """Greedy tokens of every thought, and the KV cache of each prompt and thought."""
        config = self._model.config
        ends = {*config.eos_token_ids, config.think_end_token_id}
        length = max(len(one) for one in embeds)
        padding = [length - len(one) for one in embeds]
        mask = torch.ones(len(embeds), length, dtype=torch.long, device=self._device)
        step = torch.zeros(len(embeds), length, embeds[0].shape[1], device=self._device)
        for row, (one, skipped) in enumerate(zip(embeds, padding, strict=True)):
            mask[row, :skipped] = 0
            step[row, skipped:] = one
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache()
        thoughts: list[list[int]] = [[] for _ in embeds]
        thinking = set(range(len(embeds)))
        for _ in range(self._max_new_tokens):
            tokens = self._forward(step, cache, mask, positions).argmax(-1).tolist()
            thinking -= {row for row in thinking if tokens[row] in ends}
            if not thinking:
                break
            for row in thinking:
                thoughts[row].append(tokens[row])
            step = self._model.embed_tokens(torch.tensor(tokens, device=self._device)[:, None])
            mask = torch.cat((mask, mask.new_ones(len(embeds), 1)), dim=1)
            positions = positions[:, -1:] + 1
        else:
            self._forward(step, cache, mask, positions)  # the last tokens of a spent budget
        return thoughts, [
            _cut(cache, row, padding[row], length + len(thought))
            for row, thought in enumerate(thoughts)
        ]

    def _read(self, cache: DynamicCache, ids: Sequence[int]) -> NDArray[np.float32]:
        logits = self._forward(self._embed(ids), cache)[0]
        return logits.float().cpu().numpy()

    def _forward(
        self,
        embeds: Tensor,
        cache: DynamicCache,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits ``(B, V)`` after the last of the new positions."""
        output = self._model.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _embed(self, ids: Sequence[int]) -> Tensor:
        return self._model.embed_tokens(torch.tensor([list(ids)], device=self._device))


def _cut(cache: DynamicCache, row: int, start: int, stop: int) -> DynamicCache:
    """One item's positions of a batch's cache."""
    own = DynamicCache()
    for index, layer in enumerate(cache.layers):
        part = (slice(row, row + 1), slice(None), slice(start, stop))
        assert layer.keys is not None and layer.values is not None  # it has been run
        own.update(layer.keys[part], layer.values[part], index)
    return own


def _result(tokens: Generator[int, None, _T]) -> _T:
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            result: _T = end.value
            return result
