"""How many tokens a model has positions for.

Past the last row of its position table a model raises an `IndexError` on a CPU. On CUDA that is a
device-side assert, after which only a new process can use the device. So the limit has to be known
before the first text.

What a config calls `max_position_embeddings` is not that limit everywhere. RoBERTa and its relatives
(XLM-R, CamemBERT, MPNet, Longformer...) count positions from `padding_idx + 1`, so of 514 rows 512 can
be used; BART and OPT have rows for an offset on top. Rotary and relative positions have no table: there
the number is what the model was trained with.

Not here: trying a length (`pipeline.py`), refusing a text that is too long (`pipeline.py`).
"""

from __future__ import annotations

from typing import Any

# A tokenizer without a limit of its own reports a number like 1e30.
_NO_LIMIT = 1_000_000
_TABLES = frozenset(
    {"position_embeddings", "position_embedding", "positions_embed", "embed_positions", "wpe"}
)


def most_positions(pipe: Any) -> int | None:
    """Tokens that one input may have by the tokenizer, the config and the position tables; None: no limit."""
    config: Any = getattr(pipe.model, "config", None)
    if hasattr(config, "get_text_config"):  # of a model of several parts that of its text part
        config = config.get_text_config()
    declared = _limit(getattr(config, "max_position_embeddings", None))
    own = _limit(getattr(getattr(pipe, "tokenizer", None), "model_max_length", None))
    return min([*own, *declared, *_tables(pipe.model, max(declared, default=0))], default=None)


def _tables(model: Any, declared: int) -> list[int]:
    """Positions that each table has room for. Those smaller than declared are not for tokens."""
    sizes = []
    for path, module in model.named_modules() if hasattr(model, "named_modules") else ():
        weight: Any = getattr(module, "weight", None)
        if path.rpartition(".")[2] not in _TABLES or getattr(weight, "ndim", 0) != 2:
            continue
        offset = getattr(module, "offset", None)
        if not isinstance(offset, int):
            padding = getattr(module, "padding_idx", None)
            offset = 0 if padding is None else padding + 1
        if weight.shape[0] >= declared:
            sizes.append(weight.shape[0] - offset)
    return sizes


def _limit(number: Any) -> list[int]:
    """The number, if it is a limit."""
    return [number] if isinstance(number, int) and 0 < number < _NO_LIMIT else []
