"""Comparing two lists of answers: first choices, largest difference, direction of features."""

from __future__ import annotations

import math
from typing import Any

import pytest

from serving_kit.models.agreement import COMPARED, Agreement, compare

pytestmark = pytest.mark.light


def fills(**scores: float) -> list[dict[str, Any]]:
    return [{"token": token, "score": score} for token, score in scores.items()]


def labels(**scores: float) -> list[dict[str, Any]]:
    return [{"label": label, "score": score} for label, score in scores.items()]


def zero_shot(**scores: float) -> dict[str, Any]:
    return {"sequence": "a", "labels": list(scores), "scores": list(scores.values())}


def token(index: int, entity: str, score: float) -> dict[str, Any]:
    return {"index": index, "start": 2 * index, "end": 2 * index + 1, "entity": entity, "score": score}


def group(start: int, entity: str, score: float) -> dict[str, Any]:
    return {"entity_group": entity, "score": score, "start": start, "end": start + 3, "word": "abc"}


@pytest.mark.parametrize(
    ("task", "exact", "fast", "top1", "difference"),
    [
        ("fill-mask", [fills(a=0.5, b=0.25)], [fills(a=0.375, b=0.25)], 1.0, 0.125),
        ("fill-mask", [fills(a=0.5, b=0.25)], [fills(c=0.5, a=0.25)], 0.0, 0.25),
        ("fill-mask", [[fills(a=0.5), fills(b=0.5)]], [[fills(a=0.5), fills(c=0.5)]], 0.5, 0.0),
        ("text-classification", [labels(x=0.5, y=0.25)] * 2, [labels(x=0.5), labels(y=0.5)], 0.5, 0.25),
        ("zero-shot-classification", [zero_shot(x=0.75, y=0.25)], [zero_shot(x=0.5, y=0.5)], 1.0, 0.25),
        ("token-classification", [[token(1, "O", 0.5)]], [[token(1, "PER", 0.5)]], 0.0, 0.0),
        ("token-classification", [[token(1, "O", 0.5)]], [[token(1, "O", 0.25)]], 1.0, 0.25),
        ("token-classification", [[group(0, "PER", 0.5)]], [[group(4, "PER", 0.5)]], 0.0, 0.0),
        ("token-classification", [[]], [[]], 1.0, 0.0),
    ],
)
def test_first_choices_and_scores(task: str, exact: Any, fast: Any, top1: float, difference: float) -> None:
    assert compare(task, exact, fast) == Agreement(top1, None, difference)


@pytest.mark.parametrize(
    ("fast", "cosine", "difference"),
    [([[[3.0, 4.0]]], 1.0, 0.0), ([[[4.0, 3.0]]], 0.96, 1.0), ([[[-3.0, -4.0]]], -1.0, 8.0)],
)
def test_features(fast: Any, cosine: float, difference: float) -> None:
    """The least similarity of all texts; features of zeros are like themselves."""
    exact = [[[3.0, 4.0]]]
    agreement = compare("feature-extraction", [exact, [[[0.0, 0.0]]]], [fast, [[[0.0, 0.0]]]])
    assert agreement == Agreement(None, pytest.approx(cosine), pytest.approx(difference))


def test_scores_that_are_no_numbers() -> None:
    fast = [labels(x=0.5), labels(x=math.nan), labels(x=0.5)]
    assert math.isnan(compare("text-classification", [labels(x=0.25)] * 3, fast).largest_difference)
    features = [[[[1.0, math.nan]]]]
    assert math.isnan(compare("feature-extraction", [[[[1.0, 1.0]]]], features).largest_difference)


def test_as_many_answers_on_both_sides() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare("text-classification", [labels(x=1.0)] * 2, [labels(x=1.0)])


def test_no_generated_text() -> None:
    assert "text-generation" not in COMPARED
