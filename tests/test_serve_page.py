"""The page, in a headless Chromium: by keyboard alone, with a real clip, against a live server."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from websockets.sync.client import ClientConnection, connect

from tests.serve_stub import FakeModel, Live, live, wait_for

CLIP = Path(__file__).resolve().parents[1] / "examples" / "tiger-and-birds.flac"
NAMES = ("chromium", "chromium-headless-shell", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (apt install chromium)")


class Page:
    """A tab, through Chromium's DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket
        self._numbers = itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    def js(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, element: str) -> str:
        return str(self.js(f"document.getElementById('{element}').textContent"))

    def type(self, element: str, text: str) -> None:
        self.js(f"document.getElementById('{element}').select()")
        self.js(f"document.getElementById('{element}').focus()")
        self.call("Input.insertText", text=text)

    def key(self, key: str, code: int, modifiers: int = 0) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", text="\r", **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def choose(self, path: Path) -> None:
        node = self.call("DOM.querySelector", nodeId=self._root(), selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def _root(self) -> int:
        return int(self.call("DOM.getDocument")["root"]["nodeId"])

    def problems(self) -> list[str]:
        """What the browser complained about: errors, refused resources, policy violations."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown")
        return [json.dumps(event) for event in self.events if event["method"] in kinds]


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(FakeModel(lambda: time.sleep(0.002))) as running:
        yield running


@pytest.fixture
def page(server: Live, tmp_path: Path) -> Iterator[Page]:
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--mute-audio"),
        *("--remote-debugging-port=0", f"--user-data-dir={tmp_path}", "--no-first-run"),
        "about:blank",
    ]
    with (
        open(tmp_path / "log", "w") as log,
        # A group of its own: Debian's chromium is a script, whose child outlives it.
        subprocess.Popen(command, stderr=log, stdout=log, process_group=0) as process,
    ):
        try:
            port_file = tmp_path / "DevToolsActivePort"
            wait_for(lambda: port_file.exists() and "\n" in port_file.read_text(), 30)
            port, path = port_file.read_text().split("\n")[:2]
            with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as browser:
                target = Page(browser).call("Target.createTarget", url="about:blank")["targetId"]
            url = f"ws://127.0.0.1:{port}/devtools/page/{target}"
            with connect(url, max_size=None) as socket:
                tab = Page(socket)
                for domain in ("Page", "Runtime", "Log", "DOM"):
                    tab.call(f"{domain}.enable")
                tab.call("Page.navigate", url=server.url)
                wait_for(lambda: tab.js("document.readyState") == "complete", 30)
                yield tab
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_ask_by_keyboard(page: Page, tmp_path: Path) -> None:
    page.choose(CLIP)
    wait_for(lambda: page.text("clip"), 30)
    assert re.fullmatch(r"tiger-and-birds\.flac, \d+\.\d s", page.text("clip"))
    page.type("question", "Which animal?")
    page.type("choices", "a cat\na dog")
    page.js("document.getElementById('question').focus()")
    page.key("Enter", 13, modifiers=2)
    wait_for(lambda: page.text("account"), 30)
    assert page.text("answer") == "a dog"
    assert page.text("plan") == "Listen first."
    assert page.text("audio_analysis") == "A dog barks,\n then rain."
    assert page.text("logic") == "Barking is a dog's."
    assert page.text("summary") == "A dog."
    assert "s of sound heard" in page.text("account")
    assert page.text("error") == ""
    label = "document.getElementById('{}').getAttribute('aria-label')"
    # The stand-in's attention is highest at its third token of 0.1 s.
    assert "The question looks most at 0.3 seconds" in page.js(label.format("spectrogram"))
    assert "2 channels, on average 0.38 open" in page.js(label.format("gate"))
    assert page.problems() == []


def test_the_spectrogram_shows_the_sound(page: Page, tmp_path: Path) -> None:
    rate_hz, seconds = 48_000, 2.0
    t = np.arange(round(rate_hz * seconds)) / rate_hz
    tone = 0.5 * np.sin(2 * np.pi * 894.4 * t)  # the middle of 50 Hz to 16 kHz, logarithmically
    soundfile.write(tmp_path / "tone.wav", tone, rate_hz)
    page.choose(tmp_path / "tone.wav")
    wait_for(lambda: page.text("clip"), 30)
    brightest = page.js(
        "(() => { const c = document.getElementById('spectrogram');"
        "const d = c.getContext('2d').getImageData(480, 70, 1, c.height - 94).data;"
        "let best = 0; for (let y = 0; y < d.length / 4; y++)"
        " if (d[4 * y] + d[4 * y + 1] > d[4 * best] + d[4 * best + 1]) best = y;"
        "return best / (d.length / 4); })()"
    )
    assert brightest == pytest.approx(0.5, abs=0.03)
    # What is sent is the clip itself, as 16-bit samples.
    encoded = page.js("wavBase64()")
    samples, sent_rate_hz = soundfile.read(io.BytesIO(base64.b64decode(encoded)))
    assert sent_rate_hz == rate_hz
    np.testing.assert_allclose(samples, tone, atol=1.01 / 32_768)


def test_what_goes_wrong_is_said(page: Page, tmp_path: Path) -> None:
    page.js("document.getElementById('ask').click()")
    assert "Choose, drop or record a clip" in page.text("error")
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    page.choose(tmp_path / "noise.wav")
    wait_for(lambda: "noise.wav" in page.text("error"), 30)
    page.choose(CLIP)
    wait_for(lambda: page.text("clip"), 30)
    page.type("choices", "only one")
    page.js("document.getElementById('ask').click()")
    wait_for(lambda: "1 choices given" in page.text("error"), 30)


def test_every_control_has_a_name(page: Page) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "checkbox", "combobox"}
    found = [
        node.get("name", {}).get("value", "")
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in controls
    ]
    assert {"Ask", "Stop", "Record", "Question"} <= set(found)
    assert all(found)
