"""What is kept about one service: metrics, incidents and log lines, and whatever else observes its records.

Not here: when a request ends (`service.py`), when a batch does (`batching.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from serving_kit.errors import InputRejected, ServingError
from serving_kit.incidents import IncidentLog, make_incident
from serving_kit.log import ServerLog
from serving_kit.metrics import Metrics
from serving_kit.model import FailureKind
from serving_kit.observers import Observers
from serving_kit.records import (
    SERVER_SIDE,
    BatchRecord,
    BreakerRecord,
    CostReleasedRecord,
    DropRecord,
    EvictedRecord,
    FailureRecord,
    Record,
    RequestRecord,
    TokensRecord,
)


class Telemetry:
    """Records one service. Every method may be called from any thread.

    Args:
        server: Its name, for the log.
        clock: Seconds, monotonic.

    Attributes:
        request_observers: Called with the record of every request that has ended.
        step_observers: Called with the record of every batch that has ended.
        drop_observers: Called with the record of every admitted item that has ended for lack of time.
    """

    def __init__(self, server: str, clock: Callable[[], float]) -> None:
        self.metrics = Metrics()
        self.incidents = IncidentLog()
        self.log = ServerLog(server, clock, self.incidents.find)
        self.request_observers = Observers[RequestRecord](
            self.metrics.add_request,
            self.incidents.add_request,
            self.log.add_request,  # after the one before: it writes that incident
            on_failure=self._observer_failed,
        )
        self.step_observers = Observers[BatchRecord](self.metrics.add_batch, on_failure=self._observer_failed)
        self.drop_observers = Observers[DropRecord](self.metrics.add_drop, on_failure=self._observer_failed)

    def request_ended(self, record: RequestRecord, error: BaseException | None) -> None:
        """Tell the observers of a request that has ended.

        Args:
            record: The request, without `error` and `reason`.
            error: What its client is told; None: it was answered.
        """
        if error is not None:
            reason = str(error) if record.outcome in SERVER_SIDE else ""  # else it may quote the client
            record = RequestRecord(*record[:-2], type(error).__name__, reason)  # _replace() takes longer
        self.request_observers(record)

    def report(self, record: Record) -> None:
        """Take a record of the engine: tell observers of steps and drops, keep a failure, log the rest."""
        if isinstance(record, BatchRecord):
            self.step_observers(record)
        elif isinstance(record, TokensRecord):
            self.metrics.add_tokens(record)
        elif isinstance(record, EvictedRecord):
            self.metrics.add_evicted(record.sequences)
        elif isinstance(record, DropRecord):
            self.drop_observers(record)
        elif isinstance(record, FailureRecord):
            if not isinstance(record.error, InputRejected):
                self.metrics.add_failure(record.kind)
            incident = record.incident or make_incident(record.cause, record.error.outcome)
            self.incidents.add(record.error, incident)
            if record.kind is FailureKind.CRASH:
                self.log.worker_died(incident)
        elif isinstance(record, BreakerRecord):
            self.log.breaker(record.state, record.reason)
        elif isinstance(record, CostReleasedRecord):
            self.log.cost_released(record.reason)

    def route_failed(self, failed: ServingError, error: BaseException, request_id: str) -> None:
        """Keep and log the failure of a route that does not call the model."""
        incident = self.incidents.keep(failed, error)
        self.incidents.attach(incident.id, request_id)
        self.log.route_failed(incident, request_id)

    def _observer_failed(self, error: Exception) -> None:
        self.log.observer_failed(make_incident(error))
