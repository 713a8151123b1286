"""The kinds of work: what is asked of the servers, of which model, and how answers are compared.

Not here: building the models and the texts (`models.py`), who serves them (`programs.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEAST_COSINE = 0.999
_TOLERANCE = 1e-3  # relative: other engines add up in another order


@dataclass(frozen=True)
class Kind:
    """One kind of work."""

    name: str
    task: str  # of transformers.pipeline
    architecture: str  # class of transformers
    same: Callable[[Any, Any], bool]  # (given, right)
    pooled: bool = False  # one vector for each text: the mean over its tokens, normalised


@dataclass(frozen=True)
class Route:
    """How a server is asked about one kind of work."""

    path: str = "/"
    template: str = ""  # JSON in which "$text" stands for the text, with its quotes; empty: plain text
    read: Callable[[Any], Any] = lambda answer: answer  # its answer in the form of the pipeline's
    arguments: tuple[str, ...] = ()  # of the server program

    @property
    def content_type(self) -> str:
        return "application/json" if self.template else "text/plain"


def same(given: Any, right: Any) -> bool:
    """Equal, up to what a different batch or engine does to the last digits."""
    if isinstance(right, dict):
        return (
            isinstance(given, dict)
            and given.keys() == right.keys()
            and all(same(given[key], right[key]) for key in right)
        )
    if isinstance(right, list):
        return (
            isinstance(given, list)
            and len(given) == len(right)
            and all(same(a, b) for a, b in zip(given, right, strict=True))
        )
    if isinstance(right, float):
        return isinstance(given, float) and abs(given - right) <= _TOLERANCE * max(1.0, abs(right))
    return bool(given == right)


def same_direction(given: Any, right: Any) -> bool:
    """Two vectors with a cosine above `LEAST_COSINE`, of equal length."""
    if not (isinstance(given, list) and len(given) == len(right)):
        return False
    lengths = math.hypot(*given), math.hypot(*right)
    if not math.isclose(*lengths, rel_tol=_TOLERANCE):
        return False
    return sum(a * b for a, b in zip(given, right, strict=True)) > LEAST_COSINE * lengths[0] * lengths[1]


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("text-classification", "text-classification", "BertForSequenceClassification", same),
        Kind("embeddings", "feature-extraction", "BertModel", same_direction, pooled=True),
        Kind("fill-mask", "fill-mask", "BertForMaskedLM", same),
        Kind("feature-extraction", "feature-extraction", "BertModel", same),
    )
}

# Pooled embeddings of ours: of a function that pools, or of the kit's own pooling.
POOLED_BY_FUNCTION = Route(arguments=("--function",))
POOLED_BY_THE_KIT = Route(template='{"inputs": $text, "parameters": {"pooling": "mean", "normalize": true}}')
OURS_EMBEDDINGS = POOLED_BY_THE_KIT


def everywhere(route: Route, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Route]:
    """The same route for several kinds of work."""
    return dict.fromkeys(kinds, route)
