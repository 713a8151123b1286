"""What one core can answer at most: the model that ours runs, ideal batches, no server around it.

All texts are known in advance, sorted by length, and cut into the batches that cost least. Prints texts per
second; `run.py` starts it on the core of the servers.
"""

from __future__ import annotations

import json
import sys
import time

import models
import torch

from serving_kit.model import Part
from serving_kit.models.loading import load_model
from serving_kit.scheduling.cost import CostModel
from serving_kit.scheduling.grouping import cheapest_cuts

_MOST = 32  # items in one batch, as in ours


def main() -> None:
    torch.set_num_threads(1)
    home = models.folder(sys.argv[1])
    model = load_model(home, task=sys.argv[1], device="cpu")
    cost = CostModel()
    for timing in model.timings:
        cost.observe(*timing)
    texts = [text for text, _ in json.loads((home / models.TEXTS_FILE).read_text())]
    best = 0.0
    for _ in range(2):
        start = time.perf_counter()
        prepared = sorted((model.prepare(text, {}) for text in texts), key=lambda each: each.work.tokens)
        cuts = cheapest_cuts([each.work.tokens for each in prepared], _MOST, 100_000, cost.a, cost.b)
        end = len(prepared)
        while end:
            batch = prepared[end - cuts[end] : end]
            results = model.step([Part(each, each.work.tokens) for each in batch])
            for result, each in zip(results, batch, strict=True):
                model.finish(each, result.output)
            end -= cuts[end]
        best = max(best, len(texts) / (time.perf_counter() - start))
    print(best)


if __name__ == "__main__":
    main()
