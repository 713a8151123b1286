"""One request from arrival to outcome, without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serving_kit.errors import (
    DeadlineExceeded,
    ModelFailed,
    Overloaded,
    ServingError,
    SettingError,
    Stopping,
)
from serving_kit.models.loading import load_model
from serving_kit.service import Service
from serving_kit.settings import Settings
from tests.support import BlockingFunction

pytestmark = pytest.mark.light

Function = Callable[[list[Any]], list[Any]]


@asynccontextmanager
async def running(function: Function, **knobs: Any) -> AsyncIterator[Service]:
    """A service for `function` that has started."""
    service = Service(load_model(function), Settings(**knobs))
    await service.start()
    try:
        yield service
    finally:
        await service.stop(0.2)


async def ask(service: Service, *values: Any, timeout_s: float | None = None) -> list[Any]:
    with service.observe() as ticket:
        ticket.limit(timeout_s)
        return await service.predict(values, {}, ticket)


def requests(service: Service) -> dict[str, int]:
    """How many requests ended in which way, as Prometheus is told; without those that are 0."""
    [family] = [each for each in service.families() if each.name == "serving_kit_requests"]
    counts = {
        sample.labels["outcome"]: int(sample.value)
        for sample in family.samples
        if sample.name.endswith("_total")
    }
    return {outcome: count for outcome, count in counts.items() if count}


def double(values: list[Any]) -> list[Any]:
    return [2 * value for value in values]


def fail_on_zero(values: list[Any]) -> list[Any]:
    return [1 / value for value in values]


# -- one request -----------------------------------------------------------------------------------


def test_answers_in_order() -> None:
    async def main() -> None:
        async with running(double, max_batch_size=2) as service:
            assert await ask(service, 1, 2, 3, 4, 5) == [2, 4, 6, 8, 10]
            assert requests(service) == {"ok": 1}

    asyncio.run(main())


def test_failed_request() -> None:
    """The client is told an id, the owner what was raised. Other requests are answered."""

    async def main() -> None:
        async with running(fail_on_zero) as service:
            ends = await asyncio.gather(ask(service, 0), ask(service, 4), return_exceptions=True)
            failed, answer = ends
            assert answer == [0.25]
            assert isinstance(failed, ModelFailed)
            assert "division" not in str(failed)
            [incident] = service.incidents()
            assert incident.id == failed.incident
            assert "ZeroDivisionError" in incident.error
            assert requests(service) == {"ok": 1, "failed": 1}

    asyncio.run(main())


def test_unexpected_error_while_observed() -> None:
    """An error of the front end itself becomes a `ModelFailed` with an incident."""

    async def main() -> None:
        async with running(double) as service:
            with pytest.raises(ModelFailed) as raised, service.observe():
                raise LookupError("in the front end")
            assert isinstance(raised.value.__cause__, LookupError)
            [incident] = service.incidents()
            assert incident.id == raised.value.incident
            assert requests(service) == {"failed": 1}

    asyncio.run(main())


def test_incidents_newest_first() -> None:
    async def main() -> None:
        async with running(double) as service:
            for number in range(3):
                with pytest.raises(ModelFailed), service.observe():
                    raise LookupError(f"number {number}")
            texts = [incident.error for incident in service.incidents()]
            assert texts == [f"LookupError: number {number}" for number in (2, 1, 0)]

    asyncio.run(main())


def test_cancelled_request() -> None:
    """A request that is cancelled while it waits never starts."""

    async def main() -> None:
        blocking = BlockingFunction()
        async with running(blocking, max_batch_size=1) as service:
            first = asyncio.ensure_future(ask(service, "first"))
            await blocking.entered()
            second = asyncio.ensure_future(ask(service, "second"))
            await asyncio.sleep(0.01)
            second.cancel()
            await asyncio.wait([second])
            blocking.open.set()
            assert await first == ["first"]
            assert second.cancelled()
            assert requests(service) == {"ok": 1, "cancelled": 1}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("timeout_s", "limit"),
    [(0.1, r"the client's 100 ms \(X-Request-Timeout-Ms\)"), (60, r"300 ms \(timeout_ms\)")],
)
def test_expired_request(timeout_s: float, limit: str) -> None:
    """A client may ask for less time than `timeout_ms`, never for more."""

    async def main() -> None:
        blocking = BlockingFunction()
        async with running(blocking, timeout_ms=300) as service:
            with pytest.raises(DeadlineExceeded, match=f"not answered within {limit}"):
                await ask(service, "x", timeout_s=timeout_s)
            blocking.open.set()
            assert requests(service) == {"expired": 1}

    asyncio.run(main())


def test_full_queue() -> None:
    async def main() -> None:
        blocking = BlockingFunction()
        async with running(blocking, max_batch_size=1, max_queue_size=1) as service:
            running_request = asyncio.ensure_future(ask(service, "running"))
            await blocking.entered()
            waiting = asyncio.ensure_future(ask(service, "waiting"))
            await asyncio.sleep(0.01)
            with pytest.raises(Overloaded, match="queue is full"):
                await ask(service, "one too many")
            blocking.open.set()
            assert await asyncio.gather(running_request, waiting) == [["running"], ["waiting"]]
            assert requests(service) == {"ok": 2, "shed": 1}

    asyncio.run(main())


def test_bytes_of_all_bodies_are_bounded() -> None:
    """512 MiB together, given back when a request ends."""

    async def main() -> None:
        async with running(double) as service:
            with service.observe() as first:
                first.hold(2**29)
                with pytest.raises(Overloaded, match="too many bytes"):
                    first.hold(1)
            with service.observe() as second:
                second.hold(2**29)

    asyncio.run(main())


# -- knobs -----------------------------------------------------------------------------------------


def test_tune() -> None:
    """All changes or none."""

    async def main() -> None:
        async with running(double) as service:
            assert service.tune(max_batch_size=4).max_batch_size == 4
            with pytest.raises(SettingError, match="max_wait_ms"):
                service.tune(max_batch_size=8, max_wait_ms=-1)
            assert service.settings.max_batch_size == 4
        with pytest.raises(Stopping):
            service.tune(max_batch_size=8)

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), True, "soon"])
def test_bad_live_timeout(seconds: Any) -> None:
    with pytest.raises(SettingError, match="live_timeout_s must be a number of seconds above 0"):
        Service(load_model(double), live_timeout_s=seconds)


# -- start and stop --------------------------------------------------------------------------------


def test_states() -> None:
    async def main() -> None:
        service = Service(load_model(double))
        states = [service.state()[0]]
        await service.start()
        states.append(service.state()[0])
        service.announce_stop()
        states.append(service.state()[0])
        assert await ask(service, 1) == [2], "a stop that is announced rejects no request"
        await service.stop()
        states.append(service.state()[0])
        assert states == ["starting", "ready", "draining", "stopped"]

    asyncio.run(main())


def test_drain() -> None:
    """Admitted requests are answered, new ones rejected."""

    async def main() -> None:
        blocking = BlockingFunction()
        async with running(blocking) as service:
            admitted = asyncio.ensure_future(ask(service, "admitted"))
            await blocking.entered()
            service.drain()
            with pytest.raises(Stopping):
                await ask(service, "late")
            blocking.open.set()
            assert await admitted == ["admitted"]
            assert requests(service) == {"ok": 1, "unavailable": 1}

    asyncio.run(main())


def test_stop_is_bounded() -> None:
    """What is not answered in time ends as unavailable."""

    async def main() -> None:
        blocking = BlockingFunction()
        service = Service(load_model(blocking))
        await service.start()
        stuck = asyncio.ensure_future(ask(service, "stuck"))
        await blocking.entered()
        assert await service.stop(0.1) is False
        with pytest.raises(ServingError) as raised:
            await stuck
        assert isinstance(raised.value, Stopping)
        blocking.open.set()
        assert await asyncio.to_thread(service.join, 10)

    asyncio.run(main())
