"""What the peers share: arguments, and the pipeline made safe to call with a batch.

Every server runs with one torch thread. `answer` corrects what `pipeline(list)` returns in another shape
than `pipeline(text)` (one list too many or too few, padding rows in the features), so that every peer gives
each client what `pipeline(text)` gives.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


def arguments() -> argparse.Namespace:
    """The command line of every server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--kind", default="", help="of work; see kinds.py")
    parser.add_argument("--task", default="", help="of transformers.pipeline")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--timeout-ms", type=float, default=10_000.0, help="for servers that have one")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="the first item of a batch waits at most")
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens in a step of vLLM")
    parser.add_argument("--function", action="store_true", help="ours: serve a function that pools")
    return parser.parse_args()


def load(args: argparse.Namespace) -> Any:
    """The pipeline, on one thread of the CPU; for pooled embeddings an `Embedder`."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(1)
    pipe = pipeline(args.task, model=args.model, device="cpu")
    return Embedder(pipe) if args.kind == "embeddings" else pipe


class Embedder:
    """Pooled embeddings of a feature-extraction pipeline's model: the mean over the tokens, normalised."""

    task = "embeddings"

    def __init__(self, pipe: Any) -> None:
        self.tokenizer, self.model = pipe.tokenizer, pipe.model

    def __call__(self, text: str) -> list[float]:
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[float]]:
        import torch

        encoded = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**encoded).last_hidden_state
            mask = encoded["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors: list[list[float]] = torch.nn.functional.normalize(mean).tolist()
        return vectors


def answer(pipe: Any, texts: Sequence[str]) -> list[Any]:
    """What `pipe(text)` gives for each text, computed as one batch."""
    if pipe.task == "embeddings":
        return list(pipe.batch(texts))
    if len(texts) == 1:
        return [pipe(texts[0])]
    outputs = pipe(list(texts), batch_size=len(texts))
    if pipe.task == "text-classification":
        return [[output] for output in outputs]
    if pipe.task == "feature-extraction":
        lengths = [len(ids) for ids in pipe.tokenizer(list(texts))["input_ids"]]
        return [[output[0][:length]] for output, length in zip(outputs, lengths, strict=True)]
    return list(outputs)


def run(app: Any, port: int) -> None:
    """Uvicorn with its defaults, without a log line per request."""
    import uvicorn

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", timeout_keep_alive=60)
