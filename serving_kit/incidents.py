"""The latest failures with their tracebacks, for the owner of a server. Clients are told an id at most.

Not here: which exceptions are failures (`failures/classify.py`), the log lines (`log.py`).
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import threading
import time
import traceback

from serving_kit.errors import ServingError, error_text
from serving_kit.failures.classify import WorkerDied
from serving_kit.records import Incident, Outcome, RequestRecord, shorten

_KEPT_INCIDENTS = 100
_KEPT_REQUEST_IDS = 32  # of one incident
_LONGEST_ERROR, _LONGEST_TRACEBACK = 2000, 20_000  # characters
_LONGEST_CLASS_NAME = 60  # characters


class IncidentLog:
    """Keeps the latest 100 incidents. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._incidents: dict[str, Incident] = {}  # by id, oldest first
        self._lock = threading.Lock()

    def keep(self, failed: ServingError, error: BaseException) -> Incident:
        """Keep what happened under a new id, which is written to `failed.incident`.

        Args:
            failed: What the client is told.
            error: What was raised.
        """
        incident = make_incident(error, failed.outcome)
        self.add(failed, incident)
        return incident

    def add(self, failed: ServingError, incident: Incident) -> None:
        """Keep an incident; its id is written to `failed.incident`."""
        failed.incident = incident.id
        with self._lock:
            self._incidents[incident.id] = incident
            if len(self._incidents) > _KEPT_INCIDENTS:
                del self._incidents[next(iter(self._incidents))]

    def add_request(self, record: RequestRecord) -> None:
        """Add the id of a request to the incident that ended it."""
        if record.incident is not None and record.request_id:
            self.attach(record.incident, record.request_id)

    def attach(self, incident_id: str, request_id: str) -> None:
        """Add the id of a request to an incident, which keeps the first 32 of them."""
        with self._lock:
            incident = self._incidents.get(incident_id)
            if incident is not None and len(incident.request_ids) < _KEPT_REQUEST_IDS:
                ids = (*incident.request_ids, request_id)
                self._incidents[incident_id] = dataclasses.replace(incident, request_ids=ids)

    def find(self, incident_id: str) -> Incident | None:
        """The incident of that id; None: it is too old to be kept."""
        with self._lock:
            return self._incidents.get(incident_id)

    def latest(self) -> list[Incident]:
        """All that are kept, newest first."""
        with self._lock:
            return list(self._incidents.values())[::-1]


def make_incident(error: BaseException, outcome: Outcome = Outcome.FAILED) -> Incident:
    """An exception as an incident: text only, of bounded length."""
    return Incident(
        id=secrets.token_hex(4),
        wall=time.time(),
        outcome=outcome,
        error=shorten(error_text(error), _LONGEST_ERROR),
        traceback=shorten("".join(traceback.format_exception(error)), _LONGEST_TRACEBACK),
        cause=_cause(error),
    )


def _cause(error: BaseException) -> str:
    """What failures of one kind have in common: the class, and the line that raised."""
    source = (isinstance(error, WorkerDied) and error.__cause__) or error
    name, frames = type(source).__name__[:_LONGEST_CLASS_NAME], source.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    if frames is None:
        return name
    file = os.path.basename(frames.tb_frame.f_code.co_filename)
    return f"{name} at {file}:{frames.tb_lineno}"
