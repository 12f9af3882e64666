"""Wyoming's handle domain, with Wyoming's own client."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from wyoming.asr import Transcript
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncTcpClient
from wyoming.event import Event
from wyoming.handle import Handled, NotHandled
from wyoming.info import Describe, Info

from tests.serve_stub import FakeModel, Live, live, wait_for
from tinygiant.runtime.serve import cli
from tinygiant.runtime.serve.service import Limits

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(scope="module")
def server(model: FakeModel) -> Iterator[Live]:
    with live(model, wyoming=True, limits=Limits(max_audio_s=2.0)) as running:
        yield running


def talk(server: Live, *events: Any) -> list[Event]:
    """Send events, read until the server has nothing more to say."""

    async def session() -> list[Event]:
        assert server.wyoming_port is not None
        replies = []
        async with AsyncTcpClient("127.0.0.1", server.wyoming_port) as client:
            for event in events:
                await client.write_event(event if isinstance(event, Event) else event.event())
                if isinstance(event, Transcript | Describe):
                    reply = await asyncio.wait_for(client.read_event(), 20)
                    assert reply is not None
                    replies.append(reply)
        return replies

    return asyncio.run(session())


def clip(seconds: float, rate_hz: int = RATE_HZ, width: int = 2, channels: int = 1) -> list[Any]:
    form = {"rate": rate_hz, "width": width, "channels": channels}
    block = bytes(width * channels * rate_hz // 10)
    chunks = [AudioChunk(audio=block, **form) for _ in range(round(10 * seconds))]
    return [AudioStart(**form), *chunks, AudioStop()]


def test_describe_names_the_model(server: Live) -> None:
    (reply,) = talk(server, Describe())
    (program,) = Info.from_event(reply).handle
    assert program.installed
    assert [model.name for model in program.models] == ["fake"]


def test_two_questions_about_one_clip(server: Live, model: FakeModel) -> None:
    replies = talk(server, *clip(1.0), Transcript("What is heard?"), Transcript("And then?"))
    assert [Handled.from_event(reply).text for reply in replies] == ["a dog", "a dog"]
    assert model.started[-2:] == ["What is heard?", "And then?"]


def test_choices(server: Live) -> None:
    question = Transcript("Which?", context={"choices": ["a cat", "a cow"]})
    (reply,) = talk(server, *clip(0.5), question)
    assert Handled.from_event(reply).text == "a cow"


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "no clip"),
        (clip(2.1), "longer than 2 s"),
        (clip(0.2, width=1), "8 bit"),
        (clip(0.2, rate_hz=10), "10 Hz"),
    ],
)
def test_what_cannot_be_handled_is_said(server: Live, events: list[Any], words: str) -> None:
    (reply,) = talk(server, *events, Transcript("What?"))
    assert words in (NotHandled.from_event(reply).text or "")


def test_a_blank_question_is_not_handled(server: Live) -> None:
    (reply,) = talk(server, *clip(0.2), Transcript(" "))
    assert "is empty" in (NotHandled.from_event(reply).text or "")


@pytest.mark.parametrize(
    "sent",
    [
        b"no json\n",
        b"[]\n",
        b"{}\n",
        b'{"type": "audio-chunk"}\n',
        b'{"type": "audio-chunk", "payload_length": 99999999999}\n',
        b'{"type": "transcript", "data_length": "x"}\n',
        b"[" * 60_000 + b"\n",
        b"x" * 200_000,
    ],
    ids=lambda sent: sent[:30].decode(),
)
def test_what_is_not_wyoming_ends_its_connection_alone(server: Live, sent: bytes) -> None:
    async def session() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.wyoming_port)
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    assert asyncio.run(session()) == b""
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert len(talk(server, *clip(0.2), Transcript("What?"))) == 1


def test_a_client_that_leaves_stops_its_work() -> None:
    step = threading.Semaphore(0)
    endless = "<RESPONSE>" + "and on " * 20_000
    model = FakeModel(lambda: step.acquire(timeout=30), text=endless)
    with live(model, wyoming=True, limits=Limits(max_new_tokens=len(endless))) as running:

        async def ask_and_leave() -> None:
            assert running.wyoming_port is not None
            async with AsyncTcpClient("127.0.0.1", running.wyoming_port) as client:
                for event in (*clip(0.2), Transcript("What?")):
                    await client.write_event(event.event())
                while not model.started:
                    await asyncio.sleep(0.01)

        asyncio.run(ask_and_leave())
        # A token at a time: the server notices before the 512 of a question here are written.
        wait_for(lambda: step.release() or time.sleep(0.02) or model.closed, 60)
        wait_for(lambda: running.engine.n_taken == 0)
        assert model.finished == []
        assert (
            'tinygiant_jobs_total{outcome="cancelled"} 1.0'
            in httpx.get(f"{running.url}/metrics").text
        )


def test_wyoming_with_a_token_stays_on_this_computer(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--host", "0.0.0.0", "--port", "0", "--wyoming-port", "0", "--token", "x"]
    assert cli.main(arguments) == 2
    assert "Wyoming has no token" in capsys.readouterr().err
