"""The proxies of docs/serving.md, as they are written there, in front of a live server."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serve_stub import FakeModel, Live, chat, clip, live, wait_for
from tinygiant.runtime.serve.app import HttpOptions
from tinygiant.runtime.serve.cli import listen

DOCUMENT = (Path(__file__).parents[1] / "docs" / "serving.md").read_text(encoding="utf-8")
NAME = "sounds.example"


def example(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    return str(found)


def nginx(server_port: str, port: str, folder: Path) -> list[str]:
    text = example("nginx").replace("8517", server_port).replace("listen 80", f"listen {port}")
    paths = "".join(
        f"    {kind}_temp_path {folder};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/log;\n"
        f"events {{}}\nhttp {{\n    access_log off;\n{paths}{text}}}\n"
    )
    return ["-e", f"{folder}/log", "-p", str(folder), "-c", f"{folder}/nginx.conf"]


def caddy(server_port: str, port: str, folder: Path) -> list[str]:
    text = example("caddy").replace("8517", server_port)
    assert text.startswith(f"{NAME} {{")
    text = text.replace(f"{NAME} {{", f"http://{NAME}:{port} {{", 1)  # no certificate for a test
    (folder / "Caddyfile").write_text(f"{{\n    admin off\n}}\n{text}")
    return ["run", "--adapter", "caddyfile", "--config", f"{folder}/Caddyfile"]


PROXIES = {
    "nginx": (nginx, "", HttpOptions(allowed_hosts=(NAME,))),
    "caddy": (caddy, "/sounds", HttpOptions(allowed_hosts=(NAME,), root_path="/sounds")),
}


class Steps:
    """A model's pace: some tokens at once, the others when they are let."""

    def __init__(self) -> None:
        self.left = 60
        self.open = False

    def __call__(self) -> None:
        if self.left > 0:
            self.left -= 1
        elif not self.open:
            wait_for(lambda: self.open, 30)


@pytest.fixture(params=PROXIES)
def proxied(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Live, Steps]]:
    write, prefix, options = PROXIES[request.param]
    program = shutil.which(request.param, path="/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip(f"no {request.param} (apt install {request.param})")
    with listen("127.0.0.1", 0) as free:
        port = str(free.getsockname()[1])
    steps = Steps()
    with live(FakeModel(steps, text="<RESPONSE>" + "a dog " * 100), options=options) as running:
        command = [program, *write(running.url.rsplit(":", 1)[1], port, tmp_path)]
        with (
            open(tmp_path / "out", "w") as out,
            subprocess.Popen(
                command, cwd=tmp_path, stdout=out, stderr=out, env={"HOME": str(tmp_path)}
            ) as process,
        ):
            try:
                url = f"http://127.0.0.1:{port}{prefix}"
                wait_for(lambda: _answers(f"{url}/health") or process.poll() is not None, 30)
                assert process.poll() is None, (tmp_path / "out").read_text()
                yield url, running, steps
            finally:
                steps.open = True
                process.send_signal(signal.SIGTERM)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, headers={"Host": NAME}).status_code == 200
    except httpx.TransportError:
        return False


def test_a_proxy_passes_on_pages_large_clips_and_streams(
    proxied: tuple[str, Live, Steps],
) -> None:
    url, running, steps = proxied
    headers = {"Host": NAME}
    assert httpx.get(f"{url}/", headers=headers).text == httpx.get(running.url).text
    # A stream is not held back: text arrives while the model still has some to write.
    ask = httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=chat(stream=True), headers=headers, timeout=30
    )
    with ask as response:
        lines = response.iter_lines()
        wait_for(lambda: '"content":"a' in next(lines))
        assert not steps.open
        steps.open = True
        assert [line for line in lines if line][-1] == "data: [DONE]"
    large = chat(data=clip(100.0))  # 4 MiB; nginx takes 1 unless told
    answered = httpx.post(f"{url}/v1/chat/completions", json=large, headers=headers, timeout=30)
    assert answered.status_code == 200, answered.text
