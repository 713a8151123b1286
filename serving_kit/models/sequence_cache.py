"""Keys and values of one sequence that is being generated, for all layers.

    layer ── write(key, value) ──▶ all keys and values so far, with the new ones
    step has succeeded ── commit(tokens) ──▶ the new ones count

Until `commit` a step can be run again: it writes to the same places.

Not here: attention (`cached_attention.py`), which sequences run (`scheduling/`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Layers = dict[int, "tuple[torch.Tensor, torch.Tensor]"]  # by number: keys and values of all tokens so far

_BLOCK = 64  # tokens; a cache grows by a quarter, in whole blocks, up to what its text may have
_GROWTH = 1.25


class SequenceCache:
    """The cache of one sequence. Model thread only.

    Attributes:
        length: Tokens whose keys and values count.
        most: Tokens that it may ever hold; None: not known.
        layers: Its memory. What counts of it is never changed.
    """

    __slots__ = ("layers", "length", "most")

    def __init__(self) -> None:
        self.length = 0
        self.most: int | None = None
        self.layers: Layers = {}

    @property
    def capacity(self) -> int:
        """Tokens that it has memory for."""
        return min((keys.shape[2] for keys, _ in self.layers.values()), default=0)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token, in all layers that were written."""
        each = [memory for kept in self.layers.values() for memory in kept]
        return sum(memory.shape[1] * memory.shape[3] * memory.element_size() for memory in each)

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put keys and values of new tokens behind those that count; returns all of them, up to the new ones.

        Args:
            layer: Its number.
            keys: Of shape (1, heads, new tokens, dimensions).
            values: The same.
        """
        end = self.length + keys.shape[2]
        kept = self.layers.get(layer)
        if kept is None or kept[0].shape[2] < end:
            kept = self._grown(kept, keys, values, end)
            self.layers[layer] = kept
        for memory, new in zip(kept, (keys, values), strict=True):
            memory[:, :, self.length : end] = new
        return kept[0][:, :, :end], kept[1][:, :, :end]

    def take_over(self, layers: Layers, length: int) -> None:
        """Begin with the first `length` tokens of another cache, by copying them. Of an empty cache only."""
        for layer, kept in layers.items():
            self.write(layer, *(memory[:, :, :length] for memory in kept))
        self.length = length

    def copy(self, length: int) -> Layers:
        """A copy of its first `length` tokens."""
        return {
            layer: (keys[:, :, :length].clone(), values[:, :, :length].clone())
            for layer, (keys, values) in self.layers.items()
        }

    def commit(self, tokens: int) -> None:
        """Let the `tokens` that were written last count."""
        self.length += tokens

    def clear(self) -> None:
        """Give the memory back."""
        self.length = 0
        self.layers = {}

    def _grown(
        self,
        kept: tuple[torch.Tensor, torch.Tensor] | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        end: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for at least `end` tokens, with what counts so far."""
        wanted = _BLOCK * math.ceil(max(end, _GROWTH * self.length) / _BLOCK)
        tokens = max(end, wanted if self.most is None else min(wanted, self.most))
        larger = []
        for index, new in enumerate((keys, values)):
            memory = new.new_empty(1, new.shape[1], tokens, new.shape[3])
            if kept is not None:
                memory[:, :, : self.length] = kept[index][:, :, : self.length]
            larger.append(memory)
        return larger[0], larger[1]
