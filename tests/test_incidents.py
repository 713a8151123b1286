"""Incidents: bounded text, ids, the requests that they ended."""

import gc
import weakref

import pytest

from serving_kit.errors import ModelFailed, Unavailable
from serving_kit.failures.classify import WorkerDied
from serving_kit.incidents import IncidentLog, make_incident
from serving_kit.records import Incident, Outcome, RequestRecord

pytestmark = pytest.mark.light


class Large:
    """Stands for a tensor in a frame of the traceback."""


def raised(text: str = "deep inside") -> LookupError:
    large = Large()
    raised.large = weakref.ref(large)  # type: ignore[attr-defined]
    try:
        raise LookupError(text)
    except LookupError as error:
        return error


def kept(log: IncidentLog) -> Incident:
    return log.keep(ModelFailed("the model failed on this request"), raised())


def request(incident: str | None, request_id: str) -> RequestRecord:
    return RequestRecord(0.0, 1.0, Outcome.FAILED, 1, 0.1, 0.2, request_id, incident)


def test_keep_sets_the_id() -> None:
    log, failed = IncidentLog(), Unavailable("the server has run out of memory")
    incident = log.keep(failed, raised())
    assert failed.incident == incident.id
    assert log.find(incident.id) == incident
    assert incident.outcome is Outcome.UNAVAILABLE
    assert incident.error == "LookupError: deep inside"
    assert incident.cause.startswith("LookupError at test_incidents.py:")
    assert "LookupError: deep inside" in incident.traceback


def test_latest_is_newest_first_and_bounded() -> None:
    log = IncidentLog()
    ids = [kept(log).id for _ in range(150)]
    assert [each.id for each in log.latest()] == ids[:-101:-1]
    assert log.find(ids[0]) is None


def test_requests_are_added_to_their_incident() -> None:
    log = IncidentLog()
    incident, other = kept(log), kept(log)
    for number in range(50):
        log.add_request(request(incident.id, f"r{number}"))
    log.add_request(request(incident.id, ""))
    log.add_request(request(None, "answered"))
    log.add_request(request("unknown", "r0"))
    found = log.find(incident.id)
    assert found is not None
    assert found.request_ids == tuple(f"r{number}" for number in range(32))
    assert log.find(other.id) == other
    assert incident.request_ids == (), "incidents are frozen"


def test_text_is_bounded() -> None:
    incident = make_incident(raised("begin" + "x" * 1_000_000 + "end"))
    for text in (incident.error, incident.traceback):
        assert len(text) < 25_000
        assert "characters left out" in text


def test_incident_keeps_no_frames() -> None:
    """A frame of a model holds tensors."""
    log = IncidentLog()
    kept(log)
    gc.collect()
    assert raised.large() is None  # type: ignore[attr-defined]


def test_cause_of_a_dead_worker_is_what_ended_it() -> None:
    died = WorkerDied("the model thread has died")
    died.__cause__ = raised()
    assert make_incident(died).cause.startswith("LookupError at test_incidents.py:")
    assert make_incident(WorkerDied("the model thread has died")).cause == "WorkerDied"
