"""An attention function of our own is in force while it is entered, and only there."""

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.attention import attention, refuse_other_arithmetic
from tests.support_models import fresh


def test_layers_call_the_function() -> None:
    """In every layer; afterwards the model's own is back, also after an error."""
    pipe, calls = fresh("feature-extraction"), []

    def function(module: object, *tensors: object, **others: object) -> None:
        calls.append(module)
        raise ZeroDivisionError

    usual = pipe.model.config._attn_implementation
    with pytest.raises(ZeroDivisionError), attention(pipe.model, "serving_kit_test", function):
        pipe("a stone house")
    assert len(calls) == 1
    assert pipe.model.config._attn_implementation == usual
    assert pipe("a stone house")
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "head_mask"])
def test_more_than_a_softmax_is_refused(name: str) -> None:
    refuse_other_arithmetic(None, {name: None, "is_causal": True})
    with pytest.raises(NotImplementedError):
        refuse_other_arithmetic(None, {name: 1.0})
    with pytest.raises(NotImplementedError):
        refuse_other_arithmetic(torch.ones(1), {})
