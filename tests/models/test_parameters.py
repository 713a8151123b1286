"""The parameters of each task: what they take, and their JSON schemas."""

from typing import Any

import pytest

from serving_kit.errors import MalformedRequest
from serving_kit.models.tasks import TASKS, parameters_schema

pytestmark = pytest.mark.light


@pytest.mark.parametrize("task", TASKS)
def test_schema_lists_every_parameter(task: str) -> None:
    schema: Any = parameters_schema(task)
    assert schema["properties"].keys() == TASKS[task].parameters.keys()
    assert schema["additionalProperties"] is False
    assert tuple(schema.get("required", ())) == TASKS[task].required


def test_schema_of_a_function_is_unknown() -> None:
    assert parameters_schema("function") is None


def test_schema_of_another_name() -> None:
    assert parameters_schema("sentiment-analysis") == parameters_schema("text-classification")


def test_schema_of_bounds() -> None:
    schema: Any = parameters_schema("text-classification")
    assert schema["properties"]["top_k"] == {
        "oneOf": [{"type": "integer", "minimum": 1, "maximum": 1000}, {"type": "null"}]
    }
    schema = parameters_schema("fill-mask")
    nested = schema["properties"]["tokenizer_kwargs"]
    assert nested["properties"]["truncation"] == {"type": "boolean"}


def test_types_of_the_pipeline() -> None:
    given = {"top_k": 3.0, "tokenizer_kwargs": {"max_length": 5.0}}
    TASKS["fill-mask"].check_parameters(given)
    typed = TASKS["fill-mask"].typed(given)
    assert typed == {"top_k": 3, "tokenizer_kwargs": {"max_length": 5}}
    assert isinstance(typed["top_k"], int)
    assert isinstance(TASKS["text-generation"].typed({"temperature": 1})["temperature"], float)


@pytest.mark.parametrize(
    ("task", "parameters", "complaint"),
    [
        ("fill-mask", {"top_k": 1.5}, "top_k must be a whole number from 1 to 1000, got 1.5"),
        ("fill-mask", {"top_k": float("inf")}, "top_k must be a whole number"),
        ("fill-mask", {"tokenizer_kwargs": {"max_length": 0}}, "where max_length is a whole number from 1"),
        ("text-classification", {"top_k": 0}, "top_k must be null or a whole number from 1 to 1000, got 0"),
        ("text-generation", {"top_p": "x" * 10_000}, r"a number from 1e-06 to 1, got '.{20,60}$"),
    ],
)
def test_bad_value(task: str, parameters: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MalformedRequest, match=complaint):
        TASKS[task].check_parameters(parameters)
