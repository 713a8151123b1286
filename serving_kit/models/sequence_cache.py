"""Keys and values of one sequence that is being generated, for all layers.

    layer ── write(key, value) ──▶ all keys and values so far, with the new ones
    step has succeeded ── commit(tokens) ──▶ the new ones count

Until `commit` a step can be run again: it writes to the same places.

Not here: attention (`cached_attention.py`), which sequences run (`scheduling/`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_BLOCK = 64  # tokens; a cache grows to twice its size, in whole blocks


class SequenceCache:
    """The cache of one sequence. Model thread only.

    Attributes:
        length: Tokens whose keys and values count.
    """

    __slots__ = ("_layers", "length")

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def capacity(self) -> int:
        """Tokens that it has memory for."""
        return min((keys.shape[2] for keys, _ in self._layers.values()), default=0)

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
        kept = self._layers.get(layer)
        if kept is None or kept[0].shape[2] < end:
            kept = self._grown(kept, keys, values, end)
            self._layers[layer] = kept
        for memory, new in zip(kept, (keys, values), strict=True):
            memory[:, :, self.length : end] = new
        return kept[0][:, :, :end], kept[1][:, :, :end]

    def commit(self, tokens: int) -> None:
        """Let the `tokens` that were written last count."""
        self.length += tokens

    def clear(self) -> None:
        """Give the memory back."""
        self.length = 0
        self._layers.clear()

    def _grown(
        self,
        kept: tuple[torch.Tensor, torch.Tensor] | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        end: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for at least `end` tokens, with what counts so far."""
        blocks = -(-max(end, 2 * self.length) // _BLOCK)
        larger = []
        for index, new in enumerate((keys, values)):
            memory = new.new_empty(1, new.shape[1], blocks * _BLOCK, new.shape[3])
            if kept is not None:
                memory[:, :, : self.length] = kept[index][:, :, : self.length]
            larger.append(memory)
        return larger[0], larger[1]
