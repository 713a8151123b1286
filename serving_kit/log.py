"""The log of a server: one line for each request that failed, and for each change of its state.

Two loggers of the standard library. A library adds no handlers, so where nothing is configured Python
shows WARNING and above on stderr; in a kernel `notebook/process_settings.py` keeps the lines for
`server.logs()`.

    serving_kit          ERROR    a request failed, with its traceback; the model thread died; the device
                                  is lost
                         WARNING  a request was shed, expired or met an unavailable server; the breaker
                                  opened; the learned cost was discarded; the panel or an observer failed
                         INFO     a request that its client must change, or whose client left; the breaker
                                  closed; settings changed; a server was replaced
    serving_kit.access   INFO     one line per HTTP request, where `build_app(access_log=True)` asks for it

Every value in a message is also an attribute of the record (`extra=`), so that a JSON formatter need not
parse. One cause writes at most 10 lines a minute, and after that one line with the number of lines left out.
A cause is an outcome, an exception class and the line that raised, never a client's text.

Not here: which handlers there are in a kernel (`notebook/process_settings.py`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from serving_kit.records import SERVER_SIDE, Incident, Outcome, RequestRecord

NAME = "serving_kit"
ACCESS_NAME = "serving_kit.access"
LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")
MOST_LINES, PERIOD_S = 10, 60.0  # of one cause
_MOST_CAUSES = 256
_TRACED = 64  # incidents whose traceback was written last
_BREAKER_LEVELS = {"closed": logging.INFO, "latched": logging.ERROR}  # WARNING for the others

Fields = Mapping[str, object]

_logger = logging.getLogger(NAME)
_access = logging.getLogger(ACCESS_NAME)


@dataclass(slots=True)
class _Period:
    """The lines of one cause in one period."""

    ends: float
    written: int = 0
    left_out: int = 0


class Limiter:
    """Bounds the lines of each cause: `most` in `period_s` seconds. Pure; not thread-safe."""

    def __init__(self, most: int = MOST_LINES, period_s: float = PERIOD_S) -> None:
        self.most, self.period_s = most, period_s
        self._periods: dict[tuple[int, str], _Period] = {}  # by level and cause
        self._next_end = math.inf

    def admits(self, level: int, cause: str, now: float) -> bool:
        """Whether one more line of `cause` may be written at `now`; counts it either way."""
        period = self._periods.get((level, cause))
        if period is None:
            if len(self._periods) >= _MOST_CAUSES:
                cause = "any other"
            period = self._periods.setdefault((level, cause), _Period(now + self.period_s))
            self._next_end = min(self._next_end, period.ends)
        if period.written < self.most:
            period.written += 1
            return True
        period.left_out += 1
        return False

    def ended(self, now: float) -> list[tuple[int, str, int]]:
        """Level, cause and number of the lines that were left out in periods that are over at `now`."""
        if now < self._next_end:
            return []
        over = [(key, period.left_out) for key, period in self._periods.items() if period.ends <= now]
        for key, _ in over:
            del self._periods[key]
        self._next_end = min((period.ends for period in self._periods.values()), default=math.inf)
        return [(*key, left_out) for key, left_out in over if left_out]


class ServerLog:
    """Writes the lines of one server. Every method may be called from any thread.

    Args:
        server: Its name.
        clock: Seconds, monotonic.
        find_incident: The incident of an id; None: it is not kept any more.
    """

    def __init__(
        self,
        server: str,
        clock: Callable[[], float] = time.monotonic,
        find_incident: Callable[[str], Incident | None] = lambda incident_id: None,
    ) -> None:
        self._server, self._clock, self._find_incident = server, clock, find_incident
        self._limiter = Limiter()
        self._lock = threading.Lock()
        self._traced: deque[str] = deque(maxlen=_TRACED)

    def add_request(self, record: RequestRecord) -> None:
        """A request has ended. Requests that were answered write nothing."""
        outcome = record.outcome
        if outcome is Outcome.OK:
            return
        incident = None if record.incident is None else self._find_incident(record.incident)
        level = _request_level(outcome, incident)
        error = incident.cause if incident else record.error
        if not self._admits(level, f"{outcome} {error}"):  # before any other work: requests may flood
            return
        fields = {
            "outcome": outcome.value,
            "error": error,
            "incident": record.incident,
            "request_id": record.request_id,
            "latency_ms": _milliseconds(record.latency),
            "queue_ms": _milliseconds(record.queue_wait_s),
            "model_ms": _milliseconds(record.model_time_s),
            "items": record.items,
            "reason": record.reason,
        }
        self._emit(level, f"request {outcome}", fields, incident)

    def route_failed(self, incident: Incident, request_id: str) -> None:
        """A route that does not call the model has failed."""
        fields = {"incident": incident.id, "error": incident.cause, "request_id": request_id}
        self._write(logging.ERROR, "a route failed", fields, incident)

    def worker_died(self, incident: Incident) -> None:
        """The model thread has died."""
        fields = {"incident": incident.id, "error": incident.cause}
        self._write(logging.ERROR, "the model thread died", fields, incident)

    def breaker(self, state: str, reason: str = "") -> None:
        """The circuit breaker has changed to `state`: closed, open or latched."""
        level = _BREAKER_LEVELS.get(state, logging.WARNING)
        self._write(level, f"the breaker is {state}", {"breaker": state, "reason": reason})

    def cost_released(self, reason: str) -> None:
        """The learned cost was wrong; budget and admission do without it until it is learned again."""
        self._write(logging.WARNING, "the learned cost was released", {"reason": reason})

    def settings(self, by: str, before: Fields, after: Fields) -> None:
        """Settings were changed by `by`; both mappings have the same names."""
        for name, value in after.items():
            fields = {"by": by, "setting": name, "before": before[name], "after": value}
            self._write(logging.INFO, "a setting changed", fields, cause=f"setting {name}")

    def replaced(self, model: str, url: str) -> None:
        """This server has taken the place of another of its name."""
        self._write(logging.INFO, "the server was replaced", {"model": model, "url": url})

    def panel_failed(self, incident: Incident) -> None:
        """The panel could not read the server or send a frame; it tries again."""
        self._write(logging.WARNING, "the panel failed", {"error": incident.cause}, incident)

    def observer_failed(self, incident: Incident) -> None:
        """An observer of records has raised, and was removed."""
        self._write(
            logging.WARNING, "an observer failed and was removed", {"error": incident.cause}, incident
        )

    def close(self) -> None:
        """Write how many lines were left out in the periods that have not ended."""
        with self._lock:
            ended = self._limiter.ended(math.inf)
        self._write_left_out(ended)

    def _write(
        self, level: int, text: str, fields: Fields, incident: Incident | None = None, cause: str = ""
    ) -> None:
        if self._admits(level, cause or f"{text} {fields.get('error', '')}"):
            self._emit(level, text, fields, incident)

    def _admits(self, level: int, cause: str) -> bool:
        if not _logger.isEnabledFor(level):
            return False
        now = self._clock()
        with self._lock:
            ended = self._limiter.ended(now)
            admitted = self._limiter.admits(level, cause, now)
        if ended:
            self._write_left_out(ended)
        return admitted

    def _emit(self, level: int, text: str, fields: Fields, incident: Incident | None) -> None:
        trace = ""
        if incident is not None:
            with self._lock:
                if incident.id not in self._traced:  # the requests of one batch share an incident
                    self._traced.append(incident.id)
                    trace = incident.traceback
        _emit(_logger, level, text, {"server": self._server, **fields}, trace)

    def _write_left_out(self, ended: Iterable[tuple[int, str, int]]) -> None:
        for level, cause, count in ended:
            fields = {"server": self._server, "cause": cause, "suppressed": count, "period_s": PERIOD_S}
            _emit(_logger, level, f"{count} more lines were left out", fields)


def _request_level(outcome: Outcome, incident: Incident | None) -> int:
    if outcome is Outcome.FAILED:
        return logging.ERROR
    return logging.WARNING if outcome in SERVER_SIDE or incident is not None else logging.INFO


def access(fields: Fields) -> None:
    """Write one line of the access log. No value may hold a token."""
    if _access.isEnabledFor(logging.INFO):
        _emit(_access, logging.INFO, "access", fields)


def _emit(logger: logging.Logger, level: int, text: str, fields: Fields, trace: str = "") -> None:
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    words = " ".join(f"{name}={_word(value)}" for name, value in known.items())
    record = logger.makeRecord(logger.name, level, __file__, 0, f"{text}: {words}", (), None, None, known)
    # The text and not `exc_info`: an exception holds its frames, and they hold tensors.
    record.exc_text = trace.rstrip() or None
    with contextlib.suppress(Exception):  # a handler that fails must not fail the request
        logger.handle(record)


def _word(value: object) -> str:
    """A value in a line of text, quoted unless it is one plain word: no value can begin a new line."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)


# -- for the command, which owns its process ---------------------------------------------------------

# What every record has. The rest are the fields of this kit, or what another library passed as `extra`.
_STANDARD = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: ts, level, logger, message, the record's own fields, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        document = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        document |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if trace := record.exc_text or (self.formatException(record.exc_info) if record.exc_info else ""):
            document["traceback"] = trace
        return json.dumps(document, default=str)


def configure(level: str = "info", form: str = "text") -> None:
    """Send the log of this process to stderr. Only for a program that owns its process, never in a kernel.

    Other libraries are shown from WARNING on, and Python's warnings become log lines.

    Args:
        level: One of `LEVELS`, for this kit's lines.
        form: One of `FORMATS`.
    """
    if form == "json":  # progress bars, as of loading weights, would break the format
        os.environ.setdefault("TQDM_DISABLE", "1")
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.captureWarnings(True)
    _logger.setLevel(level.upper())
    _access.setLevel(logging.INFO)  # it is written only on request, whatever the level of the rest
