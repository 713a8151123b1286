"""Whether continuous batching gives a model's own numbers: tried once, when it is loaded.

Not here: the step itself (`decoding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving_kit.models import generating
from serving_kit.models.decoding import Decoder
from serving_kit.models.generating import Generating, Rules
from serving_kit.models.pipes import Pipe, tokenizer_of
from serving_kit.models.text_pieces import TextPieces

if TYPE_CHECKING:
    import torch

_LENGTHS, _MORE = (5, 12, 3), 3  # tokens of the prompts, and steps after them
_LONGEST_WINDOW = 64  # a window up to this is tried past its end
_ROUNDING = 1e-4  # of the largest logit; half precision: 3e-2
_HALF_ROUNDING = 3e-2


def make_decoder(pipe: Pipe) -> tuple[Decoder | None, str]:
    """A decoder for a pipeline of text generation, or why there is none.

    Args:
        pipe: With modules of its own.
    """
    try:
        decoder = Decoder(pipe)
        _try_parameters(pipe)
        difference = _difference(pipe, decoder)
    except Exception as error:
        return None, f"its model does not take several sequences in one row ({type(error).__name__}: {error})"
    single = next(pipe.model.parameters()).element_size() >= 4
    if not difference <= (_ROUNDING if single else _HALF_ROUNDING):
        return None, f"several sequences in one row give other numbers ({difference:.0e} of the largest)"
    return decoder, "sequences join and leave at every step"


def _try_parameters(pipe: Pipe) -> None:
    """Raise where the parameters of a call cannot be read as `generate` reads them."""
    chunk = pipe.preprocess("a word", **pipe._preprocess_params)
    assert isinstance(chunk, Mapping)
    generating.begin(pipe, chunk, {**pipe._forward_params, "max_new_tokens": 1})


def _difference(pipe: Pipe, decoder: Decoder) -> float:
    """Largest difference from each sequence alone, as a share of the largest logit."""
    import torch

    worst = 0.0
    sequences = [_sequence(pipe, length) for length in _lengths(pipe)]
    with torch.inference_mode():
        for step in range(_MORE + 1):
            running = sequences[: 1 + step] if step else sequences[:1]  # they join one after the other
            logits = decoder.logits(running)
            for sequence, row in zip(running, logits, strict=True):
                worst = max(worst, _distance(_alone(pipe, sequence.ids), row))
                sequence.cache.commit(len(sequence.ids) - sequence.cache.length)
                sequence.ids.append(int(row.argmax()))
    return worst


def _lengths(pipe: Pipe) -> list[int]:
    window = getattr(pipe.model.config, "sliding_window", None) or 0
    return [window + 3 if 0 < window <= _LONGEST_WINDOW else _LENGTHS[0], *_LENGTHS[1:]]


def _sequence(pipe: Pipe, length: int) -> Generating:
    """A prompt of tokens that differ."""
    words = pipe.model.config.get_text_config().vocab_size
    ids = [(7 * n * n + 5 * length + 3) % words for n in range(length)]
    return Generating(
        ids, length, Rules((), (), False, None, frozenset(), True), TextPieces(tokenizer_of(pipe), length)
    )


def _alone(pipe: Pipe, ids: list[int]) -> torch.Tensor:
    import torch

    logits: torch.Tensor = pipe.model(
        input_ids=torch.tensor([ids], device=pipe.device), use_cache=False
    ).logits[0, -1]
    return logits


def _distance(wanted: torch.Tensor, given: torch.Tensor) -> float:
    distance = float((wanted.float() - given.float()).abs().max() / wanted.float().abs().max())
    return math.inf if math.isnan(distance) else distance
