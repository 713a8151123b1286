"""Generated text up to the first stop string, which is not part of it; also where it comes in pieces.

The model itself ends behind a stop string (`StopStringCriteria` of transformers). Here that string is cut
off. Of a text in pieces, an end that may be the beginning of a stop string is kept back until it is decided.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Cuts one text.

    Args:
        stops: The stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._kept = ""  # not given out: it may begin a stop string
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that can be given out after one more piece; empty: none."""
        if self.stopped or not self._stops:
            return "" if self.stopped else piece
        text = self._kept + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._kept = True, ""
            return text[: min(found)]
        kept = max(_overlap(text, stop) for stop in self._stops)
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """What was kept back, once the text has ended; empty: nothing."""
        rest, self._kept = self._kept, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop string."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
