"""Execution providers: who is asked to run what, and that nobody else does it in silence.

onnxruntime is forged at its boundary: the sessions claim to have come up on other providers, and
compute on the CPU. No real device is used.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from tinygiant.runtime import TinyGiant, load
from tinygiant.runtime.cli.main import main
from tinygiant.runtime.config import Role
from tinygiant.runtime.errors import TinyGiantError, UsageError
from tinygiant.runtime.ort import sessions
from tinygiant.runtime.ort.providers import PROVIDERS, assign, available_names, require_available

Tone = Callable[[float, int], NDArray[np.float32]]

ORT_CPU, ORT_CUDA, ORT_TENSORRT = (
    f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt")
)


GRAPHS: dict[str, Role] = {
    "whisper_encoder": "encoder",
    "htsat_encoder": "encoder",
    "clap_encoder": "encoder",
    "projector": "projector",
    "decoder_model": "decoder",
}


def names(wanted: str) -> dict[str, str]:
    return {graph: provider.name for graph, provider in assign(wanted, GRAPHS).items()}


# --- what was asked for


@pytest.mark.parametrize("name", PROVIDERS)
def test_one_name_is_for_everything(name: str) -> None:
    assert names(name) == dict.fromkeys(GRAPHS, name)
    assert names(name.upper()) == names(name)


@pytest.mark.parametrize(
    ("wanted", "whisper", "clap", "projector", "decoder"),
    [
        ("encoders=tensorrt,decoder=cuda", "tensorrt", "tensorrt", "cpu", "cuda"),
        ("cuda,projector=cpu", "cuda", "cuda", "cpu", "cuda"),
        (" decoder = cuda , openvino ", "openvino", "openvino", "openvino", "cuda"),
        ("whisper_encoder=cuda", "cuda", "cpu", "cpu", "cpu"),
        ("decoder_model=cuda,clap_encoder=coreml", "cpu", "coreml", "cpu", "cuda"),
    ],
)
def test_parts_are_given_to_providers(
    wanted: str, whisper: str, clap: str, projector: str, decoder: str
) -> None:
    found = names(wanted)
    assert found["whisper_encoder"] == whisper
    assert found["clap_encoder"] == clap
    assert found["projector"] == projector
    assert found["decoder_model"] == decoder


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("", "is unknown: choose from cpu, cuda"),
        ("gpu", "'gpu' is unknown"),
        ("encoder=cuda", "part 'encoder' is unknown: choose from encoders, projector, decoder"),
        ("=cuda", "part '' is unknown"),
        ("cuda,", "'' is unknown"),
        ("cuda,cpu", "two providers for everything"),
        ("encoders=cuda,clap_encoder=cpu", "names clap_encoder twice"),
        ("a\n\x1b[2J=cuda", "is unknown"),
        ("decoder=" + "x" * 9_999, "is unknown"),
    ],
)
def test_what_cannot_be_meant(wanted: str, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        assign(wanted, GRAPHS)
    assert problem in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "wheel"),
    [("cuda", "onnxruntime-gpu"), ("tensorrt", "onnxruntime-gpu"),
     ("openvino", "onnxruntime-openvino"), ("coreml", "macOS")],
)  # fmt: skip
def test_a_missing_provider_names_what_is_there_and_its_wheel(name: str, wheel: str) -> None:
    with pytest.raises(UsageError) as caught:
        require_available([PROVIDERS[name]], ["AzureExecutionProvider", ORT_CPU])
    assert f"no {name}, only cpu;" in str(caught.value)
    assert wheel in str(caught.value)


def test_available_providers_by_our_names() -> None:
    assert available_names([ORT_TENSORRT, ORT_CUDA, "Azure", ORT_CPU]) == (
        "cpu", "cuda", "tensorrt",
    )  # fmt: skip


@pytest.mark.skipif(
    ORT_CUDA in onnxruntime.get_available_providers(), reason="this onnxruntime has CUDA"
)
def test_the_real_onnxruntime_without_cuda(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, tone: Tone
) -> None:
    import soundfile

    with pytest.raises(UsageError, match="has no cuda, only cpu"):
        load(tiny_bundle, provider="decoder=cuda")
    soundfile.write(tmp_path / "a.wav", tone(0.5, 16_000), 16_000)
    clip = str(tmp_path / "a.wav")
    assert main([clip, "What?", "--bundle", str(tiny_bundle), "--provider", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- what came up


class Forged:
    """An onnxruntime with CUDA and TensorRT, as far as one can tell from its answers.

    ``came_up`` overrides which providers a session has; ``used`` which run its operators.
    """

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.fallbacks: list[int] = []
        self.came_up: list[str] | None = None
        self.used: tuple[str, ...] = (ORT_TENSORRT, ORT_CUDA, ORT_CPU)
        self.on_device: list[NDArray[Any]] = []

    def session(self, content: bytes, options: Any, providers: Any, enable_fallback: int) -> Any:
        forged, asked = self, [name for name, _ in providers]
        self.asked.append(providers)
        self.fallbacks.append(enable_fallback)

        class Session(onnxruntime.InferenceSession):  # type: ignore[misc]
            def get_providers(self) -> list[str]:
                return asked if forged.came_up is None else forged.came_up

            def get_provider_graph_assignment_info(self) -> list[Any]:
                return [
                    SimpleNamespace(ep_name=name, get_nodes=lambda: ["node"])
                    for name in forged.used
                    if name in asked
                ]

        return Session(content, options, providers=[ORT_CPU])

    def value(self, array: NDArray[Any], device: str = "cpu", number: int = 0) -> Any:
        if device != "cpu":
            assert (device, number) == ("cuda", 0)
            array = array.copy()
            self.on_device.append(array)
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)


@pytest.fixture
def forged(monkeypatch: pytest.MonkeyPatch) -> Forged:
    fake = Forged()
    module = SimpleNamespace(
        InferenceSession=fake.session,
        OrtValue=SimpleNamespace(ortvalue_from_numpy=fake.value),
        RunOptions=onnxruntime.RunOptions,
        SessionOptions=onnxruntime.SessionOptions,
        ExecutionMode=onnxruntime.ExecutionMode,
        get_available_providers=lambda: [ORT_TENSORRT, ORT_CUDA, ORT_CPU],
        __version__=onnxruntime.__version__,
    )
    monkeypatch.setattr(sessions, "onnxruntime", module)
    return fake


@pytest.mark.parametrize("memory", ["default", "low"])
def test_the_cache_stays_on_the_device_and_the_answer_is_the_same(
    tiny: TinyGiant, tiny_bundle: Path, tone: Tone, forged: Forged, memory: Any
) -> None:
    sound = (tone(1.5, 16_000), 16_000)
    model = load(tiny_bundle, threads=1, provider="encoders=tensorrt,decoder=cuda", memory=memory)
    for choices in (None, ["a dog", "a siren"]):
        expected = tiny.ask(sound, "What?", choices, max_new_tokens=12)
        found = model.ask(sound, "What?", choices, max_new_tokens=12)
        assert found.raw_text == expected.raw_text
        assert found.choice_index == expected.choice_index
    layers = model.config.decoder.n_layers
    assert len(forged.on_device) == 2 * 2 * layers  # two questions, keys and values
    assert all(cache.any() for cache in forged.on_device)
    assert found.providers["whisper_encoder"] == ("tensorrt", "cpu", "cuda")
    assert found.providers["projector"] == ("cpu",)
    assert found.providers["decoder_model"] == ("cuda", "cpu")
    assert expected.providers == dict.fromkeys(expected.providers, ("cpu",))


def test_what_onnxruntime_is_asked_for(tiny_bundle: Path, forged: Forged) -> None:
    load(tiny_bundle, threads=1, provider="cuda,encoders=tensorrt,projector=cpu")
    cuda, cpu = (ORT_CUDA, {"use_tf32": "0"}), (ORT_CPU, {})
    expected = {
        "whisper_encoder": [(ORT_TENSORRT, {}), cuda, cpu],
        "projector": [cpu],
        "decoder_model": [cuda, cpu],
    }
    assert all(asked in forged.asked for asked in expected.values())
    assert set(forged.fallbacks) == {0}  # onnxruntime must not choose another one by itself


@pytest.mark.parametrize("came_up", [[ORT_CPU], [ORT_CUDA, ORT_CPU], []])
def test_a_session_on_another_provider_is_an_error(
    tiny_bundle: Path, forged: Forged, came_up: list[str]
) -> None:
    forged.came_up = came_up
    with pytest.raises(UsageError, match=r"came up on .*, not on TensorrtExecutionProvider"):
        load(tiny_bundle, threads=1, provider="encoders=tensorrt")


def test_a_provider_that_runs_nothing_is_an_error(tiny_bundle: Path, forged: Forged) -> None:
    forged.used = (ORT_CPU,)
    with pytest.raises(UsageError, match="no operator that CUDAExecutionProvider runs"):
        load(tiny_bundle, threads=1, provider="decoder=cuda")


def test_a_provider_that_fails_to_start_is_one_line(
    tiny_bundle: Path, forged: Forged, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA failure 35:\n driver version is insufficient")

    monkeypatch.setattr(sessions.onnxruntime, "InferenceSession", fail)
    with pytest.raises(TinyGiantError, match="CUDA failure 35: driver") as caught:
        load(tiny_bundle, threads=1, provider="cuda")
    assert "\n" not in str(caught.value)


def test_tg_run_says_what_computes(
    tiny_bundle: Path, tone: Tone, forged: Forged, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import soundfile

    soundfile.write(tmp_path / "a.wav", tone(0.5, 16_000), 16_000)
    words = [str(tmp_path / "a.wav"), "What?", "--bundle", str(tiny_bundle), "--threads", "1"]
    words += ["--max-new-tokens", "2", "--json"]
    assert main([*words, "--provider", "decoder=cuda"]) == 0
    out, err = capsys.readouterr()
    assert "decoder_model on cuda and cpu" in err
    assert '"decoder_model": ["cuda", "cpu"]' in out
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert " on cpu" not in err
    assert '"decoder_model": ["cpu"]' in out
