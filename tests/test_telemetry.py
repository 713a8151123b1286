"""What is recorded when a request ends, a model fails or a route does."""

import logging

import pytest

from serving_kit.errors import InputRejected, ModelFailed, Overloaded
from serving_kit.failures.classify import WorkerDied
from serving_kit.model import FailureKind
from serving_kit.records import Drop, DropRecord, FailureRecord, Outcome, RequestRecord
from serving_kit.telemetry import Telemetry

pytestmark = pytest.mark.light


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry("default", lambda: 10.0)


def request(outcome: Outcome, incident: str | None = None) -> RequestRecord:
    return RequestRecord(9.0, 10.0, outcome, 1, None, None, "r1", incident)


def test_observers_get_the_record(telemetry: Telemetry) -> None:
    seen: list[RequestRecord] = []
    telemetry.request_observers.add(seen.append)
    telemetry.request_ended(request(Outcome.OK), None)
    telemetry.request_ended(request(Outcome.SHED), Overloaded("the queue is full"))
    telemetry.request_ended(request(Outcome.REJECTED), InputRejected("no mask in 'my secret'"))
    assert [(each.outcome, each.error, each.reason) for each in seen] == [
        (Outcome.OK, "", ""),
        (Outcome.SHED, "Overloaded", "the queue is full"),
        (Outcome.REJECTED, "InputRejected", ""),  # its text may quote the client
    ]
    assert seen[0] == request(Outcome.OK)
    assert telemetry.metrics.requests() == 3


def test_dropped_items_have_observers(telemetry: Telemetry) -> None:
    seen: list[DropRecord] = []
    telemetry.drop_observers.add(seen.append)
    telemetry.report(DropRecord(10.0, 0.5, Drop.HOPELESS))
    assert seen == [DropRecord(10.0, 0.5, Drop.HOPELESS)]
    assert telemetry.metrics.statistics(10.0).dropped_items[Drop.HOPELESS] == 1


def test_failing_observer_is_logged(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    def broken(record: RequestRecord) -> None:
        raise LookupError("deep inside")

    telemetry.request_observers.add(broken)
    for _ in range(2):
        telemetry.request_ended(request(Outcome.OK), None)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("an observer failed")
    assert "LookupError: deep inside" in str(record.exc_text)
    assert telemetry.metrics.requests() == 2


def test_model_failure_is_counted_and_kept(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    failed = ModelFailed("the model failed on this request")
    telemetry.report(FailureRecord(failed, LookupError("deep inside"), FailureKind.ERROR))
    telemetry.report(FailureRecord(InputRejected("no"), LookupError("why"), FailureKind.ERROR))
    telemetry.request_ended(request(Outcome.FAILED, failed.incident), failed)
    assert telemetry.metrics.statistics(10.0).faults[FailureKind.ERROR] == 1, (
        "a rejected input is not a fault"
    )
    rejected, kept = telemetry.incidents.latest()
    assert (kept.id, kept.request_ids) == (failed.incident, ("r1",))
    assert rejected.outcome is Outcome.REJECTED
    [record] = caplog.records
    assert f"incident={kept.id}" in record.getMessage()
    assert "LookupError: deep inside" in str(record.exc_text)


def test_dead_worker_has_a_line_of_its_own(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    died = WorkerDied("the model thread has died")
    telemetry.report(FailureRecord(ModelFailed("failed"), died, FailureKind.CRASH))
    assert [each.getMessage().partition(":")[0] for each in caplog.records] == ["the model thread died"]


def test_route_failure(telemetry: Telemetry, caplog: pytest.LogCaptureFixture) -> None:
    telemetry.route_failed(ModelFailed("failed"), LookupError("deep inside"), "r7")
    [kept] = telemetry.incidents.latest()
    assert kept.request_ids == ("r7",)
    assert "request_id=r7" in caplog.text
    assert telemetry.metrics.requests() == 0
