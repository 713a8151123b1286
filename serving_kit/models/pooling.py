"""One vector for a text, made of the features of its tokens.

    features (1, tokens, hidden) ── mean | cls | last ──▶ (1, 1, hidden) ── normalize ──▶ length 1

`sentence-transformers` calls the same: a model card says which pooling its model was trained with, and
whether its vectors are normalised. The mean counts the special tokens as that library does.

Not here: the rows of the padding, which are gone before (`task_steps.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

POOLINGS = ("mean", "cls", "last")


def pooled(features: torch.Tensor, pooling: str, *, normalize: bool = False) -> torch.Tensor:
    """The features of one text, pooled in single precision.

    Args:
        features: Of shape (1, tokens, hidden): the text's own tokens, no padding.
        pooling: mean: of all tokens; cls: the first token; last: the last one; any other: not pooled.
        normalize: Whether to divide each vector by its Euclidean length.
    """
    features = features.float()
    if pooling == "mean":
        features = features.mean(dim=1, keepdim=True)
    elif pooling == "cls":
        features = features[:, :1]
    elif pooling == "last":
        features = features[:, -1:]
    if not normalize:
        return features
    return features / features.norm(dim=-1, keepdim=True).clamp_min(1e-12)
