"""Continuous batching: one model call for the new tokens of many sequences, of which each may be elsewhere.

    sequence A: prompt      ─┐                                        ┌─▶ next token of A
    sequence B: last token  ─┼─ one row ── unmodified model ── logits ─┼─▶ next token of B
    sequence C: last token  ─┘  (attention by sequence, with caches)  └─▶ C has ended

A call that raises leaves every sequence as it was: caches count new tokens only after it.

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
from serving_kit.models.preparing import Tokenised
from serving_kit.models.text_pieces import Piece

if TYPE_CHECKING:
    import torch

_KEY = "continuous batching"  # all such items share steps, whatever their parameters


class Decoder:
    """Generates for one pipeline, a token for each sequence in each step. Model thread only.

    Args:
        pipe: Of text generation, with modules of its own.
    """

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
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
        return Prepared(replace(tokenised, sequence=sequence), prepared.work, _KEY)

    def step(self, parts: Sequence[Part]) -> list[StepResult]:
        """Compute the new tokens of each sequence, and choose the next one."""
        import torch

        payloads: list[Tokenised] = [part.prepared.payload for part in parts]
        sequences = [each.sequence for each in payloads if each.sequence is not None]
        with torch.inference_mode():
            logits = self.logits(sequences)
            for sequence in sequences:
                sequence.cache.commit(len(sequence.ids) - sequence.cache.length)
            return [_advance(part, logits[index : index + 1]) for index, part in enumerate(parts)]

    def logits(self, sequences: Sequence[Generating]) -> torch.Tensor:
        """Behind the last token of each sequence, shape (sequences, vocabulary). Commits nothing."""
        import torch

        device = self._pipe.device
        unseen = [each.unseen for each in sequences]
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
    try:
        sequence.take(logits)
        ended = sequence.has_ended()
        piece = _piece(sequence, last=ended) if part.streamed else None
        if ended:
            return Done(generating.output(sequence, payload.chunks[0]), piece)
    except Exception as error:
        return Failed(error)
    return More(piece, Work(context_tokens=sequence.cache.length))


def _piece(sequence: Generating, *, last: bool) -> Piece | None:
    """The text that the last token has completed; None: none."""
    text = sequence.pieces.next(sequence.ids, last=last)
    if not text:
        return None
    return Piece(text, sequence.ids[-1], sequence.logprobs[-1] if sequence.logprobs else None)
