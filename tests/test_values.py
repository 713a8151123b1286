"""`Spec`: check, read, words and JSON schema of each kind of value."""

from __future__ import annotations

import pytest

from serving_kit.errors import SettingError
from serving_kit.values import Flag, Members, Number, Spec, Template, Text, Texts, Whole, object_schema

pytestmark = pytest.mark.light

PORT = Whole(0, 65535)
COUNT = Whole(1, 4096, unit="items", auto=True)

CASES: list[tuple[Spec, str, list[object], list[object]]] = [
    (PORT, "a whole number from 0 to 65535", [0, 65535, 8.0], [-1, 65536, 1.5, True, "1", None]),
    (COUNT, 'a whole number from 1 to 4,096 items, or "auto"', [1, "auto"], [0, "Auto", None, 10**400]),
    (Whole(choices=(503, 429)), "503 or 429", [503, 429], [500, "503"]),
    (Number(0, 1, null=True), "null or a number from 0 to 1", [0, 0.5, None], [2, float("nan"), True]),
    (Flag(), "true or false", [True, False], [0, 1, "true"]),
    (Text(), "a text", ["", "a"], [8, None]),
    (Text(choices=("a", "b")), "one of a, b", ["a"], ["c", 1, []]),
    (Template(), "a string with exactly one {} in it", ["a {}"], ["a", "{} {}", "{x} {}", "x" * 999 + "{}"]),
    (Texts(), "a list of texts", [[], ["a"]], ["a", [1]]),
    (Texts(high=2), "a list of 1 to 2 strings of 1 to 1000 characters", [["a"]], [[], "a", ["a"] * 3, [""]]),
    (Texts(high=2, or_one=True), "a list of 1 to 2 strings", ["a", ["a", "b"]], ["", 1]),
    (Texts(high=2, commas=True), "a list of 1 to 2 strings", ["a, b", ["a"]], ["a,b,c", ","]),
    (Members(members={"n": PORT}), "an object with some of n", [{}, {"n": 1}], [1, {"m": 1}, {"n": -1}]),
]


@pytest.mark.parametrize(("spec", "words", "good", "bad"), CASES)
def test_check(spec: Spec, words: str, good: list[object], bad: list[object]) -> None:
    assert spec.range.startswith(words)
    for value in good:
        assert spec.problem(value) == ""
        assert spec.check("it", value) == value
    for value in bad:
        with pytest.raises(SettingError, match=r"^it must be ") as caught:
            spec.check("it", value)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 200


def test_check_gives_the_type() -> None:
    assert isinstance(PORT.check("it", 8.0), int)
    assert isinstance(Number(0, 1).check("it", 1), float)


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        (PORT, "80", 80),
        (COUNT, "auto", "auto"),
        (Number(0, 10), "1e0", 1.0),
        (Flag(), "No", False),
        (Text(), "80", "80"),
        (Texts(), "a, b,", ["a", "b"]),
    ],
)
def test_read(spec: Spec, text: str, value: object) -> None:
    assert spec.read("it", text) == value


@pytest.mark.parametrize(("spec", "text"), [(PORT, "many"), (PORT, "1" * 20), (Flag(), "maybe")])
def test_read_a_bad_text(spec: Spec, text: str) -> None:
    with pytest.raises(SettingError, match="it must be"):
        spec.read("it", text)


def test_schema() -> None:
    spec = Whole(1, 8, unit="items", auto=True, default="auto", doc="so many", owner="engine", live=True)
    assert spec.schema() == {
        "oneOf": [{"type": "integer", "minimum": 1, "maximum": 8}, {"const": "auto"}],
        "description": "so many",
        "default": "auto",
        "x-unit": "items",
        "x-owner": "engine",
        "x-live": True,
    }
    assert Whole(choices=(503, 429)).schema() == {"type": "integer", "enum": [503, 429]}
    assert Texts(high=2).schema() == {
        "type": "array",
        "items": {"type": "string", "minLength": 1, "maxLength": 1000},
        "minItems": 1,
        "maxItems": 2,
    }


def test_schema_of_an_object() -> None:
    assert object_schema({"a": Flag(), "b": Text()}, ("a",)) == {
        "type": "object",
        "additionalProperties": False,
        "properties": {"a": {"type": "boolean"}, "b": {"type": "string"}},
        "required": ["a"],
    }
