"""The frozen facts that flow out of the core. Metrics, reports and panels only read them.

All times are seconds on the monotonic clock of the service that emitted the record, except
`Incident.wall`, which is for people. Not here: counting them (`metrics.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from serving_kit.errors import ServingError
    from serving_kit.model import FailureKind


class Outcome(StrEnum):
    """How a request ended. Every request has exactly one."""

    OK = "ok"
    MALFORMED = "malformed"
    TOO_LARGE = "too_large"
    REJECTED = "rejected"
    SHED = "shed"
    UNAVAILABLE = "unavailable"  # refused for a reason other than load: broken, stopping
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    FAILED = "failed"

    __hash__ = str.__hash__  # Enum's own is Python code, and every request is counted four times


SERVER_SIDE = frozenset({Outcome.SHED, Outcome.EXPIRED, Outcome.UNAVAILABLE})  # not for the client to change


class BatchReason(StrEnum):
    """Why a batch was sent when it was sent."""

    FULL = "full"  # max_batch_size items
    BUDGET = "budget"  # one more item would exceed max_batch_tokens, or cost more than it saves
    IDLE = "idle"  # the model was free and nothing was worth waiting for
    DEADLINE = "deadline"  # the oldest item had waited max_wait_ms
    ALL_PRESENT = "all_present"  # all clients that had been answered were back
    DRAIN = "drain"  # the server is stopping: finish what was admitted
    RETRY = "retry"  # a part of a batch that had failed
    CONTINUED = "continued"  # items that go on after their last step, and those that joined them


class Drop(StrEnum):
    """Why an item that was admitted ended without an answer, and without a failure."""

    EXPIRED = "expired"  # its deadline passed, while it waited or ran
    HOPELESS = "hopeless"  # it could no longer be answered before its deadline


class RequestRecord(NamedTuple):
    """One finished request."""

    arrived: float
    finished: float
    outcome: Outcome
    items: int  # queue items that it was split into; 0 if it never reached the queue
    queue_wait_s: float | None  # longest wait of its items from arrival to batch start; None: never started
    model_time_s: float | None  # of the item that waited longest, first step to last; None: never started
    request_id: str = ""  # as the HTTP answer carried it; empty for calls from the kernel
    incident: str | None = None  # id of the `Incident` that ended it
    error: str = ""  # class of the exception that ended it; empty: it was answered
    reason: str = ""  # the text for its client, of the outcomes in `SERVER_SIDE` only

    @property
    def latency(self) -> float:
        """Seconds from arrival to answer."""
        return self.finished - self.arrived


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One finished step."""

    started: float
    finished: float
    size: int  # items
    tokens: int  # their lengths, added up
    computed_tokens: int  # size x longest; where the model packs, the same as `tokens`
    reason: BatchReason
    oldest_wait_s: float  # seconds from the oldest item's arrival to the start
    left_waiting: int  # items still queued when it started
    wasted: int  # items whose client had gone, or whose time was up, when it ended
    ok: bool
    packed: bool = False  # the model adds no padding

    @property
    def model_time_s(self) -> float:
        """Seconds that the model was busy."""
        return self.finished - self.started


class TokensRecord(NamedTuple):
    """The tokens that one step of continuous batching has computed.

    Attributes:
        at: When the step ended.
        prompt_tokens: Of prompts, also of those that are computed again.
        new_tokens: Of texts.
        first_token_s: Arrival to first token, of the items that got theirs.
        inter_token_s: Since the token before, for each token of the other items.
    """

    at: float
    prompt_tokens: int
    new_tokens: int
    first_token_s: tuple[float, ...]
    inter_token_s: tuple[float, ...]


class EvictedRecord(NamedTuple):
    """Sequences have given their caches back to others, and will be computed again."""

    sequences: int


class DropRecord(NamedTuple):
    """An item that was admitted has ended without an answer: for lack of time, not by a failure.

    What is refused on arrival has no such record. The request has its outcome in either case.
    """

    at: float
    waited_s: float  # since its arrival
    reason: Drop


class FailureRecord(NamedTuple):
    """The model, or the kit's own thread, has raised. Once for each exception."""

    error: ServingError  # what the clients are told; observers may set its `incident`
    cause: BaseException
    kind: FailureKind
    incident: Incident | None = None  # made on the thread on which it happened; None: not yet


class BreakerRecord(NamedTuple):
    """The circuit breaker has changed its state."""

    state: str
    reason: str  # empty: closed


class CostReleasedRecord(NamedTuple):
    """The learned cost was wrong and is learned again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Incident:
    """What the owner needs to know about one failure. Never sent to a client."""

    id: str
    wall: float  # seconds since the epoch
    outcome: Outcome
    error: str  # exception class and text, shortened
    traceback: str  # formatted and shortened; holds no frames, so it keeps no tensors alive
    cause: str = ""  # exception class and the line that raised: equal for failures of one kind
    request_ids: tuple[str, ...] = ()  # the first requests that it ended; a batch has several

    def to_dict(self) -> dict[str, object]:
        """As JSON: what the panel and `GET /errors` show."""
        return {
            "id": self.id,
            "wall": self.wall,
            "outcome": self.outcome.value,
            "error": self.error,
            "traceback": self.traceback,
            "request_ids": list(self.request_ids),
        }

    def __str__(self) -> str:
        return f"incident {self.id} ({self.outcome}): {self.error}\n{self.traceback}".rstrip()


Record = (
    RequestRecord
    | BatchRecord
    | TokensRecord
    | EvictedRecord
    | DropRecord
    | FailureRecord
    | BreakerRecord
    | CostReleasedRecord
)


def shorten(text: str, most: int) -> str:
    """`text` if it has at most about `most` characters, else its head and tail and how much is missing."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"
