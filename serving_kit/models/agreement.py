"""How far answers to the same texts are apart: whether the first choices agree, and how far scores differ.

A choice is what a client acts on: the word for a mask, the label of a text or of a token. An answer holds one
or several. Features have no labels: of these the direction is compared (cosine similarity).

Pure; answers are JSON. Not here: the texts (`example_texts.py`), what follows (`precision.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

Answer: TypeAlias = Any  # what the pipeline of a task returns for one input
Scores: TypeAlias = Mapping[Hashable, float]  # by label
Choices: TypeAlias = Mapping[Hashable, Scores]  # by the place in the text that they are for


class Agreement(NamedTuple):
    """How two lists of answers agree.

    Attributes:
        top1: Share of the choices whose first label is the same; None for features.
        cosine_similarity: Of features: the least of all texts; None for other tasks.
        largest_difference: Between two scores of one label at one place, or two numbers of the features. NaN
            if a score is none.
    """

    top1: float | None
    cosine_similarity: float | None
    largest_difference: float


def compare(task: str, exact: Sequence[Answer], fast: Sequence[Answer]) -> Agreement:
    """Compare answers to the same inputs.

    Args:
        task: One of `COMPARED`.
        exact: The answers that count as right, at least one.
        fast: The others, in the same order.
    """
    pairs = list(zip(exact, fast, strict=True))
    if task == "feature-extraction":
        return _compare_features([([*_numbers(a)], [*_numbers(b)]) for a, b in pairs])
    choices = _CHOICES[task]
    return _compare_choices([(choices(a), choices(b)) for a, b in pairs])


def _compare_choices(pairs: Sequence[tuple[Choices, Choices]]) -> Agreement:
    same = places = 0
    differences = [0.0]
    for exact, fast in pairs:
        for place in exact.keys() | fast.keys():
            ours, theirs = exact.get(place, {}), fast.get(place, {})
            places += 1
            same += _first(ours) == _first(theirs)
            differences += [abs(ours[label] - theirs[label]) for label in ours.keys() & theirs.keys()]
    return Agreement(same / places if places else 1.0, None, _largest(differences))


def _compare_features(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Agreement:
    differences = [abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)]
    return Agreement(None, min(_cosine(a, b) for a, b in pairs), _largest(differences))


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    lengths = math.hypot(*a) * math.hypot(*b)
    return sum(map(operator.mul, a, b)) / lengths if lengths else float(a == b)


def _largest(differences: Sequence[float]) -> float:
    """The largest; NaN if there is one, which `max` would pass over."""
    return math.nan if any(map(math.isnan, differences)) else max(differences, default=0.0)


def _first(scores: Scores) -> Hashable:
    """The label with the highest score; None without labels."""
    return max(scores, key=scores.__getitem__, default=None)


def _numbers(features: Answer) -> Iterator[float]:
    """The numbers of nested lists."""
    for each in features:
        if isinstance(each, list):
            yield from _numbers(each)
        else:
            yield each


def _fill_mask(answer: Answer) -> Choices:
    masks = answer if isinstance(answer[0], list) else [answer]
    return {at: {each["token"]: each["score"] for each in fills} for at, fills in enumerate(masks)}


def _text_classification(answer: Answer) -> Choices:
    return {0: {each["label"]: each["score"] for each in answer}}


def _zero_shot_classification(answer: Answer) -> Choices:
    return {0: dict(zip(answer["labels"], answer["scores"], strict=True))}


def _token_classification(answer: Answer) -> Choices:
    """One choice for each token, or for each group of them where the pipeline makes groups."""
    return {
        (each.get("index"), each["start"], each["end"]): {
            each.get("entity", each.get("entity_group")): each["score"]
        }
        for each in answer
    }


_CHOICES: Mapping[str, Callable[[Answer], Choices]] = {
    "fill-mask": _fill_mask,
    "text-classification": _text_classification,
    "zero-shot-classification": _zero_shot_classification,
    "token-classification": _token_classification,
}
COMPARED = frozenset({*_CHOICES, "feature-extraction"})  # the tasks whose answers can be compared
