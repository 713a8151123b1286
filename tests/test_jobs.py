"""The events of one item, as its request reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

jobs = pytest.importorskip("serving_kit.jobs")
events = pytest.importorskip("serving_kit.events")

from serving_kit.errors import ModelFailed

pytestmark = pytest.mark.light

DONE = events.Done("answer", 0.1, 0.2)


def read(*emitted: Sequence[object]) -> list[object]:
    """What a reader gets if events are emitted in these portions, one for each turn of the loop."""

    async def main() -> list[object]:
        job = jobs.Job(asyncio.get_running_loop().create_future())
        received: list[object] = []

        async def reader() -> None:
            received.extend([event async for event in job.events()])

        task = asyncio.ensure_future(reader())
        for portion in emitted:
            for event in portion:
                job.emit(event)
            await asyncio.sleep(0)
        await asyncio.wait_for(task, 10)
        return received

    return asyncio.run(main())


@pytest.mark.parametrize("end", [DONE, events.Failed(ModelFailed("it failed"))], ids=["done", "failed"])
def test_events_in_order(end: object) -> None:
    chunks = [events.Chunk(number) for number in range(3)]
    assert read([*chunks, end]) == [*chunks, end]
    assert read(*([each] for each in chunks), [end]) == [*chunks, end]
    assert read([], [], [end]) == [end]


def test_nothing_after_the_end() -> None:
    assert read([DONE, events.Chunk("late"), events.Done("again")]) == [DONE]


def test_wait_for_the_end_only() -> None:
    """A request that wants one body skips the chunks."""

    async def main() -> object:
        job = jobs.Job(asyncio.get_running_loop().create_future())
        asyncio.get_running_loop().call_soon(job.emit, events.Chunk("a"))
        asyncio.get_running_loop().call_soon(job.emit, DONE)
        return await asyncio.wait_for(job.ended, 10)

    assert asyncio.run(main()) == DONE


def test_unread_failure_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        job = jobs.Job(asyncio.get_running_loop().create_future())
        job.emit(events.Failed(ModelFailed("not read")))

    asyncio.run(main())
    assert caplog.records == []
