"""The engine against transformers: the same logits and the same greedy tokens, in any steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import Qwen3ForCausalLM

from tests.model_stub import small_qwen3
from tinygiant.export.decoder import DecoderSpec, build_decoder
from tinygiant.runtime import decoder as engine
from tinygiant.runtime.decoder import Decoder, greedy
from tinygiant.runtime.embeddings import TokenEmbeddings
from tinygiant.runtime.errors import BundleError, UsageError
from tinygiant.runtime.ort.sessions import Graph, SessionSettings

CONFIG = DecoderSpec(
    vocab_size=97,
    hidden_size=48,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
    ffn_size=80,
    max_positions=64,
    stop_token_ids=(1,),
    rms_norm_eps=1e-6,
    rope_theta=1_000_000.0,
    qk_norm=True,
)
CAPACITY = 60
IDS = st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def reference() -> Qwen3ForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small_qwen3(CONFIG)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def graph(reference: Qwen3ForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    path = tmp_path_factory.mktemp("decoder") / "decoder_model.onnx"
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    build_decoder(CONFIG, tensors, path)
    return Graph(path, SessionSettings(threads=1, spin=False))


@pytest.fixture(scope="module")
def embeddings(reference: Qwen3ForCausalLM) -> TokenEmbeddings:
    return TokenEmbeddings(reference.get_input_embeddings().weight.detach().numpy())


@pytest.fixture
def decoder(graph: Graph, embeddings: TokenEmbeddings) -> Decoder:
    return Decoder(graph, embeddings, CONFIG, CAPACITY)


def expected(reference: Qwen3ForCausalLM, ids: list[int]) -> NDArray[np.float32]:
    """Logits after each token, without any cache: (T, V)."""
    with torch.no_grad():
        logits: NDArray[np.float32] = (
            reference(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        )
    return logits


def greedy_reference(reference: Qwen3ForCausalLM, ids: list[int], n: int, cache: bool) -> list[int]:
    out = reference.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
        use_cache=cache,
    )
    return [int(token) for token in out[0, len(ids) :]]


@settings(max_examples=25)
@given(ids=IDS, cuts=st.lists(st.integers(1, 19), max_size=3))
def test_any_split_into_steps_gives_the_same_logits(
    ids: list[int],
    cuts: list[int],
    graph: Graph,
    embeddings: TokenEmbeddings,
    reference: Qwen3ForCausalLM,
) -> None:
    decoder = Decoder(graph, embeddings, CONFIG, CAPACITY)
    want = expected(reference, ids)
    ends = sorted({cut for cut in cuts if cut < len(ids)} | {len(ids)})
    start = 0
    for number, end in enumerate(ends):
        if number == 0:
            got = decoder.prefill(embeddings.lookup(ids[:end])[None])[None]
            np.testing.assert_allclose(got[-1], want[end - 1], rtol=1e-3, atol=1e-4)
        else:
            got = decoder.step(ids[start:end])
            assert got.shape == (end - start, CONFIG.vocab_size)
            np.testing.assert_allclose(got, want[start:end], rtol=1e-3, atol=1e-4)
        start = end
        assert decoder.cache.length == end


def test_a_long_prompt_is_read_in_parts(
    decoder: Decoder,
    embeddings: TokenEmbeddings,
    reference: Qwen3ForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = list(range(3, 40))
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 8)
    got = decoder.prefill(embeddings.lookup(ids)[None])
    np.testing.assert_allclose(got, expected(reference, ids)[-1], rtol=1e-3, atol=1e-4)
    assert decoder.cache.length == len(ids)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_tokens_equal_the_reference_with_and_without_cache(
    decoder: Decoder, reference: Qwen3ForCausalLM, seed: int
) -> None:
    ids = [int(i) for i in np.random.default_rng(seed).integers(3, 97, size=9)]
    tokens = list(decoder.generate(decoder.read(ids), max_new_tokens=30, stop_ids=()))
    assert tokens == greedy_reference(reference, ids, 30, cache=True)
    assert tokens == greedy_reference(reference, ids, 30, cache=False)


def test_truncating_goes_back_exactly(decoder: Decoder) -> None:
    first = decoder.read([5, 6, 7])
    continued = decoder.step([8, 9])
    decoder.cache.truncate(3)
    decoder.step([50, 51, 52])
    decoder.cache.truncate(3)
    np.testing.assert_array_equal(decoder.step([8, 9]), continued)
    decoder.cache.truncate(0)
    np.testing.assert_array_equal(decoder.read([5, 6, 7]), first)


def test_two_sequences_on_one_graph_do_not_meet(graph: Graph, embeddings: TokenEmbeddings) -> None:
    one = Decoder(graph, embeddings, CONFIG, CAPACITY)
    two = Decoder(graph, embeddings, CONFIG, CAPACITY)
    one.read([5, 6, 7])
    two.read([9, 10])
    interleaved = one.step([8])
    alone = Decoder(graph, embeddings, CONFIG, CAPACITY)
    alone.read([5, 6, 7])
    np.testing.assert_array_equal(interleaved, alone.step([8]))


def generated(decoder: Decoder, n: int, stop_ids: tuple[int, ...]) -> tuple[list[int], int | None]:
    logits = decoder.read([5, 6, 7])
    steps = decoder.generate(logits, max_new_tokens=n, stop_ids=stop_ids)
    tokens: list[int] = []

    def kept() -> Iterator[int]:
        ending.append((yield from steps))

    ending: list[int | None] = []
    tokens.extend(kept())
    return tokens, ending[0]


def test_generation_stops_before_a_stop_token(graph: Graph, embeddings: TokenEmbeddings) -> None:
    free, ending = generated(Decoder(graph, embeddings, CONFIG, CAPACITY), 10, ())
    assert len(free) == 10
    assert ending is None
    stop = free[4]
    decoder = Decoder(graph, embeddings, CONFIG, CAPACITY)
    cut, ending = generated(decoder, 10, (stop,))
    assert cut == free[: free.index(stop)]
    assert ending == stop
    assert decoder.cache.length == 3 + len(cut)  # all that was yielded has been read


def test_a_spent_budget_leaves_the_last_token_unread(decoder: Decoder) -> None:
    tokens, ending = generated(decoder, 4, ())
    assert (len(tokens), ending) == (4, None)
    assert decoder.cache.length == 3 + 3


def test_nothing_is_read_beyond_the_capacity(graph: Graph, embeddings: TokenEmbeddings) -> None:
    decoder = Decoder(graph, embeddings, CONFIG, 4)
    decoder.read([5, 6, 7])
    with pytest.raises(UsageError, match="do not fit"):
        decoder.step([1, 2])
    assert decoder.step([1]).shape == (1, 97)
    with pytest.raises(UsageError, match="do not fit"):
        decoder.step([1])
    for nothing in (lambda: decoder.step([]), lambda: decoder.read([])):
        with pytest.raises(UsageError, match="nothing to read"):
            nothing()


def test_ties_go_to_the_lowest_id_and_nan_is_an_error() -> None:
    assert greedy(np.array([0.0, 2.0, 2.0], np.float32)) == 1
    with pytest.raises(BundleError, match="NaN"):
        greedy(np.array([0.0, np.nan, 2.0], np.float32))


def test_damaged_weights_are_noticed(graph: Graph) -> None:
    broken = TokenEmbeddings(np.full((97, 48), np.nan, np.float32))
    decoder = Decoder(graph, broken, CONFIG, 8)
    with pytest.raises(BundleError, match="NaN"):
        next(decoder.generate(decoder.read([1]), max_new_tokens=2, stop_ids=()))
