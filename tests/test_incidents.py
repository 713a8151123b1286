"""The list of failures: ids, order, bounds."""

from __future__ import annotations

import threading

import pytest

incidents = pytest.importorskip("serving_kit.incidents")

from serving_kit.errors import DeadlineExceeded, ModelFailed
from serving_kit.records import Outcome, RequestRecord

pytestmark = pytest.mark.light


def raised(text: str = "deep inside") -> LookupError:
    """An exception with a traceback."""
    try:
        raise LookupError(text)
    except LookupError as error:
        return error


def ended_by(incident: str | None, request_id: str) -> RequestRecord:
    return RequestRecord(0.0, 1.0, Outcome.FAILED, 1, 0.0, 1.0, request_id, incident)


def test_keep() -> None:
    log = incidents.IncidentLog()
    failed = ModelFailed("the client is told this")
    incident = log.keep(failed, raised())
    assert failed.incident == incident.id
    assert incident.outcome is Outcome.FAILED
    assert incident.error == "LookupError: deep inside"
    assert incident.traceback.startswith("Traceback")
    assert incident.cause.startswith("LookupError at test_incidents.py:")
    assert log.find(incident.id) == incident
    assert log.find("unknown") is None


def test_outcome_of_the_error() -> None:
    log = incidents.IncidentLog()
    assert log.keep(DeadlineExceeded("late"), raised()).outcome is Outcome.EXPIRED


def test_latest_are_kept() -> None:
    """100 of them, newest first."""
    log = incidents.IncidentLog()
    for number in range(120):
        log.keep(ModelFailed(""), raised(str(number)))
    kept = [incident.error for incident in log.latest()]
    assert kept == [f"LookupError: {number}" for number in range(119, 19, -1)]


def test_request_ids() -> None:
    """The first 32 of the requests that it ended; a request without an id or an incident adds none."""
    log = incidents.IncidentLog()
    incident = log.keep(ModelFailed(""), raised())
    for number in range(40):
        log.add_request(ended_by(incident.id, f"r{number}"))
    log.add_request(ended_by(incident.id, ""))
    log.add_request(ended_by(None, "other"))
    log.add_request(ended_by("unknown", "other"))
    [kept] = log.latest()
    assert kept.request_ids == tuple(f"r{number}" for number in range(32))


def test_texts_are_bounded() -> None:
    incident = incidents.make_incident(raised("x" * 1_000_000))
    assert len(incident.error) < 2100
    assert len(incident.traceback) < 20_100


def test_same_line_same_cause() -> None:
    """Failures of one kind share their cause; it does not quote the exception's text."""
    first, second = (incidents.make_incident(raised(text)) for text in ("a", "b"))
    assert first.cause == second.cause
    assert first.id != second.id


def test_threads() -> None:
    log = incidents.IncidentLog()

    def work() -> None:
        for _ in range(200):
            incident = log.keep(ModelFailed(""), raised())
            log.attach(incident.id, "r")
            log.latest()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(log.latest()) == 100
