"""What `Spec.check` takes, its JSON schema allows; and the other way round."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

jsonschema = pytest.importorskip("jsonschema")

from serving_kit.models.tasks import TASKS
from serving_kit.settings import KNOBS
from serving_kit.values import Members, Number, Spec, Texts

PARAMETERS = {f"{task}.{name}": spec for task in TASKS for name, spec in TASKS[task].parameters.items()}
SPECS = {**KNOBS, **PARAMETERS}


def near(spec: Spec) -> st.SearchStrategy[Any]:
    """Values around the bounds of a spec."""
    if isinstance(spec, Members):
        return st.dictionaries(st.sampled_from([*spec.members, "other"]), st.integers(-1, 2) | st.booleans())
    if isinstance(spec, Number) and spec.low is not None and spec.high is not None:
        bounds = [spec.low, spec.low - 1, spec.low + 0.5, spec.high, spec.high + 1]
        return st.sampled_from(bounds) | st.floats(spec.low, spec.high)
    return st.sampled_from([*spec.choices, "{}", "a {}", "{} {}", "{{}}", "none"])


ANY = (
    st.sampled_from([None, True, False, 0, 1, 1.5, "", "a", "auto", [], {}])
    | st.lists(st.text(max_size=2) | st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


@pytest.mark.parametrize("name", SPECS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_schema_agrees_with_check(name: str, data: st.DataObject) -> None:
    spec = SPECS[name]
    value = data.draw(ANY | near(spec))
    allowed = jsonschema.Draft202012Validator(spec.schema()).is_valid(value)
    fits = spec.problem(value) == ""
    if isinstance(spec, Texts) and spec.commas and isinstance(value, str):
        assert allowed or not fits, "a schema cannot count the labels in a string"
    else:
        assert fits == allowed
