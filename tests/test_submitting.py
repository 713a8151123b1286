"""Equal inputs in flight share one computation: a real service around a small model with a gate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from serving_kit.errors import (
    DeadlineExceeded,
    MalformedRequest,
    ModelFailed,
    Overloaded,
    RequestTooLarge,
    SettingError,
    Stopping,
)
from serving_kit.model import Limits
from serving_kit.models.functions import CallableModel
from serving_kit.models.loading import load_model
from serving_kit.plain import canonical
from serving_kit.service import Service
from serving_kit.settings import Settings
from tests.support import BlockingFunction

pytestmark = pytest.mark.light


class Gate(BlockingFunction):
    """Answers each input with a list that holds it; keeps what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[Any]] = []
        self.takes_s = 0.0

    def __call__(self, values: list[Any], *, do_sample: bool = False, top_k: int = 0) -> list[Any]:
        self.calls.append(values)
        super().__call__(values)
        time.sleep(self.takes_s)
        if "bad" in values:
            raise ValueError("secret")
        return [[value] for value in values]


class Deterministic(CallableModel):
    """A function of which is known that it answers equal inputs alike."""

    limits = Limits()

    def samples(self, parameters: Mapping[str, object]) -> bool:
        return bool(parameters.get("do_sample"))


class Bench:
    """A service with a gate, in which one request is running, and the requests of a test."""

    def __init__(self, **knobs: Any) -> None:
        self.gate = Gate()
        knobs = {"share_equal_inputs": True, "max_batch_size": 1, "drop_hopeless": False, **knobs}
        self.skipped_s = 0.0
        self.service = Service(
            Deterministic(self.gate),
            Settings(**knobs),
            clock=lambda: time.monotonic() + self.skipped_s,
        )

    def ask(self, *values: Any, timeout_s: float | None = None, **parameters: Any) -> asyncio.Task[list[Any]]:
        """Ask in a task of its own."""

        async def request() -> list[Any]:
            with self.service.observe() as ticket:
                ticket.limit(timeout_s)
                return await self.service.predict(values, parameters, ticket)

        return asyncio.create_task(request())

    @property
    def shared(self) -> int:
        return self.service.statistics().shared_items

    @property
    def depth(self) -> int:
        return self.service.batcher.load().queue_depth

    def outcomes(self) -> dict[str, int]:
        return {each.value: count for each, count in self.service.statistics().requests.items() if count}


async def turn() -> None:
    """Let the requests that were made reach the queue."""
    for _ in range(3):
        await asyncio.sleep(0)


@asynccontextmanager
async def running(**knobs: Any) -> AsyncIterator[Bench]:
    bench = Bench(**knobs)
    await bench.service.start()
    try:
        yield bench
    finally:
        bench.gate.open.set()
        await bench.service.stop(5)


def drive(test: Callable[[Bench], Coroutine[Any, Any, None]], **knobs: Any) -> None:
    """Run a test while another input holds the model."""

    async def main() -> None:
        async with running(**knobs) as bench:
            first = bench.ask("held")
            await bench.gate.entered()
            await test(bench)
            bench.gate.open.set()
            assert await first == [["held"]]

    asyncio.run(main())


def test_equal_inputs_run_once() -> None:
    async def test(bench: Bench) -> None:
        asked = [bench.ask("x"), bench.ask("x"), bench.ask("y"), bench.ask("x", top_k=2)]
        await turn()
        assert (bench.depth, bench.shared) == (3, 1)
        bench.gate.open.set()
        assert await asyncio.gather(*asked) == [[["x"]], [["x"]], [["y"]], [["x"]]]
        assert bench.gate.calls == [["held"], ["x"], ["y"], ["x"]]
        assert bench.outcomes() == {"ok": 5}

    drive(test)


def test_a_running_computation_is_joined() -> None:
    async def test(bench: Bench) -> None:
        again = bench.ask("held")
        await turn()
        bench.gate.open.set()
        assert await again == [["held"]]
        assert bench.gate.calls == [["held"]]

    drive(test)


def test_off_by_default_and_live() -> None:
    assert Settings().share_equal_inputs is False

    async def test(bench: Bench) -> None:
        asked = [bench.ask("x"), bench.ask("x")]
        await turn()
        bench.service.tune(share_equal_inputs=True)
        asked += [bench.ask("x"), bench.ask("x")]
        await turn()
        bench.gate.open.set()
        await asyncio.gather(*asked)
        assert bench.gate.calls == [["held"], ["x"], ["x"], ["x"]]

    drive(test, share_equal_inputs=False)


def test_equal_inputs_of_one_request() -> None:
    async def test(bench: Bench) -> None:
        asked = bench.ask("x", "y", "x")
        await turn()
        assert (bench.depth, bench.shared) == (2, 1)
        bench.gate.open.set()
        assert await asked == [["x"], ["y"], ["x"]]

    drive(test)


def test_each_client_has_its_own_copy() -> None:
    async def test(bench: Bench) -> None:
        asked = [bench.ask("x"), bench.ask("x")]
        await turn()
        bench.gate.open.set()
        (one,), (other,) = await asyncio.gather(*asked)
        one.append("changed")
        assert other == ["x"]

    drive(test)


def test_what_samples_is_not_shared() -> None:
    async def test(bench: Bench) -> None:
        asked = [bench.ask("x", do_sample=True) for _ in range(2)]
        await turn()
        assert (bench.depth, bench.shared) == (2, 0)
        bench.gate.open.set()
        await asyncio.gather(*asked)

    drive(test)


@pytest.mark.parametrize("leaves", [0, 1])
def test_cancelling_one_does_not_cancel_another(leaves: int) -> None:
    async def test(bench: Bench) -> None:
        asked = [bench.ask("x"), bench.ask("x")]
        await turn()
        asked[leaves].cancel()
        await asyncio.wait([asked[leaves]])
        assert bench.depth == 1
        bench.gate.open.set()
        assert await asked[1 - leaves] == [["x"]]
        assert bench.outcomes()["cancelled"] == 1

    drive(test)


def test_nothing_runs_without_a_client() -> None:
    async def test(bench: Bench) -> None:
        asked = [bench.ask("x"), bench.ask("x", "x")]
        await turn()
        for each in asked:
            each.cancel()
        await asyncio.wait(asked)
        assert bench.depth == 0
        bench.gate.open.set()
        assert await bench.ask("y") == [["y"]]
        assert bench.gate.calls == [["held"], ["y"]]

    drive(test)


@pytest.mark.parametrize("short", [0, 1])
def test_each_has_its_own_deadline(short: int) -> None:
    """The one with less time expires alone and on time, whoever came first."""

    async def test(bench: Bench) -> None:
        asked = [bench.ask("x", timeout_s=0.05 if number == short else 60) for number in range(2)]
        with pytest.raises(DeadlineExceeded, match="the client's 50 ms"):
            await asked[short]
        bench.gate.open.set()
        assert await asked[1 - short] == [["x"]]
        assert bench.gate.calls == [["held"], ["x"]]

    drive(test)


def test_the_longest_deadline_leaves_with_its_client() -> None:
    """Then the item is dropped when the time of the others is up."""

    async def test(bench: Bench) -> None:
        long, short = bench.ask("x"), bench.ask("x", timeout_s=0.05)
        await turn()
        long.cancel()
        with pytest.raises(DeadlineExceeded):
            await short
        assert bench.depth == 0
        bench.gate.open.set()

    drive(test)


def test_an_expired_item_is_not_joined() -> None:
    """A newcomer with time left begins anew, also while the old item is still in the queue."""

    async def test(bench: Bench) -> None:
        old = bench.ask("x", timeout_s=5)
        await turn()
        bench.skipped_s = 6  # no timer has noticed it yet
        new = bench.ask("x")
        await turn()
        bench.gate.open.set()
        with pytest.raises(DeadlineExceeded):
            await old
        assert await new == [["x"]]

    drive(test)


def test_one_failure_reaches_all() -> None:
    async def test(bench: Bench) -> None:
        asked = [bench.ask("bad"), bench.ask("bad"), bench.ask("good")]
        await turn()
        bench.gate.open.set()
        one, other, good = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(one, ModelFailed)
        assert isinstance(other, ModelFailed)
        [incident] = bench.service.incidents()
        assert one.incident == other.incident == incident.id
        assert good == [["good"]]
        assert bench.outcomes()["failed"] == 2

    drive(test)


def test_a_rejected_request_leaves_what_it_joined() -> None:
    """All or none: its new input finds the queue full."""

    async def test(bench: Bench) -> None:
        first = bench.ask("x", "z")
        await turn()
        with pytest.raises(Overloaded, match="queue is full"):
            await bench.ask("x", "y")
        first.cancel()
        await asyncio.wait([first])
        assert (bench.depth, bench.shared) == (0, 0)
        bench.gate.open.set()

    drive(test, max_queue_size=2)


def test_followers_take_no_room_but_are_bounded() -> None:
    """Beyond `max_queue_size` of them, an equal input is queued like any other."""

    async def test(bench: Bench) -> None:
        asked = [bench.ask("x") for _ in range(3)]
        await turn()
        assert (bench.depth, bench.shared) == (1, 2)
        asked.append(bench.ask("x"))
        await turn()
        assert (bench.depth, bench.shared) == (2, 2)
        with pytest.raises(Overloaded):
            await bench.ask("x")
        with pytest.raises(RequestTooLarge):
            await bench.ask("x", "x", "x")
        bench.gate.open.set()
        assert await asyncio.gather(*asked) == [[["x"]]] * 4

    drive(test, max_queue_size=2)


def test_draining_refuses_followers_too() -> None:
    async def test(bench: Bench) -> None:
        admitted = bench.ask("x")
        await turn()
        bench.service.drain()
        with pytest.raises(Stopping):
            await bench.ask("x")
        bench.gate.open.set()
        assert await admitted == [["x"]]

    drive(test)


def test_stop_ends_every_follower() -> None:
    async def main() -> None:
        async with running() as bench:
            asked = [bench.ask("x") for _ in range(3)]
            await bench.gate.entered()
            await bench.service.stop(0.05)
            ends = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(end) for end in ends] == [Stopping] * 3
            assert bench.outcomes() == {"unavailable": 3}

    asyncio.run(main())


def test_a_bad_parameter_is_refused_as_before() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(MalformedRequest):
            await bench.ask("held", other=1)

    drive(test)


def test_shared_items_are_counted_for_prometheus() -> None:
    async def test(bench: Bench) -> None:
        again = bench.ask("held")
        await turn()
        values = {
            sample.name: sample.value for family in bench.service.families() for sample in family.samples
        }
        assert values["serving_kit_shared_items_total"] == 1
        bench.gate.open.set()
        await again

    drive(test)


def test_every_request_ends_once_under_churn() -> None:
    """Whatever mix of equal inputs, departures and deadlines: own answers, and nothing is left."""
    draw = random.Random(7)

    async def main() -> None:
        async with running(max_batch_size=4, max_queue_size=64) as bench:
            bench.gate.open.set()
            bench.gate.takes_s = 0.002
            asked: list[tuple[list[str], asyncio.Task[list[Any]]]] = []
            for _ in range(600):
                values = [draw.choice("abcdefgh") for _ in range(draw.choice([1, 1, 1, 2, 5]))]
                asked.append((values, bench.ask(*values, timeout_s=draw.choice([0.001, 0.01, 5]))))
                if draw.random() < 0.2:
                    draw.choice(asked)[1].cancel()
                if draw.random() < 0.3:
                    await asyncio.sleep(draw.choice([0, 0.001]))
            ends = await asyncio.gather(*[task for _, task in asked], return_exceptions=True)
            for (values, _), end in zip(asked, ends, strict=True):
                assert isinstance(end, DeadlineExceeded | Overloaded | asyncio.CancelledError) or end == [
                    [value] for value in values
                ]
            outcomes = bench.outcomes()
            assert outcomes["ok"] == sum(isinstance(end, list) for end in ends) > 50
            assert bench.shared > 50
            table = bench.service._submitter._table
            assert table.followers == 0
            assert [table.find(canonical(value, {})) for value in "abcdefgh"] == [None] * 8

    asyncio.run(main())


def test_functions_refuse_to_share() -> None:
    """Nobody knows whether a function is deterministic."""
    with pytest.raises(SettingError, match="share_equal_inputs must be False for Gate: a function may"):
        Service(load_model(Gate()), Settings(share_equal_inputs=True))

    async def main() -> None:
        service = Service(load_model(Gate()))
        with pytest.raises(SettingError, match="a function may"):
            service.tune(share_equal_inputs=True)
        assert service.settings.share_equal_inputs is False

    asyncio.run(main())
