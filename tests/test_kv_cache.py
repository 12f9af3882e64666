"""The KV cache: its size, and who may move its length."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tinygiant.runtime.config import DecoderConfig, KvType
from tinygiant.runtime.errors import UsageError
from tinygiant.runtime.kv_cache import KvCache

QWEN3 = DecoderConfig(
    vocab_size=151_936,
    hidden_size=1_024,
    n_layers=28,
    n_kv_heads=8,
    head_dim=128,
    max_positions=40_960,
    stop_token_ids=(151_645,),
)
CONFIG = dataclasses.replace(QWEN3, n_layers=3, n_kv_heads=2, head_dim=4, max_positions=32)


def test_one_token_costs_what_the_contract_says() -> None:
    assert QWEN3.kv_values_per_token == 57_344
    assert QWEN3.kv_token_bytes("int8") == 56 * 2**10
    cache = KvCache(CONFIG, 10)
    assert (
        cache.n_bytes == 10 * CONFIG.kv_values_per_token * 4 == 10 * CONFIG.kv_token_bytes("fp32")
    )
    assert KvCache(CONFIG, 10, "int8").n_bytes * 4 == cache.n_bytes
    assert cache.capacity == 10


@pytest.mark.parametrize(("kv_type", "dtype"), [("fp32", np.float32), ("int8", np.int8)])
def test_buffers_are_contiguous_and_one_a_layer_and_kind(kv_type: KvType, dtype: type) -> None:
    cache = KvCache(CONFIG, 5, kv_type)
    buffers = list(cache.buffers())
    assert [layer for layer, _, _ in buffers] == [0, 1, 2]
    arrays = [array for _, key, value in buffers for array in (key, value)]
    assert len({array.ctypes.data for array in arrays}) == 6
    for array in arrays:
        assert array.shape == (1, 2, 5, 4)
        assert array.dtype == dtype
        assert array.flags.c_contiguous


def test_length_moves_within_the_capacity() -> None:
    cache = KvCache(CONFIG, 5)
    cache.advance(3)
    cache.require(2)
    with pytest.raises(UsageError, match="holds 3 of 5 tokens, 3 more do not fit"):
        cache.require(3)
    with pytest.raises(UsageError):
        cache.advance(3)
    assert cache.length == 3
    cache.truncate(1)
    assert cache.length == 1
    cache.advance(4)
    assert cache.length == 5


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_only_goes_back(length: int) -> None:
    cache = KvCache(CONFIG, 5)
    cache.advance(3)
    with pytest.raises(UsageError, match="cannot cut"):
        cache.truncate(length)


@pytest.mark.parametrize("capacity", [0, -1, 33])
def test_impossible_capacities(capacity: int) -> None:
    with pytest.raises(UsageError, match="32 positions"):
        KvCache(CONFIG, capacity)


@pytest.mark.parametrize("kv_type", ["fp32", "int8"])
def test_a_snapshot_is_a_copy_of_what_is_held(kv_type: KvType) -> None:
    cache = KvCache(CONFIG, 5, kv_type)
    cache.advance(3)
    for layer, key, value in cache.buffers():
        key[...], value[...] = layer + 1, -layer - 1
    snapshot = cache.snapshot()
    cache.truncate(0)
    for _, key, value in cache.buffers():
        key[...], value[...] = 9, 9
    other = KvCache(CONFIG, 4, kv_type)
    other.restore(snapshot)
    assert other.length == 3
    for layer, key, value in other.buffers():
        assert (key[:, :, :3] == layer + 1).all()
        assert (value[:, :, :3] == -layer - 1).all()
        assert not key[:, :, 3:].any()
    with pytest.raises(UsageError, match="do not fit"):
        KvCache(CONFIG, 2, kv_type).restore(snapshot)
