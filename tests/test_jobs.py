"""One job: its events in order, for a request that waits for the end and for a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from serving_kit.errors import ModelFailed
from serving_kit.events import Chunk, Done, Event, Failed
from serving_kit.jobs import Job

pytestmark = pytest.mark.light

Test = Callable[[Job], Coroutine[Any, Any, None]]


def drive(test: Test) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await test(Job(asyncio.get_running_loop().create_future()))

    asyncio.run(main())


async def read(job: Job) -> list[Event]:
    return [event async for event in job.events()]


def test_body() -> None:
    """It waits for the end and reads no chunk."""

    async def test(job: Job) -> None:
        job.emit(Chunk(1))
        job.emit(Done("answer"))
        assert await job.ended == Done("answer")

    drive(test)


def test_stream_that_was_emitted_before() -> None:
    async def test(job: Job) -> None:
        for event in (Chunk(1), Chunk(2), Done("answer")):
            job.emit(event)
        assert await read(job) == [Chunk(1), Chunk(2), Done("answer")]

    drive(test)


def test_stream_as_it_comes() -> None:
    async def test(job: Job) -> None:
        reader = asyncio.create_task(read(job))
        for number in range(3):
            await asyncio.sleep(0)
            job.emit(Chunk(number))
        job.emit(Chunk(3))
        failed = Failed(ModelFailed("no"))
        job.emit(failed)
        assert await reader == [*map(Chunk, range(4)), failed]

    drive(test)


def test_nothing_after_the_end() -> None:
    async def test(job: Job) -> None:
        job.emit(Done("first"))
        job.emit(Failed(ModelFailed("second")))
        job.emit(Chunk("third"))
        assert await read(job) == [Done("first")]

    drive(test)


def test_events_while_the_reader_is_busy() -> None:
    """None is lost between two reads."""

    async def test(job: Job) -> None:
        seen: list[Event] = []
        job.emit(Chunk(0))
        async for event in job.events():
            seen.append(event)
            if len(seen) < 4:
                job.emit(Chunk(len(seen)))
            elif len(seen) == 4:
                job.emit(Done("answer"))
        assert seen == [*map(Chunk, range(4)), Done("answer")]

    drive(test)


def test_unread_failure_logs_nothing() -> None:
    logged: list[Any] = []

    async def test(job: Job) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: logged.append(context))
        job.emit(Failed(ModelFailed("no")))
        del job

    drive(test)
    assert logged == []


def test_cancelled_waiter() -> None:
    """The request gave up: what comes later is ignored."""

    async def test(job: Job) -> None:
        job.ended.cancel()
        job.emit(Chunk(1))
        job.emit(Done("answer"))
        assert job.ended.cancelled()

    drive(test)
