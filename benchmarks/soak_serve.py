"""A soak of ``tg-serve``: many mixed requests, none lost, memory and descriptors flat.

    python -m benchmarks.soak_serve --bundle DIR --requests 10000
    python -m benchmarks.soak_serve --bundle DIR --duration-s 7200 --interval-s 3 --log soak.jsonl

Starts the command on a free port and sends requests from several clients: answers, streams,
choices, known clips and new ones of different lengths and formats, clients that leave before the
request or the answer is whole, and requests that must be refused. Every request must end with a
status it may have, and the server's own count must agree. Memory, open files and threads are read
from the kernel; every minute a line of ``--log`` tells the least memory and the most files and
threads of that minute, so that neither the request being answered nor an interruption of the soak
hides the curve. The last line, on standard output and in the log, is the verdict as JSON.

It fails (exit code 1) if a request was lost or ended otherwise than it may, if the server did not
end in order, or if over the second half of the requests, when the cache of encoded clips (64 MiB)
has long been full, memory rose: by more than ``--max-mib`` from the median of the readings during
the third quarter of the requests to that of the last. Nor may open files or threads exceed those of
the first half of the readings.
"""

from __future__ import annotations

import argparse
import base64
import concurrent.futures
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import soundfile

__all__ = ["main"]

MAX_AUDIO_S = 40.0
MAX_BODY_MB = 8.0
MAX_NEW_TOKENS = 32
FORM = "multipart/form-data; boundary=x"
HABITS: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "tools": [{}], "max_tokens": 9_999}
SHAPES: dict[str, Any] = {"n": 3, "stop": ["."], "response_format": {"type": "json_object"}}
READINGS = 20  # for each line of the curve
SPARE_FILES = 4  # connections and the file being decoded, at the moment of a reading


def main() -> int:
    """Run the soak; returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--duration-s", type=float, help="in place of --requests")
    parser.add_argument("--interval-s", type=float, default=0.0, help="from request to request")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="readings, a line of JSON each")
    parser.add_argument("--sample-s", type=float, default=60.0, help="from line to line of it")
    parser.add_argument("--max-mib", type=float, default=2.0)
    parser.add_argument("--max-clip-s", type=float, default=35.0, help="longest new clip")
    options = parser.parse_args()
    if options.duration_s is not None and options.interval_s <= 0:
        parser.error("--duration-s needs --interval-s")
    if options.duration_s is not None:
        options.requests = round(options.duration_s / options.interval_s)
    command = [
        *(Path(sys.executable).parent / "tg-serve", "--port", "0"),
        *("--bundle", Path(options.bundle).resolve()),
        *("--threads", str(options.threads), "--queue", "3", "--max-audio", str(MAX_AUDIO_S)),
        *("--max-body-mb", str(MAX_BODY_MB), "--max-new-tokens", str(MAX_NEW_TOKENS)),
    ]
    with (
        # libsndfile looks for a file named "._" where it runs, and takes MP3 in memory for another
        # format if it finds one.
        tempfile.TemporaryDirectory() as folder,
        open(options.log or "/dev/null", "w", encoding="utf-8") as log,
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder) as process,
    ):
        try:
            assert process.stderr is not None
            found = re.search(r"http://[\d.]+:\d+", process.stderr.readline())
            if found is None:
                return 1
            report = soak(found[0], psutil.Process(process.pid), options, log)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
        report["exit_code"] = code
        report["passed"] = not (report["wrong"] or report["lost"] or report["risen"] or code)
        for file in (log, sys.stdout):
            print(json.dumps(report), file=file, flush=True)
    return int(not report["passed"])


def soak(
    url: str, server: psutil.Process, options: argparse.Namespace, log: IO[str]
) -> dict[str, Any]:
    """Send the requests; what came back, and what the server held meanwhile."""
    kinds = requests(options.max_clip_s)
    names = random.Random(options.seed).choices(
        list(kinds), [kind["weight"] for kind in kinds.values()], k=options.requests
    )
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    held: list[dict[str, Any]] = []
    done = threading.Event()
    start = time.monotonic()

    def watch() -> None:
        rows: list[dict[str, Any]] = []
        while not done.wait(options.sample_s / READINGS):
            rows.append(reading(server, time.monotonic() - start, statuses.total()))
            if rows[-1]["t_s"] >= options.sample_s * (len(held) + 1):
                least = min(rows, key=lambda row: float(row["rss_mib"]))
                most = {name: max(row[name] for row in rows) for name in ("files", "threads")}
                held.append(least | most)
                rows.clear()
                for file in (log, sys.stdout):
                    print(json.dumps(held[-1]), file=file, flush=True)

    def work(number: int, name: str, client: httpx.Client) -> tuple[str, int | str]:
        time.sleep(max(0.0, start + number * options.interval_s - time.monotonic()))
        return name, send(client, kinds[name], number)

    watcher = threading.Thread(target=watch)
    with (
        httpx.Client(base_url=url, timeout=300) as client,
        concurrent.futures.ThreadPoolExecutor(options.clients) as pool,
    ):
        watcher.start()
        try:
            for name, status in pool.map(lambda job: work(*job, client), enumerate(names)):
                statuses[f"{name} {status}"] += 1
                if status not in kinds[name]["expected"]:
                    wrong.append(f"{name}: {status}")
        finally:
            done.set()
            watcher.join()
        seconds = time.monotonic() - start
        time.sleep(1)
        counted = sum(
            float(line.rsplit(" ", 1)[1])
            for line in client.get("/metrics").text.splitlines()
            if re.match(r'tinygiant_http_requests_total\{path="/v1/(chat|audio)/', line)
        )
        idle = server.cpu_times()
        time.sleep(10)
        idle_s = sum(server.cpu_times()[:2]) - sum(idle[:2])
    rise, risen = verdict(held, options.max_mib)
    return {
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(statuses.items())),
        "wrong": wrong[:20],
        "lost": options.requests - names.count("cut short") - round(counted),
        "risen_mib": rise,
        "max_mib": options.max_mib,
        "risen": risen,
        "idle_cpu_s_per_minute": round(6 * idle_s, 2),
    }


def reading(server: psutil.Process, t_s: float, n_requests: int) -> dict[str, Any]:
    """What the server holds now; memory in MiB."""
    memory = server.memory_full_info()
    anonymous = re.search(
        r"^Anonymous: +(\d+) kB$",
        Path(f"/proc/{server.pid}/smaps_rollup").read_text("ascii"),
        re.MULTILINE,
    )
    return {
        "t_s": round(t_s, 1),
        "requests": n_requests,
        "rss_mib": round(memory.rss / 2**20, 2),
        "pss_mib": round(memory.pss / 2**20, 2),
        "anonymous_mib": round(int(anonymous[1]) / 2**10, 2) if anonymous else None,
        "files": server.num_fds(),
        "threads": server.num_threads(),
        "cpu_s": round(sum(server.cpu_times()[:2]), 1),
    }


def verdict(held: list[dict[str, Any]], max_mib: float) -> tuple[float | None, list[str]]:
    """The rise of RSS over the second half, and what rose more than it may."""
    first, second = held[: len(held) // 2], held[len(held) // 2 :]
    n_requests = (held[-1]["requests"] if held else 0) or 1
    shares = [row["requests"] / n_requests for row in held]
    third = [row["rss_mib"] for row, share in zip(held, shares, strict=True) if 0.5 < share <= 0.75]
    last = [row["rss_mib"] for row, share in zip(held, shares, strict=True) if share > 0.75]
    if not third or len(first) < 2:
        return None, ["too few readings for a verdict"]
    rise = float(np.median(last) - np.median(third))
    risen = [f"RSS by {rise:.2f} MiB"] if rise > max_mib else []
    for name, spare in (("files", SPARE_FILES), ("threads", 0)):
        before, after = (max(row[name] for row in part) for part in (first, second))
        if after > before + spare:
            risen.append(f"{name} from {before} to {after}")
    return round(rise, 2), risen


def requests(max_clip_s: float) -> dict[str, dict[str, Any]]:
    """Each kind: its body, the statuses it may end with, and how often it comes."""

    def new_clip(number: int, **fields: Any) -> bytes:
        """A request about a clip that was not heard before."""
        draw = random.Random(number)
        kind = draw.choice(["WAV", "FLAC", "OGG", "MP3"])
        seconds = draw.uniform(0.3, max_clip_s)
        return body(clip(seconds, kind, seed=number), kind.lower(), **fields)

    def new_stream(number: int) -> bytes:
        """The same, answered as a stream."""
        return new_clip(number, stream=True)

    choices = ["a dog", "a siren", "the bell rings"]
    busy = {200, 429}
    long = {"expected": {413, 429}, "weight": 1}
    return {
        "new clip": {"body": new_clip, "expected": busy, "weight": 10},
        "new stream": {"body": new_stream, "expected": busy, "weight": 4},
        "cut short": {"body": body(clip(1.0)), "expected": {"cut"}, "weight": 2},
        "answer": {"body": body(clip(1.0)), "expected": busy, "weight": 4},
        "stream": {"body": body(clip(2.0), stream=True), "expected": busy, "weight": 4},
        "choices": {"body": body(clip(3.0), choices_text=choices), "expected": busy, "weight": 4},
        "mp3": {"body": body(clip(1.5, "MP3"), "mp3"), "expected": busy, "weight": 2},
        "two chunks": {"body": body(clip(31.0, "FLAC"), "flac"), "expected": busy, "weight": 1},
        "leaves": {"body": body(clip(1.0), stream=True), "expected": {429, "left"}, "weight": 2},
        "habits": {"body": body(clip(1.0), **HABITS), "expected": busy, "weight": 2},
        "n, json": {"body": body(clip(1.0), stream=True, **SHAPES), "expected": busy, "weight": 2},
        "conversation": {"body": conversation(), "expected": busy, "weight": 2},
        "form": {"body": form(clip(2.0)), "type": FORM, "expected": busy, "weight": 3},
        "broken form": {"body": b"--y\r\n", "type": FORM, "expected": {400, 429}, "weight": 1},
        "no json": {"body": b"{", "expected": {400, 429}, "weight": 2},
        "no audio": {"body": body("AAAA"), "expected": {422, 429}, "weight": 2},
        "too long": {"body": body(clip(41.0, "FLAC"), "flac")} | long,
        "too large": {"body": b" " * round(MAX_BODY_MB * 2**20 + 1)} | long,
    }


def conversation() -> bytes:
    """A question with a system message and earlier turns."""
    request = json.loads(body(clip(1.0)))
    asked = request["messages"][0]
    request["messages"] = [
        {"role": "system", "content": "Be brief."},
        asked,
        {"role": "assistant", "content": "A dog."},
        {"role": "user", "content": "Where?"},
    ]
    return json.dumps(request).encode()


def form(data: str) -> bytes:
    """A transcription of a clip."""
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    return head + base64.b64decode(data) + b"\r\n--x--\r\n"


def send(client: httpx.Client, kind: dict[str, Any], number: int) -> int | str:
    """One request; its status, ``cut`` or ``left`` if it or its answer was not waited for."""
    make: bytes | Callable[[int], bytes] = kind["body"]
    content = make(number) if callable(make) else make
    if "cut" in kind["expected"]:
        return cut_short(str(client.base_url), content)
    headers = {"Content-Type": kind.get("type", "application/json")}
    path = "audio/transcriptions" if kind.get("type") == FORM else "chat/completions"
    with client.stream("POST", f"/v1/{path}", content=content, headers=headers) as response:
        if "left" in kind["expected"] and response.status_code == 200:
            next(response.iter_raw(), None)
            return "left"
        response.read()
        if response.status_code == 200:
            is_stream = response.headers["content-type"].startswith("text/event-stream")
            complete = response.text.endswith("data: [DONE]\n\n") if is_stream else response.json()
            return 200 if complete else "incomplete"
        return response.status_code


def cut_short(url: str, content: bytes) -> str:
    """A connection that ends in the middle of the request's body."""
    address = urlsplit(url)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
        connection.sendall(head.encode() + content[: len(content) // 2])
    return "cut"


def body(data: str, kind: str = "wav", **fields: Any) -> bytes:
    """A request about a clip."""
    content = [
        {"type": "input_audio", "input_audio": {"data": data, "format": kind}},
        {"type": "text", "text": "What is heard?"},
    ]
    message = {"role": "user", "content": content}
    request = {"model": "tinygiant", "messages": [message], "max_tokens": 16} | fields
    return json.dumps(request).encode()


def clip(seconds: float, kind: str = "WAV", seed: int | None = None) -> str:
    """Noise at 16 kHz, encoded, in base64."""
    generator = np.random.default_rng(round(seconds) if seed is None else seed)
    noise = 0.1 * generator.standard_normal(round(16_000 * seconds))
    encoded = io.BytesIO()
    soundfile.write(encoded, noise, 16_000, format=kind)
    return base64.b64encode(encoded.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
