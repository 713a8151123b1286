"""Reads one service: its state and the reason, `ServerStatus`, `Statistics`, Prometheus families.

A model call is stuck when it has run longer than twice `timeout_ms`, longer than three times what 95 of 100
such calls take, and longer than 5 s, which is more than a pause of the machine.

Not here: the values (`status.py`), what counts the requests and batches (`metrics.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from prometheus_client.core import Metric

from serving_kit.failures.breaker import Gate
from serving_kit.metrics import Metrics, gauge
from serving_kit.model import Layout, Precision
from serving_kit.status import CoreStatus, ServerStatus, State, Statistics

_STUCK_TIMEOUTS, _STUCK_EXPECTED, _STUCK_AT_LEAST_S = 2, 3, 5.0
_LOOK_AT_MODEL_S = 1.0  # between two looks at what was changed about the model


class Readable(Protocol):
    """What is read of a service. Every member may be read from any thread."""

    name: str
    model_name: str
    task: str
    device: str
    precision: Precision
    clock: Callable[[], float]
    live_timeout_s: float | None
    started_at: float | None
    leaving: bool
    stopped: bool
    metrics: Metrics
    layout: Layout

    @property
    def notes(self) -> Sequence[str]:
        """What the owner should know about how the model is served."""

    def core_status(self) -> CoreStatus:
        """What the engine reports."""

    def model_changes(self) -> str:
        """What was done to the model that answers do not show, and the remedy; empty: nothing."""


class StatusReader:
    """Reads one service. Every method may be called from any thread."""

    def __init__(self, service: Readable) -> None:
        self._service = service
        self._change = -math.inf, ""  # when the model was last looked at, and what had changed

    def state(self) -> tuple[State, str]:
        """The state, and the reason for it; empty: there is none."""
        return self._state(self._service.core_status())

    def live(self) -> tuple[bool, str]:
        """Whether the process can recover without a restart, and why not.

        False only where `live_timeout_s` is set, once a stuck model call has run longer than that. Python
        cannot end a model call, but whatever supervises the process can restart it.
        """
        limit_s = self._service.live_timeout_s
        stuck_s = self._stuck_for_s(self._service.core_status())
        if limit_s is None or stuck_s is None or stuck_s <= limit_s:
            return True, ""
        return False, f"one model call has been running for {stuck_s:.0f} s; the process must be restarted"

    def status(self) -> ServerStatus:
        """The server now."""
        service, core = self._service, self._service.core_status()
        state, reason = self._state(core)
        started_at = service.started_at
        return ServerStatus(
            name=service.name,
            model=service.model_name,
            task=service.task,
            device=service.device,
            precision=service.precision.used,
            state=state,
            reason=reason or self._model_changes(),
            notes=tuple(service.notes),
            layout=service.layout,
            uptime_s=0.0 if started_at is None else service.clock() - started_at,
            core=core,
        )

    def statistics(self, series: int = 0) -> Statistics:
        """The numbers now; with `series`, also one entry for each of the last so many seconds."""
        service = self._service
        return service.metrics.statistics(service.clock(), series, service.core_status().load)

    def families(self) -> Iterator[Metric]:
        """The metric families of this server, for Prometheus."""
        service, core = self._service, self._service.core_status()
        yield from service.metrics.families(core.load)
        state, _ = self._state(core)
        yield gauge("serving_kit_ready", "1 while /health answers 200.", ({}, state is State.READY))
        gates = [({"state": gate.value}, core.breaker is gate) for gate in Gate]
        yield gauge("serving_kit_breaker_state", "1 for the state of the circuit breaker.", *gates)
        about = {
            "model": service.model_name,
            "task": service.task,
            "device": service.device,
            "server": service.name,
        }
        yield gauge("serving_kit_model_info", "What is served; always 1.", (about, 1))

    def _state(self, core: CoreStatus) -> tuple[State, str]:
        service = self._service
        if service.stopped:
            return State.STOPPED, "the server has stopped"
        if service.started_at is None:
            return State.STARTING, "the model is not ready yet"
        if service.leaving or core.draining:
            return State.DRAINING, "the server is stopping"
        if core.unavailable_reason:
            return State.FAILED, core.unavailable_reason
        if (stuck_s := self._stuck_for_s(core)) is not None:
            return (
                State.STUCK,
                f"one model call has been running for {stuck_s:.0f} s, far longer than expected",
            )
        return State.READY, core.degraded_reason

    def _stuck_for_s(self, core: CoreStatus) -> float | None:
        """How long the model call has run, if it is stuck."""
        if core.running is None:
            return None
        took_s = self._service.clock() - core.running.since
        limit_s = max(
            _STUCK_TIMEOUTS * core.settings.timeout_s,
            _STUCK_EXPECTED * core.running.expected_s,
            _STUCK_AT_LEAST_S,
        )
        return took_s if took_s > limit_s else None

    def _model_changes(self) -> str:
        now = self._service.clock()
        looked_at, changes = self._change
        if now - looked_at >= _LOOK_AT_MODEL_S:
            changes = self._service.model_changes()
            self._change = now, changes
        return changes
