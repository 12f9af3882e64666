"""The settings file: what is right is understood, what is wrong says where it is."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from pathlib import Path

import pytest

from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.listen import cli
from tinygiant.runtime.listen.settings import (
    GateSettings,
    QuestionSettings,
    Settings,
    SourceSettings,
    minutes,
    settings_of,
)

WHOLE = """
[source.hall]
kind = "microphone"
device = "USB"
[source.door]
kind = "file"
path = "/run/door.raw"
rate_hz = 8000
[gate]
start_db = 12
voice = "off"
[queue]
size = 4
when_full = "newest"
[[question]]
name = "dog"
ask = "Is it a dog?"
choices = ["yes", "no"]
think = false
confidence = 0.7
notify = ["yes"]
refractory_s = 60
sources = ["hall"]
hours = ["22:00-06:00", "12:00-13:00"]
days = ["mon", "sun"]
[[question]]
[mqtt]
host = "broker"
[metrics]
port = 9100
"""

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "sensor.md"


def read(text: str) -> Settings:
    return settings_of(tomllib.loads(text), "listen.toml")


def test_a_whole_file_is_understood() -> None:
    settings = read(WHOLE)
    assert settings.source == {
        "hall": SourceSettings(kind="microphone", device="USB"),
        "door": SourceSettings(kind="file", path="/run/door.raw", rate_hz=8_000),
    }
    assert settings.gate == GateSettings(start_db=12.0, voice="off")
    dog, what = settings.question
    assert dog.notify == ("yes",) and dog.confidence == 0.7 and not dog.think
    assert what == QuestionSettings()
    assert settings.mqtt.host == "broker" and settings.webhook.url is None
    assert (settings.queue.size, settings.queue.when_full) == (4, "newest")


def test_an_empty_file_is_a_microphone_and_one_question() -> None:
    assert read("") == Settings(source={"microphone": SourceSettings()})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gates]", r"\[gates\] is unknown; did you mean gate\?"),
        ("[gate]\nstart_dB = 3", r"\[gate\]: start_dB is unknown; did you mean start_db\?"),
        ("[gate]\nzzz = 3", r"\[gate\]: zzz is unknown; there are start_db, stay_db"),
        ("[gate]\nstart_db = 'x'", r"\[gate\]: start_db = 'x': expected a number"),
        ("[gate]\nstart_db = true", "start_db = True: expected a number"),
        ("[gate]\nstart_db = nan", "start_db = nan: expected 1 to 60"),
        ("[gate]\nstart_db = 61", "start_db = 61: expected 1 to 60"),
        ("[gate]\nstay_db = 20", "stay_db = 20 is above start_db = 10"),
        ("[gate]\nvoice = 'yes'", "voice = 'yes': expected one of auto, on, off"),
        ("gate = 3", r"\[gate\]: expected a table of keys, found int"),
        ("[queue]\nsize = 1.5", r"\[queue\]: size = 1.5: expected a whole number"),
        ("[queue]\nsize = 0", "size = 0: expected 1 to 1,000"),
        ("[source]\nkind = 'stdin'", r"sources have names; write \[source.NAME\]"),
        ("[source.'a b']", r"\[source.a b\]: expected a name of letters"),
        ("[source.a]\nkind = 'file'", r"\[source.a\]: path goes with kind"),
        ("[source.a]\npath = 'x'", "path goes with kind"),
        ("[source.a]\nkind = 'stdin'\ndevice = 'x'", "device goes with kind"),
        ("[source.a]\nrate_hz = 10", r"rate_hz = 10: expected 1,000 to 768,000"),
        ("[source.a]\nkind='stdin'\n[source.b]\nkind='stdin'", "two sources read standard input"),
        ("[question]\nask = 'x'", r"questions are a list; write \[\[question\]\]"),
        (
            "[[question]]\naks = 'x'",
            r"\[\[question\]\] 1: aks is unknown; did you mean ask\?",
        ),
        ("[[question]]\nask = ''", r"\[\[question\]\] 1: the question is empty"),
        ("[[question]]\nchoices = ['a']", "1 choices? given"),
        ("[[question]]\nchoices = 'ab'", "choices = 'ab': expected a list of texts"),
        ("[[question]]\nconfidence = 0.5", "confidence needs choices and think = false"),
        (
            "[[question]]\nchoices = ['a','b']\nnotify = ['c']",
            "notify: 'c' is not one of the choices",
        ),
        ("[[question]]\nhours = ['7-9']", "hours: '7-9' is not a span of a day"),
        ("[[question]]\ndays = ['Monday']", "days: 'Monday' is not one of mon, tue"),
        ("[[question]]\nname = 'a/b'", "name = 'a/b': expected letters"),
        ("[[question]]\nsources = ['attic']", r"what: there is no \[source.attic\]"),
        ("[[question]]\n[[question]]", "two questions have the name what"),
        ("[mqtt]\nca_file = 'x'", "need tls = true"),
        ("[mqtt]\npassword_file = 'x'", "password_file needs user"),
        ("[mqtt]\ntopic = 'a/#'", "topic = 'a/#' is not a topic"),
        ("[webhook]\nurl = 'example.org'", "expected http://HOST/PATH"),
    ],
)
def test_what_is_wrong_says_where_it_is(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(text)
    assert str(caught.value).startswith("listen.toml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("span", ["24:00-01:00", "07:60-08:00", "07:00-07:00", "07:00-24:01", ""])
def test_a_span_that_is_none(span: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(span)}$"):
        minutes(span)


def test_the_command_checks_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "listen.toml"
    path.write_text(WHOLE)
    assert cli.main(["--config", str(path), "--check"]) == 0
    assert capsys.readouterr().out == "2 sources, 2 questions: can be used\n"
    path.write_text("[gate")
    assert cli.main(["--config", str(path), "--check"]) == 2
    assert "listen.toml: not valid TOML" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "c"], "'c' is one word too many"),
        (["Who?", "--pcm-rate", "8000"], "--pcm-rate describes raw sound"),
        (["-", "Who?", "--device", "USB"], "--device names a microphone"),
        (["-", "Who?", "--confidence", "0.5"], "--confidence needs --choices and --no-think"),
        (["-", "--config", "x"], "x: cannot be read"),
        (["--choices", "a"], "1 choices? given"),
        (["--unknown"], "there is no option --unknown"),
    ],
)
def test_wrong_options_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_what_the_file_says_is_not_said_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("")
    assert cli.main(["--config", str(tmp_path / "a.toml"), "--no-think"]) == 2
    assert "--no-think does not go with --config" in capsys.readouterr().err


def documented() -> list[str]:
    return re.findall(
        r"^```toml\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def test_the_walk_s_settings_can_be_used() -> None:
    settings = read(documented()[0])
    assert settings.mqtt.host == "localhost" and settings.question[0].notify == ("yes",)


def test_every_key_is_documented_with_its_default() -> None:
    tables = tomllib.loads(documented()[1])
    hints = typing.get_type_hints(Settings) | {
        "source": SourceSettings,
        "question": QuestionSettings,
    }
    assert set(tables) == set(hints)
    for name, kind in hints.items():
        table = tables[name]
        table = table["NAME"] if name == "source" else table[0] if name == "question" else table
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        assert set(table) == set(fields), name
        for key, default in fields.items():
            if default not in (None, (), table[key]):
                raise AssertionError(f"[{name}] {key} is {default}, documented as {table[key]}")
