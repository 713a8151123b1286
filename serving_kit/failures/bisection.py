"""Who is to blame for a batch that raised: halves of it, the largest first.

    search = Search(8, vouched=False)            # a batch of 8 has raised
    while (part := search.next()) is not None:   # range(0, 4), range(4, 8), ...
        search.passed()                          # or search.failed(part), by what came of running it

A part of one that fails is a culprit. Running both halves, where one of them has to be bad, gives a
failure that was a whim of the moment a second chance, and costs little: halves get smaller.

A part that gave a wrong number of outputs is not halved: every item that is left runs alone, because a
number of outputs that is right for several items may be so by chance.

Further forwards for n items with k culprits: at most 2 * ceil(log2 n) * k, and never above 2n - 2. If
nobody vouches for the model and 2 * ceil(log2 n) forwards have not brought one answer, it is taken to
be the model, and the search ends; that takes more than ceil(log2 n) culprits at once, or a broken model.

Pure; positions only. Not here: running the parts (`recovery.py`).
"""

from __future__ import annotations

from collections import deque


class Search:
    """One failed batch of `size` items; one alone is to blame, and nothing is searched.

    Args:
        size: Items in it.
        vouched: Whether the model is known to work, or taken to, so that the search goes on to the end.
        alone: Whether every item is to run alone.
    """

    def __init__(self, size: int, *, vouched: bool, alone: bool = False) -> None:
        self._parts: deque[range] = deque()
        self._doubts = None if vouched else 2 * (size - 1).bit_length()
        if size > 1:
            self._split(range(size))
        if alone:
            self._run_alone()

    def next(self) -> range | None:
        """The positions to run now; None: the search is over."""
        if self._doubts == 0 or not self._parts:
            return None
        return self._parts.popleft()

    def passed(self) -> None:
        """That part was answered: the model works."""
        self._doubts = None

    def failed(self, part: range, *, alone: bool = False) -> None:
        """That part raised. `alone`: from now on, every item is to run alone."""
        if self._doubts is not None:
            self._doubts -= 1
        if len(part) > 1:
            self._split(part)
        if alone:
            self._run_alone()

    def _run_alone(self) -> None:
        self._parts = deque(range(each, each + 1) for part in self._parts for each in part)

    def _split(self, part: range) -> None:
        middle = (len(part) + 1) // 2
        self._parts += (part[:middle], part[middle:])
