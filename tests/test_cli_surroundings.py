"""What surrounds tg-run: signals, standard streams, libraries that print, words out of order."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.cli.conversation import dropped_path
from tinygiant.runtime.cli.options import parse
from tinygiant.runtime.errors import UsageError

Tone = Callable[[float, int], NDArray[np.float32]]
RUN = (sys.executable, "-m", "tinygiant.runtime.cli.main")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tone: Tone) -> Path:
    path = tmp_path_factory.mktemp("clips") / "tone.wav"
    soundfile.write(path, tone(1.5, 16_000), 16_000)
    return path


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = os.environ | environment
    return subprocess.run(["sh", "-c", line], capture_output=True, timeout=120, env=env)


def restore_sigint() -> None:
    """In the child: background jobs of a shell inherit an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["argparse", "numpy", "soundfile", "onnxruntime", "tinygiant.runtime.cli.watching"]
)
def test_an_interrupt_during_an_import_is_one_line(clip: Path, module: str) -> None:
    # numpy and onnxruntime turn KeyboardInterrupt into errors of their own while they are imported.
    program = textwrap.dedent(f"""
        import os, signal, sys
        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)
                    try:  # as a library that catches whatever goes wrong
                        for _ in range(1_000_000): pass
                    except BaseException as error:
                        raise ImportError from error
        sys.modules.pop({module!r}, None)
        sys.meta_path.insert(0, Interrupt())
        sys.argv[1:] = [{str(clip)!r}, "What?"]
        from tinygiant.runtime.cli.main import main
        sys.exit(main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, preexec_fn=restore_sigint, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, b"tg-run: interrupted\n")


@pytest.mark.parametrize(
    "command",
    [
        *("runtime.cli.main", "runtime.serve.start", "runtime.listen.start"),
        *("export.start", "models.training.start"),
    ],
)
def test_ctrl_c_is_taken_care_of_before_anything_else_is_imported(command: str) -> None:
    program = textwrap.dedent(f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from tinygiant.{command} import main
        print(sorted({{"argparse", "dataclasses", "numpy", "torch"}} & set(sys.modules)))
        print([name for name in sys.modules if "tinygiant.runtime." in name and ".cli" not in name
               and ".start" not in name and not name.endswith((".serve", ".listen"))])
    """)
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[]\n[]\n")


def test_an_interrupt_while_torch_is_imported_is_one_line() -> None:
    program = textwrap.dedent("""
        import os, signal, sys
        class Interrupt:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
        sys.argv[1:] = ["--preset", "nano", "--random-weights", "0", "-o", "/nowhere"]
        from tinygiant.export.start import main
        sys.exit(main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, preexec_fn=restore_sigint, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, b"tg-export: interrupted\n")


def test_an_interrupt_inside_a_decoders_callback_is_one_line(tmp_path: Path, tone: Tone) -> None:
    # "Exception ignored from cffi callback", and then an answer about half of the clip.
    path = tmp_path / "clip.flac"
    soundfile.write(path, tone(5.0, 16_000), 16_000)
    program = textwrap.dedent(f"""
        import os, signal, sys, threading
        from tinygiant.runtime import encoded
        from tinygiant.runtime.cli.main import main
        class Interrupted(encoded.Window):
            def readinto(self, buffer):
                os.kill(os.getpid(), signal.SIGINT)
                return super().readinto(buffer)
        encoded.Window = Interrupted
        sys.argv[1:] = [{str(path)!r}, "What?"]
        sys.exit(main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, preexec_fn=restore_sigint, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, b"tg-run: interrupted\n")


def test_an_interrupt_leaves_no_empty_output(clip: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    source = tmp_path / "q.jsonl"
    os.mkfifo(tmp_path / "slow.wav")  # nobody writes: reading it waits
    source.write_text(json.dumps({"audio": "slow.wav", "question": "What?"}) + "\n")
    command = [*RUN, "--batch", str(source), "-o", str(out), "--bundle", str(tiny_bundle)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore_sigint
    )
    assert child.stderr is not None
    child.stderr.readline()  # the status of the first item
    time.sleep(0.1)
    assert out.exists()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130
    assert err.splitlines()[-1] == b"tg-run: interrupted"
    assert not out.exists()


# --- standard streams ---------------------------------------------------------------------------


def test_a_closed_standard_output_is_named(clip: Path, tiny_bundle: Path) -> None:
    asked = f"{shlex.join(RUN)} {clip} What? --bundle {tiny_bundle} --max-new-tokens 2"
    for line in (f"{asked} >&-", f"{asked} --json >&- <&-"):
        done = shell(line)
        assert done.returncode == 8
        assert b"standard output is closed" in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_other_closed_streams_do_not_matter(clip: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    asked = f"{shlex.join(RUN)} {clip} What? -q --bundle {tiny_bundle} --max-new-tokens 2"
    want = shell(asked)
    assert want.returncode == 0, want.stderr
    for streams in ("2>&-", "<&-", "<&- 2>&-"):
        done = shell(f"{asked} {streams}")
        assert (done.returncode, done.stdout) == (0, want.stdout), streams
    # A batch writes into its file, so it needs no standard output.
    source, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"audio": str(clip), "question": "What?"}) + "\n")
    batch = f"{shlex.join(RUN)} --batch {source} -o {out} --bundle {tiny_bundle}"
    assert shell(f"{batch} --max-new-tokens 2 >&- <&- 2>&-").returncode == 0
    assert "answer" in json.loads(out.read_text())
    done = shell(f"{shlex.join(RUN)} - What? <&-")
    assert done.returncode == 2
    assert b"standard input, which is closed" in done.stderr


def test_libraries_that_print_are_silenced(tmp_path: Path, tone: Tone, tiny_bundle: Path) -> None:
    # libmpg123 warned about a cut file on standard error, past --quiet.
    path = tmp_path / "cut.mp3"
    soundfile.write(path, tone(3.0, 44_100), 44_100)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    asked = f"{shlex.join(RUN)} {path} What? -q --bundle {tiny_bundle} --max-new-tokens 2"
    done = shell(asked)
    assert (done.returncode, done.stderr) == (0, b"")
    heard = shell(asked, TINYGIANT_DEBUG="1")
    assert b"Xing" in heard.stderr  # it does warn


# --- words --------------------------------------------------------------------------------------


def refusal(*words: str) -> str:
    with pytest.raises(UsageError) as caught:
        parse(words)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--choices", "yes", "no", "C", "Q"), ("--choices took all words", "'C', 'Q'", "last")),
        (("C", "Q", "--max-new-tokens", "x"), ("--max-new-tokens: 'x' given", "whole number")),
        (("C", "Q", "--threads", "1.5"), ("--threads: '1.5' given", "whole number")),
        (("C", "Q", "--max-audio", "long"), ("--max-audio: 'long' given", "seconds")),
        (("C", "Q", "--max-audio", "-1"), ("--max-audio: '-1' given", "above 0")),
        (("C", "what", "is", "heard?"), ("'is heard?' is left over", "in quotes")),
        (("C", "Q", "--choise", "a", "b"), ("no option --choise", "did you mean --choices?")),
        (("--batch", "D", "--question", "Q", "-o", "-"), ("-o -", "OUT.jsonl")),
        ((), ("no clip given",)),
    ],
)
def test_wrong_options_are_told_by_their_cause(
    words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    message = refusal(*words)
    for part in (*parts, "--help") if words and "-o" not in words else parts:
        if part == "--help" and "--choices" in words:
            continue
        assert part in message
    assert "_positive" not in message


def test_wrong_words_are_told_for_what_they_are(
    clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["What is heard?", str(clip)]) == 2
    message = capsys.readouterr().err
    assert f"the clip comes first, then the question: tg-run {clip} 'What is heard?'" in message
    # `tg-run *.wav QUESTION`, as the shell hands it on.
    for words in ([str(clip), str(clip)], [str(clip), str(clip), "What?"]):
        assert cli.main(words) == 2
        message = capsys.readouterr().err
        assert f"{clip} is a second clip" in message
        assert "--batch FOLDER --question QUESTION" in message


def test_raw_samples_in_a_file(
    tone: Tone, tmp_path: Path, tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "clip.raw"
    path.write_bytes((tone(0.8, 8_000) * 32_767).astype("<i2").tobytes())
    options = ["--bundle", str(tiny_bundle), "--max-new-tokens", "2", "--json"]
    assert cli.main([str(path), "What?", *options, "--pcm-rate", "8000"]) == 0
    audio = json.loads(capsys.readouterr().out)["audio"]
    assert (audio["used_s"], audio["sampling_rate_hz"]) == (0.8, 8_000)
    assert cli.main([str(path), "What?", *options]) == 3
    assert "--pcm-rate 16000" in capsys.readouterr().err
    assert cli.main([str(tmp_path / "none.raw"), "What?", "--pcm-rate", "8000"]) == 3
    assert "no such file" in capsys.readouterr().err


def test_paths_as_terminals_drop_them(tmp_path: Path) -> None:
    path = tmp_path / "two words.wav"
    path.touch()
    for text in (
        str(path),
        f"'{path}'",
        f'"{path}"',
        str(path).replace(" ", "\\ "),
        path.as_uri(),
    ):
        assert dropped_path(text) == str(path)
    (tmp_path / "it's.wav").touch()
    assert dropped_path(f"{tmp_path}/it's.wav") == f"{tmp_path}/it's.wav"
    assert dropped_path("~/a.wav") == os.path.expanduser("~/a.wav")
    assert dropped_path("it's gone.wav") == "it's gone.wav"
