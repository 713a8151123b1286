"""The kit's own code raises at any of its lines: every job still ends, once, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
import dis
import linecache
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

from serving_kit import (
    batching,
    engine,
    execution,
    incidents,
    jobs,
    observers,
    service,
    telemetry,
    worker,
)
from serving_kit.errors import ServingError
from serving_kit.failures import bisection, breaker, recovery
from serving_kit.items import ItemState
from serving_kit.models.functions import CallableModel
from serving_kit.scheduling import admission, scheduler
from serving_kit.service import Service
from serving_kit.settings import Settings
from tests.support import our_threads
from tests.support_core import HANG_S, Bench, Echo, values_of

pytestmark = pytest.mark.light

KIT = (  # whose lines raise
    admission,
    batching,
    bisection,
    breaker,
    engine,
    execution,
    incidents,
    jobs,
    observers,
    recovery,
    scheduler,
    service,
    telemetry,
    worker,
)


@cache
def idle_steps(code: CodeType) -> frozenset[int]:
    """Offsets of instructions that do nothing, or only jump."""
    steps = dis.get_instructions(code)
    return frozenset(step.offset for step in steps if step.opname == "NOP" or step.opname.startswith("JUMP"))


class Injected(BaseException):
    """What a test raises in the kit's own code."""


class InjectedOnTheLoop(Exception):
    """The same for the loop thread, where asyncio catches exceptions of callbacks."""


class Injector:
    """A trace function that raises at one line of the kit's own code, once.

    Without a target it only counts how often each line is passed.
    """

    FILES = frozenset(module.__file__ for module in KIT)

    def __init__(
        self,
        target: tuple[str, int] | None = None,
        visit: int = 1,
        error: type[BaseException] = Injected,
    ) -> None:
        self.target, self.visit, self.error = target, visit, error
        self.passed: Counter[tuple[str, int]] = Counter()
        self.armed, self.raised = True, False

    def __call__(self, frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in self.FILES:
            return None
        visited: set[int] = set()

        def line_by_line(frame: Any, event: str, arg: Any) -> Any:
            if event == "line":
                place = (frame.f_code.co_filename, frame.f_lineno)
                # The end of a `with` block shows up as its first line once more, and a `break` in it as
                # a step that does nothing. What is raised there keeps the interpreter from leaving the
                # block: its own gap, which no code can close.
                leaving = place[1] in visited and linecache.getline(*place).strip().startswith("with ")
                leaving = leaving or frame.f_lasti in idle_steps(frame.f_code)
                visited.add(place[1])
                if not leaving:
                    self.passed[place] += self.armed
                    if self.armed and place == self.target and self.passed[place] == self.visit:
                        self.armed, self.raised = False, True
                        raise self.error(f"{Path(place[0]).name}:{place[1]}")
            return line_by_line

        return line_by_line


# -- the model thread ------------------------------------------------------------------------------


class FaultyEcho(Echo):
    """Runs out of memory with "oom" among others, and fails with "poison"."""

    def __init__(self) -> None:
        super().__init__()
        self.lengths = {"stream": 3}
        self.bad = _bad

    def free_memory(self, error: BaseException, *, thorough: bool) -> None:
        """Nothing: a search takes 0.1 s in a large process."""


def _bad(values: list[str]) -> BaseException | None:
    if "oom" in values and len(values) > 1:
        return MemoryError()
    return ValueError() if "poison" in values else None


async def everything(bench: Bench) -> None:
    """A little of all that can happen to a step."""
    for values in (["good"], ["a", "poison", "c"], ["stream", "b"], ["d", "oom"], ["bad"]):
        with contextlib.suppress(ServingError):
            items = bench.submit(*values, stream_timeout_s=5.0)
            if values == ["d", "oom"]:
                bench.submit("late", timeout_s=1e-9)
                bench.batcher.cancel(bench.submit("gone"))
            await asyncio.wait([each.payload.ended for each in items], timeout=1)


def run_batcher(injector: Injector) -> None:
    """All of it, with an injector on the model thread: each job ends, once."""

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        bench = Bench(FaultyEcho(), group_by_length=False)
        threading.settrace(injector)
        bench.batcher.start()
        threading.settrace(None)  # type: ignore[arg-type]
        await everything(bench)
        await bench.ask("later")
        armed, injector.armed = injector.armed, False
        assert values_of(await bench.ask("last")) == ["LAST"]
        injector.armed = armed
        assert await bench.batcher.stop(HANG_S)
        without_end = [item for item in bench.submitted if not item.payload.ended.done()]
        assert [item.input.value for item in without_end] in ([], ["gone"])
        for item in without_end:
            assert item.cancelled or item.state is ItemState.DONE
        assert bench.batcher.join(HANG_S)
        assert bench.batcher.load().in_flight == 0
        assert not our_threads()

    asyncio.run(main())


def test_model_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    scout = Injector()
    run_batcher(scout)
    assert len(scout.passed) > 300
    raised, runs = 0, 0
    for place, times in scout.passed.items():
        often = place[0] in (batching.__file__, worker.__file__, engine.__file__)
        # Not the last visit: on a busy machine there may be fewer of them.
        for visit in {1, (times + 1) // 2} if often else {1}:
            injector = Injector(place, visit)
            try:
                run_batcher(injector)
            except BaseException as error:
                error.add_note(f"raised at {place}, visit {visit}")
                raise
            raised += injector.raised
            runs += 1
    assert raised > 0.9 * runs


# -- the loop thread -------------------------------------------------------------------------------


def run_service(injector: Injector) -> None:
    """Some requests through the service, with an injector on the loop thread: each ends, once."""

    def function(texts: list[str]) -> list[str]:
        if "poison" in texts:
            raise ValueError
        return [text.upper() for text in texts]

    ended: list[BaseException | str] = []

    async def client(kit: Service, *values: str, timeout_s: float = 0.2) -> None:
        try:
            with kit.observe() as ticket:
                ticket.limit(timeout_s)
                answer: BaseException | str = "".join(await kit.predict(values, {}, ticket))
        except BaseException as error:  # also the injected one
            answer = error
        ended.append(answer)

    async def streaming_client(kit: Service, value: str) -> None:
        try:
            with kit.observe() as ticket:
                ticket.limit(0.2)
                pieces = [each.value async for each in kit.stream(value, {}, ticket, 5.0)]
                answer: BaseException | str = "".join(pieces)
        except BaseException as error:
            answer = error
        ended.append(answer)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        kit = Service(CallableModel(function), Settings(max_queue_size=5))
        await kit.start()
        sys.settrace(injector)
        try:
            clients = [
                asyncio.ensure_future(client(kit, *each))
                for each in (["a", "b"], ["poison"], ["c"], ["d"] * 6, ["e"])
            ]
            clients.append(asyncio.ensure_future(client(kit, "late", timeout_s=1e-9)))
            clients.append(asyncio.ensure_future(streaming_client(kit, "s")))
            await asyncio.sleep(0)
            clients[2].cancel()
            async with asyncio.timeout(HANG_S):
                await asyncio.wait(clients)
        finally:
            sys.settrace(None)
        assert len(ended) == 7, "each ends once"
        assert kit.metrics.requests() in ((7, 6) if injector.raised else (7,)), (
            "and is counted once, unless the counting itself raised"
        )
        await client(kit, "last", timeout_s=HANG_S)
        assert ended[-1] == "LAST"
        assert kit.state()[0] == "ready"
        assert await kit.stop(HANG_S)
        assert kit.join(HANG_S)
        assert kit.batcher.load().in_flight == 0
        assert not our_threads()

    asyncio.run(main())


def test_loop_thread() -> None:
    before = sys.gettrace()  # a debugger's or a coverage tool's
    try:
        scout = Injector()
        run_service(scout)
        assert len(scout.passed) > 150
        raised = 0
        for place in scout.passed:
            injector = Injector(place, error=InjectedOnTheLoop)
            try:
                run_service(injector)
            except BaseException as error:
                error.add_note(f"raised at {place}")
                raise
            raised += injector.raised
        assert raised > 0.9 * len(scout.passed)
    finally:
        sys.settrace(before)
