"""Clients that send again as soon as they are answered share batches; nothing waits for others."""

import random

import pytest

from serving_kit.records import BatchReason
from serving_kit.scheduling.closed_loop import ClosedLoop
from tests.support_scheduling import Outcome, simulate

pytestmark = pytest.mark.light
GPU = {"a": 6e-3, "b": 2e-6}
CPU = {"a": 4e-3, "b": 60e-6}


def without_waiting(monkeypatch: pytest.MonkeyPatch, **arguments: object) -> Outcome:
    with monkeypatch.context() as patch:
        patch.setattr(ClosedLoop, "worth_waiting", lambda self, call_s: False)
        return simulate(10, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("clients", "gain"), [(2, 1.35), (4, 1.3), (16, 1.1)])
def test_clients_in_step_share_batches(clients: int, gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(5)
    loop = {**GPU, "clients": clients, "turnaround": lambda: dice.uniform(0.0005, 0.002)}
    waits, hurries = simulate(10, **loop), without_waiting(monkeypatch, **loop)  # type: ignore[arg-type]
    assert waits.rate > gain * hurries.rate
    assert waits.reasons.count(BatchReason.ALL_PRESENT) > len(waits.reasons) / 3


@pytest.mark.parametrize("cost", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("clients", [1, 4, 16, 64])
def test_no_closed_loop_is_slower(
    clients: int, cost: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loop() -> dict[str, object]:
        dice = random.Random(5)
        return {
            **cost,
            "clients": clients,
            "turnaround": lambda: dice.uniform(0.0005, 0.002),
            "length": lambda: max(4, min(512, int(dice.lognormvariate(3.7, 0.8)))),
        }

    waits, hurries = simulate(10, **loop()), without_waiting(monkeypatch, **loop())  # type: ignore[arg-type]
    assert waits.rate > 0.94 * hurries.rate


@pytest.mark.parametrize("cost", [GPU, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("rate", [5, 50, 120, 150])
def test_independent_arrivals_never_wait(
    rate: float, cost: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, hurries = simulate(10, **cost, rate=rate), without_waiting(monkeypatch, **cost, rate=rate)
    assert waits.latencies == hurries.latencies


def test_clients_that_pause_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = {**GPU, "clients": 8, "turnaround": lambda: 0.030}
    waits, hurries = simulate(10, **loop), without_waiting(monkeypatch, **loop)  # type: ignore[arg-type]
    assert waits.rate > 0.99 * hurries.rate
    assert waits.quantile(0.5) < 1.01 * hurries.quantile(0.5)


def test_clients_that_stop_are_forgotten() -> None:
    loop = ClosedLoop()
    now = 0.0
    for _ in range(60):
        loop.batch_ended(now, 2)
        loop.arrived(now + 0.001, 2)
        now += 0.010
    assert loop.worth_waiting(0.006)
    for _ in range(40):
        loop.batch_ended(now, 2)
        now += 0.010
    assert not loop.worth_waiting(0.006)


def test_no_answer_before_the_first_batch() -> None:
    loop = ClosedLoop()
    loop.arrived(0.0, 3)
    assert not loop.worth_waiting(10.0)
