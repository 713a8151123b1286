"""Warming up: the example, what a batch costs, the longest input."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from serving_kit.models import positions
from serving_kit.models.loading import load_model
from serving_kit.models.pipeline import build_pipeline_model
from serving_kit.models.warm_up import warm_up
from serving_kit.service import Service
from tests.support_models import IMAGE_TASKS, TASKS, answers, fresh, tiny, without_pad_token


@pytest.mark.parametrize("task", [task for task in TASKS if task != "text-generation"])
def test_timings(task: str) -> None:
    """Different sizes are timed, so that the cost of a call and of a token can be told apart."""
    cold = build_pipeline_model(tiny(task))
    timings = warm_up(cold).timings
    assert len({timing.computed_tokens for timing in timings}) >= 3
    assert all(timing.seconds > 0 for timing in timings)
    assert (cold.example, cold.timings) == (None, ()), "the given model stays as it is"


def test_timings_make_the_cost_known() -> None:
    service = Service(load_model(tiny("fill-mask")))
    assert service.status().core.cost_known


def test_no_timings() -> None:
    """A generated text costs what it has tokens; no image is made up."""
    generating = warm_up(build_pipeline_model(tiny("text-generation")))
    assert generating.example is not None
    assert generating.timings == ()
    images = warm_up(build_pipeline_model(tiny(IMAGE_TASKS[0])))
    assert (images.example, images.timings) == (None, ())


@pytest.mark.parametrize("task", TASKS)
def test_example_is_answered(task: str) -> None:
    model = load_model(tiny(task))
    assert model.example is not None
    value, parameters = model.example
    model.check([value], parameters)
    assert len(answers(model, [value], dict(parameters))) == 1


def test_function_has_no_example() -> None:
    """It is never called with what no client has sent."""
    seen: list[Any] = []
    model = load_model(lambda xs: seen.extend(xs) or xs)
    assert model.example is None
    assert not seen


def test_no_pad_token() -> None:
    model = warm_up(build_pipeline_model(without_pad_token()))
    assert model.example is not None


def test_longest_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the model answers, also where its config states more positions than its table has."""
    import torch

    monkeypatch.setattr(positions, "TRIAL_S", 60.0)  # however slow this machine is
    pipe = fresh("fill-mask")
    pipe.model.bert.embeddings.position_embeddings = torch.nn.Embedding(20, 32)
    model = warm_up(build_pipeline_model(pipe))
    assert model.preparer.max_tokens == 20
