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
from numpy.typing import NDArray
from websockets.sync.client import ClientConnection, connect

from tests.serve_stub import LISTENING, FakeModel, Live, clip, live, wait_for
from tinygiant.runtime.serve.app import HttpOptions

CLIP = Path(__file__).resolve().parents[1] / "examples" / "tiger-and-birds.flac"
RATE_HZ = 48_000
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

    def js(self, expression: str, *, wait: bool = False) -> Any:
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=wait
        )
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

    def click(self, element: str) -> None:
        self.js(f"document.getElementById('{element}').click()")

    def shows(self, element: str) -> bool:
        return bool(self.js(f"document.getElementById('{element}').checkVisibility()"))

    def all(self, selector: str) -> list[str]:
        """The texts of what is on show."""
        return list(
            self.js(
                f"[...document.querySelectorAll({json.dumps(selector)})]"
                ".filter((e) => e.checkVisibility()).map((e) => e.textContent)"
            )
        )

    def loaded(self) -> bool:
        return bool(self.js("clip !== null"))

    def idle(self) -> bool:
        """No question is being answered."""
        return bool(self.js("asking === null"))

    def choose(self, path: Path) -> None:
        node = self.call("DOM.querySelector", nodeId=self._root(), selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def _root(self) -> int:
        return int(self.call("DOM.getDocument")["root"]["nodeId"])

    def problems(self) -> list[str]:
        """What the browser complained about: errors, refused resources, policy violations."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown")
        return [json.dumps(event) for event in self.events if event["method"] in kinds]


def pace() -> None:
    time.sleep(0.002)


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel(pace)


@pytest.fixture(scope="module")
def server(model: FakeModel) -> Iterator[Live]:
    with live(model) as running:
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


def ask(page: Page, question: str = "Which animal?", choices: str = "") -> None:
    page.type("question", question)
    page.js(f"document.getElementById('choices').value = {json.dumps(choices)}")
    page.click("ask")
    wait_for(page.idle, 30)


def tone(path: Path, *, hz: float = 894.4, seconds: float = 2.0, level: float = 0.5) -> Path:
    """By default in the middle of 50 Hz to 16 kHz, logarithmically."""
    t = np.arange(round(RATE_HZ * seconds)) / RATE_HZ
    soundfile.write(path, level * np.sin(2 * np.pi * hz * t), RATE_HZ)
    return path


def test_ask_by_keyboard(page: Page) -> None:
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    assert page.text("clip") == "tiger-and-birds.flac, 3.8 s."
    page.type("question", "Which animal?")
    page.key("Enter", 13)
    wait_for(lambda: page.all(".account"), 30)
    assert page.all(".asked") == ["Which animal?"]
    assert page.all(".answer") == ["a dog"]
    (account,) = page.all(".account")
    assert re.fullmatch(r"3\.8 s heard, answered in \d+\.\d s\.", account)
    # The thought is there, folded under its answer.
    assert page.all(".thought h4") == []
    page.js("document.querySelector('.how summary').click()")
    assert page.all(".thought h4") == ["Plan", "Audio Analysis", "Logic", "Summary"]
    assert page.all(".thought .text") == [
        "Listen first.",
        "A dog barks,\n then rain.",
        "Barking is a dog's.",
        "A dog.",
    ]
    # The stand-in's attention is highest at its third token of 0.1 s; its gate is 0.25 and 0.5.
    assert page.all(".about p") == [
        "The question looked most at 0.3 s, 2.1 times as much as on average.",
        "Judging by the sound as a whole, 1 of 2 channels were let through and the others damped "
        "(semantic gate).",
    ]
    assert "The question looks most at 0.3 seconds" in picture_label(page)
    assert page.problems() == []


def picture_label(page: Page) -> str:
    return str(page.js("document.getElementById('spectrogram').getAttribute('aria-label')"))


def test_a_token_is_asked_for_only_where_the_server_wants_one(page: Page) -> None:
    """A newcomer wondered what to put there."""
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    assert page.shows("form") and not page.shows("token-box")
    with live(FakeModel(pace), options=HttpOptions(token="secret")) as guarded:
        page.call("Page.navigate", url=guarded.url)
        wait_for(lambda: page.js("document.readyState") == "complete", 30)
        page.choose(CLIP)
        wait_for(page.loaded, 30)
        wait_for(lambda: page.shows("token-box"), 30)


def test_an_example_is_one_click_away(page: Page) -> None:
    """And until then nothing that is empty is on show."""
    for element in ("sound", "talk", "form"):
        assert not page.shows(element)
    page.click("example")
    wait_for(lambda: page.all(".account"), 30)
    assert page.all(".asked") == ["What animal is heard in the speech?"]
    assert page.all(".choices") == ["One of: monkey, tiger, spider, rabbit"]
    assert page.all(".answer") == ["rabbit"]  # the stand-in takes the last
    assert page.problems() == []
    # Another clip is not asked for the example's answers.
    page.choose(CLIP)
    wait_for(lambda: page.text("clip").startswith("tiger-and-birds"), 30)
    assert page.js("document.getElementById('choices').value") == ""
    assert page.js("document.getElementById('question').value") == "What is heard?"


def test_questions_about_a_clip_stay_as_a_conversation(page: Page) -> None:
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    ask(page, "Which animal?")
    ask(page, "Which one?", choices="a cat\na cow")
    assert page.all(".asked") == ["Which animal?", "Which one?"]
    assert page.all(".answer") == ["a dog", "a cow"]


def test_everything_on_show_is_of_one_clip(page: Page, tmp_path: Path) -> None:
    """An old answer stayed beside a new clip, and an old error beside a good one."""
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    ask(page)
    ask(page, choices="only one")
    assert any("1 choice given" in text or "choice" in text for text in page.all(".problem"))
    page.choose(tone(tmp_path / "tone.wav"))
    wait_for(lambda: page.text("clip").startswith("tone.wav"), 30)
    assert page.all(".turn") == [] and page.all(".bad") == [""]
    assert picture_label(page) == "Spectrogram of 2.0 s of sound, from 50 Hz to 16 kHz."
    ask(page)
    assert page.all(".account")[0].startswith("2.0 s heard")


def test_after_an_unreadable_file_no_clip_is_left_to_ask(page: Page, tmp_path: Path) -> None:
    """Ask went on with the clip before."""
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    (tmp_path / "noise.wav").write_bytes(b"no audio")
    page.choose(tmp_path / "noise.wav")
    wait_for(lambda: page.text("error"), 30)
    assert page.text("error").startswith("noise.wav cannot be read as sound by this browser.")
    assert not page.loaded() and not page.shows("form") and not page.shows("sound")
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    assert page.text("error") == ""


def test_a_clip_that_is_read_late_is_not_taken(page: Page) -> None:
    """Two files dropped one after the other: the second counts, whichever is decoded first."""
    page.js(
        "const slow = new Blob([]);"
        "slow.arrayBuffer = () => new Promise((go) => { window.let_go = go; });"
        "useClip(slow, 'first');"
    )
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    page.js(f"let_go({ARRAY_BUFFER.format(wav_base64())})")
    page.js("new Promise((go) => setTimeout(go, 300))", wait=True)
    assert page.text("clip").startswith("tiger-and-birds.flac")
    assert page.text("error") == ""


ARRAY_BUFFER = "Uint8Array.from(atob('{}'), (c) => c.charCodeAt(0)).buffer"


def wav_base64() -> str:
    return clip(0.2)


def test_a_new_clip_ends_the_question_about_the_old(
    page: Page, model: FakeModel, tmp_path: Path
) -> None:
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    model.tick = lambda: time.sleep(0.2)
    try:
        page.click("ask")
        wait_for(lambda: page.text("status") == "Thinking …", 30)
        page.choose(tone(tmp_path / "tone.wav"))
        wait_for(lambda: page.text("clip").startswith("tone.wav"), 30)
        wait_for(page.idle, 30)
        assert page.all(".turn") == [] and page.all(".bad") == [""]
    finally:
        model.tick = pace


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "requires a token"),
        (403, "does not let the request through"),
        (404, "not where this page looks"),
        (413, "too large for the proxy"),
        (418, "status 418"),
        (502, "Is tg-serve running?"),
        (503, "not available"),
        (504, "did not wait for the answer"),
    ],
)
def test_a_proxy_s_refusal_is_in_words(page: Page, status: int, words: str) -> None:
    """A 413 in HTML was shown as "Unexpected token '<'"."""
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    answer = f"new Response('<html><h1>{status}</h1></html>', {{ status: {status} }})"
    page.js(f"window.fetch = async () => {answer}")
    ask(page)
    (problem,) = page.all(".problem")
    assert words in problem and "<" not in problem


def test_an_empty_question_is_not_sent(page: Page, model: FakeModel) -> None:
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    n_asked = len(model.started)
    ask(page, " ")
    assert page.text("status") == "Write a question first."
    assert page.all(".turn") == [] and len(model.started) == n_asked


def test_what_is_not_an_answer_is_said(page: Page) -> None:
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    for answer, words in (
        ("new Response('<html>', { headers: { 'Content-Type': 'text/html' } })", "login page"),
        ("Promise.reject(new TypeError('Failed to fetch'))", "cannot be reached"),
        (
            "new Response('data: {\"choices\": []}\\n\\n',"
            " { headers: { 'Content-Type': 'text/event-stream' } })",
            "ended before the answer did",
        ),
    ):
        page.js(f"window.fetch = async () => {answer}")
        ask(page)
        assert words in page.all(".problem")[-1]


def test_a_model_without_thought_attention_or_gate(page: Page, model: FakeModel) -> None:
    """Nothing is told of what a model does not have."""
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    model.text, model.listening = "a bird", (None, None)
    try:
        ask(page)
    finally:
        model.text, model.listening = None, LISTENING
    assert page.all(".answer") == ["a bird"]
    assert page.all(".how") == []
    assert "looks most" not in picture_label(page)


def pixels(page: Page) -> NDArray[np.uint8]:
    """The spectrogram, ``(height, width, 3)``, in canvas pixels."""
    found = page.js(
        "(() => { const c = document.getElementById('spectrogram'), s = c.width / c.clientWidth;"
        "const [x, y, w, h] = [area.left, area.top, area.width, area.height].map((v) =>"
        " Math.round(v * s));"
        "const d = c.getContext('2d').getImageData(x, y, w, h).data;"
        "let t = ''; for (let i = 0; i < d.length; i++) t += String.fromCharCode(d[i]);"
        "return [w, h, btoa(t)]; })()"
    )
    width, height, data = found
    flat = np.frombuffer(base64.b64decode(data), np.uint8)
    return flat.reshape(height, width, 4)[:, :, :3]


def test_the_spectrogram_shows_the_sound(page: Page, tmp_path: Path) -> None:
    page.choose(tone(tmp_path / "tone.wav"))
    wait_for(page.loaded, 30)
    seen = pixels(page)
    middle = seen[:, seen.shape[1] // 2].astype(int)
    rows = np.flatnonzero(middle.sum(axis=1) == middle.sum(axis=1).max())
    assert rows.mean() / len(middle) == pytest.approx(0.5, abs=0.03)


def test_silence_is_dark_and_said(page: Page, tmp_path: Path) -> None:
    """Its loudest point was taken for full brightness, wherever it lay."""
    page.choose(tone(tmp_path / "silence.wav", level=0.0))
    wait_for(page.loaded, 30)
    assert pixels(page).max() < 60
    assert page.text("clip") == "silence.wav, 2.0 s. It is silent."
    assert picture_label(page).endswith("It is silent.")


def test_a_click_into_the_picture_goes_there(page: Page, tmp_path: Path) -> None:
    page.choose(tone(tmp_path / "tone.wav"))
    wait_for(page.loaded, 30)
    wait_for(lambda: page.js("player.readyState") >= 1, 30)
    page.js("document.getElementById('spectrogram').scrollIntoView()")
    x, y = page.js(
        "(() => { const r = document.getElementById('spectrogram').getBoundingClientRect();"
        "return [r.left + area.left + area.width / 2, r.top + area.top + 20]; })()"
    )
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    wait_for(lambda: page.js("player.currentTime") == pytest.approx(1.0, abs=0.05), 30)
    place = "(parseFloat(document.getElementById('head').style.left) - area.left) / area.width"
    wait_for(lambda: page.js(place) == pytest.approx(0.5, abs=0.03), 30)
    assert page.shows("head")


def test_what_is_sent_is_the_file_itself(page: Page, tmp_path: Path) -> None:
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    assert base64.b64decode(page.js("encoded()", wait=True)) == CLIP.read_bytes()


def test_what_no_server_need_read_is_sent_as_wav(page: Page, tmp_path: Path) -> None:
    """What a browser plays but libsndfile may not, such as a recording, as 16-bit samples."""
    samples, _ = soundfile.read(tone(tmp_path / "tone.wav"))
    page.choose(tmp_path / "tone.wav")
    wait_for(page.loaded, 30)
    page.js("clip.blob = new Blob(['\\x1aE\\xdf\\xa3 webm'])")
    sent, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(page.js("encoded()", wait=True))))
    assert rate_hz == RATE_HZ
    np.testing.assert_allclose(sent, samples, atol=1.01 / 32_768)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_axes_can_be_read_in_both_looks(page: Page, tmp_path: Path, scheme: str) -> None:
    """WCAG's 4.5 to 1 between what is written beside the spectrogram and what it stands on."""
    page.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    page.choose(tone(tmp_path / "tone.wav"))
    wait_for(page.loaded, 30)
    colours = page.js(
        "(() => { const c = document.getElementById('spectrogram').getContext('2d');"
        "const card = getComputedStyle(document.querySelector('.card')).backgroundColor;"
        "return [c.fillStyle, card]; })()"
    )
    text, card = (luminance(colour) for colour in colours)
    bright, dark = max(text, card), min(text, card)
    assert (bright + 0.05) / (dark + 0.05) >= 4.5
    assert (card < 0.5) == (scheme == "dark")


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` or ``rgb(r, g, b)``, as WCAG defines it."""
    if colour.startswith("#"):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    else:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_the_sensor_s_last_sounds_are_shown(page: Page, model: FakeModel, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    answer = {"name": "animal", "status": "answered", "text": "a dog", "probability": 0.874}
    sounds = [
        {"unanswered": None, "answers": [answer, {"name": "who", "status": "not_asked"}]},
        {"unanswered": "queue_full", "answers": []},
    ]
    common = {"event": "sound", "time": "2026-03-01T10:00:00.000+01:00", "source": "<b>garden</b>"}
    lines = [json.dumps(common | {"duration_s": 1.5} | sound) for sound in sounds]
    assert not page.shows("heard")
    with live(model, options=HttpOptions(events=events)) as running:
        events.write_text("\n".join(lines) + "\n")
        page.call("Page.navigate", url=running.url)
        wait_for(lambda: page.all("#sounds tr"), 30)
        assert page.all("#sounds td:nth-child(2)") == ["<b>garden</b>, 1.5 s"] * 2
        assert page.all("#sounds td:nth-child(3)") == [
            "not asked: too much to do",
            "animal: a dog (87 %)",
        ]


def test_a_phone_needs_no_sideways_scrolling(page: Page) -> None:
    page.call(
        "Emulation.setDeviceMetricsOverride",
        width=360, height=740, deviceScaleFactor=2, mobile=True,
    )  # fmt: skip
    page.click("example")
    wait_for(lambda: page.all(".account"), 30)
    page.js("document.querySelector('.how summary').click()")
    assert page.js("document.documentElement.scrollWidth") <= 360
    assert page.problems() == []


def test_every_control_has_a_name(page: Page) -> None:
    page.choose(CLIP)
    wait_for(page.loaded, 30)
    ask(page)
    page.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "textbox", "checkbox", "combobox", "log", "image"}
    found = [
        node.get("name", {}).get("value", "")
        for node in nodes
        if not node.get("ignored") and node.get("role", {}).get("value") in controls
    ]
    assert {"Ask", "Record", "Question", "Try an example", "Questions and answers"} <= set(found)
    assert all(found)
