"""Mizar and Mellow from checkpoint to answer, at a reduced size, against a second implementation.

The checkpoints have random weights in the public format; tg-export makes the bundle, tg-run and the
library ask it, and :mod:`tests.public_reference` says what the answers have to be.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from benchmarks import latency
from benchmarks.answering import Question, RuntimeAnswerer
from tests import public_reference as reference
from tests.public_stub import KINDS, small_llama, small_mizar, small_tokenizer, state_of
from tests.serve_stub import live
from tinygiant.export import cli as export_cli
from tinygiant.models import mellow, mizar
from tinygiant.models.public import load_public, open_public
from tinygiant.runtime import PromptRead, TinyGiant, load, read_audio
from tinygiant.runtime.cli import main as run_cli
from tinygiant.runtime.cli.picture import draw
from tinygiant.runtime.errors import QuestionError
from tinygiant.runtime.tokenizer import Tokenizer

BOTH = pytest.mark.parametrize("name", ["mizar", "mellow"])
RATE_HZ = 22_050
N_TOKENS = 12
LENGTHS_S = {"mizar": 20.0, "mellow": 10.0}
N_TEXT = {"mizar": 256, "mellow": 129}


@dataclasses.dataclass
class World:
    """A checkpoint, its tokenizer, the bundle made of it, and clips."""

    name: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.ckpt"

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def tokenizer(self) -> Path:
        return self.folder / "tokenizer.json"

    def clip(self, seconds: float, seed: int = 0) -> Path:
        """A gliding tone with noise; each seed another sound."""
        path = self.folder / f"clip-{seconds:g}-{seed}.wav"
        t = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
        tone = 0.3 * np.sin(2 * np.pi * (200 + 300 * seed + 90 * t) * t)
        noise = np.random.default_rng(seed).standard_normal(t.size)
        soundfile.write(path, tone + 0.05 * noise, RATE_HZ, subtype="FLOAT")
        return path

    def rows(self, path: Path) -> torch.Tensor:
        """What the reference makes of a clip, ``(N, D)``."""
        state = torch.load(self.checkpoint)
        samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        with torch.no_grad():
            if self.name == "mizar":
                log_mel = reference.mizar_log_mel(samples, RATE_HZ)
                grid = reference.ced(state, log_mel, small_mizar().ced.n_heads)
                return reference.mizar_rows(state, grid)
            tower = load_public(KINDS["mellow"], self.checkpoint).get_submodule(
                "audio_encoder.base.htsat.tower"
            )
            log_mel = reference.mellow_log_mel(samples, RATE_HZ)
            return reference.mellow_rows(state, tower, log_mel)

    def ids(self, text: str) -> list[int]:
        return reference.text_ids(str(self.folder / "plain.json"), text, N_TEXT[self.name])

    def answer(self, clips: list[torch.Tensor], text: str) -> str:
        state = torch.load(self.checkpoint)
        tokens = reference.answer(state, small_llama(), clips, self.ids(text), N_TOKENS)
        hidden = {17} if self.name == "mizar" else set()
        tokenizer = Tokenizer.from_file(self.tokenizer)
        return tokenizer.decode(token for token in tokens if token not in hidden | {0})


@pytest.fixture(scope="module", params=["mizar", "mellow"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Made through the command line, with a module of the reduced size in the place of the real."""
    found = World(request.param, tmp_path_factory.mktemp(request.param))
    kind = KINDS[found.name]
    torch.save(state_of(kind.build()), found.checkpoint)
    for file in ("plain.json", "tokenizer.json"):
        (found.folder / file).write_text(small_tokenizer())
    with pytest.MonkeyPatch.context() as patch:
        module = {"mizar": mizar, "mellow": mellow}[found.name]
        patch.setattr(
            module, "open_checkpoint", lambda path, **options: open_public(kind, path, **options)
        )
        code = export_cli.main(
            [f"--{found.name}", str(found.checkpoint), "--tokenizer", str(found.folder),
             "--recipe", "fp32", "--threads", "1", "-o", str(found.bundle)]
        )  # fmt: skip
    assert code == 0
    return found


@pytest.fixture(scope="module")
def model(world: World) -> TinyGiant:
    return load(world.bundle, threads=1, verify=False)


@pytest.mark.parametrize("share", [0.13, 0.6, 1.7])
def test_rows_and_greedy_text_are_the_references(
    share: float, world: World, model: TinyGiant
) -> None:
    """Clips shorter than the window are filled up (silence, or the clip again), longer ones cut."""
    clip = world.clip(share * LENGTHS_S[world.name])
    rows = world.rows(clip)
    prepared = model.prepare(clip, "What can be heard? Wow!")
    np.testing.assert_allclose(
        prepared.projections[0].audio_embeds[0], rows.numpy(), atol=5e-4, rtol=1e-3
    )
    text = "What can be heard? Wow!"
    asked = text.lower() if world.name == "mizar" else text
    assert list(prepared.asked.prompt.parts[-1] or ()) == world.ids(asked)
    wanted = world.answer([rows] * (1 if world.name == "mizar" else 2), asked)
    answer = model.ask(clip, text, max_new_tokens=N_TOKENS, raw=True)
    assert answer.raw_text == wanted
    assert answer.text == wanted.strip()
    assert (answer.plan, answer.audio_analysis, answer.logic, answer.summary) == ("", "", "", "")
    assert answer.unparsed == ""


def test_what_does_not_fit_the_window_is_reported(world: World, model: TinyGiant) -> None:
    length_s = LENGTHS_S[world.name]
    answer = model.ask(world.clip(1.5 * length_s), "What is it?", max_new_tokens=2)
    assert answer.audio.used_s == pytest.approx(length_s)
    assert answer.audio.dropped_s == pytest.approx(0.5 * length_s)
    assert any(f"first {length_s:g} s" in note for note in answer.audio.notes)
    short = model.ask(world.clip(0.5 * length_s), "What is it?", max_new_tokens=2)
    assert short.audio.dropped_s == 0
    assert not short.audio.notes


def test_choices_are_written_as_trained_and_the_answer_is_one_of_them(
    world: World, model: TinyGiant
) -> None:
    choices = ["A Dog", "Two dogs", "rain"]
    clip = world.clip(3.0)
    prepared = model.prepare(clip, "What barks?", choices)
    text = "What barks? a) A Dog b) Two dogs c) rain"
    asked = text.lower() if world.name == "mizar" else text
    assert list(prepared.asked.prompt.parts[-1] or ()) == world.ids(asked)
    answer = model.ask(clip, "What barks?", choices)
    assert answer.text in choices
    assert answer.choice_index is not None
    assert answer.text == choices[answer.choice_index]
    assert answer.choice_probabilities is not None
    assert sum(answer.choice_probabilities) == pytest.approx(1.0)
    rows = world.rows(clip)
    clips = [rows] * (1 if world.name == "mizar" else 2)
    scores = [
        reference.log_likelihood(
            torch.load(world.checkpoint), small_llama(), clips, world.ids(asked),
            [*world.ids(f"{letter}) {choice.lower()} ")[: len(f"{letter}) {choice} ")], 0],
        )
        for letter, choice in zip("abc", choices, strict=True)
    ]  # fmt: skip
    wanted = np.exp(np.array(scores) - max(scores))
    np.testing.assert_allclose(answer.choice_probabilities, wanted / wanted.sum(), atol=1e-3)


def test_a_second_question_reads_the_sound_no_more(world: World, model: TinyGiant) -> None:
    clip, fresh = world.clip(4.0, seed=3), load(world.bundle, threads=1, verify=False)
    questions = ("What is it?", "Is it loud?", "What is it?")
    answers = [
        model.ask(clip, question, max_new_tokens=N_TOKENS, raw=True) for question in questions
    ]
    assert [answer.timings.encode_cached for answer in answers] == [False, True, True]
    assert answers[0].raw_text == answers[2].raw_text
    assert (
        fresh.ask(clip, questions[1], max_new_tokens=N_TOKENS, raw=True).raw_text
        == answers[1].raw_text
    )
    with model.decoder(600) as decoder:
        fed: list[int] = []
        feed = decoder.feed
        decoder.feed = lambda rows: fed.append(rows.shape[1]) or feed(rows)  # type: ignore[method-assign,func-returns-value]
        prepared = model.prepare(clip, questions[1])
        asked = prepared.asked.prompt
        parts = model._compose(asked, [prepared.projections])
        from tinygiant.runtime.audio import read_audio

        logits = model._prefix.prefill(decoder, parts, asked, [read_audio(clip)], keep=True)
        assert fed == []  # the audio rows' keys and values were kept
        whole = decoder.cache.length
        decoder.truncate(0)
        np.testing.assert_allclose(decoder.prefill(prepared.embeds), logits, atol=1e-4)
        assert decoder.cache.length == whole
        del decoder


def test_another_clip_is_not_taken_for_the_one_before(world: World, model: TinyGiant) -> None:
    one, two = world.clip(4.0, seed=1), world.clip(4.0, seed=2)
    texts = [
        model.ask(clip, "What?", max_new_tokens=N_TOKENS, raw=True).raw_text
        for clip in (one, two, one)
    ]
    fresh = load(world.bundle, threads=1, verify=False)
    assert fresh.ask(two, "What?", max_new_tokens=N_TOKENS, raw=True).raw_text == texts[1]
    assert texts[0] == texts[2]


def test_questions_about_two_clips(world: World, model: TinyGiant) -> None:
    one, two = world.clip(4.0, seed=1), world.clip(6.0, seed=2)
    if world.name == "mizar":
        with pytest.raises(QuestionError, match="2 clips given, mizar-159m hears one at a time"):
            model.ask([one, two], "What differs?")
        return
    answer = model.ask([one, two], "What differs?", max_new_tokens=N_TOKENS, raw=True)
    assert answer.raw_text == world.answer([world.rows(one), world.rows(two)], "What differs?")
    assert [account.source for account in (answer.audio, *answer.more_audio)] == [
        str(one), str(two),
    ]  # fmt: skip
    assert answer.tokens.audio == 2 * 129
    swapped = model.ask([two, one], "What differs?", max_new_tokens=N_TOKENS, raw=True)
    assert swapped.raw_text == world.answer([world.rows(two), world.rows(one)], "What differs?")
    with pytest.raises(QuestionError, match="3 clips given, mellow-167m hears one or 2 at a time"):
        model.ask([one, two, one], "What differs?")


def test_manifest_and_card_say_where_it_comes_from(world: World) -> None:
    manifest = json.loads((world.bundle / "manifest.json").read_text())
    source = manifest["source"]
    assert (
        source["origin"]
        == {
            "mizar": "https://huggingface.co/KaiyangLi/Mizar-159M",
            "mellow": "https://huggingface.co/soham97/mellow",
        }[world.name]
    )
    assert "Apache-2.0" in source["licence"]
    card = (world.bundle / "README.md").read_text()
    assert "license: other" in card
    assert source["origin"] in card
    assert "52.1 % on MMAU" in card or "exposure to the tests" in card
    assert "TinyGiantALM" not in card


def test_the_command_line_answers(
    world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clip = world.clip(4.0, seed=1)
    options = ["--bundle", str(world.bundle), "--threads", "1", "--max-new-tokens", "6"]
    assert run_cli.main([str(clip), "What is it?", "--json", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["model"].startswith(world.name)
    assert answer["plan"] == answer["summary"] == answer["unparsed"] == ""
    assert answer["more_audio"] == []
    command = [str(clip), "What is it?", "-q", *options, "--choices", "A Dog", "The rain"]
    assert run_cli.main(command) == 0
    assert capsys.readouterr().out in ("A Dog\n", "The rain\n")  # as given, not "a) a dog"
    second = [str(clip), "What differs?", "--second", str(world.clip(6.0, seed=2)), "--json"]
    code = run_cli.main([*second, *options])
    if world.name == "mizar":
        assert code == 5
        assert capsys.readouterr().err.splitlines()[-1].startswith("tg-run: 2 clips given")
    else:
        assert code == 0
        assert len(json.loads(capsys.readouterr().out)["more_audio"]) == 1


def test_the_api_hears_as_many_clips_as_the_model(world: World, model: TinyGiant) -> None:
    clips = [world.clip(4.0, seed=1), world.clip(6.0, seed=2)]
    parts: list[dict[str, Any]] = [
        {"type": "input_audio", "input_audio": {"data": b64encode(clip.read_bytes()).decode()}}
        for clip in clips
    ]
    asked = {"role": "user", "content": [*parts, {"type": "text", "text": "What differs?"}]}
    with live(model) as running:
        response = running.post({"messages": [asked], "max_tokens": N_TOKENS})
    assert response.status_code == 200, response.text
    reply = response.json()
    heard: Any = clips if world.name == "mellow" else clips[-1]
    expected = model.ask(heard, "What differs?", max_new_tokens=N_TOKENS)
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["usage"]["prompt_tokens_details"]["audio_tokens"] == expected.tokens.audio
    told = reply["tinygiant"]
    used_s = [audio["used_s"] for audio in (told["audio"], *told["more_audio"])]
    assert used_s == ([4.0, 6.0] if world.name == "mellow" else [6.0])
    assert ("x-tinygiant-ignored" in response.headers) is (world.name == "mizar")


def test_a_batch_may_compare_clips(world: World, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    one, two = str(world.clip(4.0, seed=1)), str(world.clip(6.0, seed=2))
    lines = [
        {"id": "one", "audio": one, "question": "What is it?"},
        {"id": "two", "audio": one, "second": two, "question": "What differs?"},
        {"id": "bad", "audio": one, "second": 3, "question": "What differs?"},
    ]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    command = [
        "--batch", str(items), "-o", str(out), "--bundle", str(world.bundle), "--threads", "1",
        "--max-new-tokens", "4", "-q",
    ]  # fmt: skip
    assert run_cli.main(command) == 11
    first, second, bad = map(json.loads, out.read_text().splitlines())
    assert "answer" in first
    assert "second is not a path" in bad["error"]["message"]
    if world.name == "mellow":
        assert second["second"] == second["answer"]["more_audio"][0]["source"] == two
    else:
        assert second["error"]["kind"] == "QuestionError"
    written = out.read_bytes()
    assert run_cli.main(command) == 11  # nothing is asked again
    assert out.read_bytes() == written


def test_benchmarks_say_how_much_was_heard(world: World, model: TinyGiant) -> None:
    length_s = LENGTHS_S[world.name]
    rows = latency.measure(model, [2.0, length_s + 3.0], 1, 2)
    assert [row["heard_s"] for row in rows] == [2.0, length_s]


def test_what_is_compared_on_arm_can_be_computed(world: World) -> None:
    """``make test-arm ARM_ARGS="--bundle DIR"`` runs this script there and here."""
    script = Path(__file__).parent / "arm" / "answers.py"
    out, clip = world.folder / "arm.npz", world.clip(1.0)
    subprocess.run([sys.executable, script, world.bundle, clip, out, "3"], check=True)
    with np.load(out) as found:
        n_streams = {"mizar": 126 * 4 * 48, "mellow": 32 * 21 + 64}[world.name]
        assert found["streams"].shape == (n_streams,)
        assert found["tokens"].shape == (3,)
        assert found["choice"] in (0, 1, 2)


def test_a_question_that_is_too_long_is_refused_in_one_line(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = N_TEXT[world.name]
    clip, options = str(world.clip(1.0)), ["--bundle", str(world.bundle), "--threads", "1"]
    assert run_cli.main([clip, "a" * (limit + 1), "-q", *options]) == 5
    assert capsys.readouterr().err == (
        f"tg-run: the question has {limit + 1} tokens, this model reads at most {limit} (about "
        f"{4 * limit} letters); write less\n"
    )
    assert run_cli.main([clip, "a" * limit, "-q", "--max-new-tokens", "1", *options]) == 0


def test_the_command_line_says_what_was_not_heard(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length_s = LENGTHS_S[world.name]
    clip, plot = world.clip(1.5 * length_s), tmp_path / "plot.png"
    options = ["--bundle", str(world.bundle), "--threads", "1", "--max-new-tokens", "1"]
    assert run_cli.main([str(clip), "What is it?", "--picture", str(plot), *options]) == 0
    lines = capsys.readouterr().err.splitlines()
    seconds = f"{length_s:.2f} of {1.5 * length_s:.2f} s of audio used"
    assert lines[0] == f"tg-run: {clip}: {seconds}"
    # Plain text has no parts that could be closed.
    assert "tg-run: note: --max-new-tokens reached; the answer ends there" in lines
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_plots_panels_have_one_time_axis(world: World, model: TinyGiant) -> None:
    """What the model does not hear stays empty; the sound above it is drawn whole."""
    length_s = LENGTHS_S[world.name]
    audio = read_audio(world.clip(1.5 * length_s))
    answer = model.ask(audio, "What is it?", max_new_tokens=1)
    figure = draw(audio, model.config, PromptRead(1, None, None), answer, "What is it?")
    panels = {panel.get_label(): panel for panel in figure.axes}
    del panels["answer"]
    assert len(panels) == 2
    for panel in panels.values():
        assert panel.get_xlim() == pytest.approx((0.0, 1.5 * length_s))
    [mel] = [panel for name, panel in panels.items() if name != "waveform"]
    assert mel.images[0].get_extent()[:2] == pytest.approx([0.0, length_s], rel=2e-3)


@pytest.mark.parametrize("is_open", [True, False])
def test_mmar_takes_no_answer_for_a_thought(is_open: bool, world: World) -> None:
    answerer = RuntimeAnswerer(world.bundle, max_new_tokens=4, threads=1)
    asked = Question(world.clip(1.0), "What is it?", ("a dog", "rain"), is_open)
    [reply] = answerer.answer([asked])
    assert reply.answer
    assert reply.thought == ""
