"""What one core can answer at most: the model that ours runs, no server, all texts known beforehand.

A model that packs computes steps of the oldest texts within a budget of tokens: the best of some budgets
counts. A model that pads gets the texts sorted by length, cut into the batches that cost least. Prints texts
per second; `run.py` starts it on the core of the servers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import torch
from kinds import KINDS, OURS_EMBEDDINGS, Kind

from serving_kit.model import AnyPrepared, Part
from serving_kit.models.loading import load_model
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.grouping import cheapest_cuts

_MOST = 32  # items in one batch, as in ours
_TOKEN_BUDGETS = (256, 512, 1024, 2048)
_PASSES = 2


def main() -> None:
    torch.set_num_threads(1)
    kind = KINDS[sys.argv[1]]
    home = models.folder(kind)
    model, parameters = served_model(kind, home)
    texts = [text for text, _ in json.loads((home / models.TEXTS_FILE).read_text())]
    packed = model.limits.layout.packed
    budgets = _TOKEN_BUDGETS if packed else (0,)
    print(max(rate(model, texts, parameters, budget) for budget in budgets for _ in range(_PASSES)))


def served_model(kind: Kind, home: Path) -> tuple[Any, dict[str, Any]]:
    """The model that ours serves for this kind of work, and the parameters of its requests."""
    if kind.pooled and "--function" in OURS_EMBEDDINGS.arguments:
        from transformers import pipeline

        sys.path.append(str(Path(__file__).parent / "servers"))
        from common import Embedder

        return load_model(Embedder(pipeline(kind.task, model=str(home), device="cpu")).batch), {}
    template = OURS_EMBEDDINGS.template.replace("$text", '""') if kind.pooled else "{}"
    return load_model(home, task=kind.task, device="cpu"), json.loads(template).get("parameters", {})


def rate(model: Any, texts: Sequence[str], parameters: dict[str, Any], budget: int) -> float:
    """Texts per second in one pass over all of them."""
    start = time.perf_counter()
    prepared = [model.prepare(text, parameters) for text in texts]
    steps = oldest_within(prepared, budget) if budget else cheapest(model, prepared)
    for step in steps:
        results = model.step([Part(each, each.work.computed(packed=bool(budget))) for each in step])
        for result, each in zip(results, step, strict=True):
            model.finish(each, result.output)
    return len(texts) / (time.perf_counter() - start)


def oldest_within(prepared: Sequence[AnyPrepared], budget: int) -> Iterator[list[AnyPrepared]]:
    """Steps of the oldest, as many as the budget of tokens has room for."""
    step: list[AnyPrepared] = []
    tokens = 0
    for each in prepared:
        more = each.work.computed(packed=True)
        if step and (tokens + more > budget or len(step) == _MOST):
            yield step
            step, tokens = [], 0
        step.append(each)
        tokens += more
    if step:
        yield step


def cheapest(model: Any, prepared: Sequence[AnyPrepared]) -> Iterator[list[AnyPrepared]]:
    """Batches of like lengths that cost least altogether, as the model's own timings have it."""
    cost = CostModel()
    for timing in model.timings:
        cost.observe(*timing)
    ordered = sorted(prepared, key=lambda each: each.work.tokens)
    cuts = cheapest_cuts([each.work.tokens for each in ordered], _MOST, 100_000, cost.a, cost.b)
    end = len(ordered)
    while end:
        yield ordered[end - cuts[end] : end]
        end -= cuts[end]


if __name__ == "__main__":
    main()
