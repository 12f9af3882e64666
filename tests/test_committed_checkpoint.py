"""The committed checkpoint through today's PyTorch code writes what the committed bundle writes.

A change of the reference model that the exporter follows would pass every comparison between the
two: here the bundle is of the day on which it was made.
"""

from __future__ import annotations

import threading
from pathlib import Path

from tinygiant.models.checkpoint import load as load_checkpoint
from tinygiant.models.generate import encode_audio, greedy, input_embeddings
from tinygiant.runtime import Answer, load, read_audio
from tinygiant.runtime.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "nano"
CLIP = ROOT / "examples" / "tiger-and-birds.flac"
QUESTION = "How many times is the bird chirp heard?"
CHOICES = ["1", "3", "2"]


def test_todays_pytorch_code_gives_the_bundle_s_text() -> None:
    model = load_checkpoint(CHECKPOINT)
    tokenizer = Tokenizer.from_file(CHECKPOINT / "tokenizer.json")
    encoded = encode_audio(model, read_audio(CLIP))
    embeds = input_embeddings(model, encoded, QUESTION, CHOICES, tokenizer)
    ids = greedy(model, embeds, 200)
    thought = tokenizer.decode(ids).partition("</think>")[0]
    # With choices the runtime writes the thought freely, and then one of them.
    found = load(threads=1).ask(CLIP, QUESTION, CHOICES)
    assert found.raw_text.partition("</think>")[0] == thought
    assert "tiger" in thought and found.text == "3"


def test_two_threads_may_load_and_ask() -> None:
    """Each its own model at the same time: nothing that loading sets up is shared by accident."""
    answers: dict[int, Answer] = {}

    def ask(number: int) -> None:
        answers[number] = load(threads=1).ask(CLIP, QUESTION, CHOICES)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = load(threads=1).ask(CLIP, QUESTION, CHOICES)
    assert [answers[n].raw_text for n in range(2)] == [alone.raw_text] * 2
