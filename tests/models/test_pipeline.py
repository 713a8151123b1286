"""A served pipeline answers what the pipeline answers, alone and in a batch, for every text task."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np

from serving_kit.errors import ModelFailed
from serving_kit.model import Done, FailureKind, More, Part, Work
from serving_kit.models.loading import load_model
from serving_kit.models.pipeline import build_pipeline_model
from serving_kit.service import Service
from tests.support_models import (
    IMAGE_TASKS,
    LENGTHS,
    PARAMETERS,
    TASKS,
    answers,
    assert_same,
    example,
    fresh,
    parts,
    plain,
    tiny,
)


@pytest.mark.parametrize("task", TASKS)
def test_same_answer_alone(task: str) -> None:
    pipe, parameters, text = tiny(task), PARAMETERS.get(task, {}), example(task, 12)
    model = build_pipeline_model(pipe, shortcuts=False)
    got, want = answers(model, [text], parameters), [plain(pipe(text, **parameters))]
    if task == "zero-shot-classification":  # its labels share a model call here: the last digits differ
        assert_same(got, want)
    else:
        assert got == want


@pytest.mark.parametrize("task", TASKS)
def test_same_answers_in_a_mixed_batch(task: str) -> None:
    pipe, parameters = tiny(task), PARAMETERS.get(task, {})
    texts = [example(task, words) for words in LENGTHS]
    want = [plain(pipe(text, **parameters)) for text in texts]
    assert_same(answers(build_pipeline_model(pipe), texts, parameters), want)


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        ("fill-mask", {"top_k": 2}),
        ("fill-mask", {"targets": ["house", "river"]}),
        ("text-classification", {"top_k": 2}),
        ("text-classification", {"top_k": None}),
        ("text-classification", {"function_to_apply": "sigmoid"}),
        ("token-classification", {"aggregation_strategy": "simple"}),
        ("token-classification", {"aggregation_strategy": "max", "stride": 4}),
        ("zero-shot-classification", {"candidate_labels": ["a", "b"], "multi_label": True}),
        ("zero-shot-classification", {"candidate_labels": ["a"], "hypothesis_template": "It is {}!"}),
        ("text-generation", {"max_new_tokens": 3, "do_sample": False, "return_full_text": False}),
        ("text-generation", {"max_new_tokens": 3, "num_beams": 2, "do_sample": False}),
        ("feature-extraction", {"tokenize_kwargs": {"truncation": True, "max_length": 5}}),
    ],
)
def test_parameters_reach_the_pipeline(task: str, parameters: dict[str, Any]) -> None:
    pipe = tiny(task)
    model = build_pipeline_model(pipe)
    texts = [example(task, words) for words in (4, 30)]
    model.check(texts, parameters)
    assert_same(answers(model, texts, parameters), [plain(pipe(text, **parameters)) for text in texts])


def test_text_pair() -> None:
    pipe = tiny("text-classification")
    model = build_pipeline_model(pipe)
    pair = {"text": "it rains", "text_pair": "the sun shines"}
    model.check([pair], {})
    assert_same(answers(model, [pair, "it rains"], {})[1], plain(pipe("it rains")))
    assert_same(answers(model, [pair], {})[0][0], plain(pipe(pair)))


@pytest.mark.parametrize("task", TASKS)
def test_step_and_protocol(task: str) -> None:
    """Of a model that answers at once a first step ends all; what does nothing may be called at any time."""
    model, text = build_pipeline_model(tiny(task)), example(task, 9)
    prepared = [model.prepare(text, PARAMETERS.get(task, {})) for _ in range(2)]
    steps = PARAMETERS.get(task, {}).get("max_new_tokens", 1)
    for step in range(1, steps + 1):
        results = model.step(parts(prepared))
        assert [type(result) for result in results] == [Done if step == steps else More] * 2
    assert model.changed() == ""
    model.release(prepared[0])
    model.release(prepared[0])
    model.free_memory(ValueError(), thorough=False)
    assert model.classify(MemoryError()) is FailureKind.MEMORY
    assert model.classify(ValueError()) is FailureKind.ERROR


def test_failed_step_changes_no_input() -> None:
    pipe = fresh("fill-mask")
    model, text = build_pipeline_model(pipe), example("fill-mask", 9)
    prepared = model.prepare(text, {})
    hook = model.pipe.model.cls.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.step(parts([prepared]))
    hook.remove()
    (result,) = model.step(parts([prepared]))
    assert_same(plain(model.finish(prepared, result.output)), plain(pipe(text)))


def test_estimates() -> None:
    """About four characters make a token; images are not measured."""
    assert build_pipeline_model(tiny("fill-mask")).estimate("x" * 40) == Work(longest=12)
    assert build_pipeline_model(tiny(IMAGE_TASKS[0])).estimate(b"x" * 40) == Work()


def test_bad_inputs_open_no_breaker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        model = load_model(tiny("fill-mask"))
        step = model.step

        def raises_for_long(batch: Sequence[Part]) -> Any:
            if any(part.tokens > 8 for part in batch):
                raise ValueError
            return step(batch)

        monkeypatch.setattr(model, "step", raises_for_long)
        service = Service(model)
        await service.start()
        for _ in range(6):
            with service.observe() as ticket, pytest.raises(ModelFailed):
                await service.predict(["a word " * 9 + "[MASK]."], {}, ticket)
        with service.observe() as ticket:
            assert len(await service.predict(["a [MASK]."], {}, ticket)) == 1
        assert await service.stop()

    asyncio.run(main())


def test_numbers_of_numpy_in_answers() -> None:
    assert plain({"a": np.float32(0.5), "b": np.arange(3)}) == {"a": 0.5, "b": [0, 1, 2]}
