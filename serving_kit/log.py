"""What the owner reads in a log: one line per failed request, and what has changed about the server.

Two loggers of the standard library. A library adds no handlers, so where nothing is configured Python
shows WARNING and above on stderr; in a kernel `process_settings.py` keeps the lines for `server.logs()`.

    serving_kit          ERROR    a request failed, with its traceback; the model thread died; the device
                                  is lost
                         WARNING  a request was shed, expired or met an unavailable server; the breaker
                                  opened; the learned cost was released; the panel failed
                         INFO     a request that its client must change, or whose client left; the breaker
                                  closed; settings changed; a server was replaced
    serving_kit.access   INFO     one line per HTTP request, where `build_app(access_log=True)` asks for it

Every value in a message is also an attribute of the record (`extra=`), so that a JSON formatter need not
parse. One cause writes at most 10 lines a minute, and later one line with how many were left out. A cause is
an outcome, an exception class and the line that raised, never a client's text.

Not here: which handlers there are in a kernel (`process_settings.py`).
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
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from serving_kit.records import Incident, Outcome, RequestRecord

NAME = "serving_kit"
ACCESS_NAME = "serving_kit.access"
LEVELS = ("debug", "info", "warning", "error", "critical")
FORMATS = ("text", "json")
MOST_LINES, PERIOD_S = 10, 60.0  # of one cause
_MOST_CAUSES = 256
_TRACED = 64  # incidents whose traceback was written last

_logger = logging.getLogger(NAME)
_access = logging.getLogger(ACCESS_NAME)
_SERVER_SIDE = (Outcome.SHED, Outcome.EXPIRED, Outcome.UNAVAILABLE)


class Limiter:
    """Bounds the lines of each cause: `most` in `period_s` seconds. Pure; not thread-safe."""

    def __init__(self, most: int = MOST_LINES, period_s: float = PERIOD_S) -> None:
        self.most, self.period_s = most, period_s
        # Level and cause: end of its period, lines written, lines left out.
        self._causes: dict[tuple[int, str], list[Any]] = {}
        self._next_end = math.inf

    def admits(self, level: int, cause: str, now: float) -> bool:
        """Whether one more line of `cause` may be written at `now`; counts it either way."""
        entry = self._causes.get((level, cause))
        if entry is None:
            if len(self._causes) >= _MOST_CAUSES:
                cause = "any other"
            entry = self._causes.setdefault((level, cause), [now + self.period_s, 0, 0])
            self._next_end = min(self._next_end, entry[0])
        admitted: bool = entry[1] < self.most
        entry[1 if admitted else 2] += 1
        return admitted

    def ended(self, now: float) -> list[tuple[int, str, int]]:
        """Level, cause and number of the lines that were left out in periods that are over at `now`."""
        if now < self._next_end:
            return []
        over = [(key, entry[2]) for key, entry in self._causes.items() if entry[0] <= now]
        for key, _ in over:
            del self._causes[key]
        self._next_end = min((entry[0] for entry in self._causes.values()), default=math.inf)
        return [(*key, left_out) for key, left_out in over if left_out]


class ServerLog:
    """Writes the lines of one server. Every method may be called from any thread."""

    def __init__(self, server: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._clock = server, clock
        self._limiter = Limiter()
        self._lock = threading.Lock()
        self._traced: deque[str] = deque(maxlen=_TRACED)

    def request(self, record: RequestRecord, error: BaseException, incident: Incident | None) -> None:
        """A request has ended without an answer.

        Args:
            record: The request.
            error: What ended it, as its client is told.
            incident: What really happened, if the owner was told more than the client.
        """
        outcome = record.outcome
        level = logging.INFO
        if outcome is Outcome.FAILED:
            level = logging.ERROR
        elif outcome in _SERVER_SIDE or incident is not None:
            level = logging.WARNING
        kind = incident.cause if incident else type(error).__name__
        if not self._admits(level, f"{outcome.value} {kind}"):  # first of all: this is the path of a flood
            return
        fields = {
            "outcome": outcome.value,
            "error": kind,
            "incident": record.incident,
            "request_id": record.request_id,
            "latency_ms": _milliseconds(record.latency),
            "queue_ms": _milliseconds(record.queue_wait_s),
            "model_ms": _milliseconds(record.model_time_s),
            "items": record.items,
        }
        if outcome in _SERVER_SIDE:  # for the client's mistakes the text may quote the client
            fields["reason"] = str(error)
        self._emit(level, f"request {outcome}", fields, incident)

    def failed_elsewhere(self, incident: Incident) -> None:
        """A route that asks no model has failed."""
        request_id = "".join(incident.request_ids[:1])
        fields = {"incident": incident.id, "error": incident.cause, "request_id": request_id}
        self._write(logging.ERROR, "a route failed", fields, incident)

    def worker_died(self, incident: Incident) -> None:
        """The model thread has died."""
        fields = {"incident": incident.id, "error": incident.cause}
        self._write(logging.ERROR, "the model thread died", fields, incident)

    def observer_removed(self, incident: Incident) -> None:
        """An observer of the records has raised, and gets no more of them."""
        self._write(logging.ERROR, "an observer raised and was removed", {"error": incident.cause}, incident)

    def breaker(self, state: str, reason: str = "") -> None:
        """The circuit breaker has changed to `state`: closed, open or latched."""
        levels = {"closed": logging.INFO, "latched": logging.ERROR}
        level = levels.get(state, logging.WARNING)
        fields = {"breaker": state, **({"reason": reason} if reason else {})}
        self._write(level, f"the breaker is {state}", fields)

    def cost_released(self, reason: str) -> None:
        """The learned cost was wrong; budget and admission do without it until it is learned again."""
        self._write(logging.WARNING, "the learned cost was released", {"reason": reason})

    def settings(self, by: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
        """Settings were changed by `by`; both mappings have the same names."""
        for name, value in after.items():
            fields = {"by": by, "setting": name, "before": before[name], "after": value}
            self._write(logging.INFO, "a setting changed", fields, cause=f"setting {name}")

    def replaced(self, model: str, url: str) -> None:
        """This server has taken the place of another of its name."""
        self._write(logging.INFO, "the server was replaced", {"model": model, "url": url})

    def panel_failed(self, incident: Incident) -> None:
        """The panel could not look or send; it goes on."""
        self._write(logging.WARNING, "the panel failed", {"error": incident.cause}, incident)

    def close(self) -> None:
        """Write what is still to be said about lines that were left out."""
        self._summaries(math.inf)

    def _write(
        self,
        level: int,
        text: str,
        fields: Mapping[str, Any],
        incident: Incident | None = None,
        cause: str = "",
    ) -> None:
        if self._admits(level, cause or f"{text} {fields.get('error', '')}"):
            self._emit(level, text, fields, incident)

    def _admits(self, level: int, cause: str) -> bool:
        if not _logger.isEnabledFor(level):
            return False
        now = self._clock()
        self._summaries(now)
        with self._lock:
            return self._limiter.admits(level, cause, now)

    def _emit(self, level: int, text: str, fields: Mapping[str, Any], incident: Incident | None) -> None:
        trace = ""
        if incident is not None:
            with self._lock:
                if incident.id not in self._traced:  # the requests of one batch share an incident
                    self._traced.append(incident.id)
                    trace = incident.traceback
        _emit(_logger, level, text, {"server": self._server, **fields}, trace)

    def _summaries(self, now: float) -> None:
        with self._lock:
            ended = self._limiter.ended(now)
        for level, cause, count in ended:
            fields = {"server": self._server, "cause": cause, "suppressed": count, "period_s": PERIOD_S}
            _emit(_logger, level, f"{count} more lines were left out", fields)


def access(fields: Mapping[str, Any]) -> None:
    """Write one line of the access log. No value may hold a token."""
    if _access.isEnabledFor(logging.INFO):
        _emit(_access, logging.INFO, "access", fields)


def _emit(logger: logging.Logger, level: int, text: str, fields: Mapping[str, Any], trace: str = "") -> None:
    known = {name: value for name, value in fields.items() if value not in (None, "")}
    words = " ".join(f"{name}={_word(value)}" for name, value in known.items())
    record = logger.makeRecord(logger.name, level, __file__, 0, f"{text}: {words}", (), None, None, known)
    # The text and not `exc_info`: an exception holds its frames, and they hold tensors.
    record.exc_text = trace.rstrip() or None
    with contextlib.suppress(Exception):  # a handler that fails must not fail the request
        logger.handle(record)


def _word(value: Any) -> str:
    """A value in a line of text: quoted if it would fall apart, so that no value can begin a new line."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 1)


# -- for the command, which owns its process ---------------------------------------------------------

# What every record has; the rest is ours, or what another library passed as `extra`.
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
    """Send the log of this process to stderr. Only for a program that owns its process.

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
    _access.setLevel(logging.INFO)  # whoever asks for it wants it, whatever the level of the rest
