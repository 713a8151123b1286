"""The sentences that precisions are compared on, as inputs of each task."""

from __future__ import annotations

import pytest

from serving_kit.models.agreement import COMPARED
from serving_kit.models.example_texts import TEXTS, example_inputs
from serving_kit.models.tasks import TASKS

pytestmark = pytest.mark.light


def test_several_lengths() -> None:
    words = [len(text.split()) for text in TEXTS]
    assert len(set(TEXTS)) == 32
    assert (min(words), max(words)) < (6, 40)
    assert len(set(words)) > 10


@pytest.mark.parametrize("task", sorted(COMPARED))
def test_inputs_keep_the_contract(task: str) -> None:
    for value, parameters in example_inputs(task, "<mask>"):
        TASKS[task].check_input(value)
        TASKS[task].check_parameters(parameters)
        assert str(value).count("<mask>") == (task == "fill-mask")
