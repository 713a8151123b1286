"""Whether continuous batching gives a model's own numbers: tried once, when it is loaded.

Not here: the step itself (`decoding.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serving_kit.model import Limit
from serving_kit.models import generating
from serving_kit.models.decoding import Decoder
from serving_kit.models.free_memory import free_bytes
from serving_kit.models.generating import Generating, Rules
from serving_kit.models.pipes import Pipe, tokenizer_of
from serving_kit.models.text_pieces import TextPieces

if TYPE_CHECKING:
    import torch

_LENGTHS, _MORE = (5, 12, 4), 4  # tokens of the prompts, and steps after the first
_CHUNK = 3  # tokens of the first part of each prompt
_LONGEST_WINDOW = 64  # a window up to this is tried past its end
_FEWEST, _UNKNOWN = 2048, 2**31 - 1  # tokens of all caches
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


def cache_limit(pipe: Pipe, decoder: Decoder) -> Limit:
    """How many tokens the caches may hold: a quarter of the memory that is free now.

    A quarter, because steps, copies while a cache grows, and other programs need memory as well.
    """
    free = free_bytes(pipe.device)
    if free is None or not decoder.token_bytes:
        return Limit(_UNKNOWN, "it is not known how much memory is free")
    tokens = free // 4 // decoder.token_bytes
    if tokens < _FEWEST:
        return Limit(
            _FEWEST, f"hardly any memory was free when the model was loaded ({free / 2**30:.1f} GiB)"
        )
    return Limit(tokens, f"a quarter of the {free / 2**30:.1f} GiB that were free when the model was loaded")


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
            running = sequences[: 1 + step]  # they join one after the other
            # A new prompt is cut: its first tokens now, the others beside the next tokens of those before it.
            most = [_CHUNK if not each.cache.length else len(each.ids) for each in running]
            logits = decoder.logits(running, most)
            for sequence, row, tokens in zip(running, logits, most, strict=True):
                seen = min(sequence.cache.length + tokens, len(sequence.ids))
                worst = max(worst, _distance(_alone(pipe, sequence.ids[:seen]), row))
                sequence.cache.commit(seen - sequence.cache.length)
                if seen == len(sequence.ids):
                    sequence.ids.append(int(row.argmax()))
    decoder.token_bytes = sequences[0].cache.token_bytes
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
