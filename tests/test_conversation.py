"""Many questions about one clip, on a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.runtime import TinyGiant, loading
from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.cli.conversation import history_path
from tinygiant.runtime.ort.sessions import Graph

Tone = Callable[[float, int], NDArray[np.float32]]
Talk = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, tone: Tone) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("clips")
    for name, seconds in (("one.wav", 1.0), ("two.wav", 2.0)):
        soundfile.write(folder / name, tone(seconds, 16_000), 16_000)
    return folder / "one.wav", folder / "two.wav"


@pytest.fixture
def talk(
    tiny: TinyGiant,
    clips: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Talk:
    """Pipe lines into tg-run CLIP: exit code, lines of output, standard error."""

    def call(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
        stdin = io.TextIOWrapper(io.BytesIO("".join(f"{x}\n" for x in lines).encode()))
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(loading, "load", lambda *_, **__: tiny)
        code = cli.main([str(clips[0]), "--max-new-tokens", "3", *options])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def test_every_line_is_a_question(talk: Talk, tiny: TinyGiant, clips: tuple[Path, Path]) -> None:
    questions = ("What is heard?", "Who speaks?")
    code, out, err = talk(*questions, "", "  ", options=("--json",))
    assert code == 0
    assert [json.loads(line)["raw_text"] for line in out] == [
        tiny.ask(clips[0], question, max_new_tokens=3).raw_text for question in questions
    ]
    assert "? " not in "".join(out)
    assert err.count("s in all") == 2


def test_commands_change_what_follows(talk: Talk, clips: tuple[Path, Path]) -> None:
    code, out, err = talk(
        ":choices a dog | a siren",
        "What is heard?",
        ":json",
        "What is heard?",
        f":load {clips[1]}",
        "What is heard?",
        ":choices",
        "What is heard?",
        ":json",
        "What is heard?",
        ":help",
        ":quit",
        "never asked",
        options=("-q",),
    )
    assert code == 0
    assert out[0] in ("a dog", "a siren")
    first, second, free = map(json.loads, out[1:4])
    assert (first["text"], first["audio"]["used_s"]) == (out[0], 1.0)
    assert (second["choice_index"] is not None, second["audio"]["used_s"]) == (True, 2.0)
    assert free["choice_index"] is None
    assert out[4:] == free["text"].splitlines()
    for command in (":load", ":mic", ":choices", ":json", ":help", ":quit"):
        assert command in err


def test_no_clip_is_encoded_twice(
    talk: Talk, clips: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tone: Tone
) -> None:
    runs: list[str] = []
    run = Graph.run
    monkeypatch.setattr(Graph, "run", lambda self, x: (runs.append(self.name), run(self, x))[1])
    third = clips[0].parent / "three.wav"
    soundfile.write(third, tone(3.0, 16_000) * 0.5, 16_000)
    talk(f":load {third}", "One?", "Two?", f":load {clips[1]}", f":load {third}", "Three?")
    assert runs.count("whisper_encoder") == 1
    assert runs.count("projector") == 3


def test_a_failed_line_does_not_end_the_session(talk: Talk) -> None:
    code, out, err = talk(
        ":nonsense",
        ":load /nothing/there.wav",
        ":load",
        ":choices one",
        "a\x07b",
        "x" * 20_000,
        "What is heard?",
        options=("--json",),
    )
    assert len(out) == 1
    assert code == 2  # of the first failure
    assert all(line.startswith("tg-run: ") and line.isprintable() for line in err.splitlines())
    for part in (
        "unknown command :nonsense",
        "/there.wav: no such file",
        ":load PATH",
        "1 choice given",
        "U+",
    ):
        assert part in err
    assert talk("a\x07b")[0] == 5


@pytest.mark.parametrize("word", ["exit", "quit", ":exit", ":quit", ":q", "EXIT"])
def test_exit_is_no_question(talk: Talk, word: str) -> None:
    code, out, _ = talk(word, "What is heard?", options=("--json",))
    assert (code, out) == (0, [])


def test_unforeseen_failures_do_not_end_it_either(
    talk: Talk, tiny: TinyGiant, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = tiny.stream
    calls = iter([RuntimeError("broken"), None])

    def sometimes(*args: object, **options: object) -> object:
        if error := next(calls):
            raise error
        return stream(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tiny, "stream", sometimes)
    code, out, err = talk("One?", "Two?", options=("--json",))
    assert (code, len(out)) == (1, 1)
    assert "unforeseen RuntimeError: broken" in err


def test_the_clip_is_read_before_the_model(talk: Talk, clips: tuple[Path, Path]) -> None:
    assert cli.main([str(clips[0].parent / "missing.wav")]) == 3
    assert cli.main([str(clips[0]), "--choices", "one"]) == 5


class Terminal:
    """tg-run on a terminal of its own."""

    def __init__(self, *arguments: object, state: Path) -> None:
        ours, theirs = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "dumb"}
        command = [sys.executable, "-m", "tinygiant.runtime.cli.main", *map(str, arguments)]
        self.child = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        os.close(theirs)
        self._ours = ours
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """Everything shown since the last call, up to where ``pattern`` ends."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < deadline, self.seen
            if select.select([self._ours], [], [], 0.2)[0]:
                self.seen += os.read(self._ours, 65_536).decode("utf-8", "replace")
        text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return text

    def interrupt(self) -> None:
        self.child.send_signal(signal.SIGINT)

    def interrupt_prompt(self) -> None:
        """Interrupt until a fresh prompt is there: readline misses what comes before it waits."""
        for _ in range(20):
            self.interrupt()
            try:
                self.until(r"\? ", timeout_s=1.5)
            except AssertionError:
                continue
            return
        raise AssertionError(self.seen)

    def close(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self._ours)


@pytest.fixture
def terminal(
    tiny_bundle: Path, clips: tuple[Path, Path], tmp_path: Path
) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def start(*options: object, state: Path = tmp_path / "state") -> Terminal:
        model = ("--bundle", tiny_bundle, "--threads", "1")
        opened.append(Terminal(clips[0], *model, *options, state=state))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_control_c_gives_up_one_answer_and_control_d_leaves(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    session = terminal("--max-new-tokens", 3900)
    session.until(r"\? ")
    session.interrupt_prompt()
    session.type("What is heard?\n")
    session.until("Answer:\r\n.+")
    session.interrupt()
    session.until("cancelled")
    session.until(r"\? ")
    time.sleep(0.5)  # longer than the grace after which other commands end
    session.type(":choices yes | no\n")
    session.until("choices: yes | no")
    session.until(r"\? ")
    session.type("\x04")
    assert session.child.wait(timeout=30) == 0
    history = tmp_path / "state" / "tinygiant" / "history"
    assert "What is heard?" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_an_unwritable_history_is_no_failure(
    terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    session = terminal(state=tmp_path / "file")
    session.until(r"\? ")
    session.type(":quit\n")
    assert session.child.wait(timeout=30) == 0
    assert "Traceback" not in session.seen


def test_where_history_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for value, want in (
        ("/state", "/state/tinygiant/history"),
        ("", "/home/somebody/.local/state/tinygiant/history"),
        ("relative", "/home/somebody/.local/state/tinygiant/history"),
    ):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert history_path() == Path(want)
