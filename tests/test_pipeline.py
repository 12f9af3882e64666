"""From audio to answer: against the PyTorch model, and what a caller can rely on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tinygiant.models.generate import encode_audio, greedy, input_embeddings
from tinygiant.models.tinygiant import TinyGiantALM
from tinygiant.runtime import (
    Answer,
    AudioError,
    AudioRead,
    AudioTooLongError,
    BundleError,
    Finished,
    PromptRead,
    QuestionError,
    StreamsReady,
    TextPiece,
    TinyGiant,
    UsageError,
    load,
    read_audio,
)
from tinygiant.runtime import bundle as b
from tinygiant.runtime.answer import AnswerParser
from tinygiant.runtime.tokenizer import Tokenizer

Tone = Callable[[float, int], NDArray[np.float32]]

QUESTIONS = ("What is heard?", "Which sound comes first, the bell or the siren?", "Wer spricht?")
CHOICES = ["a dog", "a dog barks", "a siren", "the bell rings"]


def without_times(answer: Answer) -> Answer:
    """An answer without what may differ from run to run: times, and what was drafted."""
    fields = [field.name for field in dataclasses.fields(answer.timings)]
    return dataclasses.replace(
        answer,
        timings=dataclasses.replace(answer.timings, **dict.fromkeys(fields, 0)),
        tokens=dataclasses.replace(answer.tokens, drafted=0, accepted=0),
    )


@pytest.mark.parametrize("seconds", [0.3, 4.0, 31.5])
@pytest.mark.parametrize("choices", [None, CHOICES], ids=["open", "choices"])
def test_greedy_tokens_equal_pytorch(
    tiny: TinyGiant,
    tiny_model: TinyGiantALM,
    tokenizer: Tokenizer,
    tone: Tone,
    seconds: float,
    choices: list[str] | None,
) -> None:
    audio = read_audio((tone(seconds, 22_050), 22_050))
    encoded = encode_audio(tiny_model, audio)
    for question in QUESTIONS:
        embeds = input_embeddings(tiny_model, encoded, question, choices, tokenizer)
        tokens = greedy(tiny_model, embeds, 24)
        answer = tiny.ask(audio, question, choices, max_new_tokens=24, raw=True)
        text = tokenizer.decode(tokens)
        assert answer.tokens.prompt == embeds.shape[1]
        if choices is None:
            assert answer.raw_text == text
            assert answer.tokens.generated == len(tokens)
        else:
            assert answer.raw_text == f"{text}</think>\n<RESPONSE>\n{answer.text}</RESPONSE>"


def test_greedy_tokens_equal_pytorch_on_200_pairs(
    tiny: TinyGiant, tiny_model: TinyGiantALM, tokenizer: Tokenizer, tone: Tone
) -> None:
    rng = np.random.default_rng(11)
    words = ["dog", "siren", "bell", "door", "first", "loud", "who", "what", "barks", "speaking"]
    for number in range(10):
        samples = tone(float(rng.uniform(0.2, 9.0)), 16_000) * rng.uniform(0.01, 1.0)
        audio = read_audio((samples.astype(np.float32), 16_000))
        encoded = encode_audio(tiny_model, audio)
        for pair in range(20):
            question = " ".join(rng.choice(words, size=int(rng.integers(1, 12)))) + "?"
            embeds = input_embeddings(tiny_model, encoded, question, None, tokenizer)
            tokens = greedy(tiny_model, embeds, 8)
            answer = tiny.ask(audio, question, max_new_tokens=8, raw=True)
            assert answer.raw_text == tokenizer.decode(tokens), (number, question)
            if pair < 3:  # the definition itself: the whole sequence again at every step
                assert greedy(tiny_model, embeds, 8, use_cache=False) == tokens


@pytest.mark.parametrize("seconds", [0.5, 2.0, 5.0, 9.0])
def test_the_choice_is_the_one_pytorch_prefers(
    tiny: TinyGiant, tiny_model: TinyGiantALM, tokenizer: Tokenizer, tone: Tone, seconds: float
) -> None:
    audio = read_audio((tone(seconds, 16_000), 16_000))
    question = f"What is heard in {seconds}?"
    embeds = input_embeddings(
        tiny_model, encode_audio(tiny_model, audio), question, CHOICES, tokenizer
    )
    context = [*greedy(tiny_model, embeds, 7), tokenizer.token_id("</think>")]
    sequences = [tokenizer.encode(f"\n<RESPONSE>\n{choice}</RESPONSE>") for choice in CHOICES]
    left = list(range(len(sequences)))
    for position in itertools.count():
        allowed = sorted({sequences[i][position] for i in left})
        if len(allowed) > 1:  # the whole sequence again, without any cache
            with torch.no_grad():
                whole = torch.cat([embeds, tiny_model.embed_tokens(torch.tensor([context]))], 1)
                logits = tiny_model.decoder(inputs_embeds=whole).logits[0, -1]
            allowed = [max(allowed, key=lambda token: float(logits[token]))]
        context.append(allowed[0])
        left = [i for i in left if sequences[i][position] == allowed[0]]
        if len(left) == 1 and len(sequences[left[0]]) == position + 1:
            break
    answer = tiny.ask(audio, question, CHOICES, max_new_tokens=7, raw=True)
    assert answer.choice_index == left[0]
    assert answer.text == CHOICES[left[0]]
    assert answer.raw_text == tokenizer.decode(context)


@pytest.mark.parametrize("choices", [CHOICES, ["a", "a dog, perhaps two"], ["\u97f3", "<think>"]])
def test_choices_without_thought_are_scored_as_pytorch_does(
    tiny: TinyGiant,
    tiny_model: TinyGiantALM,
    tokenizer: Tokenizer,
    tone: Tone,
    choices: list[str],
) -> None:
    audio = read_audio((tone(3.0, 16_000), 16_000))
    question = "Which of these is heard?"
    encoded = encode_audio(tiny_model, audio)
    embeds = input_embeddings(tiny_model, encoded, question, choices, tokenizer)
    thought = tokenizer.encode_markup("<think>\n\n</think>")
    scores = []
    for choice in choices:  # each by itself, the whole sequence at once, without any cache
        tokens = tokenizer.encode(f"\n<RESPONSE>\n{choice}</RESPONSE>")
        with torch.no_grad():
            text = tiny_model.embed_tokens(torch.tensor([[*thought, *tokens]]))
            logits = tiny_model.decoder(inputs_embeds=torch.cat([embeds, text], 1)).logits[0]
        rows = logits[-len(tokens) - 1 : -1].double().log_softmax(-1)
        scores.append(rows[range(len(tokens)), tokens].sum())
    want = (torch.stack(scores) / 2.0).softmax(0)  # the tiny model's choice_temperature
    answer = tiny.ask(audio, question, choices, think=False)
    np.testing.assert_allclose(answer.choice_probabilities, want, rtol=2e-3, atol=1e-9)
    assert answer.choice_index == int(want.argmax())
    assert answer.text == choices[answer.choice_index]
    assert answer.raw_text == f"\n<RESPONSE>\n{answer.text}</RESPONSE>"
    assert (answer.finish_reason, answer.plan, answer.unparsed) == ("stop", "", "")
    assert answer.choice_scoring == "sum_of_log_probabilities"
    assert answer.tokens.prompt == embeds.shape[1] + len(thought)


def test_an_answer_without_thought_follows_an_empty_one(
    tiny: TinyGiant, tiny_model: TinyGiantALM, tokenizer: Tokenizer, tone: Tone
) -> None:
    audio = read_audio((tone(3.0, 16_000), 16_000))
    encoded = encode_audio(tiny_model, audio)
    embeds = input_embeddings(tiny_model, encoded, "What is heard?", None, tokenizer)
    thought = tokenizer.encode_markup("<think>\n\n</think>\n\n")
    assert tokenizer.token_id("</think>") in thought
    embeds = torch.cat([embeds, tiny_model.embed_tokens(torch.tensor([thought]))], 1)
    answer = tiny.ask(audio, "What is heard?", think=False, max_new_tokens=12, raw=True)
    assert answer.raw_text == tokenizer.decode(greedy(tiny_model, embeds, 12))
    assert answer.text == answer.raw_text.strip()
    assert (answer.choice_probabilities, answer.choice_scoring) == (None, None)
    thinking = tiny.ask(audio, "What is heard?", CHOICES, max_new_tokens=3)
    assert thinking.choice_probabilities is None


def test_headings_after_an_empty_thought_are_the_answers_own() -> None:
    parser = AnswerParser()
    parser.feed("<think>\n\n</think>")
    parser.feed("\n\nSummary: it rains")
    parser.finish()
    assert parser.result().answer == "Summary: it rains"


def test_events_come_in_order_and_make_up_the_answer(tiny: TinyGiant, tone: Tone) -> None:
    source = (tone(31.0, 8_000), 8_000)
    events = list(tiny.stream(source, "What is heard?", CHOICES, max_new_tokens=9))
    kinds = [type(event) for event in events]
    assert kinds[:3] == [AudioRead, StreamsReady, PromptRead]
    assert set(kinds[3:-1]) == {TextPiece}
    assert kinds[-1] is Finished
    audio_read, _, prompt_read, *pieces, finished = events
    answer = finished.answer
    assert "".join(piece.text for piece in pieces) == answer.raw_text
    assert audio_read.audio == answer.audio
    assert (answer.audio.n_chunks, answer.audio.used_s) == (2, 31.0)
    assert answer.tokens.audio == 300 + 10  # the second chunk holds one second
    assert prompt_read.n_tokens == answer.tokens.prompt
    assert prompt_read.intent_attention.shape == (310,)
    np.testing.assert_allclose(prompt_read.intent_attention[:300].sum(), 1.0, rtol=1e-4)
    assert prompt_read.gate.shape == (2, 48)
    assert without_times(answer) == without_times(
        tiny.ask(source, "What is heard?", CHOICES, max_new_tokens=9)
    )


def test_choices_are_given_back_as_they_came(tiny: TinyGiant, tone: Tone) -> None:
    choices = ["  cafe\u0301 ", "tea\u3000"]
    answer = tiny.ask((tone(1.0, 16_000), 16_000), "Which?", choices, max_new_tokens=1)
    assert answer.choice_index is not None
    assert answer.text == choices[answer.choice_index]


def test_a_spent_budget_is_told(tiny: TinyGiant, tone: Tone) -> None:
    audio = (tone(1.0, 16_000), 16_000)
    for choices in (None, CHOICES):
        answer = tiny.ask(audio, "What is heard?", choices, max_new_tokens=3)
        assert answer.finish_reason == "length"
    assert answer.text in CHOICES


def test_a_thought_closed_by_the_model_ends_there(
    tiny_bundle: Path, tiny_model: TinyGiantALM, tokenizer: Tokenizer, tone: Tone
) -> None:
    model = load(tiny_bundle, threads=1)
    audio = read_audio((tone(1.0, 16_000), 16_000))
    encoded = encode_audio(tiny_model, audio)
    embeds = input_embeddings(tiny_model, encoded, "What is heard?", CHOICES, tokenizer)
    thought = greedy(tiny_model, embeds, 30)
    # Let a token this model writes stand for </think>, then for the end of its text.
    length = next(n for n in range(2, 30) if thought[n] not in thought[:n])
    config = model.config
    assert config.answer.thought is not None
    closed = dataclasses.replace(config.answer.thought, close_id=thought[length])
    ended = dataclasses.replace(config.decoder, stop_token_ids=(thought[length],))
    for model.config, end_id in (
        (
            dataclasses.replace(config, answer=dataclasses.replace(config.answer, thought=closed)),
            closed.close_id,
        ),
        (dataclasses.replace(config, decoder=ended), config.answer.thought.close_id),
    ):
        answer = model.ask(audio, "What is heard?", CHOICES, max_new_tokens=30, raw=True)
        assert answer.finish_reason == "stop"
        assert answer.text in CHOICES
        end = [*thought[:length], end_id]
        assert answer.raw_text == (f"{tokenizer.decode(end)}\n<RESPONSE>\n{answer.text}</RESPONSE>")


def test_an_open_answer_ends_with_the_text(
    tiny_bundle: Path, tiny_model: TinyGiantALM, tokenizer: Tokenizer, tone: Tone
) -> None:
    model = load(tiny_bundle, threads=1)
    audio = read_audio((tone(1.0, 16_000), 16_000))
    encoded = encode_audio(tiny_model, audio)
    embeds = input_embeddings(tiny_model, encoded, "What is heard?", None, tokenizer)
    tokens = greedy(tiny_model, embeds, 30)
    length = next(n for n in range(2, 30) if tokens[n] not in tokens[:n])
    decoder = dataclasses.replace(model.config.decoder, stop_token_ids=(tokens[length],))
    model.config = dataclasses.replace(model.config, decoder=decoder)
    answer = model.ask(audio, "What is heard?", max_new_tokens=30, raw=True)
    assert answer.finish_reason == "stop"
    assert answer.raw_text == tokenizer.decode(tokens[:length])
    assert answer.tokens.generated == length


def test_a_second_question_skips_the_encoders(tiny_bundle: Path, tone: Tone) -> None:
    model, fresh = load(tiny_bundle, threads=1), load(tiny_bundle, threads=1)
    audio = (tone(3.0, 16_000), 16_000)
    first = model.ask(audio, QUESTIONS[0], max_new_tokens=5)
    assert not first.timings.encode_cached
    second = model.ask(audio, QUESTIONS[1], max_new_tokens=5)
    assert second.timings.encode_cached
    assert without_times(second) == without_times(fresh.ask(audio, QUESTIONS[1], max_new_tokens=5))
    other = model.ask((tone(3.1, 16_000), 16_000), QUESTIONS[0], max_new_tokens=5)
    assert not other.timings.encode_cached


def test_low_memory_gives_the_same_answers(tiny: TinyGiant, tiny_bundle: Path, tone: Tone) -> None:
    low = load(tiny_bundle, threads=1, memory="low")
    audio = (tone(31.0, 16_000), 16_000)
    for choices in (None, CHOICES):
        assert without_times(low.ask(audio, "Which?", choices, max_new_tokens=6)) == without_times(
            tiny.ask(audio, "Which?", choices, max_new_tokens=6)
        )


def test_streams_may_be_left_and_interleaved(tiny: TinyGiant, tone: Tone) -> None:
    audio = (tone(2.0, 16_000), 16_000)
    alone = [tiny.ask(audio, question, max_new_tokens=8) for question in QUESTIONS[:2]]
    left = tiny.stream(audio, QUESTIONS[2], max_new_tokens=8)
    for _ in range(5):
        next(left)
    left.close()
    streams = [tiny.stream(audio, question, max_new_tokens=8) for question in QUESTIONS[:2]]
    last = [None, None]
    for events in itertools.zip_longest(*streams):
        last = [new or old for new, old in zip(events, last, strict=True)]
    answers = [event.answer for event in last if isinstance(event, Finished)]
    assert [answer.raw_text for answer in answers] == [answer.raw_text for answer in alone]


def test_timings_add_up(tiny: TinyGiant, tone: Tone) -> None:
    answer = tiny.ask((tone(2.3, 16_000), 16_000), "What?", max_new_tokens=8)
    timings = answer.timings
    parts = [timings.audio_s, timings.encode_s, timings.project_s, timings.prefill_s]
    assert all(seconds > 0 for seconds in parts)
    assert timings.total_s == pytest.approx(sum(parts) + timings.decode_s)
    assert sum(parts) <= timings.first_token_s <= timings.total_s
    assert timings.tokens_per_s == pytest.approx(answer.tokens.generated / timings.decode_s)


def test_an_answer_is_json_ready(tiny: TinyGiant, tone: Tone) -> None:
    answer = tiny.ask((tone(1.0, 16_000), 16_000), "What?", CHOICES, max_new_tokens=4)
    data = json.loads(json.dumps(answer.to_dict()))
    assert data["text"] == answer.text
    assert data["tokens"] == dataclasses.asdict(answer.tokens)
    assert data["audio"]["used_s"] == 1.0


def test_questions_are_refused_before_the_audio_is_touched(tiny: TinyGiant) -> None:
    with pytest.raises(QuestionError, match="empty"):
        tiny.stream("/nothing/there.wav", " ")
    with pytest.raises(QuestionError, match="1 choice given"):
        tiny.stream("/nothing/there.wav", "What?", ["a"])
    with pytest.raises(UsageError, match="max_new_tokens"):
        tiny.stream("/nothing/there.wav", "What?", max_new_tokens=0)


def test_bad_audio_leaves_the_model_usable(tiny: TinyGiant, tmp_path: Path, tone: Tone) -> None:
    (tmp_path / "noise.wav").write_bytes(b"not audio at all")
    with pytest.raises(AudioError):
        tiny.ask(tmp_path / "noise.wav", "What?")
    with pytest.raises(AudioTooLongError, match="max-audio"):
        tiny.ask((tone(2.0, 8_000), 8_000), "What?", max_audio_s=1.0)
    assert (
        tiny.ask((tone(1.0, 8_000), 8_000), "What?", max_new_tokens=2, raw=True).tokens.generated
        == 2
    )


def test_more_than_the_decoder_has_positions(tiny: TinyGiant, tone: Tone) -> None:
    with pytest.raises(UsageError, match="4096 positions"):
        tiny.ask((tone(1.0, 8_000), 8_000), "What?", max_new_tokens=4096)


def rehash(root: Path, *paths: str) -> None:
    """Make the manifest agree with files that were changed on purpose."""
    manifest = root / b.MANIFEST_NAME
    data = json.loads(manifest.read_text())
    for entry in data["files"]:
        if entry["path"] in paths:
            entry.update(vars(b.describe_file(root, entry["path"])))
    manifest.write_text(json.dumps(data))


def refused(root: Path, **options: bool) -> str:
    with pytest.raises(BundleError) as caught:
        load(root, threads=1, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer.json"
    data = json.loads(path.read_text())
    for token in data["added_tokens"]:
        if token["content"] == "</think>":
            token["content"] = "</thought>"
    data["model"]["vocab"]["</thought>"] = data["model"]["vocab"].pop("</think>")
    path.write_text(json.dumps(data))
    assert "the manifest says" in refused(bundle_copy)
    rehash(bundle_copy, "tokenizer.json")
    assert "no control token </think>" in refused(bundle_copy)


def test_a_decoder_of_another_vocabulary_is_refused(bundle_copy: Path) -> None:
    path = bundle_copy / b.MANIFEST_NAME
    data = json.loads(path.read_text())
    data["model"]["decoder"]["vocab_size"] = 100
    path.write_text(json.dumps(data))
    embeddings = np.load(bundle_copy / "embed_tokens.npy")[:100]
    np.save(bundle_copy / "embed_tokens.npy", embeddings)
    rehash(bundle_copy, "embed_tokens.npy")
    assert "does not belong to this decoder" in refused(bundle_copy)


@pytest.mark.parametrize("graph", ["whisper_encoder", "decoder_model"])
def test_damaged_graphs_are_refused_when_loading(bundle_copy: Path, graph: str) -> None:
    path = bundle_copy / "onnx" / f"{graph}.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    rehash(bundle_copy, f"onnx/{graph}.onnx")
    assert f"graph {graph}: the graph is damaged" in refused(bundle_copy)


def test_graphs_in_each_others_place_are_noticed(bundle_copy: Path, tone: Tone) -> None:
    onnx = bundle_copy / "onnx"
    (onnx / "whisper_encoder.onnx").write_bytes((onnx / "htsat_encoder.onnx").read_bytes())
    rehash(bundle_copy, "onnx/whisper_encoder.onnx")
    assert "graph whisper_encoder: weights in" in refused(bundle_copy)
    # Also where the manifest describes what lies there.
    path = bundle_copy / b.MANIFEST_NAME
    data = json.loads(path.read_text())
    graphs = data["graphs"]
    graphs["whisper_encoder"] = graphs["htsat_encoder"] | {"file": "onnx/whisper_encoder.onnx"}
    path.write_text(json.dumps(data))
    model = load(bundle_copy, threads=1)
    with pytest.raises(BundleError, match="whisper_encoder"):
        model.ask((tone(1.0, 8_000), 8_000), "What?")


def test_unknown_memory_mode() -> None:
    with pytest.raises(UsageError, match="memory"):
        load(memory="tiny")  # type: ignore[arg-type]


def test_reading_prompts_and_configs_loads_no_engine() -> None:
    program = (
        "import sys, tinygiant.runtime.prompt, tinygiant.runtime.config, tinygiant.runtime.bundle\n"
        "import tinygiant.runtime.answer, tinygiant.runtime.choices\n"
        "heavy = {'onnxruntime', 'soundfile', 'soxr', 'torch', 'transformers', 'onnx'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    import tinygiant.runtime as runtime

    for name in runtime.__all__:
        assert name == "Event" or getattr(runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        _ = runtime.nonsense
