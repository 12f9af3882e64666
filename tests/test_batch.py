"""Batches: what is written for each item, resuming, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.runtime import Query, TinyGiant, loading
from tinygiant.runtime.cli import batch
from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.ort.sessions import Graph

Tone = Callable[[float, int], NDArray[np.float32]]
Run = Callable[..., tuple[int, str, str]]
SCHEMA = Path(batch.__file__).parents[1] / "schema" / "answer.schema.json"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, tone: Tone) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    (folder / "deeper").mkdir()
    for name, seconds in (("a.wav", 0.5), ("b.FLAC", 0.7), ("deeper/c.ogg", 0.9)):
        soundfile.write(folder / name, tone(seconds, 16_000), 16_000)
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture
def run(
    tiny: TinyGiant, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run tg-run --batch in this process: exit code, standard output and error."""
    monkeypatch.setattr(loading, "load", lambda *_, **__: tiny)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["--batch", *map(str, arguments), "--max-new-tokens", "3"])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def write(path: Path, *items: Any) -> Path:
    path.write_text("".join(f"{i if isinstance(i, str) else json.dumps(i)}\n" for i in items))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_folder_of_clips(run: Run, clips: Path, tmp_path: Path, tiny: TinyGiant) -> None:
    asked = ("--question", "What is heard?", "--choices", "a dog", "a siren")
    code, out, err = run(clips, "-o", tmp_path / "out.jsonl", *asked)
    assert (code, out) == (0, "")
    records = read(tmp_path / "out.jsonl")
    assert [record["id"] for record in records] == ["a.wav", "b.FLAC", "deeper/c.ogg"]
    for record in records:
        want = tiny.ask(
            clips / record["audio"], "What is heard?", ["a dog", "a siren"], max_new_tokens=3
        )
        assert record["answer"]["text"] == want.text
        assert record["question"] == "What is heard?"
    assert "[" in err
    assert "2/3" in err
    assert "complete" in err


def test_a_folder_of_a_phone(run: Run, tmp_path: Path, tone: Tone) -> None:
    # m4a and aac were skipped without a word; macOS's `._x.wav` was taken for a clip.
    folder = tmp_path / "phone"
    (folder / "__MACOSX").mkdir(parents=True)
    soundfile.write(folder / "x.wav", tone(0.3, 16_000), 16_000)
    (folder / "._x.wav").write_bytes(b"\0\5\x16\7" + bytes(200))
    (folder / "__MACOSX" / "._x.m4a").write_bytes(b"\0\5\x16\7" + bytes(200))
    for name in ("memo.m4a", "call.AAC", "film.mp4", "note.amr"):
        (folder / name).write_bytes(b"not really")
    for name in ("cover.jpg", "list.txt"):
        (folder / name).write_bytes(b"no sound")
    out = tmp_path / "out.jsonl"
    code, _, err = run(folder, "-o", out, "--question", "What?")
    assert code == 11
    records = {record["id"]: record for record in read(out)}
    assert [*records] == ["call.AAC", "film.mp4", "memo.m4a", "note.amr", "x.wav"]
    assert [name for name, record in records.items() if "answer" in record] == ["x.wav"]
    assert "note: 2 files left out, not audio by their names: cover.jpg, list.txt" in err


def test_the_output_is_a_file(run: Run, clips: Path) -> None:
    code, _, err = run(clips, "-o", "-", "--question", "What?")
    assert code == 2
    assert "a batch resumes from its output, which must be a file" in err
    assert not Path("-").exists()


def test_counts_have_their_plural(run: Run, clips: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "one.jsonl", {"audio": str(clips / "a.wav"), "question": "What?"})
    assert "tg-run: 1 item in 0 s" in run(source, "-o", tmp_path / "one.out")[2]
    source = write(tmp_path / "bad.jsonl", "{", {"audio": "none.wav", "question": "What?"})
    err = run(source, "-o", tmp_path / "bad.out")[2]
    assert "2 items in 0 s" in err
    assert "2 items could not be answered" in err


def test_a_file_of_questions_and_its_bad_items(run: Run, clips: Path, tmp_path: Path) -> None:
    source = write(
        clips / "questions.jsonl",
        {"audio": "a.wav", "question": "What?", "choices": ["a dog", "a siren"], "id": "first"},
        {"audio_path": "deeper/c.ogg", "question": "What?"},
        "",
        "{no json",
        {"audio": "missing.wav", "question": "What?"},
        {"audio": "a.wav", "question": " "},
        {"audio": "a.wav", "question": "What?", "choices": ["one"]},
        {"audio": "a.wav", "question": "What?", "choices": "one"},
        {"audio": 5, "question": "What?"},
        {"audio": "a.wav"},
        {"audio": str(clips / "a.wav"), "question": "\u97f3?", "id": 99},
        {"audio": "a.wav", "question": "What?", "id": [1]},
        {"audio": "a\0.wav", "question": "What?"},
    )
    code, _, err = run(source, "-o", tmp_path / "out.jsonl")
    assert code == 11
    records = {record["id"]: record for record in read(tmp_path / "out.jsonl")}
    assert [*records] == ["first", *map(str, (2, 4, 5, 6, 7, 8, 9, 10, 99, 12, 13))]
    answered = {item_id for item_id, record in records.items() if "answer" in record}
    assert answered == {"first", "2", "99"}
    kinds = {item_id: r["error"]["kind"] for item_id, r in records.items() if "error" in r}
    assert kinds.pop("5") == kinds.pop("13") == "AudioError"
    assert set(kinds.values()) == {"QuestionError"}
    assert "line 4 is not a JSON object" in records["4"]["error"]["message"]
    schema = json.loads(SCHEMA.read_text())
    answer = {key: value for key, value in schema.items() if key[0] != "$"}
    text = json.dumps({"$defs": schema["$defs"], **schema["$defs"]["batch"]})
    whole = json.loads(text.replace('"$ref": "#"', '"$ref": "#/$defs/answer"'))
    whole["$defs"]["answer"] = answer
    for record in records.values():
        jsonschema.validate(record, whole, jsonschema.Draft202012Validator)
    assert "9 items could not be answered" in err.splitlines()[-1]
    assert all(line.startswith("tg-run: ") for line in err.splitlines())


def test_a_second_start_does_only_what_is_left(
    run: Run, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (clips, "-o", tmp_path / "out.jsonl", "--question", "What?")
    run(*asked)
    whole = (tmp_path / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    untimed = [{**record, "answer": None} for record in read(tmp_path / "out.jsonl")]
    runs: list[str] = []
    events = TinyGiant.events

    def counting(self: TinyGiant, query: Query, *rest: Any) -> Any:
        runs.append(query.audio.name)
        return events(self, query, *rest)

    monkeypatch.setattr(TinyGiant, "events", counting)
    for kept, want in (
        (whole, []),
        (lines[0] + lines[1], ["c.ogg"]),
        (lines[0] + lines[1][:50], ["b.FLAC", "c.ogg"]),  # half-written
        (lines[0] + lines[1][:-1], ["b.FLAC", "c.ogg"]),
        (lines[0][:5], ["a.wav", "b.FLAC", "c.ogg"]),
        (b"", ["a.wav", "b.FLAC", "c.ogg"]),
    ):
        (tmp_path / "out.jsonl").write_bytes(kept)
        runs.clear()
        code, _, _ = run(*asked)
        assert (code, runs) == (0, want)
        assert [{**r, "answer": None} for r in read(tmp_path / "out.jsonl")] == untimed
        assert (tmp_path / "out.jsonl").read_bytes().startswith(kept if kept[-1:] == b"\n" else b"")


def test_failed_items_still_count_at_a_second_start(run: Run, clips: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "q.jsonl", {"audio": "missing.wav", "question": "What?"})
    for _ in range(2):
        code, _, _ = run(source, "-o", tmp_path / "out.jsonl")
        assert code == 11
    assert len(read(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    "content",
    ["somebody's notes", "some notes\n", "{}\n", "[1]\n", '{"id": "a.wav", "question": "Else?"}\n'],
)
def test_a_foreign_file_is_never_touched(
    run: Run, clips: Path, tmp_path: Path, content: str
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    code, _, err = run(clips, "-o", out, "--question", "What?")
    assert (code, out.read_text()) == (2, content)
    assert "name another output" in err


def test_answers_to_other_questions_are_not_taken_for_these(
    run: Run, clips: Path, tmp_path: Path
) -> None:
    run(clips, "-o", tmp_path / "out.jsonl", "--question", "What?")
    code, _, err = run(clips, "-o", tmp_path / "out.jsonl", "--question", "Who?")
    assert code == 2
    assert "line 1 answers something that is not asked here" in err


def test_bad_sources(run: Run, clips: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    twice = write(tmp_path / "twice.jsonl", *[{"audio": "a", "question": "b", "id": "c"}] * 2)
    none = write(tmp_path / "none.jsonl", "")
    out = ("-o", tmp_path / "out.jsonl")
    for arguments, code, part in (
        ((tmp_path / "missing.jsonl", *out), 2, "cannot be read"),
        ((tmp_path / "empty", *out, "--question", "What?"), 2, "has the name of a clip"),
        ((none, *out), 2, "no line in it"),
        ((twice, *out), 2, "two items have the id c"),
        ((clips, *out), 2, "--question"),
        ((twice, *out, "--question", "What?"), 2, "are for a folder, and "),
        ((clips, *out, "--question", " "), 5, "empty"),
        ((clips, *out, "--question", "What?", "--choices", "one"), 5, "1 choice given"),
        ((clips, "-o", tmp_path / "no" / "out.jsonl", "--question", "What?"), 8, "another output"),
    ):
        found, _, err = run(*arguments)
        assert (found, part in err, len(err.splitlines())) == (code, True, 1), arguments
    assert not (tmp_path / "out.jsonl").exists()


def test_a_clip_asked_twice_is_encoded_once(
    run: Run, clips: Path, tmp_path: Path, tone: Tone, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "new.wav", tone(0.6, 16_000) * 0.3, 16_000)
    items = [{"audio": "new.wav", "question": f"What {n}?"} for n in range(3)]
    runs: list[str] = []
    graph_run = Graph.run
    monkeypatch.setattr(
        Graph, "run", lambda self, inputs: (runs.append(self.name), graph_run(self, inputs))[1]
    )
    run(write(tmp_path / "q.jsonl", *items), "-o", tmp_path / "out.jsonl")
    assert runs.count("whisper_encoder") == 1


def test_a_broken_bundle_ends_the_batch(
    run: Run, clips: Path, tmp_path: Path, tiny: TinyGiant, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinygiant.runtime.errors import BundleError

    def fail(*_: object, **__: object) -> None:
        raise BundleError("was changed")

    monkeypatch.setattr(tiny, "events", fail)
    code, _, err = run(clips, "-o", tmp_path / "out.jsonl", "--question", "What?")
    assert (code, (tmp_path / "out.jsonl").exists()) == (4, False)
    assert "was changed" in err


def test_unforeseen_failures_are_records(
    run: Run, clips: Path, tmp_path: Path, tiny: TinyGiant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tiny, "events", fail)
    code, _, _ = run(clips, "-o", tmp_path / "out.jsonl", "--question", "What?")
    records = read(tmp_path / "out.jsonl")
    assert (code, len(records)) == (11, 3)
    assert records[0]["error"] == {"kind": "MemoryError", "exit_code": 1, "message": "MemoryError"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error(clips: Path) -> None:
    items = batch.read_items(str(clips), "What?", None)
    with open("/dev/full", "wb", buffering=0) as full:
        output = batch.Output(Path(os.devnull), full, items)
        with pytest.raises(OSError, match="make room"):
            output.write(items[0], answer={})


def test_only_files_are_outputs(run: Run, clips: Path) -> None:
    for path in ("/dev/zero", "/dev/null", clips):
        code, _, err = run(clips, "-o", path, "--question", "What?")
        assert (code, len(err.splitlines())) == (8, 1)


def test_items_in_work_at_a_time_change_nothing(
    run: Run, clips: Path, tmp_path: Path, tiny: TinyGiant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines come in the order of the source, whichever is done first; bad items stay in theirs."""
    asked = [("a.wav", "What?"), ("none.wav", "What?"), ("b.FLAC", "Why?"), ("a.wav", ""),
             ("deeper/c.ogg", "Who?"), ("b.FLAC", "Where?")]  # fmt: skip
    items = [{"audio": str(clips / audio), "question": question} for audio, question in asked]
    source = write(tmp_path / "q.jsonl", *items, {"question": "Of what?"}, items[0])
    sizes: list[int] = []
    batch_of = TinyGiant.batch
    monkeypatch.setattr(
        TinyGiant, "batch", lambda self, size: (sizes.append(size), batch_of(self, size))[1]
    )
    found = []
    for n in (1, 3, None):
        option = [] if n is None else ["--parallel", n]
        out = tmp_path / f"{n}.jsonl"
        assert run(source, "-o", out, *option)[0] == 11
        for record in read(out):
            if "answer" in record:
                assert record["answer"].pop("timings")["total_s"] > 0
                del record["answer"]["tokens"]
            found.append((n, record))
    assert sizes == [1, 3, None]
    by_n = [[record for m, record in found if m == n] for n in (1, 3, None)]
    assert by_n[0] == by_n[1] == by_n[2]
    assert [r["id"] for r in by_n[0] if "error" in r] == ["2", "4", "7"]


def test_kill_loses_at_most_the_item_in_work(
    clips: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    items = [{"audio": str(clips / "a.wav"), "question": f"What {n}?"} for n in range(40)]
    source, out = write(tmp_path / "q.jsonl", *items), tmp_path / "out.jsonl"
    module = [sys.executable, "-m", "tinygiant.runtime.cli.main"]
    model = ["--bundle", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "20"]
    model += ["--parallel", "1"]
    command = [*module, "--batch", str(source), "-o", str(out), *model]
    n_before = 0
    for wanted in (3, 20):
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(child.pid, signal.SIGKILL)
        _, err = child.communicate()
        n_started = len(re.findall(r"\] \d+/\d+[,:]", err))
        before = out.read_bytes()
        n_lost = n_before + n_started - before.count(b"\n")
        assert n_lost in (0, 1)
        n_before = before.count(b"\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    records = read(out)
    assert [record["id"] for record in records] == [str(n + 1) for n in range(40)]
    assert all("answer" in record for record in records)


def test_items_are_read_in_order(tmp_path: Path) -> None:
    source = write(tmp_path / "q.jsonl", *({"audio": f"{n}", "question": "?"} for n in "cab"))
    items = batch.read_items(str(source), None, None)
    assert [(item.id, item.audio, item.path) for item in items] == [
        (str(n), name, tmp_path / name) for n, name in enumerate("cab", start=1)
    ]
    with pytest.raises(UsageError):
        batch.read_items(str(tmp_path / "nothing"), None, None)
