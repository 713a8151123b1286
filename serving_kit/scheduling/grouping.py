"""Which waiting items share a step: in order of arrival, or by like lengths.

Pure functions of lengths and of a cost a + b * n * longest, for models that pad. Not here: when the step
starts and what shares it where the model packs (`scheduler.py`), the cost (`cost.py`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence

from serving_kit.items import Item


def fifo_prefix(items: Sequence[Item], most: int, budget: int) -> list[Item]:
    """The oldest items that fit together: at most `most`, at most `budget` padded tokens.

    A single item always fits.
    """
    batch: list[Item] = []
    longest = 0
    for item in items[:most]:
        longest = max(longest, item.tokens)
        if batch and longest * (len(batch) + 1) > budget:
            break
        batch.append(item)
    return batch


def group_by_length(items: Sequence[Item], most: int, budget: int, a: float, b: float) -> list[Item]:
    """The batch that holds `items[0]` in the cheapest cut of `items` into batches.

    With a cost a + b * n * longest that grows with both, some cheapest cut is contiguous in the items sorted
    by length (dynamic programming, as in TurboTransformers, PPoPP'21). While the cost is unknown (a = b = 0),
    or a token costs nothing, the result is first come, first served.

    Args:
        items: Waiting items in order of arrival, all of one group; not empty.
        most: Items per batch.
        budget: Padded tokens per batch; a single item always fits.
        a: Seconds per batch.
        b: Seconds per padded token.
    """
    if b <= 0:
        return fifo_prefix(items, most, budget)
    by_length = sorted(items, key=_tokens)  # stable: equal lengths stay in order of arrival
    if by_length[0].tokens == by_length[-1].tokens:
        return fifo_prefix(items, most, budget)  # the fuller, the cheaper
    cuts = cheapest_cuts([item.tokens for item in by_length], most, budget, a, b)
    anchor = by_length.index(items[0])
    end = len(by_length)
    while end - cuts[end] > anchor:
        end -= cuts[end]
    part = by_length[end - cuts[end] : end]
    # A cut may fall between items of equal length and take the younger ones. Swap: the cost is the same.
    wanted = Counter(item.tokens for item in part)
    batch = []
    for item in items:
        if wanted[item.tokens]:
            wanted[item.tokens] -= 1
            batch.append(item)
    return batch


def cheapest_cuts(lengths: Sequence[int], most: int, budget: int, a: float, b: float) -> list[int]:
    """For every prefix of ascending `lengths`, the size of the last batch in its cheapest cut.

    The cost of a batch from `start` to `end` satisfies the quadrangle inequality, because lengths
    ascend: the best start never moves back as the end moves on. So each start is the best one for a
    range of ends, and O(n log n) steps find the ranges (Hirschberg and Larmore 1987, the least weight
    subsequence). A start that is too far back for `most` or `budget` stays so for all later ends.
    """
    totals, cuts = [0.0], [0]

    def total(start: int, end: int) -> float:
        size = end - start
        if size > most or (size > 1 and size * lengths[end - 1] > budget):
            return math.inf
        return totals[start] + a + b * size * lengths[end - 1]

    best: deque[tuple[int, int]] = deque([(0, 1)])  # starts, and the first end for which each is the best
    for end in range(1, len(lengths) + 1):
        while len(best) > 1 and best[1][1] <= end:
            best.popleft()
        start = best[0][0]
        totals.append(total(start, end))
        cuts.append(end - start)
        # A batch that starts here is the best from some end on: ranges are taken over from the back.
        high = len(lengths) + 1
        while best[-1][1] > end and total(end, best[-1][1]) <= total(best[-1][0], best[-1][1]):
            high = best.pop()[1]
        low = max(best[-1][1], end + 1)
        while low < high:
            middle = (low + high) // 2
            if total(end, middle) <= total(best[-1][0], middle):
                high = middle
            else:
                low = middle + 1
        if low <= len(lengths):
            best.append((end, low))
    return cuts


def _tokens(item: Item) -> int:
    return item.tokens
