"""Attention by sequence is in force while it is entered, and refuses arithmetic that it does not know."""

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.cached_attention import NAME, Segment, cached_attention
from serving_kit.models.sequence_cache import SequenceCache
from tests.support_models import fresh


class Layer(torch.nn.Module):
    layer_idx = 0


def attend(model: object, segments: list[Segment], **given: object) -> "torch.Tensor":
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    size = sum(each.tokens for each in segments)
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, size, 8, generator=generator) for _ in range(3))
    with cached_attention(model, segments):  # type: ignore[arg-type]
        output, _ = ALL_ATTENTION_FUNCTIONS[NAME](Layer(), query, key, value, None, **given)
    return output


def test_config_is_restored_after_an_error() -> None:
    model = fresh("text-generation").model
    usual = model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), cached_attention(model, []):
        _ = 1 / (model.config._attn_implementation != NAME)
    assert model.config._attn_implementation == usual


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask"])
def test_other_arithmetic_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError):
        attend(fresh("text-generation").model, [Segment(SequenceCache(), 3)], **{name: 50.0})


def test_sequences_do_not_see_each_other() -> None:
    model = fresh("text-generation").model
    together = attend(model, [Segment(SequenceCache(), 3), Segment(SequenceCache(), 2)])
    first = attend(model, [Segment(SequenceCache(), 3)])
    assert together.shape == (1, 5, 2, 8)
    assert not torch.equal(together[:, :3], first), "other random numbers: the seed covers the whole row"
    assert torch.isfinite(together).all()
