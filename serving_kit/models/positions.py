"""How many tokens a model has positions for.

Past the last row of its position table a model raises an `IndexError` on a CPU. On CUDA that is a
device-side assert, after which only a new process can use the device. So the limit has to be known before
the first text.

What a config calls `max_position_embeddings` is not that limit everywhere. RoBERTa and its relatives
(XLM-R, CamemBERT, MPNet, Longformer...) count positions from `padding_idx + 1`, so of 514 rows 512 can be
used; BART and OPT have rows for an offset on top. Rotary and relative positions have no table: there the
number is what the model was trained with.

Not here: rejecting a text that is too long (`preparing.py`).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from serving_kit.models.pipes import Chunk, Pipe, tokenizer_of, width

if TYPE_CHECKING:
    import torch

# A tokenizer without a limit of its own reports a number like 1e30.
_NO_LIMIT = 1_000_000
_TABLES = frozenset(
    {"position_embeddings", "position_embedding", "positions_embed", "embed_positions", "wpe"}
)
_LONGEST_TRIAL, TRIAL_S = 1024, 0.5  # tokens and seconds up to which lengths are tried


def most_positions(pipe: Pipe) -> int | None:
    """Tokens that one input may have by the tokenizer, the config and the position tables; None: no limit."""
    declared = _declared(pipe)
    own = _limit(getattr(getattr(pipe, "tokenizer", None), "model_max_length", None))
    tables = [rows - offset for rows, offset in _tables(pipe.model, max(declared, default=0))]
    return min([*own, *declared, *tables], default=None)


def position_rows(pipe: Pipe) -> int | None:
    """Rows of the smallest table of positions; None: there is none."""
    tables = _tables(pipe.model, max(_declared(pipe), default=0))
    return min((rows for rows, _ in tables), default=None)


def answered_positions(pipe: Pipe, chunk: Chunk, most: int | None) -> int | None:
    """Tokens that the model answers, at most `most`. On a CPU lengths are tried, for about 0.5 s.

    Elsewhere it is `most`: an index past the end of a table makes a CUDA device unusable.

    Args:
        pipe: The pipeline.
        chunk: The tensors of a short text.
        most: What `most_positions` says.
    """
    if most is None or str(pipe.device) != "cpu":
        return most
    shortest, highest = width(chunk), min(most, _LONGEST_TRIAL)
    answered, fails = shortest, 0
    while answered < highest and not fails:
        length, started = min(2 * answered, highest), time.perf_counter()
        if not _answers(pipe, chunk, length):
            fails = length
        elif 2 * (time.perf_counter() - started) > TRIAL_S:
            return most
        else:
            answered = length
    while answered + 1 < fails:
        length = (answered + fails) // 2
        if _answers(pipe, chunk, length):
            answered = length
        else:
            fails = length
    # A model that does not even take the text twice: the failure need not be about the length.
    return answered if fails and answered > shortest else most


def _answers(pipe: Pipe, chunk: Chunk, tokens: int) -> bool:
    """Whether the model has positions for so many tokens: those of `chunk`, repeated."""
    import torch

    names = [name for name in tokenizer_of(pipe).model_input_names if name in chunk]
    times = tokens // width(chunk) + 1
    repeated = {name: chunk[name].repeat(1, times)[:, :tokens] for name in names}
    try:
        with torch.no_grad():
            getattr(pipe.model, "base_model", pipe.model)(**repeated)
    except Exception:  # an index past the table, or a model that takes no such inputs at any length
        return False
    return True


def _declared(pipe: Pipe) -> list[int]:
    """What the config calls the limit."""
    config = getattr(pipe.model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()  # of a model of several parts the text part's
    return _limit(getattr(config, "max_position_embeddings", None))


def _tables(model: torch.nn.Module, declared: int) -> list[tuple[int, int]]:
    """Rows of each table, and the row of the first token. Tables smaller than declared are not for tokens."""
    sizes = []
    for path, module in model.named_modules() if hasattr(model, "named_modules") else ():
        weight = getattr(module, "weight", None)
        if path.rpartition(".")[2] not in _TABLES or weight is None or weight.ndim != 2:
            continue
        offset = getattr(module, "offset", None)
        if not isinstance(offset, int):
            padding = getattr(module, "padding_idx", None)
            offset = 0 if padding is None else padding + 1
        if weight.shape[0] >= declared:
            sizes.append((weight.shape[0], offset))
    return sizes


def _limit(number: object) -> list[int]:
    """The number, if it is a limit."""
    return [number] if isinstance(number, int) and 0 < number < _NO_LIMIT else []
