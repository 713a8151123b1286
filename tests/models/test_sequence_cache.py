"""Keys and values of one sequence: what counts stays, what was not committed is written over."""

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.sequence_cache import SequenceCache


def tokens(count: int, value: float) -> "torch.Tensor":
    """Shape (1, heads, tokens, dimensions)."""
    return torch.full((1, 2, count, 4), value)


def test_returns_all_tokens_so_far() -> None:
    cache = SequenceCache()
    cache.write(0, tokens(3, 1), tokens(3, -1))
    cache.commit(3)
    keys, values = cache.write(0, tokens(1, 2), tokens(1, -2))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2]
    assert values[0, 1, :, 3].tolist() == [-1, -1, -1, -2]


def test_uncommitted_tokens_are_written_over() -> None:
    cache = SequenceCache()
    cache.write(0, tokens(2, 1), tokens(2, 1))
    cache.commit(2)
    cache.write(0, tokens(5, 7), tokens(5, 7))
    keys, _ = cache.write(0, tokens(1, 3), tokens(1, 3))
    assert (cache.length, keys[0, 0, :, 0].tolist()) == (2, [1, 1, 3])


def test_growth_keeps_what_counts() -> None:
    cache = SequenceCache()
    for count in range(300):
        cache.write(0, tokens(1, count), tokens(1, count))
        cache.commit(1)
    keys, _ = cache.write(0, tokens(1, 300), tokens(1, 300))
    assert keys[0, 0, :, 0].tolist() == list(range(301))
    assert 301 <= cache.capacity <= 1.25 * 301 + 64


def test_no_more_memory_than_its_text_may_need() -> None:
    cache = SequenceCache()
    cache.most = 70
    for count in range(70):
        cache.write(0, tokens(1, count), tokens(1, count))
        cache.commit(1)
    assert cache.capacity == 70


def test_bytes_of_a_token() -> None:
    """Keys and values of two heads with four single numbers each, in every layer."""
    cache = SequenceCache()
    for layer in range(3):
        cache.write(layer, tokens(5, 1.0), tokens(5, 1.0))
    assert cache.token_bytes == 3 * 2 * 2 * 4 * 4


def test_layers_are_apart() -> None:
    cache = SequenceCache()
    cache.write(0, tokens(2, 1), tokens(2, 1))
    keys, _ = cache.write(1, tokens(2, 5), tokens(2, 5))
    assert keys.unique().tolist() == [5]


def test_cleared_cache_holds_nothing() -> None:
    cache = SequenceCache()
    cache.write(0, tokens(2, 1), tokens(2, 1))
    cache.commit(2)
    cache.clear()
    assert (cache.length, cache.capacity) == (0, 0)
