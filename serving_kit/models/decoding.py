"""Continuous batching: one model call for the new tokens of many sequences, of which each may be elsewhere.

    sequence A: prompt      ─┐                                        ┌─▶ next token of A
    sequence B: last token  ─┼─ one row ── unmodified model ── logits ─┼─▶ next token of B
    sequence C: last token  ─┘  (attention by sequence, with caches)  └─▶ C has ended

A call that raises leaves every sequence as it was, except for what its cache has copied from another one:
caches count new tokens only after the call. A long prompt may take several calls. A sequence whose cache was
given back computes it again, from the tokens that it has.

Not here: attention (`cached_attention.py`), choosing a token (`generating.py`), who is in a step
(`scheduling/`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from serving_kit.model import Done, Failed, More, Part, Prepared, StepResult, Work
from serving_kit.models import generating
from serving_kit.models.cached_attention import Segment, cached_attention
from serving_kit.models.generating import Generating
from serving_kit.models.pipes import Pipe
from serving_kit.models.prefixes import Prefixes
from serving_kit.models.preparing import Tokenised
from serving_kit.models.text_pieces import Piece

if TYPE_CHECKING:
    import torch

_KEY = "continuous batching"  # all such items share steps, whatever their parameters


class Decoder:
    """Generates for one pipeline, a token for each sequence in each step. Model thread only.

    Args:
        pipe: Of text generation, with modules of its own.

    Attributes:
        token_bytes: Of the cache of one token; 0: not known.
    """

    def __init__(self, pipe: Pipe) -> None:
        self.token_bytes = 0
        self._pipe = pipe
        self._prefixes = Prefixes()
        self._keeps = "logits_to_keep" in inspect.signature(pipe.model.forward).parameters

    def begin(self, prepared: Prepared[Tokenised]) -> Prepared[Tokenised]:
        """The same input as a sequence; unchanged where a call asks for a search or several texts."""
        tokenised = prepared.payload
        asked = tokenised.parameters
        seed = cast("int | None", asked.get("seed"))
        sequence = generating.begin(
            self._pipe,
            tokenised.chunks[0],
            tokenised.split.forward,
            seed=seed,
            details=bool(asked.get("details")),
        )
        if sequence is None:
            return prepared
        tokens = len(sequence.ids)
        sequence.cache.most = sequence.rules.most
        most = max(tokens, sequence.rules.most or 0)
        # An estimate: the other one may have ended when this one starts, or computed more.
        found = self._prefixes.find(sequence.ids)
        known = 0 if found is None else found.length
        rest = tokens - known
        work = Work(longest=rest, packed_tokens=rest, context_tokens=known, most_context=most)
        return Prepared(replace(tokenised, sequence=sequence), work, _KEY)

    def release(self, prepared: Prepared[Tokenised]) -> None:
        """Give the cache of a text back; idempotent."""
        sequence = prepared.payload.sequence
        if sequence is not None:
            try:
                self._prefixes.stopped(sequence)
            finally:  # also where there is no memory for a copy
                sequence.cache.clear()

    def keep_prompts(self, most_tokens: int) -> None:
        """Keep up to so many tokens of prompts whose texts have ended, or fewer."""
        self._prefixes.most_tokens = min(most_tokens, self._prefixes.most_tokens)

    def free_memory(self) -> None:
        """Give back what is kept of prompts whose texts have ended."""
        self._prefixes.clear()

    def step(self, parts: Sequence[Part]) -> list[StepResult]:
        """Compute so many tokens of each sequence, and choose the next one of those that have no more."""
        import torch

        payloads: list[Tokenised] = [part.prepared.payload for part in parts]
        sequences = [each.sequence for each in payloads if each.sequence is not None]
        tokens = [part.tokens for part in parts]
        with torch.inference_mode():
            for sequence in sequences:
                self._start(sequence)
            logits = self.logits(sequences, tokens)
            for sequence, new in zip(sequences, tokens, strict=True):
                sequence.cache.commit(min(new, len(sequence.ids) - sequence.cache.length))
            return [_advance(part, logits[index : index + 1]) for index, part in enumerate(parts)]

    def _start(self, sequence: Generating) -> None:
        """Let a sequence whose cache is empty copy what others have computed of it."""
        if sequence.cache.length:
            return
        found = self._prefixes.find(sequence.ids)
        if found is not None:
            sequence.cache.take_over(found.layers, found.length)
        self._prefixes.started(sequence)

    def logits(self, sequences: Sequence[Generating], most: Sequence[int] | None = None) -> torch.Tensor:
        """Behind the last computed token of each sequence, shape (sequences, vocabulary). Commits nothing.

        Args:
            sequences: Each with tokens that the model has not seen.
            most: Of these, how many are computed of each sequence; None: all.
        """
        import torch

        device = self._pipe.device
        unseen = [each.unseen for each in sequences]
        if most is not None:
            unseen = [new[:tokens] for new, tokens in zip(unseen, most, strict=True)]
        segments = [Segment(each.cache, len(new)) for each, new in zip(sequences, unseen, strict=True)]
        row = torch.tensor([[token for new in unseen for token in new]], device=device)
        places = torch.tensor(
            [[cache.length + n for cache, tokens in segments for n in range(tokens)]], device=device
        )
        last = torch.tensor([tokens for _, tokens in segments], device=device).cumsum(0) - 1
        keep = {"logits_to_keep": last} if self._keeps else {}
        with cached_attention(self._pipe.model, segments):
            output = self._pipe.model(input_ids=row, position_ids=places, use_cache=False, **keep)
        logits: torch.Tensor = output.logits[0]
        return logits if self._keeps else logits[last]


def _advance(part: Part, logits: torch.Tensor) -> StepResult:
    """One sequence after the call: its text goes on, has ended, or has failed alone."""
    payload: Tokenised = part.prepared.payload
    sequence = payload.sequence
    assert sequence is not None
    if sequence.cache.length < len(sequence.ids):  # more of the prompt is to come
        return More(work=_rest(sequence, part))
    try:
        sequence.take(logits)
        sequence.ended = ended = sequence.has_ended()
        piece = _piece(sequence, last=ended) if part.streamed else None
        if ended:
            return Done(generating.output(sequence, payload.chunks[0]), piece, generated=1)
    except Exception as error:
        return Failed(error)
    return More(piece, _rest(sequence, part), generated=1)


def _rest(sequence: Generating, part: Part) -> Work:
    """What the next step of a sequence costs."""
    cached = sequence.cache.length
    tokens = len(sequence.ids) - cached
    most = part.prepared.work.most_context
    return Work(longest=tokens, packed_tokens=tokens, context_tokens=cached, most_context=most)


def _piece(sequence: Generating, *, last: bool) -> Piece | None:
    """The text that the last token has completed; None: none."""
    text = sequence.pieces.next(sequence.ids, last=last)
    if not text:
        return None
    return Piece(text, sequence.ids[-1], sequence.logprobs[-1] if sequence.logprobs else None)
