"""The text of generated tokens, piece by piece: what is complete so far and was not given out before.

A token may be part of a character, and the space before a word may depend on the word before it. So pieces
are differences of two decoded texts, and an unfinished character is kept back. The window slides, so that a
piece costs the same late in a text as early (the way of vLLM and of `TextStreamer`). The first piece is
decoded without the prompt, as the pipeline does: joined pieces are its new text.

Not here: the tokens (`generating.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from serving_kit.models.pipes import Tokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Piece(NamedTuple):
    """Text that has become complete; the chunk of a stream of generated text.

    Attributes:
        text: Not empty.
        token: Id of the token that has completed it.
        logprob: Of that token, a natural logarithm; None: the call does not ask for details.
    """

    text: str
    token: int
    logprob: float | None = None


class TextPieces:
    """Decodes one generated text as it grows. Model thread only.

    Args:
        tokenizer: Of the model.
        prompt: How many tokens come before the text.
    """

    __slots__ = ("_read", "_start", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, prompt: int) -> None:
        self._tokenizer = tokenizer
        self._start = self._read = prompt  # tokens whose text was given out, and where the window begins

    def next(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that has become complete; empty: none has.

        Args:
            ids: All tokens, those of the prompt first.
            last: Whether no token follows: what is unfinished is given out as it is.
        """
        before = self._decode(ids[self._start : self._read])
        now = self._decode(ids[self._start :])
        if len(now) <= len(before) or (now.endswith(_UNFINISHED) and not last):
            return ""
        self._start, self._read = self._read, len(ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)
