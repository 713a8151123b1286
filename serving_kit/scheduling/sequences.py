"""Which sequences run in the next step of continuous batching, and how many of its tokens each may compute.

    running, the oldest first    each needs one token more, or what is left of its prompt
    waiting, the oldest first    join while there are sequences and cache
                                      │
                                      ▼
    Advance: shares of the step, or who gives its cache back first

1. Every sequence whose prompt is computed gets its next token.
2. Up to `chunk` tokens of prompts are computed beside: at least half of them of the oldest, and the others of
   the shortest. So every prompt ends, and a short one does not wait for long ones.
3. A prompt starts only where the cache holds all of it beside what runs, in order of arrival.
4. Where the cache is too small for the next tokens, the newest sequence gives its own back. It is computed
   again, before any that waits. The oldest never gives its own back, so that there is always a step.

Pure. Not here: the queue (`scheduler.py`), how large `chunk` is (`pace.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from serving_kit.items import Item

_GROWTH = 16  # tokens that every sequence may still add before one has to give its cache back


class Share(NamedTuple):
    """The tokens that an item computes in a step."""

    item: Item
    tokens: int


class Advance(NamedTuple):
    """What happens next: `evicted` give their caches back, or, if there are none, a step of `shares`."""

    shares: Sequence[Share] = ()
    evicted: Sequence[Item] = ()


def advance(
    running: Sequence[Item],
    waiting: Sequence[Item],
    *,
    most: int,
    budget: int,
    chunk: int,
    cache: float = math.inf,
) -> Advance:
    """The next step of these sequences.

    Args:
        running: Sequences that have begun, the oldest first.
        waiting: Those that may join them, the oldest first.
        most: Sequences in a step.
        budget: Tokens in a step.
        chunk: Tokens of prompts in a step.
        cache: Tokens that all caches may hold.
    """
    holding = [item for item in running if item.context_tokens]
    if evicted := _evicted(holding, cache):
        return Advance(evicted=evicted)
    chosen = holding[:most]  # it may have been lowered
    decoding = [Share(item, 1) for item in chosen if decodes(item)][:budget]
    begun = [item for item in chosen if not decodes(item)]
    new = [*(item for item in running if not item.context_tokens), *waiting][: most - len(chosen)]
    prompts = sorted([*begun, *_with_room(holding, new, cache)], key=_arrival)
    shares = [*decoding, *_divide(prompts, min(chunk, budget - len(decoding)))]
    return Advance(sorted(shares, key=lambda share: _arrival(share.item)))


def decodes(item: Item) -> bool:
    """Whether all that it needs is its next token."""
    return item.tokens == 1 and item.context_tokens > 0


def _evicted(holding: Sequence[Item], cache: float) -> list[Item]:
    """The newest sequences whose caches have to make room for the others; never the oldest."""
    needed, count = _needed(holding), len(holding)
    while needed > cache and count > 1:
        count -= 1
        needed -= _needed(holding[count : count + 1])
    return list(holding[count:])


def _with_room(holding: Sequence[Item], new: Sequence[Item], cache: float) -> list[Item]:
    """The first of the new prompts that the cache holds beside what runs.

    Each needs room for all of its tokens, and for what all of them are about to add.
    """
    needed, sequences = _needed(holding), len(holding)
    for count, item in enumerate(new):
        needed, sequences = needed + _needed([item]), sequences + 1
        if sequences > 1 and needed + _GROWTH * sequences > cache:
            return list(new[:count])
    return list(new)


def _needed(items: Sequence[Item]) -> int:
    """Tokens in the caches of these items once their next tokens, or their prompts, are computed."""
    return sum(item.context_tokens + item.tokens for item in items)


def _divide(prompts: Sequence[Item], room: int) -> list[Share]:
    """Divide `room` tokens: half to the oldest, the others to the shortest, of equal ones to the older."""
    if not prompts or room < 1:
        return []
    oldest = prompts[0]
    reserved = min(oldest.tokens, -(-room // 2))
    room -= reserved
    shares = []
    for item in sorted(prompts, key=lambda item: item.tokens):
        before = reserved if item is oldest else 0
        given = min(item.tokens - before, room)
        room -= given
        if before + given:
            shares.append(Share(item, before + given))
    return shares


def _arrival(item: Item) -> float:
    return item.arrived
