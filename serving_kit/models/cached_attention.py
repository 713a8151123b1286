"""Attention of several sequences in one row, each with the cache of its own earlier tokens.

    row of new tokens:   [ prompt of A . . . . | B | C | part of the prompt of D . . ]
    attention:             A with itself        B, C with their caches    D with its cache and itself

Not here: the cache (`sequence_cache.py`), whether a model works so (`decoding_trial.py`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

from serving_kit.models.attention import attention, refuse_other_arithmetic
from serving_kit.models.sequence_cache import SequenceCache

if TYPE_CHECKING:
    import torch

NAME = "serving_kit_cached"


class Segment(NamedTuple):
    """The new tokens of one sequence in the row."""

    cache: SequenceCache
    tokens: int


class _Running(threading.local):
    """The row that this thread computes."""

    segments: Sequence[Segment] = ()
    masks: dict[tuple[int, int, int], torch.Tensor]  # of this row, by new tokens, all tokens and window


_running = _Running()


@contextlib.contextmanager
def cached_attention(model: torch.nn.Module, segments: Sequence[Segment]) -> Iterator[None]:
    """Let a model attend by sequence while this is entered.

    Args:
        model: A transformers model with a config of its own.
        segments: The sequences in the order of the row.
    """
    _running.segments, _running.masks = segments, {}
    try:
        with attention(model, NAME, _attend):
            yield
    finally:
        _running.segments, _running.masks = (), {}


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: The attention of one layer.
        query: Of shape (1, heads, tokens of the row, dimensions).
        key: The same with the heads of keys.
        value: The same.
        attention_mask: None.
        scaling: Of the scores; None: that of SDPA.
        sliding_window: Tokens that each sees, with itself; None: all.
        others: What is not used.

    Returns:
        The output of shape (1, tokens of the row, heads, dimensions).
    """
    import torch

    refuse_other_arithmetic(attention_mask, others)
    heads, tokens, grouped = query.shape[1], query.shape[2], query.shape[1] != key.shape[1]
    output = query.new_empty(1, tokens, heads, value.shape[3])
    start, layer = 0, cast("int", module.layer_idx)
    for cache, new in _running.segments:
        end = start + new
        keys, values = cache.write(layer, key[:, :, start:end], value[:, :, start:end])
        whole = keys.shape[2] == new and not (sliding_window and new > sliding_window)
        mask = (
            None
            if whole or (new == 1 and not sliding_window)
            else _mask(query, new, keys.shape[2], sliding_window)
        )
        output[:, start:end] = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:end],
            keys,
            values,
            attn_mask=mask,
            is_causal=whole and new > 1,
            scale=scaling,
            enable_gqa=grouped,
        ).transpose(1, 2)
        start = end
    return output, None


def _mask(query: torch.Tensor, new: int, total: int, window: int | None) -> torch.Tensor | None:
    """Which tokens each new one sees, shape (new, total); None: all."""
    import torch

    if new == 1 and (not window or total <= window):
        return None
    key = (new, total, window or 0)
    if key not in _running.masks:
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
        _running.masks[key] = mask.triu(total - new - window + 1) if window else mask
    return _running.masks[key]
