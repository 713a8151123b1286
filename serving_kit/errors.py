"""Every way in which a request can end badly, as one tree. Statuses of HTTP: `http/problems.py`.

    ServingError
    ├── MalformedRequest    the request cannot be read                     (its sender must change it)
    │   ├── RequestTooLarge     more bytes, items, nesting or memory than there may be
    │   ├── SlowRequest         the body did not arrive in time
    │   └── UnsupportedMediaType  a form, or another kind of body, that this task does not take
    ├── InputRejected       readable, but this model cannot take this input
    ├── Overloaded          not admitted, or dropped while waiting       (try again later)
    │   └── Unavailable         not an overload: loading, broken
    │       └── Stopping            draining, stopped
    ├── DeadlineExceeded    its time was up, waiting or running
    ├── ClientGone          the client has left
    └── ModelFailed         the model, or this kit, raised

    SettingError            a knob was given a value that it cannot take   (a ValueError)
    StartError              a server could not start                       (a RuntimeError)

The text of a `ServingError` is for clients: it never carries a path, a traceback or another
client's text. What really happened is its `__cause__`, which `service.py` turns into an `Incident`
that only the owner sees.
"""

from __future__ import annotations

from serving_kit.records import Outcome, shorten

_LONGEST_DETAIL = 2000  # characters: an exception may quote an input of megabytes

_RESTART_S = 5.0  # Retry-After of a server that stops: about what starting one takes


def error_text(error: BaseException) -> str:
    """Class and text of an exception, also of one whose text cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}: (its text cannot be made)"


class ServingError(Exception):
    """A request ended without an answer.

    Attributes:
        outcome: Which of the terminal outcomes this is; fixed by the class.
        incident: Id under which the owner finds the details, or None if there are none.
        detail: Text for the owner, shown to clients only with `expose_errors`.
        dropped: Whether the request had been admitted, and ended for lack of time; not refused on arrival.
    """

    outcome: Outcome = Outcome.FAILED

    def __init__(self, message: str, *, detail: str | None = None) -> None:
        super().__init__(message)
        self.detail = None if detail is None else shorten(detail, _LONGEST_DETAIL)
        self.incident: str | None = None
        self.dropped = False


class MalformedRequest(ServingError):
    """The request cannot be read: encoding, JSON, types, unknown or impossible parameters."""

    outcome = Outcome.MALFORMED


class RequestTooLarge(MalformedRequest):
    """The request exceeds a bound; the text names the bound."""

    outcome = Outcome.TOO_LARGE


class SlowRequest(MalformedRequest):
    """The body did not arrive before the request's own deadline."""


class UnsupportedMediaType(MalformedRequest):
    """The body is of a kind that this task does not take; the text says how to send it."""


class InputRejected(ServingError):
    """The model cannot take this input (no mask token, too long, wrong kind)."""

    outcome = Outcome.REJECTED


class Overloaded(ServingError):
    """Not admitted, or dropped from the queue because it could not be answered in time.

    Attributes:
        retry_after: Seconds until trying again makes sense, from the measured drain rate; None when
            that is unknown.
    """

    outcome = Outcome.SHED

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unavailable(Overloaded):
    """The server cannot answer now for a reason other than load: draining, stopped, broken."""

    outcome = Outcome.UNAVAILABLE


class Stopping(Unavailable, RuntimeError):
    """The server is stopping or has stopped: another one, or the same after a restart, can answer.

    In a cell also a RuntimeError, as Python's own for what is closed.
    """

    def __init__(self, message: str = "the server is stopping") -> None:
        super().__init__(message, retry_after=_RESTART_S)


class DeadlineExceeded(ServingError):
    """The request's time was up, in the queue or while the model ran."""

    outcome = Outcome.EXPIRED


class ClientGone(ServingError):
    """The client left before its answer was ready."""

    outcome = Outcome.CANCELLED


class ModelFailed(ServingError):
    """The model raised, returned the wrong number of outputs, or this kit has a bug."""

    outcome = Outcome.FAILED


class SettingError(ValueError):
    """A knob was given a value that it cannot take. The text names knob, value and range."""


class StartError(RuntimeError):
    """A server could not start. The text says why, and what to do about it."""
