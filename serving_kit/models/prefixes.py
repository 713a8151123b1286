"""Equal beginnings of prompts are computed once: keys and values are copied from another cache.

    system prompt + question A      computed; what its cache holds of the prompt is kept for a while
    system prompt + question B      copies what is equal, computes the rest

Candidates are the sequences that run, and copies of the last prompts whose texts have ended, up to
`most_tokens`. What a cache holds of a sequence never changes, so that it can be copied while the sequence
goes on. Nothing that waits holds a cache.

One client's prompt may so shorten the time to the first token of another one's.

Not here: the cache itself (`sequence_cache.py`).
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from serving_kit.models.generating import Generating
from serving_kit.models.sequence_cache import Layers

_WORTH = 16  # tokens: fewer are not copied
_KEPT_FROM = 64  # tokens of a prompt that is kept


class Found(NamedTuple):
    """The first `length` tokens of a prompt are the first ones of another cache."""

    length: int
    layers: Layers


class Prefixes:
    """What sequences have computed, and others may copy. Model thread only.

    Args:
        most_tokens: Of prompts whose texts have ended: how many tokens are kept.
    """

    def __init__(self, most_tokens: int = 8192) -> None:
        self.most_tokens = most_tokens
        self._running: weakref.WeakSet[Generating] = weakref.WeakSet()
        self._kept: OrderedDict[tuple[int, ...], Layers] = OrderedDict()  # the oldest use first

    def find(self, ids: Sequence[int]) -> Found | None:
        """The longest known beginning of a prompt, without its last token; None: it is short.

        The last one is always computed, because its logits are needed.
        """
        best, longest, used = None, _WORTH - 1, None
        for running in self._running:
            length = min(common(running.ids, ids), running.cache.length, len(ids) - 1)
            if length > longest:
                best, longest = running.cache.layers, length
        tokens = tuple(ids)
        for kept, layers in self._kept.items():
            length = min(common(kept, tokens), len(ids) - 1)
            if length > longest:
                best, longest, used = layers, length, kept
        if used is not None:
            self._kept.move_to_end(used)
        return None if best is None else Found(longest, best)

    def started(self, sequence: Generating) -> None:
        """Others may copy what this one computes."""
        self._running.add(sequence)

    def stopped(self, sequence: Generating) -> None:
        """Its cache is about to be given back. Of a text that has ended a copy of its prompt is kept."""
        self._running.discard(sequence)
        length = min(sequence.prompt, sequence.cache.length, self.most_tokens)
        if not sequence.ended or length < _KEPT_FROM:
            return
        ids = tuple(sequence.ids[:length])
        if any(kept[:length] == ids for kept in self._kept):
            return
        for kept in [kept for kept in self._kept if ids[: len(kept)] == kept]:
            del self._kept[kept]
        while self._kept and length + sum(map(len, self._kept)) > self.most_tokens:
            self._kept.popitem(last=False)
        self._kept[ids] = sequence.cache.copy(length)

    def clear(self) -> None:
        """Give the memory back."""
        self._kept.clear()


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginnings."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection, because comparing slices takes no Python code for each token
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
