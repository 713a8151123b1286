"""Attention by text in one row, against one text at a time with a mask written out."""

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.packed_attention import NAME, Row, packed_attention
from tests.support_models import fresh

LENGTHS = [3, 3, 9, 1, 5]


class Layer(torch.nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.is_causal = causal


def attend(row: Row, *tensors: torch.Tensor, causal: bool = False, **given: object) -> torch.Tensor:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with packed_attention(fresh("feature-extraction").model, row):
        output, _ = ALL_ATTENTION_FUNCTIONS[NAME](Layer(causal), *tensors, None, **given)
    return output


def heads(count: int, seed: int, size: int = sum(LENGTHS)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, size, count, 8, generator=generator).transpose(1, 2)


def wanted(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, causal: bool
) -> torch.Tensor:
    """Shape (1, tokens, heads, dimensions), text by text."""
    outputs = []
    for q, k, v in zip(*(each.split(LENGTHS, dim=2) for each in (query, key, value)), strict=True):
        tokens = q.shape[2]
        distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
        seen = torch.ones(tokens, tokens, dtype=torch.bool)
        if window:
            seen &= distance.abs() < window
        if causal:
            seen &= distance >= 0
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = (q @ k.transpose(2, 3)) * 0.3
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v)
    return torch.cat(outputs, dim=2).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_each_text_sees_itself_alone(window: int | None, causal: bool, key_heads: int) -> None:
    query, key, value = heads(4, 1), heads(key_heads, 2), heads(key_heads, 3)
    given = attend(Row(LENGTHS), query, key, value, causal=causal, scaling=0.3, sliding_window=window)
    torch.testing.assert_close(given, wanted(query, key, value, window, causal), atol=1e-5, rtol=1e-5)


def test_queries_of_some_tokens_only() -> None:
    query, key, value = heads(4, 1), heads(4, 2), heads(4, 3)
    read, counts = torch.tensor([0, 2, 3, 6, 14, 16, 17, 20]), [2, 1, 2, 0, 3]
    row = Row(LENGTHS, read, counts)
    row.keys, row.values = (each.transpose(1, 2).flatten(2) for each in (key, value))
    given = attend(row, query[:, :, read], key[:, :, read], value[:, :, read], scaling=0.3)
    all_of_them = wanted(query, key, value, None, causal=False)
    torch.testing.assert_close(given, all_of_them[:, read], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_other_arithmetic_is_refused(name: str) -> None:
    tensors = heads(4, 1), heads(4, 2), heads(4, 3)
    with pytest.raises(NotImplementedError):
        attend(Row(LENGTHS), *tensors, **{name: 50.0})


def test_config_is_restored_after_an_error() -> None:
    model = fresh("feature-extraction").model
    usual = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), packed_attention(model, Row([1])):
        _ = 1 / (model.config._attn_implementation != NAME)
    assert model.config._attn_implementation == usual
