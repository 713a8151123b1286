"""How many tokens of prompts a step may compute beside the next tokens of those that are being generated.

Learned apart, because they cost apart: the next tokens of all sequences take one pass over the weights, and
prompts add to it for every token.

    chunk = (inter_token_target - seconds of the next tokens alone) / seconds for each token of a prompt

Every step with a prompt corrects the second, every step without one the first, and `chunk` is never below
`LEAST`: so a wrong value of either is corrected.

Pure. Not here: which prompts (`sequences.py`).
"""

from __future__ import annotations

_RATE = 0.2  # of one step on the mean of the steps without prompts
_FORGET = 0.9  # per step with prompts
LEAST, _FIRST, _MOST = 16, 256, 8192  # tokens
_GAP_SHARE = 0.5  # of the step without prompts: what prompts may add where that alone exceeds the target


class Pace:
    """Learns from the steps of one model. Not thread-safe: the scheduler owns it."""

    def __init__(self) -> None:
        self.decode_s = 0.0  # a step without prompts; 0: there was none yet
        self._prompt_s = self._prompt_tokens = 0.0

    @property
    def prompt_token_s(self) -> float:
        """Seconds that one token of a prompt adds to a step; 0: not known."""
        return self._prompt_s / self._prompt_tokens if self._prompt_tokens else 0.0

    def observe(self, decoded: int, prompt_tokens: int, seconds: float) -> None:
        """Learn from a step.

        Args:
            decoded: Sequences that got their next token without a prompt.
            prompt_tokens: Of prompts.
            seconds: What it took.
        """
        if prompt_tokens:
            added_s = max(0.0, seconds - (self.decode_s if decoded else 0.0))
            self._prompt_s = self._prompt_s * _FORGET + added_s
            self._prompt_tokens = self._prompt_tokens * _FORGET + prompt_tokens
        elif decoded:
            self.decode_s += (_RATE if self.decode_s else 1.0) * (seconds - self.decode_s)

    def chunk(self, target_s: float, *, decoding: bool) -> int:
        """Tokens of prompts for a step that is to take about `target_s`.

        Args:
            target_s: Longest time that is wanted between two tokens of a sequence.
            decoding: Whether any sequence waits for its next token in that step.
        """
        if not self.prompt_token_s:
            return _FIRST
        base_s = self.decode_s if decoding else 0.0
        room_s = max(target_s - base_s, _GAP_SHARE * base_s)
        return int(min(max(room_s / self.prompt_token_s, LEAST), _MOST))
