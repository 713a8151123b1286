"""`precision="fast"`: serve a pipeline in bfloat16, if that is measured to be faster here.

    exact ── can it be compared? ── one layer ── copy, warm up ── example texts, in turns ──▶ fast
                     │                  │             │                     │
                     └──────────────────┴─────────────┴─────────────────────┴──▶ exact, with the reason

A processor without instructions for bfloat16 emulates it, ten times slower. Whether this one has them is
never asked by name: one layer is timed, which takes milliseconds, before anything is copied.

Not here: the copy (`bfloat16.py`), comparing answers (`agreement.py`), warming up (`warm_up.py`).
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from serving_kit.model import Done, Part, Precision
from serving_kit.models.advice import advice
from serving_kit.models.agreement import COMPARED, Agreement, compare
from serving_kit.models.bfloat16 import (
    Timer,
    bfloat16_copy,
    common_layer,
    layer_speedup,
    seconds,
    speedup,
)
from serving_kit.models.changes import GivenPipeline, versions
from serving_kit.models.example_texts import TEXTS, example_inputs
from serving_kit.models.pipeline import PipelineModel, build_pipeline_model
from serving_kit.models.pipes import Pipe
from serving_kit.models.shared_weights import structure
from serving_kit.models.warm_up import warm_up

_WORTH_IT = 1.05  # times as fast; less is within what such a measurement varies by
_LAYER_HOPELESS = 0.8  # a layer alone: on an accelerator it is too small to gain, so only a loss counts
_BATCH = 8
_NOT_ASKED = "precision is exact, not fast: "


class Measured(NamedTuple):
    """The example texts, exact and fast."""

    speedup: float
    agreement: Agreement
    extra_bytes: int


def fast_or_exact(
    exact: PipelineModel, given: Pipe, *, shortcuts: bool, handed_over: bool, timer: Timer = seconds
) -> PipelineModel:
    """A model in bfloat16 if that can be had and is faster, else `exact`; `precision` and a note say which.

    Args:
        exact: The model of `given`, warmed up.
        given: Its pipeline; nothing in it is changed.
        shortcuts: As for `build_pipeline_model`.
        handed_over: Whether the notebook holds `given`, so that its weights stay in memory.
        timer: Runs work and says how long it took.
    """
    if refused := _refused_early(exact, timer):
        return _with_note(exact, refused)
    try:
        fast, size = _fast_model(exact, given, shortcuts)
        measured = _measure(exact, fast, timer, size if handed_over else 0)
    except Exception as error:  # a model of another structure, too little memory
        reason = f"bfloat16 could not be tried: {advice(error)}"
        exact.free_memory(error, thorough=True)
        return _with_note(exact, Precision("fast", reason=reason))
    decision = decide(measured)
    if decision.used == "exact":
        return _with_note(exact, decision)
    if handed_over:
        fast = replace(fast, given=_as_it_is(given))
    return _with_note(fast, decision)


def decide(measured: Measured) -> Precision:
    """What is served, from what was measured: never what is slower, or has no numbers."""
    top1, cosine, difference = measured.agreement
    figures = Precision(
        "fast", "exact", "", measured.speedup, top1, cosine, None if math.isnan(difference) else difference
    )
    if math.isnan(difference):
        return figures._replace(reason="in bfloat16 some scores are no numbers")
    if measured.speedup < _WORTH_IT:
        return figures._replace(reason="bfloat16 is not faster here")
    return figures._replace(used="fast", extra_bytes=measured.extra_bytes)


def note(precision: Precision) -> str:
    """The line for the owner of a model for which fast was asked."""
    figures = _figures(precision)
    if precision.used == "exact":
        return f"{_NOT_ASKED}{precision.reason}{f' ({figures})' if figures else ''}"
    more = f", {precision.extra_bytes / 1e6:,.0f} MB more memory" if precision.extra_bytes else ""
    return f"precision is fast: bfloat16, {figures}{more}"


def _figures(precision: Precision) -> str:
    """What was measured of both precisions; empty: nothing was."""
    words = []
    if precision.speedup is not None:
        words.append(f"{precision.speedup:.3g} times as fast as exact")
    if precision.top1_agreement is not None:
        words.append(
            f"{100 * precision.top1_agreement:.1f} % of the first choices for {len(TEXTS)} texts are the same"
        )
    if precision.cosine_similarity is not None:
        words.append(f"cosine similarity of {len(TEXTS)} texts at least {precision.cosine_similarity:.5f}")
    if precision.largest_score_difference is not None:
        words.append(f"scores differ by at most {precision.largest_score_difference:.2g}")
    return ", ".join(words)


def _refused_early(exact: PipelineModel, timer: Timer) -> Precision | None:
    """Why there is no trial of the model; None: there is one."""
    if exact.task_name not in COMPARED:
        reason = f"not for {exact.task_name}, because fast is tried on {', '.join(sorted(COMPARED))} only"
        return Precision("fast", reason=reason)
    layer = common_layer(exact.pipe.model)
    if layer is None:
        return Precision("fast", reason="the model has no linear layers in single precision")
    gain = layer_speedup(layer, timer)
    if gain >= _LAYER_HOPELESS:
        return None
    reason = f"bfloat16 is slower here, in a layer of {layer.in_features} × {layer.out_features}"
    return Precision("fast", reason=reason, speedup=gain)


def _fast_model(exact: PipelineModel, given: Pipe, shortcuts: bool) -> tuple[PipelineModel, int]:
    """The model in bfloat16, warmed up, and the bytes of its weights.

    Raises:
        TypeError: the model cannot be copied.
        Exception: whatever it raises for its example.
    """
    try:
        return _built(exact, given, shortcuts, buffers=False)
    except RuntimeError:  # what it computes with a buffer in single precision meets weights in bfloat16
        return _built(exact, given, shortcuts, buffers=True)


def _built(exact: PipelineModel, given: Pipe, shortcuts: bool, *, buffers: bool) -> tuple[PipelineModel, int]:
    own, copied = copy.copy(given), bfloat16_copy(given.model, buffers=buffers)
    if copied is None:
        raise TypeError("the model's modules cannot be copied, as with hooks, adapters or compiled parts")
    own.model = copied.model
    return warm_up(build_pipeline_model(own, exact.name, shortcuts=shortcuts)), copied.bytes


def _measure(exact: PipelineModel, fast: PipelineModel, timer: Timer, extra_bytes: int) -> Measured:
    """Answer the example texts in both precisions, then time the model calls in turns."""
    ours, theirs = _batches(exact), _batches(fast)
    agreement = compare(exact.task_name, _answers(exact, ours), _answers(fast, theirs))
    gain = speedup(lambda: _run(exact, ours), lambda: _run(fast, theirs), timer)
    return Measured(gain, agreement, extra_bytes)


def _batches(model: PipelineModel) -> list[list[Part]]:
    mask = getattr(model.pipe.tokenizer, "mask_token", "")
    prepared = [model.prepare(*each) for each in example_inputs(model.task_name, mask)]
    limit = model.limits.max_batch_size
    size = _BATCH if limit is None else min(_BATCH, limit.value)
    parts = [Part(each, each.work.tokens) for each in prepared]
    return [parts[start : start + size] for start in range(0, len(parts), size)]


def _answers(model: PipelineModel, batches: Sequence[Sequence[Part]]) -> list[object]:
    return [
        model.finish(part.prepared, result.output)
        for batch in batches
        for part, result in zip(batch, model.step(batch), strict=True)
        if isinstance(result, Done)
    ]


def _as_it_is(given: Pipe) -> GivenPipeline:
    model = given.model
    return GivenPipeline(weakref.ref(given), model, given.tokenizer, structure(model), versions(model))


def _run(model: PipelineModel, batches: Sequence[Sequence[Part]]) -> None:
    for batch in batches:
        model.step(batch)


def _with_note(model: PipelineModel, precision: Precision) -> PipelineModel:
    return replace(model, precision=precision, notes=[*model.notes, note(precision)])
