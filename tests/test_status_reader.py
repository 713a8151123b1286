"""The state of a server and the reason, from what the engine reports."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest

from serving_kit.failures.breaker import Gate
from serving_kit.metrics import Metrics
from serving_kit.model import PADDED, Layout, Precision
from serving_kit.settings import Settings
from serving_kit.status import CoreStatus, Load, Running, State
from serving_kit.status_reader import StatusReader

pytestmark = pytest.mark.light


FAST = Precision("fast", "fast")


@dataclass
class Service:
    """What is read of a service, with every value given."""

    core: CoreStatus
    now: float = 100.0
    name: str = "default"
    model_name: str = "bert"
    task: str = "fill-mask"
    device: str = "cpu"
    precision: Precision = FAST
    live_timeout_s: float | None = None
    started_at: float | None = 90.0
    leaving: bool = False
    stopped: bool = False
    notes: list[str] = field(default_factory=lambda: ["a note"])
    layout: Layout = PADDED
    metrics: Metrics = field(default_factory=Metrics)
    changes: str = ""
    looks: int = 0  # at the model

    def clock(self) -> float:
        return self.now

    def core_status(self) -> CoreStatus:
        return self.core

    def model_changes(self) -> str:
        self.looks += 1
        return self.changes


CORE = CoreStatus(
    load=Load(queue_depth=2, in_flight=3),
    draining=False,
    breaker=Gate.CLOSED,
    cost_known=False,
    cost_released_reason="",
    call_s=0.0,
    token_s=0.0,
    max_batch_tokens=4096,
    memory_limit_tokens=None,
    running=None,
    unavailable_reason="",
    degraded_reason="",
    settings=Settings(timeout_ms=1000),
)
STUCK = dataclasses.replace(CORE, running=Running(since=90.0, expected_s=0.0))
BROKEN = dataclasses.replace(CORE, unavailable_reason="the model is broken")
DRAINING = dataclasses.replace(CORE, draining=True)


@pytest.mark.parametrize(
    ("service", "state", "reason"),
    [
        (Service(CORE), State.READY, ""),
        (Service(dataclasses.replace(CORE, degraded_reason="not sure")), State.READY, "not sure"),
        (Service(STUCK), State.STUCK, "one model call has been running for 10 s, far longer than expected"),
        (Service(BROKEN), State.FAILED, "the model is broken"),
        (Service(DRAINING), State.DRAINING, "the server is stopping"),
        (Service(CORE, leaving=True), State.DRAINING, "the server is stopping"),
        (Service(BROKEN, started_at=None), State.STARTING, "the model is not ready yet"),
        (Service(DRAINING, stopped=True), State.STOPPED, "the server has stopped"),
    ],
)
def test_state(service: Service, state: State, reason: str) -> None:
    assert StatusReader(service).state() == (state, reason)
    assert StatusReader(service).status().state is state


@pytest.mark.parametrize(
    ("took_s", "timeout_ms", "expected_s", "state"),
    [
        (4, 100, 0, State.READY),  # a pause of the machine
        (6, 100, 0, State.STUCK),
        (6, 2_000, 0, State.STUCK),
        (25, 60_000, 0, State.READY),  # a long generation within its timeout
        (121, 60_000, 0, State.STUCK),
        (6, 2_000, 20, State.READY),  # expected to take long
        (61, 2_000, 20, State.STUCK),
    ],
)
def test_stuck(took_s: float, timeout_ms: float, expected_s: float, state: State) -> None:
    """Longer than twice the timeout, three times what is expected, and 5 s."""
    core = dataclasses.replace(
        CORE, running=Running(100.0 - took_s, expected_s), settings=Settings(timeout_ms=timeout_ms)
    )
    assert StatusReader(Service(core)).state()[0] is state


def test_live() -> None:
    assert StatusReader(Service(STUCK)).live() == (True, "")
    assert StatusReader(Service(STUCK, live_timeout_s=11)).live() == (True, "")
    alive, reason = StatusReader(Service(STUCK, live_timeout_s=9)).live()
    assert not alive
    assert reason == "one model call has been running for 10 s; the process must be restarted"
    assert StatusReader(Service(CORE, live_timeout_s=1)).live() == (True, "")


def test_status() -> None:
    status = StatusReader(Service(CORE)).status()
    assert (status.name, status.model, status.task, status.device) == ("default", "bert", "fill-mask", "cpu")
    assert (status.notes, status.uptime_s, status.core) == (("a note",), 10.0, CORE)
    assert status.precision == "fast"
    assert StatusReader(Service(CORE, started_at=None)).status().uptime_s == 0


def test_model_is_looked_at_once_a_second() -> None:
    service = Service(CORE, changes="another tokenizer: run serve() again")
    reader = StatusReader(service)
    assert {reader.status().reason for _ in range(10)} == {"another tokenizer: run serve() again"}
    assert service.looks == 1
    service.now, service.changes = 101.0, ""
    assert reader.status().reason == ""
    assert service.looks == 2


def test_reason_of_the_state_comes_before_changes() -> None:
    reader = StatusReader(Service(BROKEN, changes="another tokenizer: run serve() again"))
    assert reader.status().reason == "the model is broken"


def test_families() -> None:
    families = {each.name: each for each in StatusReader(Service(BROKEN)).families()}
    assert [each.value for each in families["serving_kit_ready"].samples] == [0]
    assert {each.labels["state"]: each.value for each in families["serving_kit_breaker_state"].samples} == {
        "closed": 1,
        "open": 0,
        "half_open": 0,
        "latched": 0,
    }
    assert [each.value for each in families["serving_kit_in_flight"].samples] == [3]
    [about] = families["serving_kit_model_info"].samples
    assert about.labels == {"model": "bert", "task": "fill-mask", "device": "cpu", "server": "default"}


def test_statistics_have_the_load() -> None:
    [second] = StatusReader(Service(CORE)).statistics(series=1).series
    assert (second.queue_depth, second.in_flight) == (2, 3)
