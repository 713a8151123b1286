"""A model before its first client: what is lazy is initialised, its cost and its longest input are measured.

Not here: the limit that position tables state (`positions.py`), learning the cost (`scheduling/cost.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from serving_kit.model import Done, Part, Prepared, Timing, computed_tokens
from serving_kit.models.pipeline import PipelineModel
from serving_kit.models.positions import answered_positions
from serving_kit.models.preparing import Tokenised

_WARM_UP_S, _MIN_TIMINGS = 0.15, 3
_LONG = 12  # times the example


def warm_up(model: PipelineModel) -> PipelineModel:
    """Run a few small steps, so that the first client does not pay for the first call.

    Returns:
        The model with the example, with what the steps after the first took (fewer on a slow model), and with
        the longest input that it answers. The model itself for a task whose inputs run one by one.

    Raises:
        Exception: whatever the model raises for the example.
    """
    if not model.task.batches:  # images, sound: no input is made up
        return model
    example = model.steps.example(model.pipe)
    short = model.prepare(*example)
    _timed(model, [short])  # initialises all that is lazy
    max_tokens = answered_positions(model.pipe, short.payload.chunks[0], model.preparer.max_tokens)
    model = replace(model, example=example, preparer=replace(model.preparer, max_tokens=max_tokens))
    if not model.steps.timed:
        return model
    fits = max_tokens is None or _LONG * short.work.longest <= max_tokens
    long = model.prepare(str(example.value) * _LONG, example.parameters) if fits else short
    return replace(model, timings=_timings(model, short, long))


def _timings(model: PipelineModel, short: Prepared[Tokenised], long: Prepared[Tokenised]) -> list[Timing]:
    limit = model.limits.max_batch_size
    timings: list[Timing] = []
    started = time.perf_counter()
    for batch in ([short], [long], [short] * 4, [long] * 4, [short] * 16):
        if len(timings) >= _MIN_TIMINGS and time.perf_counter() - started > _WARM_UP_S:
            break
        timings.append(_timed(model, batch if limit is None else batch[: limit.value]))
    return timings


def _timed(model: PipelineModel, batch: Sequence[Prepared[Tokenised]]) -> Timing:
    """Run one step, and make the answers."""
    started = time.perf_counter()
    results = model.step([Part(each, each.work.tokens) for each in batch])
    for prepared, result in zip(batch, results, strict=True):
        if isinstance(result, Done):
            model.finish(prepared, result.output)
    packed = model.limits.layout.packed
    tokens = computed_tokens((each.work.computed(packed=packed) for each in batch), packed=packed)
    return Timing(tokens, time.perf_counter() - started)
