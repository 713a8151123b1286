"""Parameters of generation mean what they mean to the pipeline, because the library reads them."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.model import Done, Part
from serving_kit.models.pipeline import PipelineModel, build_pipeline_model
from tests.support_models import fresh, plain, tiny


def answer(model: PipelineModel, text: str, parameters: dict[str, Any]) -> Any:
    prepared = model.prepare(text, parameters)
    while True:
        (result,) = model.step([Part(prepared, prepared.work.tokens)])
        if isinstance(result, Done):
            return plain(model.finish(prepared, result.output))


@pytest.mark.parametrize(
    "parameters",
    [
        {"max_new_tokens": 7},
        {"max_new_tokens": 12, "repetition_penalty": 1.7},
        {"max_new_tokens": 12, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 9, "min_new_tokens": 9},
        {"max_new_tokens": 20, "stop_sequence": ["e"]},
        {"max_new_tokens": 5, "return_full_text": False},
    ],
)
def test_greedy_text_is_the_pipelines(parameters: dict[str, Any]) -> None:
    pipe = tiny("text-generation")
    parameters = {"do_sample": False, **parameters}
    model = build_pipeline_model(pipe)
    assert model.prepare("the old house", parameters).payload.sequence is not None
    assert answer(model, "the old house", parameters) == plain(pipe("the old house", **parameters))


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_searches_run_in_groups(more: dict[str, int]) -> None:
    pipe = tiny("text-generation")
    parameters: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, **more}
    model = build_pipeline_model(pipe)
    assert model.prepare("the old house", parameters).payload.sequence is None
    assert answer(model, "the old house", parameters) == plain(pipe("the old house", **parameters))


def test_end_token_ends_a_text() -> None:
    pipe = fresh("text-generation")
    (free,) = pipe("the old house", do_sample=False, max_new_tokens=12)
    ids = pipe.tokenizer(free["generated_text"], add_special_tokens=False)["input_ids"]
    pipe.model.generation_config.eos_token_id = ids[-4]
    parameters = {"do_sample": False, "max_new_tokens": 12}
    model = build_pipeline_model(pipe)
    assert answer(model, "the old house", parameters) == plain(pipe("the old house", **parameters))


def test_total_length_ends_a_text() -> None:
    """`max_length` counts the prompt too."""
    pipe = fresh("text-generation")
    pipe.model.generation_config.max_length = 9
    wanted = plain(pipe("the old house", do_sample=False))
    assert wanted != plain(pipe("the old house", do_sample=False, max_new_tokens=9))
    assert answer(build_pipeline_model(pipe), "the old house", {"do_sample": False}) == wanted


def test_samples_differ() -> None:
    model = build_pipeline_model(tiny("text-generation"))
    parameters = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 8}
    texts = {answer(model, "the old house", parameters)[0]["generated_text"] for _ in range(4)}
    assert len(texts) > 1


def test_top_k_of_one_is_the_likeliest() -> None:
    """Sampling passes through the library's processors."""
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    sampled = answer(model, "the old house", {"do_sample": True, "top_k": 1, "max_new_tokens": 8})
    assert sampled == plain(pipe("the old house", do_sample=False, max_new_tokens=8))
