"""What can happen to a process and its disk: killed, out of memory or space, files replaced.

Nothing may be lost or half written, and every end has a documented exit code.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import soundfile
from numpy.typing import NDArray

from tinygiant.export.bundle import staged_folder
from tinygiant.runtime import load
from tinygiant.runtime.bundle import MANIFEST_NAME, Bundle
from tinygiant.runtime.cli import main as cli
from tinygiant.runtime.errors import BundleError, StorageError, TinyGiantError, UsageError
from tinygiant.runtime.ort.machine import Machine
from tinygiant.runtime.ort.memory import require_memory

Tone = Callable[[float, int], NDArray[np.float32]]

DOCUMENTED = {0, 1, 2, 3, 4, 5, 8}


def mounts() -> bool:
    """Whether this machine lets a process mount file systems of its own."""
    if shutil.which("unshare") is None:
        return False
    run = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    )
    return run.returncode == 0


needs_mounts = pytest.mark.skipif(not mounts(), reason="mounting is not allowed here")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, tone: Tone) -> Path:
    path = tmp_path_factory.mktemp("clip") / "tone.wav"
    soundfile.write(path, tone(1.0, 16_000), 16_000)
    return path


def tg_run(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tinygiant.runtime.cli.main", *map(str, arguments)]


def state(*folders: Path) -> dict[Path, tuple[int, int]]:
    """Size and modification time of everything below the folders."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("delay_s", [0.05, 0.3, 0.6, 1.0])
def test_killed_at_any_moment_nothing_changes(
    bundle_copy: Path, clip: Path, tmp_path: Path, delay_s: float
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    before = state(bundle_copy, home, clip.parent)
    child = subprocess.Popen(
        tg_run(clip, "What?", "--bundle", bundle_copy, "--max-new-tokens", 3_000, "--raw"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=home,
        env=os.environ | {"HOME": str(home), "TMPDIR": str(home)},
    )
    time.sleep(delay_s)
    child.kill()
    assert child.wait(timeout=30) == -signal.SIGKILL
    assert state(bundle_copy, home, clip.parent) == before


def bounded(limit_mib: int, *command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in an address space of so many MiB."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit_mib << 20, limit_mib << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        timeout=60,
        check=False,
        **options,
    )


@pytest.mark.parametrize("limit_mib", [60, 120, 180, 210, 240, 270, 300, 400])
def test_out_of_memory_ends_in_a_line(tiny_bundle: Path, clip: Path, limit_mib: int) -> None:
    options = ("--bundle", tiny_bundle, "--threads", 1, "--max-new-tokens", 3)
    run = bounded(limit_mib, *tg_run(clip, "What?", *options))
    assert "Traceback" not in run.stderr
    assert run.returncode in DOCUMENTED, run.stderr
    assert run.returncode == 0 or run.stderr.strip()
    if limit_mib == 60:
        assert run.stderr == (
            "tg-run: needs at least 100 MiB of address space to start, "
            f"{re.findall('[0-9]+', run.stderr)[-1]} are left; raise ulimit -v\n"
        )


WATCHED = """
import os, signal, sys, time
from tinygiant.runtime.cli.watching import watched
def command():
    print(os.getpid(), flush=True)
    how = sys.argv[1]
    if how == "wait":
        try:
            time.sleep(50)
        except KeyboardInterrupt:
            return 130
    if how.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(50)
    return int(how)
sys.exit(watched("tg", command))
"""


@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("0", 0, ""),
        ("4", 4, ""),
        ("SIGSEGV", 1, "tg: ended by SIGSEGV in native code"),
        ("SIGABRT", 1, "tg: ended by SIGABRT in native code"),
        ("SIGBUS", 1, "tg: ended by SIGBUS in native code"),
        ("SIGKILL", -signal.SIGKILL, ""),
        ("SIGTERM", -signal.SIGTERM, ""),
    ],
)
def test_a_death_in_native_code_is_told_where_memory_is_bounded(
    how: str, code: int, told: str
) -> None:
    run = bounded(1_000, sys.executable, "-c", WATCHED, how)
    assert run.returncode == code
    assert run.stderr.startswith(told)
    assert run.stderr.count("\n") == (1 if told else 0)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_signal_to_a_watched_command_reaches_it(number: signal.Signals, code: int) -> None:
    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1_000 << 20, 1_000 << 20))
        # A shell starts what it runs in the background with Ctrl-C ignored, and so its children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    child = subprocess.Popen(
        [sys.executable, "-c", WATCHED, "wait"],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )
    assert child.stdout is not None
    command = int(child.stdout.readline())
    assert command != child.pid
    time.sleep(0.2)
    child.send_signal(number)
    assert child.wait(timeout=30) == code
    for _ in range(100):
        if not psutil.pid_exists(command) or is_dead(command):
            return
        time.sleep(0.1)
    pytest.fail("the command outlived the one that was signalled")


def is_dead(pid: int) -> bool:
    """Whether a process is no more than an entry that nobody has asked about."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return True


def test_without_a_bound_nothing_is_started() -> None:
    command = [sys.executable, "-c", WATCHED + "\n", "0"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out, _ = run.communicate(timeout=30)
    assert int(out) == run.pid


def machine(
    root: Path,
    *,
    available_mib: int = 4_000,
    swap_mib: int = 0,
    space_mib: int | None = None,
    groups: dict[str, str] | None = None,
) -> Machine:
    """A forged machine with 4,000 MiB."""
    bound = "unlimited" if space_mib is None else str(space_mib << 20)
    files = {
        "proc/meminfo": f"MemTotal: {4_000 << 10} kB\nMemAvailable: {available_mib << 10} kB\n"
        f"SwapTotal: {swap_mib << 10} kB\nSwapFree: {swap_mib << 10} kB\n",
        "proc/self/limits": "Limit                     Soft Limit           Hard Limit   Units\n"
        f"Max address space         {bound}            unlimited            bytes\n",
        "proc/self/statm": "0 0 0 0 0 0 0",
    } | (groups or {})
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return Machine(root)


def large(bundle: Bundle, graph_mib: int) -> Bundle:
    """The bundle as if each of its graphs had so many MiB."""
    graphs = {graph.file for graph in bundle.manifest.graphs.values()}
    files = tuple(
        dataclasses.replace(entry, size_bytes=graph_mib << 20 if entry.path in graphs else 0)
        for entry in bundle.manifest.files
    )
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, files=files))


V2 = {"proc/self/cgroup": "0::/system.slice/tg.service\n"}
V1 = {"proc/self/cgroup": "5:cpu:/\n4:hugetlb,memory:/docker/1\n0::/\n"}
OURS = "sys/fs/cgroup/system.slice/tg.service/memory"


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        # Graphs of 1,000 MiB: 500 MiB of memory at the least, 1,000 of address space.
        ({}, None),
        ({"available_mib": 501}, None),
        ({"available_mib": 499}, "500 MiB of memory and swap, 499 are left"),
        ({"available_mib": 100, "swap_mib": 500}, None),
        ({"available_mib": 100, "swap_mib": 300}, "500 MiB of memory and swap, 400 are left"),
        ({"space_mib": 1_001}, None),
        ({"space_mib": 999}, "1000 MiB of address space (ulimit -v), 999 are left"),
        ({"groups": V2 | {f"{OURS}.max": "max\n"}}, None),
        ({"groups": V2 | {f"{OURS}.max": str(400 << 20)}}, "500 MiB of memory and swap, 400"),
        ({"groups": V2 | {f"{OURS}.max": str(400 << 20)}, "swap_mib": 200}, None),
        (
            {
                "groups": V2 | {f"{OURS}.max": str(400 << 20), f"{OURS}.swap.max": "0"},
                "swap_mib": 200,
            },
            "500 MiB of memory and swap, 400",
        ),
        # What a group holds of files can be dropped; what others in it hold of memory cannot.
        (
            {
                "groups": V2
                | {
                    f"{OURS}.max": str(900 << 20),
                    f"{OURS}.current": str(800 << 20),
                    f"{OURS}.stat": f"anon 0\ninactive_file {500 << 20}\nactive_file {9 << 20}",
                }
            },
            None,
        ),
        (
            {"groups": V2 | {f"{OURS}.max": str(900 << 20), f"{OURS}.current": str(800 << 20)}},
            "500 MiB of memory and swap, 100",
        ),
        # A limit above ours binds too, and so does one of version 1.
        ({"groups": V2 | {"sys/fs/cgroup/system.slice/memory.max": str(300 << 20)}}, "300 are"),
        (
            {"groups": V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(200 << 20)}},
            "200 are left",
        ),
        (
            {"groups": V1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}},
            None,
        ),
    ],
)
def test_memory_is_counted_before_anything_is_loaded(
    tiny_bundle: Path, tmp_path: Path, found: dict[str, Any], refused: str | None
) -> None:
    bundle = large(Bundle.open(tiny_bundle, verify=False), 1_000)
    forged = machine(tmp_path, **found)
    if refused is None:
        require_memory(bundle, keep=False, machine=forged)
        return
    with pytest.raises(TinyGiantError, match=re.escape(refused)) as caught:
        require_memory(bundle, keep=False, machine=forged)
    assert (caught.value.exit_code, str(caught.value).count("\n")) == (1, 0)


def test_low_memory_mode_needs_the_largest_graph_alone(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = large(Bundle.open(tiny_bundle, verify=False), 1_000)
    forged = machine(tmp_path, available_mib=600)
    require_memory(bundle, keep=False, machine=forged)
    with pytest.raises(TinyGiantError, match="use --memory low"):
        require_memory(bundle, keep=True, machine=forged)


def test_a_system_that_does_not_tell_refuses_nothing(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = large(Bundle.open(tiny_bundle, verify=False), 10**6)
    require_memory(bundle, keep=True, machine=Machine(tmp_path))


def test_where_a_question_works_the_check_does_not_refuse(tiny_bundle: Path, clip: Path) -> None:
    """The same bound with and without the check: what answers without it is not refused by it.

    It may still run out of memory: this near to the bound no two runs need quite the same.
    """
    options = ("--bundle", tiny_bundle, "--threads", 1, "--max-new-tokens", 2, "-q")
    for limit_mib in (250, 290, 330):
        free = bounded(limit_mib, *tg_run(clip, "What?", *options, "--no-memory-check"))
        checked = bounded(limit_mib, *tg_run(clip, "What?", *options))
        if free.returncode == 0 and checked.returncode != 0:
            assert "memory ran out" in checked.stderr, checked.stderr
            assert "needs at least" not in checked.stderr


def test_the_check_can_be_left_out(
    tiny_bundle: Path,
    clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Machine, "obtainable_bytes", lambda self: 10)
    options = [str(clip), "What?", "--bundle", str(tiny_bundle), "--max-new-tokens", "2", "-q"]
    assert cli.main(options) == 1
    assert re.fullmatch(r"tg-run: the model needs at least \d+ MiB .*\n", capsys.readouterr().err)
    assert cli.main([*options, "--no-memory-check"]) == 0


def test_native_code_out_of_memory_says_so(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    with pytest.raises(TinyGiantError, match="memory ran out in graph") as caught:
        load(tiny_bundle)
    assert caught.value.exit_code == 1  # the bundle itself is sound


def test_nothing_need_be_writable(tiny_bundle: Path, clip: Path, tmp_path: Path) -> None:
    """Under a limit of zero bytes a file, any write to a disk would fail."""
    run = subprocess.run(
        tg_run(clip, "What?", "-q", "--bundle", tiny_bundle, "--max-new-tokens", 2),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()


STAGE = """
import sys
from pathlib import Path
from tinygiant.export.bundle import staged_folder
from tinygiant.runtime.errors import TinyGiantError
try:
    with staged_folder(Path(sys.argv[1]), force=True) as folder:
        (folder / "manifest.json").write_text("new")
        if sys.argv[2] == "fill":
            (folder / "weights").write_bytes(bytes(4 << 20))
        else:
            print("staged", flush=True)
            sys.stdin.read()
except TinyGiantError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@needs_mounts
def test_a_full_disk_leaves_the_old_bundle(tmp_path: Path) -> None:
    script = (
        "mount -t tmpfs -o size=1m none /mnt && mkdir /mnt/b && echo old >/mnt/b/manifest.json; "
        '"$@"; code=$?; cat /mnt/b/manifest.json; ls -A /mnt; exit $code'
    )
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", STAGE, "/mnt/b", "fill"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == StorageError.exit_code
    assert "No space left" in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stdout.split() == ["old", "b"]


@needs_mounts
def test_a_read_only_disk_is_one_line(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o ro none /mnt && exec "$@"'
    run = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", sys.executable, "-c", STAGE, "/mnt/b", "fill"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == StorageError.exit_code
    assert "Read-only file system" in run.stderr


def staging(target: Path) -> subprocess.Popen[str]:
    """An export that has written its files and waits."""
    child = subprocess.Popen(
        [sys.executable, "-c", STAGE, str(target), "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "staged\n"
    return child


def test_a_killed_export_leaves_the_old_bundle_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged_folder(target) as folder:
        (folder / MANIFEST_NAME).write_text("old")
    child = staging(target)
    child.kill()
    child.wait(timeout=30)
    assert (target / MANIFEST_NAME).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2  # the killed one's folder is still there
    with staged_folder(target, force=True) as folder:
        (folder / MANIFEST_NAME).write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (target / MANIFEST_NAME).read_text() == "newer"


def test_two_exports_at_once_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    child = staging(target)
    with staged_folder(target) as folder:  # must not remove the other's folder
        (folder / MANIFEST_NAME).write_text("mine")
    assert (target / MANIFEST_NAME).read_text() == "mine"
    with pytest.raises(UsageError), staged_folder(target):
        pass
    child.communicate("", timeout=30)
    assert child.returncode == 0  # it was told to replace
    assert (target / MANIFEST_NAME).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def replace(bundle: Path, source: Path) -> None:
    """Put another bundle in place of ``bundle`` as tg-export --force does."""
    with staged_folder(bundle, force=True) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def reversed_vocabulary(bundle: Path, target: Path) -> Path:
    """A bundle that fits and answers differently: its embeddings are in another order."""
    from tinygiant.runtime.bundle import describe_file

    shutil.copytree(bundle, target)
    np.save(target / "embed_tokens.npy", np.load(bundle / "embed_tokens.npy")[::-1].copy())
    manifest = json.loads((target / MANIFEST_NAME).read_text())
    for entry in manifest["files"]:
        entry["sha256"] = describe_file(target, entry["path"]).sha256
    (target / MANIFEST_NAME).write_text(json.dumps(manifest))
    return target


def test_a_loaded_model_survives_the_replacement_of_its_bundle(
    bundle_copy: Path, tmp_path: Path, tone: Tone
) -> None:
    other = reversed_vocabulary(bundle_copy, tmp_path / "other")
    model = load(bundle_copy, threads=1)
    clip = (tone(1.0, 16_000), 16_000)
    before = model.ask(clip, "What is heard?", max_new_tokens=12).raw_text
    replace(bundle_copy, other)
    assert model.ask(clip, "What is heard?", max_new_tokens=12).raw_text == before
    after = load(bundle_copy, threads=1).ask(clip, "What is heard?", max_new_tokens=12).raw_text
    assert after != before


def test_low_memory_mode_refuses_to_mix_two_bundles(
    bundle_copy: Path, tmp_path: Path, tone: Tone
) -> None:
    """Graphs are loaded when they are needed: those of a new bundle do not fit the old parts."""
    other = reversed_vocabulary(bundle_copy, tmp_path / "other")
    model = load(bundle_copy, threads=1, memory="low")
    clip = (tone(1.0, 16_000), 16_000)
    model.ask(clip, "What is heard?", max_new_tokens=2)
    replace(bundle_copy, other)
    with pytest.raises(BundleError, match="was replaced"):
        model.ask(clip, "What is heard?", max_new_tokens=2)


def test_a_bundle_removed_while_in_use(bundle_copy: Path, tone: Tone) -> None:
    clip = (tone(1.0, 16_000), 16_000)
    loaded = load(bundle_copy, threads=1)
    low = load(bundle_copy, threads=1, memory="low")
    expected = loaded.ask(clip, "What is heard?", max_new_tokens=5).raw_text
    shutil.rmtree(bundle_copy)
    assert loaded.ask(clip, "What else is heard?", max_new_tokens=5).raw_text
    assert loaded.ask(clip, "What is heard?", max_new_tokens=5).raw_text == expected
    with pytest.raises(BundleError):
        low.ask(clip, "What is heard?", max_new_tokens=5)


JUMPING_CLOCK = """
import itertools, time
offsets_s = itertools.cycle([0, 3_600, -3_600, 0, -50_000_000])
seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() + next(offsets_s)
time.time_ns = lambda: nanoseconds() + 10**9 * next(offsets_s)
"""


@pytest.fixture
def jumping_clock(tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose wall clock jumps by hours whenever it is read."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(JUMPING_CLOCK)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    code = "import time; print(time.time() - time.time() < -3000)"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == "True\n"
    return environment


def assert_plausible(timings: dict[str, Any]) -> None:
    """Of a question that a process answered within a minute."""
    stages = [timings[f"{name}_s"] for name in ("audio", "encode", "project", "prefill", "decode")]
    assert all(0.0 <= seconds < 60.0 for seconds in stages)
    assert sum(stages) <= timings["total_s"] + 1e-3
    assert 0.0 < timings["first_token_s"] <= timings["total_s"] < 60.0


def test_a_clock_that_jumps_changes_no_timing(
    tiny_bundle: Path, clip: Path, jumping_clock: dict[str, str]
) -> None:
    options = ("--bundle", tiny_bundle, "--threads", 1, "--max-new-tokens", 3, "--json")
    run = subprocess.run(
        tg_run(clip, "What?", *options),
        capture_output=True,
        text=True,
        env=jumping_clock,
        timeout=60,
        check=True,
    )
    assert_plausible(json.loads(run.stdout)["timings"])


def test_a_clock_that_jumps_during_a_batch(
    tiny_bundle: Path, clip: Path, tmp_path: Path, jumping_clock: dict[str, str]
) -> None:
    """Also between two runs of it: what is done is known by its content, not by its time."""
    clips = tmp_path / "clips"
    clips.mkdir()
    output = tmp_path / "out.jsonl"
    questions = tmp_path / "questions.jsonl"
    for name in ("1.wav", "2.wav"):
        shutil.copy(clip, clips / name)
    questions.write_text(
        "".join(json.dumps({"audio": f"clips/{n}.wav", "question": "What?"}) + "\n" for n in "12")
    )
    command = tg_run("--batch", questions, "-o", output, "--bundle", tiny_bundle, "--threads", 1)
    kept = ""
    for time_s in (4_000_000_000, 1_000):
        for path in (questions, *clips.iterdir()):
            os.utime(path, (time_s, time_s))
        run = subprocess.run(
            [*command, "--max-new-tokens", "3"],
            capture_output=True,
            text=True,
            env=jumping_clock,
            timeout=60,
            check=True,
        )
        left = re.findall(r"([\d.]+) s left", run.stderr)
        assert all(float(seconds) < 600 for seconds in left)
        lines = output.read_text().splitlines(keepends=True)
        assert len(lines) == 2
        for line in lines:
            assert_plausible(json.loads(line)["answer"]["timings"])
        # The second run finds the first item answered, and answers the other one.
        assert lines[0].startswith(kept)
        kept = lines[0]
        output.write_text(kept)


def test_a_clock_that_jumps_under_a_server(
    tiny_bundle: Path, clip: Path, jumping_clock: dict[str, str]
) -> None:
    command = [Path(sys.executable).parent / "tg-serve", "--bundle", tiny_bundle, "--port", "0"]
    audio = base64.b64encode(clip.read_bytes()).decode()
    content = [
        {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}},
        {"type": "text", "text": "What?"},
    ]
    request = {
        "model": "tinygiant",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 3,
    }
    with subprocess.Popen(
        [*command, "--threads", "1"], stderr=subprocess.PIPE, text=True, env=jumping_clock
    ) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"http://[\d.]+:\d+", process.stderr.readline())
            assert found is not None
            with httpx.Client(base_url=found[0], timeout=60) as client:
                created = []
                for stream in (False, True, False, False):
                    reply = client.post("/v1/chat/completions", json=request | {"stream": stream})
                    assert reply.status_code == 200
                    if stream:
                        assert reply.text.endswith("data: [DONE]\n\n")
                    else:
                        created.append(reply.json()["created"])
                # The time of day is told as it is; it is the only thing that jumps.
                assert max(created) - min(created) > 3_000
                waited = re.findall(
                    r"^(tinygiant_\S*seconds_sum\S*) (\S+)$",
                    client.get("/metrics").text,
                    re.MULTILINE,
                )
                assert waited
                assert all(0.0 <= float(seconds) < 120.0 for _, seconds in waited), waited
        finally:
            process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            assert process.wait(timeout=30) == 0
    assert time.monotonic() - start < 20.0


def test_durations_are_of_the_monotonic_clock() -> None:
    """The wall clock is asked for stamps and schedules alone."""
    runtime = Path(cli.__file__).parents[1]
    askers = {
        path.relative_to(runtime).as_posix()
        for path in runtime.rglob("*.py")
        if re.search(r"time\.time(_ns)?\b|datetime|localtime|gmtime", path.read_text())
    }
    assert askers == {"serve/replies.py"} | {
        f"listen/{name}.py" for name in ("ear", "keeping", "questions", "telling")
    }


@pytest.mark.parametrize("shift_s", [3_600, -3_600, -(10**9), 10**9])
def test_a_bundle_may_be_of_any_time(bundle_copy: Path, tone: Tone, shift_s: int) -> None:
    """Weights with a new time are the same weights: hashes decide, also while in use."""
    clip = (tone(1.0, 16_000), 16_000)
    model = load(bundle_copy, threads=1, memory="low")
    before = model.ask(clip, "What?", max_new_tokens=3).raw_text
    for path in bundle_copy.rglob("*"):
        if path.is_file() and path.name != MANIFEST_NAME:
            now_s = path.stat().st_mtime
            os.utime(path, (now_s + shift_s, now_s + shift_s))
    assert model.ask(clip, "What?", max_new_tokens=3).raw_text == before
    assert load(bundle_copy, threads=1).ask(clip, "What?", max_new_tokens=3).raw_text == before


STEP = """
import os, time
from tinygiant.models.training import cli, nano
def pretrain(run, name):
    print(os.getpid(), flush=True)
    time.sleep(100)
nano.pretrain = pretrain
cli.main(["encoder", "whisper", "-o", "run"])
"""
TRAINING = """
import subprocess, sys
from tinygiant.models.training import cli, nano
nano.train_nano = lambda run: subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
cli.main(["nano", "-o", "run"])
"""


def test_a_killed_training_takes_its_steps_along(tmp_path: Path) -> None:
    """tg-train nano runs its encoders in processes of their own: none may be left computing."""
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING, STEP], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert training.stdout is not None
    step = int(training.stdout.readline())
    assert not is_dead(step)
    training.kill()
    training.wait(timeout=30)
    deadline = time.monotonic() + 30
    while not is_dead(step):
        assert time.monotonic() < deadline, "the step goes on without the command"
        time.sleep(0.1)
