"""Which pipelines sample, and with which parameters."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("torch")

from transformers import GenerationConfig, pipeline

from serving_kit.errors import SettingError
from serving_kit.models.pipeline import build_pipeline_model
from serving_kit.service import Service
from serving_kit.settings import Settings
from tests.support_models import tiny


def generator(**given: Any) -> Any:
    """A text-generation pipeline that was made with these parameters."""
    pipe = tiny("text-generation")
    model = copy.deepcopy(pipe.model)
    return build_pipeline_model(pipeline(pipe.task, model=model, tokenizer=pipe.tokenizer, **given))


def test_text_generation_samples_by_default() -> None:
    model = generator()
    assert model.samples({})
    assert model.samples({"do_sample": True})
    assert not model.samples({"do_sample": False})


@pytest.mark.parametrize("asked", [True, False])
def test_what_the_pipeline_was_made_with_counts(asked: bool) -> None:
    model = generator(do_sample=asked)
    assert model.samples({}) is asked
    assert model.samples({"do_sample": not asked}) is not asked


def test_a_generation_config_that_samples_counts() -> None:
    model = generator(generation_config=GenerationConfig(do_sample=True))
    model.pipe._generation_defaults.pop("do_sample")
    assert model.samples({})


@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "feature-extraction"])
def test_pipelines_that_classify_do_not_sample(task: str) -> None:
    model = build_pipeline_model(tiny(task))
    assert not model.samples({})
    assert model.limits.sharing_obstacle == ""


def test_models_that_make_sound_are_refused() -> None:
    model = build_pipeline_model(tiny("text-to-audio"))
    with pytest.raises(SettingError, match=r"share_equal_inputs must be False for .*: .* noise"):
        Service(model, Settings(share_equal_inputs=True, max_batch_size=1))
