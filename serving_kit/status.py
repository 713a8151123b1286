"""What is known about a server at one moment, as frozen values. Durations are in seconds.

    CoreStatus      what the engine reports: load, breaker, learned cost, settings
    ServerStatus    that, and which server it is, its state and the reason
    Statistics      totals, the window of the last 30 s, and one `Second` for each second

Not here: how they are found out (`status_reader.py`, `metrics.py`), how they look as JSON (`stats_json.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from serving_kit.failures.breaker import Gate
from serving_kit.model import FailureKind, Layout, Limit
from serving_kit.records import BatchReason, Drop, Outcome
from serving_kit.settings import Settings


class State(StrEnum):
    """Where a server is between its start and its end, and whether it answers."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # it stops, or has announced that it will
    STOPPED = "stopped"
    STUCK = "stuck"  # one model call runs far longer than expected
    FAILED = "failed"  # no request can be answered now
    REPLACED = "replaced"  # a newer run of `serve()` has its name


class Load(NamedTuple):
    """How much there is to do."""

    queue_depth: int  # items that wait
    in_flight: int  # items admitted and not yet answered


class Caches(NamedTuple):
    """The caches of the texts that are being generated."""

    sequences: int  # that have begun and not ended
    tokens: int  # in their caches, as of their last steps
    limit: Limit  # most tokens in them, and why


class Running(NamedTuple):
    """The model call that runs. Immutable, so that any thread may read it without a lock."""

    since: float
    expected_s: float  # 95 of 100 such calls take less; 0: not known


@dataclass(frozen=True, slots=True)
class CoreStatus:
    """What the queue, the scheduler and the breaker report, read at once."""

    load: Load
    draining: bool
    breaker: Gate
    cost_known: bool
    cost_released_reason: str  # why the learned cost was discarded lately; empty: it was not
    call_s: float  # learned: seconds per model call
    token_s: float  # learned: seconds per computed token
    max_batch_tokens: int  # in force
    memory_limit_tokens: int | None  # computed tokens that did not fit into memory; None: none are known
    running: Running | None  # None: the model is idle
    unavailable_reason: str  # why no request can be answered now; fit for clients; empty: requests can be
    degraded_reason: str  # why it is not certain that requests can be answered; empty: there is no reason
    settings: Settings
    caches: Caches | None = None  # None: the model has none


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """One server at one moment."""

    name: str
    model: str
    task: str
    device: str
    state: State
    reason: str  # why it is in this state, or what its owner should do; may be empty
    notes: tuple[str, ...]  # what the owner should know about how this model is served
    layout: Layout  # whether the model packs the items of a step, and why
    uptime_s: float  # 0: not started
    core: CoreStatus
    precision: str = "exact"  # that is served: exact or fast


class Percentiles(NamedTuple):
    """Of durations, in seconds, within 2 %; None without samples."""

    p50_s: float | None
    p95_s: float | None
    p99_s: float | None


class Tokens(NamedTuple):
    """What continuous batching has computed in a time."""

    prompt_per_s: float
    generated_per_s: float
    first_token: Percentiles  # arrival to the first token of a text
    inter_token: Percentiles  # time between two tokens of a text


class TokenTotals(NamedTuple):
    """The same since the start."""

    prompt: int
    generated: int
    evicted_sequences: int  # that gave their caches back to others, and were computed again


@dataclass(frozen=True, slots=True)
class Window:
    """Rates and percentiles over the last `duration_s` seconds."""

    duration_s: float
    arrivals_per_s: float
    answers_per_s: float
    batches_per_s: float
    batch_size_mean: float | None  # None: no batch has ended
    batch_size_max: int | None
    padding: float | None  # share of the computed tokens; None: no batch has ended, or the model packs
    busy: float  # share of the time in which the model ran
    samples: int  # answered requests, which the latency is of
    latency: Percentiles  # arrival to answer
    queue_time: Percentiles  # arrival to the start of the batch
    model_time: Percentiles  # per batch
    tokens: Tokens


@dataclass(frozen=True, slots=True, eq=False)
class Second:
    """What ended in one second. Equal only to itself, so that it can be a key of a cache."""

    second: int  # of the service's clock
    arrivals: int
    outcomes: Mapping[Outcome, int]  # requests; outcomes that did not occur are absent
    queue_depth: int  # highest
    in_flight: int  # highest
    sizes: Mapping[int, int]  # batch size: batches; ascending
    reasons: Mapping[BatchReason, int]  # batches
    padding: float | None
    busy: float
    samples: int
    latency: Percentiles
    queue_time: Percentiles
    model_time: Percentiles
    tokens: Tokens | None = None  # None: no step of continuous batching has ended


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """Settings that were changed together."""

    ago_s: float
    settings: Mapping[str, object]  # name: new value


@dataclass(frozen=True, slots=True)
class Statistics:
    """The numbers of one server since its start, with every member of each enum as a key."""

    requests: Mapping[Outcome, int]
    batches: Mapping[BatchReason, int]
    faults: Mapping[FailureKind, int]
    items: int  # that were run
    wasted_items: int  # of these: the client had left, or the deadline had passed, when the batch ended
    dropped_items: Mapping[Drop, int]  # admitted, and ended without an answer for lack of time
    shared_items: int  # inputs that were not run: they joined the computation of an equal one
    tokens: TokenTotals
    window: Window
    series: tuple[Second, ...] = ()  # oldest first; empty: not asked for
    changes: tuple[SettingsChange, ...] = ()  # oldest first; only with `series`
