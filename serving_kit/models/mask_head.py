"""fill-mask computes scores at the masks only.

A masked language model computes a score for every word of its vocabulary at every position, and the
pipeline then reads those at the masks. On a CPU that projection is most of the work. Here a hook on the
model's encoder keeps the hidden states at the masks, so that the head computes nothing else:

    encoder (items, tokens, hidden) ── gather ──▶ (1, masks, hidden) ── head ──▶ (1, masks, vocabulary)

A head works position by position, so the numbers are the pipeline's own: at most 5.4e-7 apart for BERT,
RoBERTa, DistilBERT, ELECTRA, ALBERT, ModernBERT and DeBERTa-v2. Whether that holds for the model at hand is
tried once, when it is loaded.

Not here: preparing inputs (`preparing.py`), reading answers out of the scores (the pipeline itself).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from serving_kit.models.pipes import Chunk, Collate, Output, Pipe, tokenizer_of

if TYPE_CHECKING:
    import torch

_ROUNDING = 1e-3  # of the largest score; in single precision the difference is a thousandth of that
_ROUNDING_STEPS = 4  # of the scores' own type, where that is coarser


class MaskHead:
    """Runs a fill-mask pipeline's `forward` with the head at the masks only. Model thread only."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def run(self, batch: Chunk) -> list[Mapping[str, object]]:
        """One output for each item of a collated batch, as `pipe.postprocess` takes it."""
        ids = batch["input_ids"]
        masks = ids == tokenizer_of(self._pipe).mask_token_id
        here = masks.to(self._pipe.device)

        def gather(module: torch.nn.Module, inputs: object, output: Output) -> Output:
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
        return [{"input_ids": ids[i : i + 1], "logits": MaskLogits(row)} for i, row in enumerate(rows)]


class MaskLogits:
    """Takes the place of logits of shape (1, tokens, vocabulary) of which only the masks' rows are read."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._rows.float()  # the pipeline makes probabilities of them, in their type


def mask_head(pipe: Pipe, collate: Collate) -> MaskHead | None:
    """A `MaskHead` for this pipeline, or None if its answers would not be the pipeline's own.

    Tries it on two texts of different lengths, one of them with two masks.
    """
    mask = tokenizer_of(pipe).mask_token
    texts = [f"a {mask}.", f"the {mask} of a rather longer text is {mask}, or so they say."]
    try:
        if pipe.model.base_model is pipe.model:
            return None
        head, batch = MaskHead(pipe), collate([_only_chunk(pipe, text) for text in texts])
        return head if _same_scores(pipe, pipe.forward(batch)["logits"], head.run(batch)) else None
    except Exception:  # a model of another structure: it runs in full, which is always right
        return None


def _only_chunk(pipe: Pipe, text: str) -> Chunk:
    chunk = pipe.preprocess(text)
    assert isinstance(chunk, Mapping)
    return chunk


def _same_scores(pipe: Pipe, full: torch.Tensor, outputs: Sequence[Output]) -> bool:
    """Whether the outputs have the rows at the masks of `full`, shape (items, tokens, vocabulary)."""
    import torch

    mask_token_id = tokenizer_of(pipe).mask_token_id
    rounding = max(_ROUNDING, _ROUNDING_STEPS * torch.finfo(full.dtype).eps)
    for item, output in enumerate(outputs):
        masks = (output["input_ids"][0] == mask_token_id).nonzero().squeeze(-1)
        wanted, given = full[item, masks].float(), output["logits"][0].float()
        if wanted.shape != given.shape or (wanted - given).abs().max() > rounding * wanted.abs().max():
            return False
    return True
