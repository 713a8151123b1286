"""Attention of several texts in one row, each with itself alone.

    row:         [ text A . . . . | text B . . | text C . . ]
    attention:     A with A         B with B     C with C        (neighbours of one length in one call)

In the last layer the queries may be those of a few tokens only, with the keys and values of all of them
(`last_layer.py`).

Not here: building the row and cutting up what the model makes of it (`packed.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from serving_kit.models.attention import attention, refuse_other_arithmetic

if TYPE_CHECKING:
    import torch

NAME = "serving_kit_packed"


class Run(NamedTuple):
    """Neighbouring texts with one number of tokens and of queries, for one call."""

    texts: int
    tokens: int  # of each
    queries: int  # of each


@dataclass(eq=False, slots=True)
class Row:
    """Texts in one row, and what is read of them.

    Attributes:
        lengths: Tokens of each text.
        read: Places in the row whose output is read, shape (reads,); None: all.
        counts: How many of them each text has.
        each_alone: Whether what is read gets a row for each place, shape (reads, 1, hidden), as heads expect
            that read the first token; else one row for all.
        calls: Calls of the attention in this forward.
        windows: The sliding windows that the layers have asked for.
        module: The attention that was called last.
        pointers: Where the keys and values were that it was given.
        hidden: What the last layer was given, once only a part of it goes on.
        keys: Of the last layer, for all tokens, shape (1, tokens, heads x dimensions); None: as given.
        values: The same.
        layer_calls: Calls of the module of the last layer in this forward.
    """

    lengths: Sequence[int]
    read: torch.Tensor | None = None
    counts: Sequence[int] = ()
    each_alone: bool = False
    calls: int = 0
    windows: set[int | None] = field(default_factory=set)
    module: torch.nn.Module | None = None
    pointers: tuple[int, int] = (0, 0)
    hidden: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    layer_calls: int = 0

    def runs(self, *, cut: bool) -> list[Run]:
        """The calls for all queries, or for those that are read."""
        queries = self.counts if cut else self.lengths
        pairs = zip(self.lengths, queries, strict=True)
        return [Run(len(list(same)), *pair) for pair, same in itertools.groupby(pairs)]


class _Running(threading.local):
    """The row that this thread computes."""

    row: Row | None = None


_running = _Running()


def running() -> Row | None:
    """The row that this thread computes; None: none."""
    return _running.row


@contextlib.contextmanager
def packed_attention(model: torch.nn.Module, row: Row) -> Iterator[None]:
    """Let a model attend by text while this is entered.

    Args:
        model: A transformers model with a config of its own.
        row: What it is given.
    """
    _running.row = row
    try:
        with attention(model, NAME, _attend):
            yield
    finally:
        _running.row = None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer.

    Args:
        module: The attention of one layer.
        query: Of shape (1, heads, queries of the row, dimensions).
        key: Of shape (1, heads of keys, tokens of the row, dimensions).
        value: The same.
        attention_mask: None.
        scaling: Of the scores; None: that of SDPA.
        sliding_window: Tokens further away than this minus 1 are not seen; None: all are.
        is_causal: Whether later tokens are not seen; None: as the module says.
        others: What is not used.

    Returns:
        The output of shape (1, queries of the row, heads, dimensions).
    """
    import torch

    refuse_other_arithmetic(attention_mask, others)
    row = _running.row
    assert row is not None, "a packed forward without a row. This is a bug."
    row.calls += 1
    row.windows.add(sliding_window)
    row.module, row.pointers = module, (key.data_ptr(), value.data_ptr())
    cut = row.keys is not None and row.values is not None
    queries, keys, values = (each.transpose(1, 2)[0] for each in (query, key, value))  # (tokens, heads, ...)
    if row.keys is not None and row.values is not None:
        keys, values = row.keys.view(-1, *keys.shape[1:]), row.values.view(-1, *values.shape[1:])
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    if cut and (causal or sliding_window):
        raise NotImplementedError("the places of single queries are not known here")
    grouped = queries.shape[1] != keys.shape[1]
    output = query.new_empty(1, queries.shape[0], queries.shape[1], values.shape[2])
    first_query = first_token = 0
    for texts, tokens, each in row.runs(cut=cut):
        last_query, last_token = first_query + texts * each, first_token + texts * tokens
        mask = _window_mask(tokens, sliding_window, causal, query.device)
        output[0, first_query:last_query].view(texts, each, *output.shape[2:])[...] = (
            torch.nn.functional.scaled_dot_product_attention(
                _texts(queries[first_query:last_query], texts, each),
                _texts(keys[first_token:last_token], texts, tokens),
                _texts(values[first_token:last_token], texts, tokens),
                attn_mask=mask,
                is_causal=causal and mask is None,
                scale=scaling,
                enable_gqa=grouped,
            ).transpose(1, 2)
        )
        first_query, first_token = last_query, last_token
    return output, None


def _texts(rows: torch.Tensor, texts: int, each: int) -> torch.Tensor:
    """Shape (texts x each, heads, dimensions) as (texts, heads, each, dimensions)."""
    return rows.reshape(texts, each, *rows.shape[1:]).transpose(1, 2)


def _window_mask(tokens: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Which tokens of one text see which, shape (tokens, tokens); None: the window is no limit."""
    import torch

    if not window or tokens <= window:
        return None
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1 - window)
    return mask.tril(0 if causal else window - 1)
