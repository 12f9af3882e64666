"""tg-run: what goes to standard output and error, and every exit code."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.cli.options import make_parser, parse
from tinygiant.runtime.cli.terminal import TextWriter
from tinygiant.runtime.errors import TinyGiantError

Tone = Callable[[float, int], NDArray[np.float32]]
Run = Callable[..., tuple[int, str, str]]
CHOICES = ("a dog", "a siren")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tone: Tone) -> Path:
    path = tmp_path_factory.mktemp("clips") / "tone.wav"
    soundfile.write(path, tone(1.5, 16_000), 16_000)
    return path


@pytest.fixture
def run(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run tg-run in this process on the tiny bundle: exit code, standard output and error."""

    def call(*arguments: object, bundle: Path | None = tiny_bundle) -> tuple[int, str, str]:
        options = ["--bundle", str(bundle), "--threads", "1"] if bundle else []
        code = cli.main([*options, *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def process(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    """Start tg-run as a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    command = [sys.executable, "-m", "tinygiant.runtime.cli.main", *map(str, arguments)]
    return subprocess.Popen(command, **(pipes | options))


def failed(outcome: tuple[int, str, str], code: int) -> str:
    """Check a failure's form: exit code, nothing on standard output, one line of error."""
    got, out, err = outcome
    lines = [line for line in err.splitlines() if "random weights" not in line]
    assert (got, out) == (code, "")
    assert len(lines) == 1
    assert lines[0].startswith("tg-run: ")
    assert lines[0].isprintable()
    return lines[0]


def test_the_text_streams_to_stdout_and_the_rest_to_stderr(run: Run, clip: Path) -> None:
    code, out, err = run(clip, "What is heard?", "--max-new-tokens", 6, "--choices", *CHOICES)
    assert code == 0
    assert out.endswith(("Answer:\na dog\n", "Answer:\na siren\n"))
    assert "1.50 s of audio" in err
    assert "random weights" in err
    assert "tokens at" in err
    assert all(line.startswith("tg-run: ") for line in err.splitlines())


def test_json_is_one_object_and_the_same_answer(run: Run, clip: Path) -> None:
    asked = (clip, "What is heard?", "--max-new-tokens", 6, "--choices", *CHOICES)
    code, out, _ = run("--json", *asked)
    assert code == 0
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert answer["text"] in CHOICES
    assert answer["audio"]["used_s"] == 1.5
    _, quiet, err = run("-q", *asked)
    assert quiet == answer["text"] + "\n"
    assert err == ""


def test_options_may_stand_anywhere() -> None:
    for words in (
        ["clip.wav", "--json", "What?"],
        ["--json", "clip.wav", "What?"],
        ["clip.wav", "What?", "--json"],
    ):
        options = parse(words)
        assert (options.clip, options.question, options.json) == ("clip.wav", "What?", True)
    options = parse(["-q", "--", "-clip.wav", "-what?"])
    assert (options.clip, options.question) == ("-clip.wav", "-what?")


def test_the_microphone_takes_the_clips_place() -> None:
    for words, want in (
        (["--mic", "What?"], ("", "What?")),
        (["What?", "--mic"], ("", "What?")),
        (["--mic=USB mic", "What?"], ("USB mic", "What?")),
        (["--mic"], ("", None)),
    ):
        options = parse(words)
        assert (options.mic, options.question, options.clip) == (*want, None)


def test_jsonl_is_a_line_an_event(run: Run, clip: Path) -> None:
    asked = (clip, "What is heard?", "--max-new-tokens", 6, "--choices", *CHOICES)
    code, out, _ = run("--jsonl", *asked)
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[:3] == ["audio_read", "streams_ready", "prompt_read"]
    assert {*kinds[3:-1]} == {"text"}
    assert kinds[-1] == "answer"
    answer = events[-1]["answer"]
    assert "".join(event["text"] for event in events[3:-1]) == answer["raw_text"]
    assert len(events[2]["intent_attention"]) == answer["tokens"]["audio"]
    assert {event["schema"] for event in events} == {answer["schema"]}


def test_no_think_tells_how_likely_each_choice_is(run: Run, clip: Path) -> None:
    code, out, err = run(clip, "What?", "--no-think", "--choices", *CHOICES)
    assert code == 0
    assert out in ("Answer:\na dog\n", "Answer:\na siren\n")
    shares = [line for line in err.splitlines() if "%" in line]
    assert len(shares) == 1
    assert out.split(":\n")[1].strip() in shares[0].split(",")[0]
    _, out, _ = run("--json", clip, "What?", "--no-think", "--choices", *CHOICES)
    answer = json.loads(out)
    assert sum(answer["choice_probabilities"]) == pytest.approx(1.0)
    assert answer["choice_scoring"] == "sum_of_log_probabilities"


def test_json_in_an_ascii_terminal_is_still_json(tiny_bundle: Path, clip: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    choices = ("\U0001f3b5", "caf\u00e9")
    options = ("--json", "--bundle", tiny_bundle, "--no-think", "--choices", *choices)
    out, err = process(clip, "What?", *options, env=environment).communicate(timeout=60)
    assert json.loads(out)["text"] in choices, err


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_options(run: Run, shell: str) -> None:
    code, script, err = run("--completion", shell, bundle=None)
    assert (code, err) == (0, "")
    if shutil.which("bash") is None or shell != "bash":
        assert "bashcompinit" in script or shell == "bash"
        return
    line = "COMP_WORDS=(tg-run --me); COMP_CWORD=1; _tg_run; echo ${COMPREPLY[@]}"
    values = "COMP_WORDS=(tg-run --memory l); COMP_CWORD=2; _tg_run; echo ${COMPREPLY[@]}"
    every = "COMP_WORDS=(tg-run x --); COMP_CWORD=2; _tg_run; echo ${COMPREPLY[@]}"
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{line}\n{values}\n{every}"], capture_output=True, text=True
    )
    memory, low, names = done.stdout.splitlines()
    assert (memory, low) == ("--memory", "low")
    long_names = {name for action in make_parser()._actions for name in action.option_strings}
    assert set(names.split()) == {name for name in long_names if name.startswith("--")}


def test_sections_are_shown_under_their_headings() -> None:
    from tinygiant.runtime.answer import AnswerParser

    text = (
        "<think>\n<PLANNING>\n  listen\n\n\nwell </PLANNING>\n<CAPTION>\n</CAPTION>\n"
        "<SUMMARY>so\x1b[31m</SUMMARY>\n</think>\n<RESPONSE>\na dog</RESPONSE>"
    )
    out = io.StringIO()
    writer, parser = TextWriter(out, show=True), AnswerParser()
    for piece in [p for c in text for p in parser.feed(c)] + parser.finish():
        writer.take(piece)
    assert out.getvalue() == ("Plan:\nlisten\n\n\nwell\n\nSummary:\nso\\x1b[31m\n\nAnswer:\na dog")


def test_audio_from_standard_input(run: Run, clip: Path, tiny_bundle: Path) -> None:
    _, want, _ = run(clip, "What?", "-q", "--choices", *CHOICES, "--max-new-tokens", 5)
    options = ("-q", "--bundle", tiny_bundle, "--max-new-tokens", 5, "--choices", *CHOICES)
    with clip.open("rb") as stdin:
        out, err = process("-", "What?", *options, stdin=stdin).communicate(timeout=60)
    assert (out.decode(), err) == (want, b"")


def test_raw_samples_from_standard_input(tiny_bundle: Path, tone: Tone) -> None:
    pcm = (tone(0.8, 8_000) * 32_767).astype("<i2").tobytes()
    options = ("--json", "--bundle", tiny_bundle, "--max-new-tokens", 2, "--pcm-rate", 8_000)
    child = process("-", "What?", *options, stdin=subprocess.PIPE)
    out, _ = child.communicate(pcm, timeout=60)
    audio = json.loads(out)["audio"]
    assert (audio["used_s"], audio["sampling_rate_hz"]) == (0.8, 8_000)


def test_a_terminal_is_not_audio(tiny_bundle: Path) -> None:
    ours, theirs = pty.openpty()
    child = process("-", "What?", "--bundle", tiny_bundle, stdin=theirs)
    _, err = child.communicate(timeout=60)
    os.close(ours)
    os.close(theirs)
    assert child.returncode == 2
    assert b"terminal" in err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("-",),
        ("clip.wav", "What?", "more"),
        ("clip.wav", "What?", "--nonsense"),
        ("clip.wav", "What?", "--json", "--jsonl"),
        ("clip.wav", "What?", "--question", "What?"),
        ("clip.wav", "What?", "-o", "out.jsonl"),
        ("clip.wav", "What?", "--picture", "out.jpg"),
        ("clip.wav", "--picture", "out.png"),
        ("clip.wav", "What?", "--mic"),
        ("clip.wav", "What?", "--batch", "clips", "-o", "out.jsonl"),
        ("--batch", "clips"),
        ("--batch", "clips", "-o", "out.jsonl", "--json"),
        ("--completion", "fish"),
        ("clip.wav", "What?", "--threads", "many"),
        ("clip.wav", "What?", "--threads", "0"),
        ("clip.wav", "What?", "--max-new-tokens", "0"),
        ("clip.wav", "What?", "--max-new-tokens", "99999"),
        ("clip.wav", "What?", "--max-audio", "-1"),
        ("clip.wav", "What?", "--max-audio", "nan"),
        ("clip.wav", "What?", "--memory", "huge"),
        ("clip.wav", "What?", "--choices"),
        ("--mic", "What?", "--pcm-rate", "16000"),
        ("clip.wav", "What?", "--jso"),
        ("clip.wav", "What?", "two\nlines\x1b"),
    ],
)
def test_wrong_options_end_with_2(run: Run, clip: Path, arguments: tuple[str, ...]) -> None:
    named = [str(clip) if argument == "clip.wav" else argument for argument in arguments]
    code, out, err = run(*named)
    assert (code, out) == (2, "")
    # That 99999 tokens are too many is only known once the model is loaded.
    assert err.count("\n") == 1 or "99999" in named
    assert err.splitlines()[-1].isprintable()
    assert "Traceback" not in err


def test_bad_audio_ends_with_3(run: Run, clip: Path, tmp_path: Path) -> None:
    assert "no such file" in failed(run(tmp_path / "no\nthing.wav", "What?"), 3)
    (tmp_path / "empty.wav").touch()
    assert "empty" in failed(run(tmp_path / "empty.wav", "What?"), 3)
    (tmp_path / "text.wav").write_text("no audio")
    assert "not audio" in failed(run(tmp_path / "text.wav", "What?"), 3)
    assert "--max-audio" in failed(run(clip, "What?", "--max-audio", 1), 3)


def test_bad_bundles_end_with_4(run: Run, clip: Path, bundle_copy: Path, tmp_path: Path) -> None:
    assert "no such bundle" in failed(run(clip, "What?", bundle=tmp_path / "nothing"), 4)
    (bundle_copy / "embed_tokens.npy").write_bytes(b"")
    assert "embed_tokens.npy" in failed(run(clip, "What?", bundle=bundle_copy), 4)


def test_unverified_bundles_are_used_when_asked(run: Run, clip: Path, bundle_copy: Path) -> None:
    path = bundle_copy / "tokenizer.json"
    path.write_text(path.read_text().replace("\n", " ", 1))
    assert "was changed" in failed(run(clip, "What?", bundle=bundle_copy), 4)
    code, _, _ = run(clip, "What?", "--no-verify", "--max-new-tokens", 1, bundle=bundle_copy)
    assert code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("",),
        ("x" * 20_000,),
        ("a\x07b",),
        ("What?", "--choices", "one"),
        ("What?", "--choices", "same", "same"),
        ("What?", "--choices", "", "b"),
    ],
    ids=["empty", "enormous", "control", "one", "duplicate", "blank"],
)
def test_bad_questions_end_with_5(run: Run, clip: Path, arguments: tuple[str, ...]) -> None:
    failed(run(clip, *arguments), 5)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("option", ["--quiet", "--json", "--threads=1"])
def test_a_full_disk_ends_with_8(tiny_bundle: Path, clip: Path, option: str) -> None:
    with open("/dev/full", "wb") as full:
        options = (option, "--bundle", tiny_bundle, "--max-new-tokens", 3, "--choices", *CHOICES)
        child = process(clip, "What?", *options, stdout=full)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 8
    assert b"No space left" in err.splitlines()[-1]
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


def test_unforeseen_failures_are_one_line(
    run: Run, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something\nbroke")

    monkeypatch.setattr("tinygiant.runtime.loading.load", fail)
    line = failed(run(clip, "What?"), 1)
    assert "unforeseen RuntimeError: something broke" in line
    assert "TINYGIANT_DEBUG=1" in line
    monkeypatch.setenv("TINYGIANT_DEBUG", "1")
    with pytest.raises(RuntimeError):
        run(clip, "What?")


def test_memory_that_runs_out_is_one_line(
    run: Run, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("tinygiant.runtime.loading.load", fail)
    assert "MemoryError" in failed(run(clip, "What?"), 1)


def test_a_reader_that_leaves_is_no_error(tiny_bundle: Path, clip: Path) -> None:
    child = process(clip, "What?", "--bundle", tiny_bundle, "--max-new-tokens", 3000)
    assert child.stdout is not None
    child.stdout.read(1)
    child.stdout.close()
    assert child.stderr is not None
    err = child.stderr.read()
    assert child.wait(timeout=60) == 141
    assert b"Traceback" not in err
    assert b"Broken" not in err


def restore_sigint() -> None:
    """In the child: background jobs of a shell inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("moment", ["reading", "writing"])
def test_an_interrupt_ends_with_130(tiny_bundle: Path, clip: Path, moment: str) -> None:
    options = ("--bundle", tiny_bundle, "--max-new-tokens", 3_500)
    source = "-" if moment == "reading" else clip
    child = process(source, "What?", *options, stdin=subprocess.PIPE, preexec_fn=restore_sigint)
    assert child.stdin is not None
    assert child.stdout is not None
    if moment == "reading":
        child.stdin.write(bytes(1 << 20))  # more than a pipe holds: it returns once this is read
        child.stdin.flush()
    else:
        child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    err = child.stderr.read() if child.stderr else b""
    assert child.wait(timeout=60) == 130
    assert b"Traceback" not in err
    assert err.splitlines()[-1] == b"tg-run: interrupted"


def test_an_interrupt_does_not_wait_for_native_code() -> None:
    program = (
        "import hashlib, sys\nfrom tinygiant.runtime.cli import main as cli\n"
        "def run(options):\n"
        "    print('started', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"  # minutes, without the interpreter
        "cli._run = run\n"
        "sys.argv[1:] = ['clip.wav', 'What?']\n"
        "sys.exit(cli.main())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=restore_sigint,
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == 130
    assert err == b"tg-run: interrupted\n"


def test_an_ascii_terminal_still_gets_an_answer(tiny_bundle: Path, clip: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = ("-q", "--bundle", tiny_bundle, "--max-new-tokens", 2)
    choices = ("--choices", "caf\u00e9", "\u97f3")
    child = process(clip, "What?", *options, *choices, env=environment)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert out in (b"caf\\xe9\n", b"\\u97f3\n")


def test_help_and_version(run: Run) -> None:
    for option in ("--help", "--version"):
        child = process(option)
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, b"")
        assert b"tg-run" in out
    assert b"onnxruntime" in out
    child = process("--help")
    text = child.communicate(timeout=60)[0].decode()
    for code in {c.exit_code for c in TinyGiantError.__subclasses__()} & {2, 3, 4, 5, 8}:
        assert f"{code} " in text
    for option in ("--choices", "--json", "--bundle", "--threads", "--pcm-rate", "--memory"):
        assert option in text


def test_defaults_are_the_librarys() -> None:
    from tinygiant.runtime.asking import MAX_NEW_TOKENS
    from tinygiant.runtime.audio import MAX_AUDIO_S

    options = parse(["clip.wav", "What?"])
    assert (options.max_audio, options.max_new_tokens) == (MAX_AUDIO_S, MAX_NEW_TOKENS)


def test_help_is_instant() -> None:
    program = (
        "import sys\nfrom tinygiant.runtime.cli import main as cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'onnxruntime', 'soundfile'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
