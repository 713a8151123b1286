"""fill-mask pays only for its masks.

A masked language model computes a score for every word of its vocabulary at every position, and the
pipeline then reads those at the masks. On a CPU that projection is most of the work. Here a hook on
the model's encoder keeps the hidden states at the masks, so that the head never sees the others:

    encoder (items, tokens, hidden) ── gather ──▶ (1, masks, hidden) ── head ──▶ (1, masks, vocabulary)

A head works position by position, so the numbers are the pipeline's own: at most 5.4e-7 apart for
BERT, RoBERTa, DistilBERT, ELECTRA, ALBERT, ModernBERT and DeBERTa-v2. Whether that holds for the model
at hand is not believed but tried, once, when it is loaded.

Not here: batching the inputs and reading the answers (`pipeline.py`, and the pipeline itself).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ROUNDING = 1e-3  # of the largest score; in single precision it is a thousandth of that


class MaskHead:
    """Runs a fill-mask pipeline's forward with the head at the masks only. Model thread only."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def forward(self, batch: Any) -> list[dict[str, Any]]:
        """One output for each item of a collated batch, as `pipe.postprocess` wants it."""
        ids = batch["input_ids"]
        masks = ids == self._pipe.tokenizer.mask_token_id
        here = masks.to(self._pipe.device)

        def gather(module: Any, inputs: Any, output: Any) -> Any:
            at_masks = output[0][here].unsqueeze(0)
            if isinstance(output, tuple):
                return (at_masks, *output[1:])
            output[next(iter(output))] = at_masks
            return output

        hook = self._pipe.model.base_model.register_forward_hook(gather)
        try:
            logits = self._pipe.forward(batch)["logits"]
        finally:
            hook.remove()
        rows = logits[0].split(masks.sum(dim=1).tolist())
        return [{"input_ids": ids[i : i + 1], "logits": _OnlyMasks(row)} for i, row in enumerate(rows)]


class _OnlyMasks:
    """Stands in for logits of shape (1, tokens, vocabulary) of which only the masks' rows are read."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __getitem__(self, index: Any) -> Any:
        return self._rows


def mask_head(pipe: Any, collate: Callable[[list[Any]], Any]) -> MaskHead | None:
    """A `MaskHead` for this pipeline, or None if its answers would not be the pipeline's own.

    Tries it on two texts of different lengths, one of them with two masks.
    """
    mask = pipe.tokenizer.mask_token
    texts = [f"a {mask}.", f"the {mask} of a rather longer text is {mask}, or so they say."]
    try:
        if pipe.model.base_model is pipe.model:
            return None
        head, batch = MaskHead(pipe), collate([pipe.preprocess(text) for text in texts])
        full = pipe.forward(batch)["logits"]
        for item, output in enumerate(head.forward(batch)):
            masks = (output["input_ids"][0] == pipe.tokenizer.mask_token_id).nonzero().squeeze(-1)
            wanted, given = full[item, masks].float(), output["logits"][0].float()
            if wanted.shape != given.shape or (wanted - given).abs().max() > _ROUNDING * wanted.abs().max():
                return None
    except Exception:  # a model that is built otherwise: it runs in full, which is always right
        return None
    return head
