"""A soak of ``tg-serve``: many mixed requests, none lost, memory and descriptors flat.

    python -m benchmarks.soak_serve --bundle DIR --requests 10000

Starts the command on a free port and sends requests from several clients: answers, streams,
choices, clips of different lengths and formats, clients that leave, and requests that must be
refused. Every request must end with a status it may have, and the server's own count must agree.
RSS and open files are read from the kernel as the requests go by; the last line is JSON.
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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import soundfile

__all__ = ["main"]

MAX_AUDIO_S = 40.0
MAX_BODY_MB = 8.0
MAX_NEW_TOKENS = 32


def main() -> int:
    """Run the soak; returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
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
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder) as process,
    ):
        try:
            assert process.stderr is not None
            found = re.search(r"http://[\d.]+:\d+", process.stderr.readline())
            if found is None:
                return 1
            report = soak(found[0], psutil.Process(process.pid), options)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(60)
    report["exit_code"] = code
    print(json.dumps(report))
    return int(bool(report["wrong"] or report["lost"] or code))


def soak(url: str, server: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    """Send the requests; what came back, and what the server held meanwhile."""
    kinds = requests()
    names = random.Random(options.seed).choices(
        list(kinds), [kind["weight"] for kind in kinds.values()], k=options.requests
    )
    statuses: Counter[str] = Counter()
    wrong: list[str] = []
    held = []
    start = time.monotonic()
    with (
        httpx.Client(base_url=url, timeout=300) as client,
        concurrent.futures.ThreadPoolExecutor(options.clients) as pool,
    ):
        step = max(options.requests // 20, 1)
        for number, (name, status) in enumerate(
            pool.map(lambda name: (name, send(client, kinds[name])), names), start=1
        ):
            statuses[f"{name} {status}"] += 1
            if status not in kinds[name]["expected"]:
                wrong.append(f"{name}: {status}")
            if number % step == 0:
                memory = server.memory_info().rss
                held.append([number, round(memory / 2**20, 1), server.num_fds()])
                print(f"{number} requests, RSS {held[-1][1]} MiB, {held[-1][2]} files", flush=True)
        seconds = time.monotonic() - start
        time.sleep(1)
        counted = sum(
            float(line.rsplit(" ", 1)[1])
            for line in client.get("/metrics").text.splitlines()
            if line.startswith('tinygiant_http_requests_total{path="/v1/chat/completions"')
        )
        idle = server.cpu_times()
        time.sleep(10)
        idle_s = sum(server.cpu_times()[:2]) - sum(idle[:2])
    half = [row[1] for row in held[len(held) // 2 :]]
    return {
        "requests": options.requests,
        "seconds": round(seconds, 1),
        "statuses": dict(sorted(statuses.items())),
        "wrong": wrong[:20],
        "lost": options.requests - round(counted),
        "rss_mib": held,
        "rss_second_half_mib": [min(half), max(half)],
        "idle_cpu_s_per_minute": round(6 * idle_s, 2),
    }


def requests() -> dict[str, dict[str, Any]]:
    """Each kind: its body, the statuses it may end with, and how often it comes."""
    choices = ["a dog", "a siren", "the bell rings"]
    busy = {200, 429}
    long = {"expected": {413, 429}, "weight": 1}
    return {
        "answer": {"body": body(clip(1.0)), "expected": busy, "weight": 4},
        "stream": {"body": body(clip(2.0), stream=True), "expected": busy, "weight": 4},
        "choices": {"body": body(clip(3.0), choices_text=choices), "expected": busy, "weight": 4},
        "mp3": {"body": body(clip(1.5, "MP3"), "mp3"), "expected": busy, "weight": 2},
        "two chunks": {"body": body(clip(31.0, "FLAC"), "flac"), "expected": busy, "weight": 1},
        "leaves": {"body": body(clip(1.0), stream=True), "expected": {429, "left"}, "weight": 2},
        "no json": {"body": b"{", "expected": {400, 429}, "weight": 2},
        "no audio": {"body": body("AAAA"), "expected": {422, 429}, "weight": 2},
        "too long": {"body": body(clip(41.0, "FLAC"), "flac")} | long,
        "too large": {"body": b" " * round(MAX_BODY_MB * 2**20 + 1)} | long,
    }


def send(client: httpx.Client, kind: dict[str, Any]) -> int | str:
    """One request; its status, or ``left`` if it was not waited for."""
    headers = {"Content-Type": "application/json"}
    with client.stream(
        "POST", "/v1/chat/completions", content=kind["body"], headers=headers
    ) as response:
        if "left" in kind["expected"] and response.status_code == 200:
            next(response.iter_raw(), None)
            return "left"
        response.read()
        if response.status_code == 200:
            is_stream = response.headers["content-type"].startswith("text/event-stream")
            complete = response.text.endswith("data: [DONE]\n\n") if is_stream else response.json()
            return 200 if complete else "incomplete"
        return response.status_code


def body(data: str, kind: str = "wav", **fields: Any) -> bytes:
    """A request about a clip."""
    content = [
        {"type": "input_audio", "input_audio": {"data": data, "format": kind}},
        {"type": "text", "text": "What is heard?"},
    ]
    message = {"role": "user", "content": content}
    request = {"model": "tinygiant", "messages": [message], "max_tokens": 16} | fields
    return json.dumps(request).encode()


def clip(seconds: float, kind: str = "WAV") -> str:
    """Noise at 16 kHz, encoded, in base64."""
    noise = 0.1 * np.random.default_rng(round(seconds)).standard_normal(round(16_000 * seconds))
    encoded = io.BytesIO()
    soundfile.write(encoded, noise, 16_000, format=kind)
    return base64.b64encode(encoded.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
