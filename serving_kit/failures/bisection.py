"""Which items of a failed batch fail alone: halves of it, the largest first.

    bisection = Bisection(8, known_healthy=False)      # a batch of 8 has raised
    while (part := bisection.next()) is not None:      # range(0, 4), range(4, 8), ...
        bisection.passed()                             # or bisection.failed(part), by what came of running it

A part of one item that fails is isolated. Running both halves, where one of them has to fail, gives a
transient failure a second chance, and costs little: halves get smaller.

A part that gave a wrong number of outputs is not halved: every item that is left runs alone, because a
number of outputs that is right for several items may be so by chance.

Further steps for n items of which k fail: at most 2 * ceil(log2 n) * k, and never above 2n - 2. While the
model is not known to be healthy, the bisection ends after 2 * ceil(log2 n) steps without one answer; that
takes more than ceil(log2 n) failing items at once, or a broken model.

Pure; positions only. Not here: running the parts (`recovery.py`).
"""

from __future__ import annotations

from collections import deque


class Bisection:
    """One failed batch of `size` items; a batch of one is isolated already.

    Args:
        size: Items in it.
        known_healthy: Whether the model works, or is taken to, so that the bisection goes on to the end.
        alone: Whether every item is to run alone.
    """

    def __init__(self, size: int, *, known_healthy: bool, alone: bool = False) -> None:
        self._parts: deque[range] = deque()
        self._tries: int | None = None if known_healthy else 2 * (size - 1).bit_length()
        if size > 1:
            self._split(range(size))
        if alone:
            self._run_alone()

    def next(self) -> range | None:
        """The positions to run now; None: it is over."""
        if self._tries == 0 or not self._parts:
            return None
        return self._parts.popleft()

    def passed(self) -> None:
        """That part was answered: the model works."""
        self._tries = None

    def failed(self, part: range, *, alone: bool = False) -> None:
        """That part raised. `alone`: from now on, every item is to run alone."""
        if self._tries is not None:
            self._tries -= 1
        if len(part) > 1:
            self._split(part)
        if alone:
            self._run_alone()

    def _run_alone(self) -> None:
        self._parts = deque(range(each, each + 1) for part in self._parts for each in part)

    def _split(self, part: range) -> None:
        middle = (len(part) + 1) // 2
        self._parts += (part[:middle], part[middle:])
