"""How `make bench` compares the answers of a server with the pipeline's."""

from __future__ import annotations

import pytest

from tests.programs import load_program

pytestmark = pytest.mark.light
kinds = load_program("benchmarks/kinds.py")
RIGHT = [{"label": "LABEL_1", "score": 0.6}]


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ([{"label": "LABEL_1", "score": 0.6005}], True),
        ([{"label": "LABEL_1", "score": 0.605}], False),
        ([{"label": "LABEL_2", "score": 0.6}], False),
        ([{"label": "LABEL_1"}], False),
        ([*RIGHT, *RIGHT], False),
        (None, False),
    ],
)
def test_label_and_score_must_be_near(given: object, same: bool) -> None:
    assert kinds.same(given, RIGHT) is same


@pytest.mark.parametrize(
    ("given", "same"),
    [
        ([0.6, 0.8], True),
        ([0.59, 0.80741], True),  # cosine 0.99992
        ([0.5, 0.8660], False),  # cosine 0.9928
        ([1.2, 1.6], False),  # the same direction, not normalised
        ([0.6, 0.8, 0.0], False),
        (None, False),
    ],
)
def test_vector_must_have_direction_and_length(given: object, same: bool) -> None:
    assert kinds.same_direction(given, [0.6, 0.8]) is same


def test_pooling_of_the_kit_is_asked_for_in_json() -> None:
    load = load_program("benchmarks/load.py")
    route = kinds.POOLED_BY_THE_KIT
    assert route.content_type == "application/json"
    assert load.body(route.template, "a") == (
        '{"inputs": "a", "parameters": {"pooling": "mean", "normalize": true}}'
    )
