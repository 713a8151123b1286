"""Attention by sequence is in force while it is entered, and refuses arithmetic that it does not know."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.cached_attention import NAME, Segment, cached_attention
from serving_kit.models.sequence_cache import SequenceCache
from tests.support_models import fresh


class Layer(torch.nn.Module):
    layer_idx = 0


Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def made(tokens: int) -> Made:
    """Query, keys and values of one row, shape (1, heads, tokens, dimensions)."""
    generator = torch.Generator().manual_seed(1)
    query, keys, values = torch.randn(3, 1, 2, tokens, 8, generator=generator)
    return query, keys, values


def attend(model: Any, segments: list[Segment], row: Made, mask: Any = None, **given: object) -> torch.Tensor:
    """The output of a row, shape (tokens, heads, dimensions). What was computed counts afterwards."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with cached_attention(model, segments):
        output, _ = ALL_ATTENTION_FUNCTIONS[NAME](Layer(), *row, mask, **given)
    for cache, tokens in segments:
        cache.commit(tokens)
    return output[0]


def part(row: Made, start: int, end: int) -> Made:
    query, keys, values = (each[:, :, start:end] for each in row)
    return query, keys, values


def wanted(row: Made, window: int | None = None) -> torch.Tensor:
    """Causal attention of one text, written out."""
    query, keys, values = row
    size = query.shape[2]
    sees = torch.ones(size, size).tril()
    if window:
        sees = sees.triu(1 - window)
    scores = (query @ keys.mT / query.shape[3] ** 0.5).masked_fill(sees == 0, float("-inf"))
    return (scores.softmax(-1) @ values)[0].transpose(0, 1)


def test_config_is_restored_after_an_error() -> None:
    model = fresh("text-generation").model
    usual = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), cached_attention(model, []):
        _ = 1 / (model.config._attn_implementation != NAME)
    assert model.config._attn_implementation == usual


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask"])
def test_other_arithmetic_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError):
        attend(fresh("text-generation").model, [Segment(SequenceCache(), 3)], made(3), **{name: 50.0})


def test_mask_of_the_model_is_refused() -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(NotImplementedError):
        attend(fresh("text-generation").model, [Segment(SequenceCache(), 3)], made(3), mask)


def test_sequences_do_not_see_each_other() -> None:
    row = made(5)
    together = attend(
        fresh("text-generation").model, [Segment(SequenceCache(), 3), Segment(SequenceCache(), 2)], row
    )
    alone = torch.cat([wanted(part(row, 0, 3)), wanted(part(row, 3, 5))])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_text_in_parts_is_the_text_at_once(window: int | None) -> None:
    """A prompt, a single token, a few more, and a single one again, with and without a window."""
    model, row, cache = fresh("text-generation").model, made(12), SequenceCache()
    found = [
        attend(model, [Segment(cache, end - start)], part(row, start, end), sliding_window=window)
        for start, end in [(0, 5), (5, 6), (6, 11), (11, 12)]
    ]
    torch.testing.assert_close(torch.cat(found), wanted(row, window))
