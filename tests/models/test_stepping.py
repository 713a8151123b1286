"""What may share a model call, and why not."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import (
    IMAGE_TASKS,
    SOUND_TASKS,
    TASKS,
    answers,
    example,
    fresh,
    tiny,
    without_pad_token,
)


@pytest.mark.parametrize("task", TASKS)
def test_text_batches_without_a_limit(task: str) -> None:
    assert build_pipeline_model(tiny(task)).limits.max_batch_size is None


@pytest.mark.parametrize("task", [*IMAGE_TASKS, *SOUND_TASKS, "text-to-audio"])
def test_media_run_one_by_one(task: str) -> None:
    assert build_pipeline_model(tiny(task)).limits.max_batch_size == (
        1,
        "inputs of this task are answered one by one",
    )


def test_no_pad_token() -> None:
    limit = build_pipeline_model(without_pad_token()).limits.max_batch_size
    assert limit is not None
    assert limit.value == 1
    assert "its tokenizer has no pad token" in limit.reason
    assert "pad_token = pipe.tokenizer.eos_token" in limit.reason


@pytest.mark.parametrize("task", ["text-classification", "zero-shot-classification"])
def test_no_pad_token_in_the_config(task: str) -> None:
    """A classifier that reads the last token finds it by the config's pad token."""
    pipe = fresh(task)
    pipe.model.config.pad_token_id = None
    limit = build_pipeline_model(pipe).limits.max_batch_size
    assert limit is not None
    assert "its config has no pad token" in limit.reason


def test_inputs_without_collating() -> None:
    """Inputs of a model that cannot pad still get one output each."""
    model = build_pipeline_model(tiny("image-feature-extraction"))
    from tests.support_models import image_file

    first, second = answers(model, [image_file(), image_file()], {})
    assert first == second


def test_chunks_share_a_call() -> None:
    model = build_pipeline_model(tiny("zero-shot-classification"))
    calls: list[int] = []
    hook = model.pipe.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        text = example("zero-shot-classification", 9)
        answers(model, [text, text], {"candidate_labels": ["a", "b", "c"]})
    finally:
        hook.remove()
    assert len(calls) == 1
