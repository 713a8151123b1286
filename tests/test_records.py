"""Records: frozen, comparable by value, bounded."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving_kit.records import BatchReason, BatchRecord, Incident, Outcome, RequestRecord, shorten

pytestmark = pytest.mark.light

INCIDENT = Incident(
    "1a2b3c4d", 1e9, Outcome.FAILED, "LookupError: x", "Traceback ...", request_ids=("a", "b")
)


def test_latency() -> None:
    record = RequestRecord(10.0, 12.5, Outcome.OK, 1, 0.5, 1.5)
    assert record.latency == 2.5


def test_batch_record_is_frozen() -> None:
    record = BatchRecord(0.0, 0.1, 4, 30, 40, BatchReason.FULL, 0.0, 3, 1, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record.size = 5  # type: ignore[misc]


@pytest.mark.parametrize("kind", [Outcome, BatchReason])
def test_enums_are_their_texts(kind: type[Outcome | BatchReason]) -> None:
    """Metrics labels, JSON and dictionaries take them as strings."""
    for each in kind:
        assert each == each.value == str(each)
        assert {each.value: 1}[each] == 1


def test_incident_to_dict_is_json() -> None:
    told = json.loads(json.dumps(INCIDENT.to_dict()))
    assert told == {
        "id": "1a2b3c4d",
        "wall": 1e9,
        "outcome": "failed",
        "error": "LookupError: x",
        "traceback": "Traceback ...",
        "request_ids": ["a", "b"],
    }


def test_incident_as_text() -> None:
    assert str(INCIDENT) == "incident 1a2b3c4d (failed): LookupError: x\nTraceback ..."


@given(text=st.text(max_size=300), most=st.integers(2, 200))
def test_shorten(text: str, most: int) -> None:
    """A text that is too long keeps its head and its tail."""
    short = shorten(text, most)
    if len(text) <= most:
        assert short == text
    else:
        half = most // 2
        assert short.startswith(text[:half])
        assert short.endswith(text[-half:])
        assert f"{len(text) - 2 * half:,} characters left out" in short
        assert len(short) <= most + 40
