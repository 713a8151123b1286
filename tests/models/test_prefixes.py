"""Equal beginnings of prompts are computed once, and give the same texts."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

from serving_kit.model import Done, More, Part, Prepared
from serving_kit.models.pipeline import PipelineModel, build_pipeline_model
from serving_kit.models.prefixes import common
from tests.support_models import example, plain, tiny

PARAMETERS = {"do_sample": False, "max_new_tokens": 5}


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12))
def test_common_tokens(one: list[int], other: list[int]) -> None:
    length = common(one, other)
    assert one[:length] == other[:length]
    assert one[length : length + 1] != other[length : length + 1] or length == len(one) == len(other)


def answer(model: PipelineModel, prepared: Prepared[Any]) -> object:
    """Its answer, alone; it is released then."""
    tokens = prepared.work.tokens
    while True:
        (result,) = model.step([Part(prepared, tokens)])
        if isinstance(result, Done):
            given = plain(model.finish(prepared, result.output))
            model.release(prepared)
            return given
        assert isinstance(result, More)
        tokens = result.work.tokens


def prompts() -> tuple[str, str]:
    """Two that begin with the same 80 tokens and more."""
    shared = example("text-generation", 80)
    return shared + " river", shared + " of the"


def test_prompt_that_has_ended_is_not_computed_again() -> None:
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    first, second = prompts()
    one = model.prepare(first, PARAMETERS)
    assert one.work.context_tokens == 0
    assert answer(model, one) == plain(pipe(first, **PARAMETERS))
    other = model.prepare(second, PARAMETERS)
    assert other.work.context_tokens >= 70
    assert other.work.tokens + other.work.context_tokens == len(other.payload.sequence.ids)
    assert answer(model, other) == plain(pipe(second, **PARAMETERS))


def test_prompt_of_a_running_text_is_not_computed_again() -> None:
    """Also where that text has ended before the other one starts."""
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    first, second = prompts()
    running = model.prepare(first, PARAMETERS)
    model.step([Part(running, running.work.tokens)])
    other = model.prepare(second, PARAMETERS)
    assert other.work.context_tokens >= 70
    model.release(running)
    assert answer(model, other) == plain(pipe(second, **PARAMETERS))


def test_equal_prompt_computes_its_last_token() -> None:
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    text, _ = prompts()
    given = [answer(model, model.prepare(text, PARAMETERS)) for _ in range(2)]
    assert model.prepare(text, PARAMETERS).work.tokens == 1
    assert given == [plain(pipe(text, **PARAMETERS))] * 2


def test_failed_first_step_can_be_run_again() -> None:
    pipe = tiny("text-generation")
    model = build_pipeline_model(pipe)
    first, second = prompts()
    answer(model, model.prepare(first, PARAMETERS))
    prepared = model.prepare(second, PARAMETERS)
    hook = model.pipe.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.step([Part(prepared, prepared.work.tokens)])
    hook.remove()
    assert answer(model, prepared) == plain(pipe(second, **PARAMETERS))


def test_kept_prompts_are_given_back() -> None:
    model = build_pipeline_model(tiny("text-generation"))
    first, second = prompts()
    answer(model, model.prepare(first, PARAMETERS))
    model.free_memory(MemoryError(), thorough=False)
    assert model.prepare(second, PARAMETERS).work.context_tokens == 0
