"""An attention function of our own in the layers of an unmodified transformers model.

transformers looks a function up by the name in the model's config. It makes no mask for a name without a mask
function, so such a function alone decides which tokens see which.

Not here: the functions (`packed_attention.py`, `cached_attention.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Passed by models whose attention is not softmax(q k) v alone; ignoring them would give other numbers.
_REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")


@contextlib.contextmanager
def attention(
    model: torch.nn.Module, name: str, function: Callable[..., tuple[torch.Tensor, None]]
) -> Iterator[None]:
    """Let the layers of a model call `function` while this is entered.

    Args:
        model: A transformers model with a config of its own.
        name: Of the function, in the whole process.
        function: As transformers calls it.
    """
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(name, function)
    config = model.config
    usual = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = usual


def refuse_other_arithmetic(attention_mask: torch.Tensor | None, others: Mapping[str, object]) -> None:
    """Raise `NotImplementedError` where a layer asks for more than softmax(q k) v, or brings a mask.

    Args:
        attention_mask: As the layer gives it.
        others: Its further arguments.
    """
    if attention_mask is not None or any(others.get(name) is not None for name in _REFUSED):
        raise NotImplementedError("this attention is not softmax(q k) v alone")
