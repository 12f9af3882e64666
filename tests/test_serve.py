"""The server: OpenAI's API as its own client sees it, limits, the queue, leaving and stopping."""

from __future__ import annotations

import base64
import copy
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve_stub import FakeModel, Live, chat, clip, live, wait_for
from tinygiant.runtime import TinyGiant
from tinygiant.runtime.batch import Batch
from tinygiant.runtime.errors import BundleError, MissingDependencyError, UsageError
from tinygiant.runtime.events import TextPiece
from tinygiant.runtime.serve import cli
from tinygiant.runtime.serve.app import HttpOptions
from tinygiant.runtime.serve.chat import parse_chat
from tinygiant.runtime.serve.errors import ApiError
from tinygiant.runtime.serve.replies import TextDeltas
from tinygiant.runtime.serve.service import Limits

SCRIPTS = Path(sys.executable).parent
REASONING = (
    "Plan:\nListen first.\n\nAudio Analysis:\nA dog barks,\n then rain.\n\n"
    "Logic:\nBarking is a dog's.\n\nSummary:\nA dog."
)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(FakeModel(), limits=Limits(max_body_bytes=200_000, max_audio_s=5.0)) as running:
        yield running


def error_of(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return dict(error)


def metrics(url: str, **headers: str) -> dict[tuple[str, str], float]:
    """Name and last label -> value."""
    text = httpx.get(f"{url}/metrics", headers=headers).text
    return {
        (sample.name, " ".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


# --- with the openai client, on a real model ---------------------------------------------------


@pytest.fixture(scope="module")
def tiny_server(tiny: TinyGiant) -> Iterator[Live]:
    with live(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def client(tiny_server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def user(data: str, kind: str, question: str) -> list[Any]:
    audio = {"type": "input_audio", "input_audio": {"data": data, "format": kind}}
    return [{"role": "user", "content": [audio, {"type": "text", "text": question}]}]


@pytest.mark.parametrize("kind", ["wav", "mp3", "flac", "ogg"])
def test_openai_client_gets_the_library_s_answer(
    client: openai.OpenAI, tiny: TinyGiant, kind: str
) -> None:
    data = clip(1.0, kind=kind.upper())
    expected = tiny.ask(base64.b64decode(data), "What is heard?", max_new_tokens=12)
    answer = client.chat.completions.create(
        model="tiny", messages=user(data, kind, "What is heard?"), max_tokens=12
    )
    (choice,) = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.tokens.prompt
    assert answer.usage.completion_tokens == expected.tokens.generated
    details = answer.usage.prompt_tokens_details
    assert details is not None and details.audio_tokens == expected.tokens.audio


def test_openai_client_streams_a_choice(client: openai.OpenAI, tiny: TinyGiant) -> None:
    data, choices = clip(2.0), ["a dog", "a siren", "the bell rings"]
    expected = tiny.ask(base64.b64decode(data), "Which?", choices, max_new_tokens=8)
    chunks = list(
        client.chat.completions.create(
            model="tinygiant",
            messages=user(data, "wav", "Which?"),
            max_completion_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"tinygiant": {"choices": choices, "events": True}},
        )
    )
    text = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert "".join(text) == expected.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == expected.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == expected.tokens.generated
    extras = [extra for c in chunks if (extra := (c.model_extra or {}).get("tinygiant"))]
    (seen,) = [extra for extra in extras if extra.get("event") == "prompt_read"]
    assert len(seen["intent_attention"]) == expected.tokens.audio
    assert seen["token_s"] == pytest.approx(tiny.config.row_s)
    assert len(seen["gate"]) == 1
    assert extras[-1]["choice_index"] == expected.choice_index


def test_openai_client_sees_models_and_errors(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tinygiant"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=user(clip(), "wav", "What?"))
    with pytest.raises(openai.UnprocessableEntityError, match="not audio"):
        client.chat.completions.create(model="tiny", messages=user("AAAA", "wav", "What?"))
    with pytest.raises(openai.BadRequestError, match="is empty"):
        client.chat.completions.create(model="tiny", messages=user(clip(), "wav", "  "))


# --- shapes ------------------------------------------------------------------------------------


def test_whole_and_streamed_texts_are_the_same(server: Live) -> None:
    whole = server.post(chat()).json()
    message = whole["choices"][0]["message"]
    assert message["content"] == "a dog"
    assert message["reasoning_content"] == REASONING
    assert whole["tinygiant"]["audio"]["used_s"] == 0.5
    assert whole["usage"]["total_tokens"] == (
        whole["usage"]["prompt_tokens"] + whole["usage"]["completion_tokens"]
    )
    streamed = server.post(chat(stream=True)).text
    blocks = streamed.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == REASONING
    assert "".join(delta.get("content", "") for delta in deltas) == "a dog"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


def test_spent_budget_is_told(server: Live) -> None:
    reply = server.post(chat(max_tokens=4)).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 4


def test_white_space_around_parts_is_left_out() -> None:
    deltas = TextDeltas(answer=True)
    pieces = [
        TextPiece(" \n", "other", False),
        TextPiece("<PLANNING>", "plan", True),
        TextPiece("\n one", "plan", False),
        TextPiece(" ", "plan", False),
        TextPiece("two \n", "plan", False),
        TextPiece("\n", "answer", False),
        TextPiece("three\n", "answer", False),
    ]
    found = [(d.field, d.text) for piece in pieces for d in deltas.take(piece)]
    assert found == [
        ("reasoning_content", "Plan:\n"),
        ("reasoning_content", "one"),
        ("reasoning_content", " two"),
        ("content", "three"),
    ]


# --- requests that are refused -----------------------------------------------------------------


def changed(**fields: Any) -> dict[str, Any]:
    return chat(**fields)


def with_content(*parts: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": list(parts)}]}


AUDIO = {"type": "input_audio", "input_audio": {"data": clip(), "format": "wav"}}
TEXT = {"type": "text", "text": "What?"}
SYSTEM = {"role": "system", "content": "Be brief."}

REFUSED: list[tuple[Any, int, str]] = [
    ([], 400, "must be a JSON object"),
    ({"model": "fake"}, 400, "messages must be a list"),
    (changed(model=3), 400, "model must be a string"),
    (changed(model="other"), 404, "does not exist"),
    (changed(messages=[*chat()["messages"], {"role": "assistant", "content": "Yes."}]), 400,
     "the last message has the role 'assistant'"),
    (changed(messages=[{"role": "critic", "content": "No."}]), 400, "unknown role 'critic'"),
    (changed(messages=[{"role": "user"}]), 400, "must be a list of parts"),
    (with_content(TEXT), 400, "no input_audio parts"),
    (with_content(AUDIO), 400, "no question given; add a text part"),
    (with_content(AUDIO, {"type": "text", "text": None}), 400, "must be a string"),
    (with_content(AUDIO, {"type": "image_url", "image_url": {}}), 400, "'image_url'"),
    (with_content({"type": "input_audio"}, TEXT), 400, "fields type and input_audio"),
    (with_content({"type": "input_audio", "input_audio": {"data": 3}}, TEXT), 400, "in base64"),
    ({"model": "fake", "messages": [{"role": "user", "content": "What?"}]}, 400, "no input_audio"),
    (changed(data="@@@@"), 400, "not base64"),
    (changed(data="AAA"), 400, "not base64"),
    (changed(data="ÄÄÄÄ"), 400, "not base64"),
    (changed(data="data:audio/wav,RIFF"), 400, "not in base64"),
    (changed(data=""), 422, "is empty"),
    (changed(data=base64.b64encode(b"no audio").decode()), 422, "not audio"),
    (changed(data=clip(5.1, rate_hz=8_000)), 413, "the limit is 5 s"),
    (changed(data=clip(0.01, rate_hz=384_000)), 422, "at most 192000 Hz"),
    (changed(data=clip(0.01, channels=9)), 422, "9 channels"),
    (changed(tool_choice="required"), 400, "calls no tools"),
    (changed(n=True), 400, "n is True"),
    (changed(n=129), 400, "from 1 to 128"),
    (changed(stop=[1]), 400, "stop must be a text"),
    (changed(stop=""), 400, "stop must be a text"),
    (changed(response_format={"type": "xml"}), 400, "expected text, json_object or json_schema"),
    (changed(max_tokens=0), 400, "from 1 to 2048"),
    (changed(max_tokens="many"), 400, "from 1 to 2048"),
    (changed(stream="yes"), 400, "stream must be true or false"),
    (changed(tinygiant={"choice": []}), 400, "unknown field 'choice'"),
    (changed(tinygiant={"choices": ["one"]}), 400, "1 choice given"),
    (changed(choices_text=["a", "a"]), 400, "are the same"),
    (changed(choices_text="ab"), 400, "list of strings"),
    (changed(choices_text=["a", "b"], tinygiant={"choices": ["a", "b"]}), 400, "both given"),
    (chat("\ud800"), 400, "U+D800"),
]  # fmt: skip
# What a strict server refuses as well: of these requests something is left out, or put elsewhere.
STRICTLY_REFUSED: list[tuple[Any, int, str]] = [
    (changed(messages=[SYSTEM, *chat()["messages"]]), 400, "role 'system'"),
    (changed(messages=chat()["messages"] * 2), 400, "2 messages given"),
    (with_content(AUDIO, AUDIO, TEXT), 400, "2 input_audio parts"),
    (with_content(AUDIO | {"detail": 1}, TEXT), 400, "fields type and input_audio"),
    (changed(temperature=0.7), 400, "temperature can only be 0"),
    (changed(n=2), 400, "n can only be 1"),
    (changed(stop=["."]), 400, "stop can only be []"),
    (changed(tools=[{"type": "function"}]), 400, "tools can only be []"),
    (changed(response_format={"type": "json_object"}), 400, "response_format"),
    (changed(nonsense=1), 400, "unknown field 'nonsense'"),
    (changed(max_tokens=2049), 400, "from 1 to 2048"),
    (changed(max_tokens=1, max_completion_tokens=2), 400, "differ"),
    (changed(stream_options={"include_usage": True}), 400, "without stream"),
]


@pytest.fixture(scope="module")
def strict_server() -> Iterator[Live]:
    limits = Limits(max_body_bytes=200_000, max_audio_s=5.0)
    with live(FakeModel(), limits=limits, options=HttpOptions(strict=True)) as running:
        yield running


@pytest.mark.parametrize(("body", "status", "words"), REFUSED, ids=lambda x: str(x)[-40:])
def test_refused(server: Live, body: Any, status: int, words: str) -> None:
    response = server.post(body)
    assert (response.status_code, words in error_of(response)["message"]) == (status, True), (
        response.text
    )
    streamed = server.post(body | {"stream": True} if isinstance(body, dict) else body)
    if "stream" not in words:
        assert streamed.status_code == status


@pytest.mark.parametrize(("body", "status", "words"), STRICTLY_REFUSED, ids=lambda x: str(x)[-40:])
def test_strictly_refused(
    server: Live, strict_server: Live, body: Any, status: int, words: str
) -> None:
    response = strict_server.post(body)
    assert (response.status_code, words in error_of(response)["message"]) == (status, True), (
        response.text
    )
    assert server.post(body).status_code == 200


def test_neutral_fields_are_accepted(strict_server: Live) -> None:
    neutral = {"temperature": 0, "top_p": 1.0, "n": 1, "stop": None, "tools": [], "seed": 3}
    response = strict_server.post(chat(**neutral))
    assert response.status_code == 200
    assert response.json()["tinygiant"]["ignored"] == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"{",
        b"[" * 100_000,
        b'{"model": NaN}',
        b'{"a": 1, "a": 2}',
        b"1" * 5_000,
        b"null",
    ],
    ids=lambda content: content[:8].decode("latin-1"),
)
def test_hostile_json_is_400(server: Live, content: bytes) -> None:
    response = server.post(content=content)
    assert response.status_code == 400
    error_of(response)


def test_parsing_survives_any_change_of_one_field() -> None:
    """Every value anywhere in a body replaced by others: a request or a 4xx, nothing else."""
    body = chat(stream=True, stream_options={"include_usage": True}, tinygiant={"events": True})
    strange: list[Any] = [None, True, -1, 1e308, "", "x" * 10, "\ud800", [], {}, [[]], {"type": {}}]

    def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        if isinstance(value, dict | list):
            for key in value if isinstance(value, dict) else range(len(value)):
                yield from paths(value[key], (*path, key))

    for path in paths(body):
        for value in strange:
            damaged: Any = {"body": copy.deepcopy(body)}
            target, full = damaged, ("body", *path)
            for key in full[:-1]:
                target = target[key]
            target[full[-1]] = value
            try:
                parse_chat(json.dumps(damaged["body"]).encode(), "fake", 2_048)
            except ApiError as error:
                assert error.status in (400, 404)


def test_paths_methods_and_types(server: Live) -> None:
    missing = httpx.get(f"{server.url}/v1/nothing")
    assert missing.status_code == 404
    assert "/v1/nothing" in error_of(missing)["message"]
    assert httpx.get(f"{server.url}/v1/models/other").status_code == 404
    wrong = httpx.get(f"{server.url}/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    error_of(wrong)
    text = server.post(chat(), headers={"Content-Type": "text/plain"})
    assert (text.status_code, error_of(text)["code"]) == (415, "unsupported_media_type")
    assert httpx.get(f"{server.url}/health").json() == {
        "status": "ok",
        "model": "fake",
        "events": False,
        "token": False,
    }


def test_another_host_name_is_refused(server: Live) -> None:
    for host, status in (("evil.example", 421), ("localhost:80", 200), ("[::1]:80", 200)):
        response = httpx.get(f"{server.url}/health", headers={"Host": host})
        assert response.status_code == status


def test_a_large_body_is_refused_before_it_is_held(server: Live) -> None:
    response = server.post(content=b" " * 200_001)
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")

    def blocks() -> Iterator[bytes]:  # chunked: no Content-Length to look at
        for _ in range(20):
            yield b" " * 20_000

    assert server.post(content=blocks()).status_code == 413
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":")[-1]))) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 999999999\r\n\r\n"
        )
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_408() -> None:
    with (
        live(FakeModel(), limits=Limits(body_timeout_s=0.2)) as running,
        socket.create_connection(("127.0.0.1", int(running.url.rsplit(":")[-1]))) as raw,
    ):
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        raw.settimeout(10)
        assert raw.recv(100).startswith(b"HTTP/1.1 408")
        wait_for(lambda: running.engine.n_taken == 0)


def test_token() -> None:
    with live(FakeModel(), options=HttpOptions(token="secret")) as running:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            response = running.post(chat(), headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert error_of(response)["code"] == "invalid_api_key"
        assert running.post(chat(), headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        asking = openai.OpenAI(base_url=f"{running.url}/v1", api_key="no", max_retries=0)
        with asking, pytest.raises(openai.AuthenticationError):
            asking.models.list()


def test_browser_headers(server: Live) -> None:
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page.text)
    for response in (page, httpx.get(f"{server.url}/health"), httpx.get(f"{server.url}/none")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


# --- the queue, leaving, stopping --------------------------------------------------------------


# Far more text than is written before a client's leaving is noticed, token by token.
ENDLESS = "<RESPONSE>" + "and on " * 20_000


class Gate:
    """Lets a fake model write only while it is open."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self) -> None:
        assert self.open.wait(30)


def test_a_full_queue_refuses_and_the_rest_is_answered_in_order() -> None:
    gate = Gate()
    model = FakeModel(gate)
    with (
        live(model, n_queued=2) as running,
        ThreadPoolExecutor(3) as pool,
    ):
        futures = []
        for number in range(3):
            futures.append(pool.submit(running.post, chat(f"question {number}")))
            # The first one is being answered; of the others the bodies are read, in this order.
            wait_for(lambda n=number: model.started and running.n_waiting == n)
        refused = running.post(chat("one too many"))
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        gate.open.set()
        assert [future.result().status_code for future in futures] == [200] * 3
        assert model.started == ["question 0", "question 1", "question 2"]
        assert running.post(chat("again")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_work(stream: bool) -> None:
    """The work ends in the middle: a job that runs on to its end is what this is to catch."""
    step = threading.Semaphore(0)
    model = FakeModel(lambda: step.acquire(timeout=30), text=ENDLESS)
    with live(model, limits=Limits(max_new_tokens=len(ENDLESS))) as running:
        with running.client(chat(stream=stream, max_tokens=len(ENDLESS))):
            wait_for(lambda: model.started)
        assert model.closed == []  # it is waiting inside a token
        wait_for(lambda: step.release() or time.sleep(0.005) or model.closed, 60)
        wait_for(lambda: running.engine.n_taken == 0)
        assert model.finished == []
        step.release(len(ENDLESS))
        assert running.post(chat(max_tokens=4)).status_code == 200
        assert metrics(running.url)["tinygiant_jobs_total", "cancelled"] == 1


def test_a_client_that_leaves_the_queue_is_never_started() -> None:
    gate = Gate()
    model = FakeModel(gate)
    with live(model) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.post, chat("first"))
        wait_for(lambda: model.started == ["first"])
        with running.client(chat("second")):
            wait_for(lambda: running.n_waiting == 1)
        wait_for(lambda: running.engine.n_taken == 1)
        gate.open.set()
        assert first.result().status_code == 200
        assert running.post(chat("third")).status_code == 200
        assert model.started == ["first", "third"]


def test_stopping_finishes_the_running_request_and_refuses_the_rest() -> None:
    gate = Gate()
    model = FakeModel(gate)
    with live(model) as running, ThreadPoolExecutor(2) as pool:
        first = pool.submit(running.post, chat("first"))
        wait_for(lambda: model.started == ["first"])
        second = pool.submit(running.post, chat("second"))
        wait_for(lambda: running.n_waiting == 1)
        running.stop()
        gate.open.set()
        assert first.result().json()["choices"][0]["message"]["content"] == "a dog"
        assert (second.result().status_code, error_of(second.result())["code"]) == (
            503,
            "shutting_down",
        )
    assert model.started == ["first"]


def test_grace_ends() -> None:
    model = FakeModel(lambda: time.sleep(0.05), text=ENDLESS)
    with live(model, grace_s=0.2) as running, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, chat(stream=True))
        wait_for(lambda: model.started)
        running.stop()
        last = asked.result().text.split("\n\n")[-2]
        assert model.finished == []
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_failing_model_is_500_and_the_server_goes_on() -> None:
    """However often: a request that failed does not keep its place."""
    failures = iter([RuntimeError("secret\nof the model")] * 5)

    def tick() -> None:
        if (failure := next(failures, None)) is not None:
            raise failure

    with live(FakeModel(tick), n_queued=2) as running:
        for _ in range(5):
            response = running.post(chat())
            assert (response.status_code, error_of(response)["code"]) == (500, "unforeseen")
        assert running.post(chat()).status_code == 200


def test_two_hundred_mixed_requests_lose_none() -> None:
    """More clients than places: every request ends with the status it must, and is counted."""
    model = FakeModel()
    bodies = [
        (chat(), {200, 429}),
        (chat(stream=True), {200, 429}),
        (chat(choices_text=["a", "b"]), {200, 429}),
        (chat(data="%%"), {400, 429}),
        (chat(data=clip(5.5)), {413, 429}),
    ]
    with (
        live(model, n_queued=3, limits=Limits(max_audio_s=5)) as running,
        ThreadPoolExecutor(8) as pool,
        httpx.Client(timeout=60) as asking,
    ):
        url = f"{running.url}/v1/chat/completions"

        def one(number: int) -> int:
            body, expected = bodies[number % len(bodies)]
            response = asking.post(url, json=body)
            assert response.status_code in expected
            if response.status_code == 200:
                assert response.text.endswith("[DONE]\n\n") or response.json()["choices"]
            return response.status_code

        statuses = list(pool.map(one, range(200)))
        found = metrics(running.url)
        for status in set(statuses):
            key = "tinygiant_http_requests_total", f"/v1/chat/completions {status}"
            assert found[key] == statuses.count(status)
        assert found["tinygiant_jobs_total", "finished"] == statuses.count(200)
        assert found["tinygiant_requests_in_progress", ""] == 0
        assert len(model.closed) == len(model.started)


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_serves_and_stops(tiny_bundle: Path, number: int, code: int) -> None:
    command = [SCRIPTS / "tg-serve", "--bundle", tiny_bundle, "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        reply = httpx.post(
            f"{found[0]}/v1/chat/completions", json=chat(max_tokens=4, model="tiny"), timeout=60
        )
        assert reply.status_code == 200, reply.text
        process.send_signal(number)
        assert process.wait(20) == code
        assert process.stderr.read() == ""


def test_the_command_serves_with_its_streams_closed(tiny_bundle: Path) -> None:
    """As a script starts it that wants no output; uvicorn's log asked what is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"exec {SCRIPTS / 'tg-serve'} --bundle {tiny_bundle} --port {port} --threads 1"
    with subprocess.Popen(["bash", "-c", f"{line} <&- >&- 2>&-"]) as process:
        reply = None
        while reply is None and process.poll() is None:
            with suppress(httpx.TransportError):
                reply = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
            time.sleep(0.1)
        process.terminate()
        assert process.wait(20) == 0
    assert reply is not None and reply.json()["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--queue", "-1"], "--queue is -1"),
        (["--max-audio", "nan"], "--max-audio is nan"),
        (["--token", ""], "--token is empty"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--nonsense"], "see tg-serve --help"),
    ],
)
def test_wrong_options_end_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(arguments) == UsageError.exit_code
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_taken_port_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with cli.listen("127.0.0.1", 0) as taken:
        taken.listen()
        assert cli.main(["--port", str(taken.getsockname()[1])]) == UsageError.exit_code
    assert "choose another" in capsys.readouterr().err


def test_of_two_servers_started_together_one_says_that_the_port_is_taken(
    tiny_bundle: Path,
) -> None:
    """Both bound the port and announced it; one then ended in uvicorn's traceback."""
    with cli.listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    command = [SCRIPTS / "tg-serve", "--bundle", tiny_bundle, "--port", str(port), "--threads", "1"]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        wait_for(lambda: any(process.poll() is not None for process in both), 60)
        second, first = sorted(both, key=lambda process: process.poll() is None)
        assert second.wait() == UsageError.exit_code
        assert second.stderr is not None and first.stderr is not None
        (line,) = second.stderr.read().splitlines()
        assert "Address already in use" in line and "--port" in line
        assert f"http://127.0.0.1:{port}" in first.stderr.readline()
        assert httpx.get(f"http://127.0.0.1:{port}/health").json()["status"] == "ok"
    finally:
        for process in both:
            process.terminate()
            process.communicate(timeout=20)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'tinygiant\[serve\]'"):
        cli.require({"no_such_module": "serve"})


def test_the_bare_runtime_does_not_import_the_server() -> None:
    code = (
        "import sys, tinygiant.runtime.cli.main, tinygiant.runtime.pipeline"
        "\nimport tinygiant.runtime.serve.cli"
        "\nprint([m for m in ('starlette', 'uvicorn', 'prometheus_client') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


# --- several at a time -------------------------------------------------------------------------


def ask_all(running: Live, bodies: list[dict[str, Any]]) -> list[Any]:
    """All at once; what the responses say."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return [said(response) for response in pool.map(running.post, bodies)]


def said(response: httpx.Response) -> Any:
    """What a response says, times and ids apart."""
    if response.status_code == 200:
        return response.json()["choices"]
    return response.status_code, error_of(response)


def test_requests_are_answered_together_as_by_themselves(tiny: TinyGiant) -> None:
    """A full step is seen; bad requests and those that leave cost the others nothing."""
    model = tiny.config.name
    bodies = [
        chat(f"Question {n}?", clip(0.4 + n / 10), model=model, max_tokens=10 + 5 * n)
        for n in range(6)
    ]
    bodies.insert(2, chat("Which?", base64.b64encode(b"no sound").decode(), model=model))
    with live(tiny, parallel=1) as running:
        wanted = [ask_all(running, [body])[0] for body in bodies]
    assert [isinstance(found, list) for found in wanted] == [True] * 2 + [False] + [True] * 4
    sizes: list[int] = []
    step = Batch._step

    def counted(self: Batch, members: Any) -> Any:
        sizes.append(len(members))
        return step(self, members)

    with pytest.MonkeyPatch.context() as patch, live(tiny, parallel=3) as running:
        patch.setattr(Batch, "_step", counted)
        assert running.engine.n_places == 3 + 8
        with ThreadPoolExecutor(len(bodies)) as pool:
            with running.held():  # until all wait, so that three are begun at once
                asked = []
                for n_before, body in enumerate(bodies):
                    asked.append(pool.submit(running.post, body))
                    wait_for(lambda n=n_before: running.n_waiting == n + 1)
            assert [said(future.result()) for future in asked] == wanted
        assert max(sizes) == 3
        leaving = chat("Long?", model=model, max_tokens=300, stream=True)
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=leaving) as response:
            assert next(response.iter_lines()).startswith("data: ")
        assert ask_all(running, bodies) == wanted
        wait_for(lambda: running.engine.n_taken == 0)


def test_a_step_that_fails_fails_for_all_and_the_server_goes_on(tiny: TinyGiant) -> None:
    model = tiny.config.name
    bodies = [chat("What?", clip(0.5), model=model, max_tokens=20) for _ in range(2)]

    def broken(*_: object) -> None:
        raise BundleError("graph decoder_model failed: it is broken")

    with live(tiny, parallel=2) as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batch, "step", broken)
            for status, error in ask_all(running, bodies):
                assert (status, error["type"]) == (500, "server_error")
        assert all(isinstance(found, list) for found in ask_all(running, bodies))
