"""What clients of OpenAI's API send by habit: honoured, or left out and told."""

from __future__ import annotations

import base64
import json
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest

from tests.serve_stub import FakeModel, Live, chat, clip, live
from tinygiant.runtime.serve.app import HttpOptions
from tinygiant.runtime.serve.chat import parse_chat
from tinygiant.runtime.serve.errors import ApiError


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture(scope="module")
def server(model: FakeModel) -> Iterator[Live]:
    with live(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def parse(body: dict[str, Any], **options: Any) -> Any:
    return parse_chat(json.dumps(body).encode(), "fake", 2_048, **options)


def audio(data: str | None = None, **fields: Any) -> dict[str, Any]:
    given = {"data": clip() if data is None else data, "format": "wav"} | fields
    return {"type": "input_audio", "input_audio": given}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def message(role: str, *content: Any) -> dict[str, Any]:
    return {"role": role, "content": content[0] if isinstance(content[0], str) else [*content]}


def body(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": list(messages)} | fields


# --- left out, and told ------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_what_clients_send_by_habit_is_left_out_and_said(server: Live, stream: bool) -> None:
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    habits = {
        "temperature": 1,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "tools": [tool],
        "tool_choice": "auto",
        "max_tokens": 100_000,
        "logprobs": True,
        "top_k": 40,
        "a\r\nfield, of: no one": 1,
    }
    response = server.post(chat(stream=stream, **habits))
    assert response.status_code == 200, response.text
    named = response.headers["x-tinygiant-ignored"].split(", ")
    assert set(named) == {
        *("temperature", "top_p", "presence_penalty", "tools", "max_tokens", "logprobs", "top_k"),
        "a??field??of??no?one",
    }
    if stream:
        last = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))
    else:
        last = response.json()
    ignored = dict(line.split(": ", 1) for line in last["tinygiant"]["ignored"])
    assert ignored["tools"] == "the model calls no tools"
    assert ignored["max_tokens"] == "this server writes at most 2048 tokens"
    assert set(ignored) == set(named)


def test_nothing_ignored_is_no_header(server: Live) -> None:
    response = server.post(chat(temperature=0, seed=7, user="me"))
    assert "x-tinygiant-ignored" not in response.headers
    assert response.json()["tinygiant"]["ignored"] == []


def test_what_is_ignored_is_bounded() -> None:
    asked = parse(chat(**{f"field{i}": i for i in range(5_000)}))
    assert len(asked.form.ignored) == 32


def test_a_missing_model_is_the_one_there_is(server: Live) -> None:
    asked = chat()
    del asked["model"]
    assert server.post(asked).json()["model"] == "fake"


# --- messages ----------------------------------------------------------------------------------


def test_earlier_messages_are_put_before_the_question() -> None:
    asked = parse(
        body(
            message("system", "Answer in one word."),
            message("user", audio(), text("What is heard?")),
            message("assistant", text("A dog.")),
            {"role": "assistant", "content": None, "reasoning_content": "Plan: listen."},
            message("user", "How many times?"),
        )
    )
    assert asked.question == textwrap.dedent("""\
        Answer in one word.

        Earlier in this conversation:
        User: What is heard?
        Assistant: A dog.

        How many times?""")
    assert asked.clips == (base64.b64decode(clip()),)
    assert asked.form.ignored == ()


def test_the_last_clip_is_heard_and_the_one_before_is_said_to_be_left_out() -> None:
    first, second = clip(0.2), clip(0.3)
    asked = parse(
        body(
            message("user", audio(first), text("And this?")),
            message("assistant", "A dog."),
            message("user", audio(second), text("And this?")),
        )
    )
    assert asked.clips == (base64.b64decode(second),)
    (line,) = asked.form.ignored
    assert line == (
        "messages: the model hears one clip at once, the last of the question; the clip before is "
        "left out"
    )


@pytest.mark.parametrize(
    ("given", "heard", "n_left"),
    [
        ([[0, 1]], [0, 1], 0),
        ([[0]], [0], 0),
        ([[0, 1, 2]], [1, 2], 1),
        ([[0], "A dog.", [1]], [1], 1),  # a new clip is not compared unless both are sent
        ([[0, 1], "A dog.", []], [0, 1], 0),  # a further question about the same two
        ([[0], "A dog.", [1, 2], "Rain.", []], [1, 2], 1),
        ([[0], [1]], [0, 1], 0),  # two messages of one turn
    ],
)
def test_a_model_that_hears_two_clips_gets_those_of_the_question(
    given: list[Any], heard: list[int], n_left: int
) -> None:
    clips = [clip(0.1 * (1 + number)) for number in range(3)]
    turns = [
        message("assistant", turn)
        if isinstance(turn, str)
        else message("user", *(audio(clips[number]) for number in turn), text("What differs?"))
        for turn in given
    ]
    asked = parse(body(*turns), n_clips=2)
    assert asked.clips == tuple(base64.b64decode(clips[number]) for number in heard)
    assert len(asked.form.ignored) == bool(n_left)
    if n_left:
        assert "hears at most 2 clips at once" in asked.form.ignored[0]
    if len(given) == 1 and n_left:
        with pytest.raises(ApiError, match="3 input_audio parts given, expected one to 2 clips"):
            parse(body(*turns), n_clips=2, strict=True)


def test_a_clip_and_its_question_may_come_in_two_messages() -> None:
    asked = parse(body(message("user", audio()), message("user", "What is heard?")))
    assert asked.question == "What is heard?"


def test_a_system_message_alone_can_be_the_question() -> None:
    asked = parse(body(message("system", "Say what is heard."), message("user", audio())))
    assert asked.question == "Say what is heard."


def test_empty_turns_and_null_fields_ask_for_nothing() -> None:
    """Other servers failed at an assistant's empty message, and at ``max_tokens: null``."""
    asked = parse(
        body(
            message("user", audio(), text("A")),
            message("assistant", ""),
            message("user", "B"),
            max_tokens=None,
            temperature=None,
            tools=None,
            stream=None,
        )
    )
    assert asked.question == "Earlier in this conversation:\nUser: A\n\nB"
    assert asked.max_new_tokens is None and asked.form.ignored == ()


def test_the_answer_of_this_server_can_be_sent_back(server: Live, model: FakeModel) -> None:
    """As chat programs do with every turn: the whole message, whatever fields it has."""
    first = server.post(chat("What is heard?")).json()["choices"][0]["message"]
    turns = [*chat("What is heard?")["messages"], first, message("user", "Where?")]
    again = server.post(body(*turns))
    assert again.json()["tinygiant"]["ignored"] == []
    assert model.started[-1].endswith("Assistant: a dog\n\nWhere?")


# --- clips -------------------------------------------------------------------------------------


def wrapped(data: str) -> str:
    """As ``base64 clip.wav`` prints it."""
    return "\n".join(textwrap.wrap(data, 76)) + "\n"


@pytest.mark.parametrize(
    "part",
    [
        audio(wrapped(clip())),
        audio(wrapped(clip()).replace("\n", "\r\n")),
        audio(f"data:audio/wav;base64,{clip()}"),
        audio(f"DATA:audio/x-wav;codecs=1;base64,{wrapped(clip())}"),
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{clip()}"}},
    ],
    ids=["lines", "dos lines", "data uri", "data uri, lines", "audio_url"],
)
def test_base64_as_programs_write_it(part: dict[str, Any]) -> None:
    for strict in (False, True):
        asked = parse(body(message("user", part, text("What?"))), strict=strict)
        assert asked.clips == (base64.b64decode(clip()),)


def test_base64_that_a_shell_put_into_the_json() -> None:
    """``"data": "$(base64 clip.wav)"``: line breaks inside a string, which JSON does not have."""
    raw = json.dumps(chat(data="CLIP")).replace("CLIP", wrapped(clip()))
    assert parse_chat(raw.encode(), "fake", 2_048).clips == (base64.b64decode(clip()),)
    with pytest.raises(ApiError, match="not JSON"):
        parse_chat(raw.encode(), "fake", 2_048, strict=True)


def test_no_url_is_fetched() -> None:
    part = {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:1/clip.wav"}}
    with pytest.raises(ApiError, match="fetches nothing"):
        parse(body(message("user", part, text("What?"))))


@pytest.mark.parametrize("said", ["opus", "oga", "FLAC", "m4a", "mp3", None, 3])
def test_the_content_decides_not_the_format(server: Live, said: Any) -> None:
    """``opus``, ``oga`` and ``FLAC`` were refused, though the server reads them."""
    given = audio(clip(kind="OGG"), format=said)
    assert server.post(body(message("user", given, text("What?")))).status_code == 200
    del given["input_audio"]["format"]
    assert server.post(body(message("user", given, text("What?")))).status_code == 200


# --- how long, and whether to think ------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "think", "told"),
    [(None, True, False), ("none", False, False), ("low", True, True), ("high", True, True)],
)
def test_no_reasoning_effort_is_no_thought(
    server: Live, model: FakeModel, given: str | None, think: bool, told: bool
) -> None:
    response = server.post(chat(reasoning_effort=given))
    assert response.status_code == 200, response.text
    assert model.options[-1].think is think
    assert ("reasoning_effort" in response.headers.get("x-tinygiant-ignored", "")) is told
    assert server.post(chat(reasoning_effort=3)).status_code == 400


def test_a_request_is_answered_within_what_there_is_room_for(
    server: Live, model: FakeModel
) -> None:
    """``max_tokens`` that does not fit behind a long clip was a 400; the runtime now fits it in."""
    assert server.post(chat(max_tokens=2_000)).status_code == 200
    assert (model.options[-1].max_new_tokens, model.options[-1].fit) == (2_000, True)


# --- stop, n, JSON -----------------------------------------------------------------------------


def contents(response: httpx.Response) -> list[str]:
    """The content of each choice, streamed or not."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [choice["message"]["content"] for choice in response.json()["choices"]]
    found: dict[int, str] = {}
    for block in response.text.split("\n\n")[:-2]:
        for choice in json.loads(block.removeprefix("data: "))["choices"]:
            index = choice["index"]
            found[index] = found.get(index, "") + choice["delta"].get("content", "")
    return list(found.values())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_answer(server: Live, stream: bool) -> None:
    assert contents(server.post(chat(stop=["og", "do"], stream=stream))) == ["a "]
    assert contents(server.post(chat(stop="cat", stream=stream))) == ["a dog"]
    chosen = server.post(chat(stop="o", choices_text=["cow", "fox"], stream=stream))
    assert contents(chosen) == ["fox"]
    assert chosen.headers["x-tinygiant-ignored"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_n_gives_the_one_greedy_answer_n_times(server: Live, stream: bool) -> None:
    assert contents(server.post(chat(n=3, stream=stream))) == ["a dog"] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_json_object_has_the_answer_s_own_fields(server: Live, stream: bool) -> None:
    (content,) = contents(server.post(chat(response_format={"type": "json_object"}, stream=stream)))
    assert json.loads(content) == {
        "answer": "a dog",
        "plan": "Listen first.",
        "audio_analysis": "A dog barks,\n then rain.",
        "logic": "Barking is a dog's.",
        "summary": "A dog.",
    }


class Heard(openai.BaseModel):
    """What a program wants to know."""

    animal: Literal["a cat", "a cow"]
    summary: str


def test_a_schema_s_listed_values_are_the_choices(client: openai.OpenAI) -> None:
    messages: Any = chat("Which animal?")["messages"]
    reply = client.chat.completions.parse(model="fake", messages=messages, response_format=Heard)
    assert reply.choices[0].message.parsed == Heard(animal="a cow", summary="A dog.")


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"answer": {"type": "integer"}}, "wants 'answer' as integer"),
        ({"animal": {"type": "string"}, "place": {"type": "string"}}, "'animal'"),
        ({"answer": {"type": "string", "pattern": "^a"}}, "'pattern' for 'answer'"),
        ({"plan": {"enum": ["a", "b"]}}, "lists values of 'plan'"),
        ({"answer": {"enum": [1, 2]}}, "not strings"),
        ({"answer": {"$ref": "#/$defs/none"}}, "does not describe"),
        ({}, "an object with properties"),
    ],
)
def test_a_schema_that_the_answer_does_not_have_is_refused(
    server: Live, properties: dict[str, Any], words: str
) -> None:
    schema = {"type": "object", "properties": properties}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = server.post(chat(response_format=wanted))
    assert response.status_code == 400
    error = response.json()["error"]
    assert words in error["message"] and error["param"] == "response_format"


# --- transcriptions ----------------------------------------------------------------------------


def file(kind: str = "WAV") -> tuple[str, bytes]:
    return f"clip.{kind.lower()}", base64.b64decode(clip(kind=kind))


def test_openai_client_transcribes(client: openai.OpenAI, model: FakeModel) -> None:
    transcriptions = client.audio.transcriptions
    assert transcriptions.create(model="fake", file=file()).text == "a dog"
    assert model.started[-1] == "What is said?"
    as_text = transcriptions.create(model="whisper-1", file=file("MP3"), response_format="text")
    assert as_text == "a dog\n"
    verbose = transcriptions.create(
        model="fake", file=file("FLAC"), response_format="verbose_json", language="en"
    )
    assert (verbose.text, verbose.language, verbose.duration) == ("a dog", "en", 0.5)
    assert verbose.segments is not None
    assert [(s.start, s.end, s.text) for s in verbose.segments] == [(0.0, 0.5, "a dog")]


def test_a_transcription_can_be_streamed(client: openai.OpenAI) -> None:
    events = list(client.audio.transcriptions.create(model="fake", file=file(), stream=True))
    assert {event.type for event in events[:-1]} == {"transcript.text.delta"}
    assert "".join(getattr(event, "delta", "") for event in events) == "a dog"
    assert events[-1].type == "transcript.text.done" and events[-1].text == "a dog"


def test_another_question_is_set_and_told() -> None:
    model = FakeModel()
    options = HttpOptions(transcription_question="Which words are spoken?")
    with live(model, options=options) as running:
        url = f"{running.url}/v1/audio/transcriptions"
        assert httpx.post(url, files={"file": file()}).json()["text"] == "a dog"
        httpx.post(url, files={"file": file()}, data={"question": "And who speaks?"})
        assert model.started == ["Which words are spoken?", "And who speaks?"]
        told = httpx.get(f"{running.url}/v1/models").json()["data"][0]["tinygiant"]
        assert told == {"transcription_question": "Which words are spoken?"}


def test_what_a_transcription_cannot_have_is_told_or_refused(
    server: Live, capfd: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}/v1/audio/transcriptions"
    habits = {"prompt": "names", "temperature": "0", "model": "whisper-1", "language": "en"}
    told = httpx.post(url, files={"file": file()}, data=habits)
    assert set(told.headers["x-tinygiant-ignored"].split(", ")) == {"prompt", "model"}
    with live(FakeModel(), options=HttpOptions(strict=True)) as strict:
        refused = httpx.post(
            f"{strict.url}/v1/audio/transcriptions", files={"file": file()}, data=habits
        )
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "model"
    for data, files, words in (
        ({"response_format": "srt"}, {"file": file()}, "expected json, text, verbose_json"),
        ({"stream": "maybe"}, {"file": file()}, "stream must be"),
        ({}, {"clip": file()}, "field file"),
    ):
        response = httpx.post(url, files=files, data=data)
        assert response.status_code == 400 and words in response.json()["error"]["message"]
    assert httpx.post(url, files={"file": ("a.wav", b"no audio")}).status_code == 422
    assert httpx.post(url, json={}).status_code == 415
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        broken = httpx.post(url, content=b"--y\r\n", headers={"Content-Type": kind})
        assert broken.status_code == 400, broken.text
    assert capfd.readouterr().err == ""  # the log has no line for a request


def test_no_clip_of_a_form_is_written_to_disk(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starlette moves files of more than a MiB to a temporary file."""
    rolled = []
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: rolled.append(self))
    large = {"file": ("clip.wav", base64.b64decode(clip(60.0)))}
    url = f"{server.url}/v1/audio/transcriptions"
    assert httpx.post(url, files=large, timeout=30).json()["text"] == "a dog"
    assert not rolled


# --- the sensor's sounds -----------------------------------------------------------------------


def sound(number: int, **fields: Any) -> str:
    """A line as ``tg-listen`` writes it; see runtime/schema/listen.schema.json."""
    answer = {
        "name": "animal",
        "question": "Which animal?",
        "status": "answered",
        "reason": None,
        "text": "a dog",
        "probability": 0.9,
        "notify": False,
        "answer": {"schema": "tinygiant.answer/1", "raw_text": "secret"},
        "error": None,
    }
    line = {
        "schema": "tinygiant.listen/1",
        "event": "sound",
        "time": "2026-03-01T10:00:00.000+01:00",
        "id": f"{number:032x}",
        "source": "garden",
        "number": number,
        "duration_s": 1.5,
        "unanswered": None,
        "answers": [answer],
    }
    return json.dumps(line | fields) + "\n"


def test_the_last_sounds_come_from_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with live(FakeModel(), options=HttpOptions(events=path)) as running:

        def numbers() -> list[int]:
            reply = httpx.get(f"{running.url}/events").json()
            return [int(told["id"], 16) for told in reply["sounds"]]

        assert numbers() == []  # the file is not there yet
        report = json.dumps({"event": "report", "counts": {}}) + "\n"
        path.write_text(sound(1) + report + "no line\n[]\n" + sound(2) + sound(3)[:-40])
        assert numbers() == [2, 1]  # the last line is torn
        (tmp_path / "events.jsonl.1").write_text(path.read_text())
        path.write_text("".join(sound(n, filler="x" * 50_000) for n in range(10, 25)))
        assert numbers()[:10] == [24, 23, 22, 21, 20, 19, 18, 17, 16, 15]
        assert numbers()[-2:] == [2, 1]
        (told,) = httpx.get(f"{running.url}/events").json()["sounds"][0]["answers"]
        assert told["text"] == "a dog" and "answer" not in told


def test_sounds_need_the_token_and_the_option(server: Live, tmp_path: Path) -> None:
    assert httpx.get(f"{server.url}/events").status_code == 404
    options = HttpOptions(events=tmp_path / "none", token="secret")
    with live(FakeModel(), options=options) as running:
        assert httpx.get(f"{running.url}/events").status_code == 401


# --- from elsewhere ----------------------------------------------------------------------------


def test_pages_of_an_allowed_origin_may_ask_and_read() -> None:
    origin = "http://localhost:3000"
    token = {"Authorization": "Bearer secret"}
    options = HttpOptions(cors_origins=(origin,), token="secret")
    with live(FakeModel(), options=options) as running:
        url = f"{running.url}/v1/chat/completions"
        asks = {
            "Access-Control-Request-Method": "POST",
            # OpenAI's client in a browser sends headers of its own.
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-timeout",
        }
        allowed = httpx.options(url, headers={"Origin": origin} | asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        for name in ("authorization", "x-stainless-timeout"):
            assert name in allowed.headers["access-control-allow-headers"]
        read = running.post(chat(temperature=1), headers={"Origin": origin} | token)
        assert read.headers["access-control-allow-origin"] == origin
        assert "ignored" in read.headers["access-control-expose-headers"].lower()
        wrong = running.post(chat(max_tokens=0), headers={"Origin": origin} | token)
        assert wrong.status_code == 400
        assert wrong.headers["access-control-allow-origin"] == origin
        other = {"Origin": "http://evil.example"}
        assert httpx.options(url, headers=other | asks).status_code == 400
        read = running.post(chat(), headers=other | token)
        assert "access-control-allow-origin" not in read.headers


def test_every_origin_can_be_let_in() -> None:
    with live(FakeModel(), options=HttpOptions(cors_origins=("*",))) as running:
        read = running.post(chat(), headers={"Origin": "http://anywhere.example"})
        assert read.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in read.headers


def test_a_proxy_s_name_and_path_are_let_in() -> None:
    options = HttpOptions(allowed_hosts=("sounds.example",), root_path="/sounds")
    with live(FakeModel(), options=options) as running:
        for host, status in (("sounds.example", 200), ("evil.example", 421), ("localhost", 200)):
            for path in ("/health", "/sounds/health"):
                found = httpx.get(running.url + path, headers={"Host": host})
                assert found.status_code == status
        refused = httpx.get(running.url, headers={"Host": "evil.example"})
        assert "--allowed-host" in refused.json()["error"]["message"]
        # The page asks for v1/... beside itself, so it must be a folder's.
        redirected = httpx.get(f"{running.url}/sounds")
        assert (redirected.status_code, redirected.headers["location"]) == (308, "/sounds/")
        assert httpx.get(f"{running.url}/sounds/").text == httpx.get(running.url).text
        asked = httpx.post(f"{running.url}/sounds/v1/chat/completions", json=chat())
        assert asked.json()["choices"][0]["message"]["content"] == "a dog"
