"""`Settings`: ranges, defaults, changes, schema."""

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.errors import SettingError
from serving_kit.settings import KNOBS, Settings, settings_schema
from tests.support import REPOSITORY

pytestmark = pytest.mark.light


def test_defaults() -> None:
    assert Settings().to_dict() == {
        "max_batch_size": 32,
        "max_wait_ms": 0.0,
        "max_batch_tokens": "auto",
        "max_queue_size": 256,
        "timeout_ms": 10_000.0,
        "stream_timeout_ms": 300_000.0,
        "group_by_length": True,
        "drop_hopeless": True,
        "overload_status": 503,
        "expose_errors": False,
        "max_body_bytes": "auto",
        "share_equal_inputs": False,
        "max_cache_tokens": "auto",
        "inter_token_target_ms": 100.0,
    }


@pytest.mark.parametrize("name", KNOBS)
def test_bad_value(name: str) -> None:
    """The message names the knob, the range and the value."""
    knob = KNOBS[name]
    assert knob.doc
    for bad in ("x", None, [], float("nan"), float("inf"), -1, 10**12, 1.5 if knob.kind is int else "1"):
        with pytest.raises(SettingError) as caught:
            Settings(**{name: bad})
        assert str(caught.value) == f"{name} must be {knob.range}, got {bad!r}"


def test_schema_of_each_knob() -> None:
    for name, schema in settings_schema().items():
        assert schema["x-live"] is True
        assert schema["x-owner"] in ("http", "engine", "scheduling")
        assert schema["default"] == getattr(Settings(), name)


def test_table_in_readme() -> None:
    rows = ["| knob | default | range | meaning |", "|---|---|---|---|"]
    for name, knob in KNOBS.items():
        default = json.dumps(knob.default).strip('"')
        rows.append(f"| `{name}` | {default} | {knob.range} | {knob.doc} |")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- knobs -->\n(.*?)\n<!-- /knobs -->", readme, re.DOTALL)
    assert table is not None
    assert table[1] == "\n".join(rows)


def test_bounds_are_inclusive() -> None:
    for name, knob in KNOBS.items():
        for value in (knob.low, knob.high, *knob.choices):
            if value is not None:
                assert getattr(Settings(**{name: value}), name) == value


def test_numbers_are_converted() -> None:
    settings = Settings(max_batch_size=8.0, max_wait_ms=5)
    assert isinstance(settings.max_batch_size, int)
    assert isinstance(settings.max_wait_ms, float)
    assert (settings.max_wait_s, settings.timeout_s) == (0.005, 10.0)
    with pytest.raises(SettingError):
        Settings(max_batch_size=True)


def test_replace() -> None:
    old = Settings()
    assert old.replace(max_batch_size=1).max_batch_size == 1
    assert old == Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        old.max_batch_size = 1  # type: ignore[misc]
    with pytest.raises(SettingError, match="no setting named 'max_batch'; did you mean max_batch_size"):
        old.replace(max_batch=3)
    with pytest.raises(SettingError, match="the knobs are max_batch_size, "):
        old.replace(zzz=3)


_values: dict[str, st.SearchStrategy[Any]] = {
    name: st.booleans()
    if knob.kind is bool
    else st.sampled_from(knob.choices)
    if knob.choices
    else st.integers(int(knob.low or 0), int(knob.high or 0))
    | (st.just("auto") if knob.auto else st.nothing())
    for name, knob in KNOBS.items()
}


@given(values=st.fixed_dictionaries({}, optional=_values))
def test_json_round_trip(values: dict[str, Any]) -> None:
    settings = Settings(**values)
    assert Settings(**json.loads(json.dumps(settings.to_dict()))) == settings
