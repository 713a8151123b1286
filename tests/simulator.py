"""Plays one service from one seed: the real service, engine, scheduler and recovery under virtual time.

    python -m tests.simulator 4711            one seed, with what happened
    python -m tests.simulator 0 1000000       many

Only the model and the clock are simulated. The model answers, raises, hangs, runs out of memory and comes
back; its thread dies now and then; clients leave, settings change, the service is drained and replaced. The
invariants are checked at every step and every record; a seed that breaks one is named, to be run again.

Not here: virtual time and the worker (`simulation/virtual.py`), what is checked (`simulation/watch.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from serving_kit.errors import InputRejected, ServingError
from serving_kit.events import Chunk
from serving_kit.failures import classify
from serving_kit.model import (
    EXACT,
    PADDED,
    Done,
    FailureKind,
    Input,
    Layout,
    Limit,
    Limits,
    More,
    Part,
    Prepared,
    StepResult,
    Work,
    computed_tokens,
)
from serving_kit.model import Failed as PartFailed
from serving_kit.records import Outcome
from serving_kit.service import Service
from serving_kit.settings import Settings
from serving_kit.worker import Handover
from tests.simulation.virtual import Broken, Clock, SimulatedWorker, VirtualLoop
from tests.simulation.watch import Cause, Watch

SECONDS = 30.0  # of virtual time in which clients arrive
LONGEST_S = 3000.0  # until everything must have ended


# -- the model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Query:
    """What one item asks for."""

    number: int
    tokens: int
    steps: int = 1
    bad: str = ""  # "", "prepare", "rejected", "step", "part", "finish", "memory"


@dataclass
class State:
    """What the model holds of one item."""

    query: Query
    steps_done: int = 0
    cached: int = 0  # tokens in its cache, of a model that generates
    tried: tuple[int, int] | None = None  # `steps_done` and `cached` at its last step

    @property
    def rest(self) -> int:
        """Tokens that are not in its cache yet."""
        return self.query.tokens + self.steps_done - self.cached


class SimulatedModel:
    """Answers the numbers of its queries, unless `behaviour`, which changes with the time, says otherwise."""

    name, task_name, device, media = "simulated", "function", "cpu", False
    notes: tuple[str, ...] = ()
    timings: tuple[tuple[int, float], ...] = ()
    precision = EXACT

    def __init__(self, play: Play, dice: random.Random, retry: bool) -> None:
        self.play, self._dice, self._retry = play, dice, retry
        self.example = Input(Query(-1, 3), {}) if dice.random() < 0.6 else None
        self.a_s, self.b_s = dice.choice([1e-4, 0.01, 0.3]), dice.choice([0.0, 1e-5, 1e-3])
        layout = dice.choice([PADDED, Layout(packed=True, reason="simulated")])
        self.generates = layout.packed and play.more.random() < 0.5
        cache = Limit(play.more.choice([90, 90, 10_000]), "simulated") if self.generates else None
        self.limits = Limits(layout=layout, cache=cache)
        self.behaviour = "ok"
        self.fits = self.least_fits = 10**9  # computed tokens
        self.cause = Cause.NONE  # of the last step
        self.held: set[int] = set()

    def estimate(self, value: Query) -> Work:
        return Work(longest=max(1, value.tokens + self._dice.randint(-2, 2)))

    def check(self, values: Sequence[Any], parameters: Mapping[str, Any]) -> None:
        """All is taken."""

    def changed(self) -> str:
        return ""

    def prepare(self, value: Query, parameters: Mapping[str, Any]) -> Prepared[State]:
        if value.bad == "rejected":
            raise InputRejected("rejected")
        if value.bad == "prepare":
            raise ValueError("prepare")
        state = State(value)
        prepared = Prepared(state, self._work(state, value.tokens), parameters.get("key", 0))
        self.held.add(id(prepared))
        self.play.keep.append(prepared)
        return prepared

    def step(self, parts: Sequence[Part]) -> list[StepResult]:
        lengths = [part.tokens for part in parts]
        tokens = computed_tokens(lengths, packed=self.limits.layout.packed)
        took = self.a_s + self.b_s * tokens
        states: list[State] = [part.prepared.payload for part in parts]
        keys = {part.prepared.key for part in parts}
        self.play.check(len(keys) == 1, "items of several keys share a step")
        ids = {id(part.prepared) for part in parts}
        # A sequence whose cache was given back runs again; one that has ended is found in the end.
        self.held |= ids if self.generates else set()
        self.play.check(ids <= self.held, "an item runs after it was released")
        for part, state in zip(parts, states, strict=True):
            again = state.tried == (state.steps_done, state.cached)
            self.play.check(self._retry or not again, "an input runs again without retry")
            state.tried = state.steps_done, state.cached
            self.play.check(
                not self.generates or 1 <= part.tokens <= state.rest, "a share is larger than what is left"
            )
        if self.behaviour == "hangs":
            took += self._dice.choice([1.0, 20.0, 100.0])
        self.play.clock.ahead_s += took * self._dice.choice([0.5, 1.0, 1.0, 1.5])
        self.cause = cause = self._why_not(states, tokens)
        if tokens > self.fits or any(state.query.bad == "memory" for state in states):
            raise MemoryError
        if self.behaviour == "lost":
            raise RuntimeError("CUDA error: device-side assert triggered")
        if self.behaviour == "miscounts" and cause is Cause.BEHAVIOUR:
            return []
        if cause is not Cause.NONE:
            raise RuntimeError("step")
        results: list[StepResult] = []
        for part, state in zip(parts, states, strict=True):
            state.cached += part.tokens
            if state.query.bad == "part":
                results.append(PartFailed(ValueError("part")))
            elif self.generates and state.rest:
                results.append(More(work=self._work(state, state.rest)))
                continue
            elif state.steps_done + 1 < state.query.steps:
                chunk = state.query.number, state.steps_done
                results.append(More(chunk, self._work(state, 1), generated=1))
            else:
                results.append(Done(state.query.number, generated=1))
            state.steps_done += 1
        return results

    def _work(self, state: State, tokens: int) -> Work:
        if not self.generates:
            return Work(longest=tokens)
        most = state.query.tokens + state.query.steps
        return Work(longest=tokens, packed_tokens=tokens, context_tokens=state.cached, most_context=most)

    def _why_not(self, states: Sequence[State], tokens: int) -> Cause:
        if tokens > self.fits:
            return Cause.MEMORY
        if self.behaviour in ("raises", "lost") or (self.behaviour == "miscounts" and len(states) > 1):
            return Cause.BEHAVIOUR
        return Cause.QUERY if any(state.query.bad in ("memory", "step") for state in states) else Cause.NONE

    def finish(self, prepared: Prepared[State], output: int) -> int:
        if prepared.payload.query.bad == "finish":
            raise ValueError("finish")
        return output

    def release(self, prepared: Prepared[State]) -> None:
        self.held.discard(id(prepared))
        prepared.payload.cached, prepared.payload.tried = 0, None

    def classify(self, error: BaseException) -> FailureKind:
        return classify.kind(error)

    def free_memory(self, error: BaseException, *, thorough: bool) -> None:
        """Nothing is held."""


# -- the play --------------------------------------------------------------------------------------


@dataclass
class Play:
    """One seed: a service, its clients, and all that happens to them."""

    seed: int
    verbose: bool = False
    loop: VirtualLoop = field(default_factory=VirtualLoop)
    sent: int = 0
    keep: list[object] = field(default_factory=list)  # so that no two have the same id
    services: list[Service] = field(default_factory=list)
    models: list[SimulatedModel] = field(default_factory=list)
    workers: list[SimulatedWorker] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)  # one for each service
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dice, self.more = random.Random(self.seed), random.Random(f"more of {self.seed}")
        self.clock = Clock(self.loop)

    @property
    def seen(self) -> Counter[Outcome]:
        """How the requests have ended, as their clients saw it."""
        return sum((watch.seen for watch in self.watches), Counter())

    @property
    def batches(self) -> int:
        """Steps that the records tell of."""
        return sum(watch.observed.total() for watch in self.watches)

    def run(self) -> None:
        """Play it to the end. Raises `Broken`."""
        asyncio.set_event_loop(self.loop)
        errors: list[Mapping[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: errors.append(context))
        try:
            self.loop.run_until_complete(asyncio.wait_for(self._main(), LONGEST_S))
        except TimeoutError:
            raise Broken(f"not all requests have ended after {LONGEST_S:g} s") from None
        finally:
            asyncio.set_event_loop(None)
            self.loop.close()
            if self.broken:  # all else may follow from it
                raise Broken(self.broken[0])
        if errors:
            raise Broken(f"an exception was not handled: {errors[0]}") from errors[0].get("exception")

    async def _main(self) -> None:
        await self._replace()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._disturb(group))
            for number in range(self.dice.choice([1, 5, 15, 40])):
                group.create_task(self._client(number))
        for service, model in zip(self.services, self.models, strict=True):
            model.behaviour, model.fits = "ok", 10**9
            if service is self.services[-1]:
                await self._check_idle()
        await self.services[-1].stop(60.0)
        await asyncio.sleep(200.0)  # for what hangs
        self.check_end()

    async def _replace(self) -> None:
        retry = self.dice.random() < 0.9
        model = SimulatedModel(self, self.dice, retry)
        watch = Watch(self.loop, self.check, model, retry)

        def make_worker(handover: Handover, ended: Callable[..., None]) -> SimulatedWorker:
            worker = SimulatedWorker(self.loop, self.clock, self.dice, handover, ended, watch.forget)
            self.workers.append(worker)
            watch.attach(handover, worker)
            return worker

        service = watch.service = Service(
            model, self._settings(), retry=retry, clock=self.clock, make_worker=make_worker
        )
        service.telemetry.request_observers.add(watch.observe)
        service.telemetry.step_observers.add(watch.observe)
        await service.start()
        self.models.append(model)
        self.services.append(service)
        self.watches.append(watch)

    def _settings(self) -> Settings:
        dice = self.dice
        return Settings(
            max_batch_size=dice.choice([1, 2, 4, 32]),
            max_wait_ms=dice.choice([0, 0, 5, 200]),
            max_batch_tokens=dice.choice(["auto", 1, 50, 400]),
            max_queue_size=dice.choice([4, 30, 256]),
            timeout_ms=dice.choice([50, 1000, 10_000]),
            group_by_length=dice.random() < 0.5,
            drop_hopeless=dice.random() < 0.7,
            max_cache_tokens=self.more.choice(["auto", "auto", "auto", 90]),
            inter_token_target_ms=self.more.choice([1, 100, 1000]),
        )

    async def _disturb(self, group: asyncio.TaskGroup) -> None:
        dice, end = self.dice, self.loop.now + SECONDS
        while self.loop.now < end:
            await asyncio.sleep(dice.expovariate(1.0))
            service, model = self.services[-1], self.models[-1]
            what = dice.choice(
                ["behaviour", "behaviour", "behaviour", "tune", "tune", "memory", "die", "replace"]
            )
            self._say(what)
            if what == "behaviour":
                behaviours = ["ok"] * 6 + ["raises", "hangs", "miscounts"] + ["lost"] * (dice.random() < 0.3)
                model.behaviour = dice.choice(behaviours)
            elif what == "memory":
                model.fits = dice.choice([10, 100, 10**9])
                model.least_fits = min(model.least_fits, model.fits)
            elif what == "tune":
                service.tune(**self._settings().to_dict())
            elif what == "die" and dice.random() < 0.3:
                self.workers[-1].die()
            elif what == "replace" and dice.random() < 0.3:
                await self._replace()
                group.create_task(service.stop(dice.choice([0.0, 1.0, 30.0])))

    async def _client(self, number: int) -> None:
        dice = self.dice
        await asyncio.sleep(dice.random() * SECONDS)
        for turn in range(dice.choice([1, 1, 3, 10])):
            task = asyncio.current_task()
            assert task is not None
            leaves = None
            if dice.random() < 0.15:
                leaves = self.loop.call_later(dice.choice([0.0, 0.01, 1.0]), task.cancel)
            try:
                await self._ask(number * 1000 + turn * 20)
            except asyncio.CancelledError:
                task.uncancel()
            finally:
                if leaves is not None:
                    leaves.cancel()
            if dice.random() < 0.5:
                await asyncio.sleep(dice.expovariate(10.0))

    async def _ask(self, number: int) -> None:
        dice, service, watch = self.dice, self.services[-1], self.watches[-1]
        queries = [self._query(number + index) for index in range(dice.choice([1, 1, 1, 2, 5]))]
        parameters = {"key": dice.choice([0, 0, 0, 1])}
        self.sent += 1
        outcome = Outcome.FAILED
        try:
            with service.observe(str(number)) as ticket:
                if dice.random() < 0.2:
                    ticket.limit(dice.choice([0.001, 0.1, 2.0]))
                if dice.random() < 0.3:
                    await self._stream(service, queries[0], parameters, ticket)
                else:
                    answers = await service.predict(queries, parameters, ticket)
                    self.check(answers == [query.number for query in queries], "an answer is another's")
                    self.check(self.loop.now <= ticket.deadline + 1e-6, "an answer came after its deadline")
            outcome = Outcome.OK
        except ServingError as error:
            outcome = error.outcome
        except asyncio.CancelledError:
            outcome = Outcome.CANCELLED
            raise
        finally:
            watch.seen[outcome] += 1

    async def _stream(self, service: Service, query: Query, parameters: Any, ticket: Any) -> None:
        given, leaves_after = 0, self.dice.choice([None, None, 0, 1, 2])
        stream = service.stream(query, parameters, ticket, self.dice.choice([1.0, 30.0]))
        async with contextlib.aclosing(stream):
            async for event in stream:
                if isinstance(event, Chunk):
                    self.check(event.value == (query.number, given), "a chunk is another's, or out of order")
                    given += 1
                    if given == leaves_after:
                        return
                else:
                    self.check(event.value == query.number, "an answer is another's")
                    self.check(given == query.steps - 1, "a chunk is missing")

    def _query(self, number: int) -> Query:
        dice = self.dice
        kinds = ["prepare", "rejected", "step", "part", "finish", "memory"]
        bad = dice.choice(kinds) if dice.random() < 0.1 else ""
        tokens, steps = dice.choice([1, 3, 10, 40]), dice.choice([1, 1, 1, 2, 8])
        if self.models[-1].generates:
            steps = self.more.choice([1, 40, 40])
        return Query(number, tokens, steps, bad)

    # -- what must hold --------------------------------------------------------------------------

    def check(self, holds: bool, what: str) -> None:
        """Raise unless an invariant holds."""
        if not holds:
            self.broken.append(what)  # what the kit catches counts, too
            raise Broken(what)

    async def _check_idle(self) -> None:
        """Without requests nothing is left, and nothing wakes up."""
        batcher = self.services[-1].batcher
        await asyncio.sleep(200.0)
        self.watches[-1].check_idle()
        before = batcher.wakeups
        await asyncio.sleep(100.0)
        self.check(batcher.wakeups == before, "an idle server wakes up")

    def check_end(self) -> None:
        """One outcome each, and everything was given back."""
        told = sum(watch.told.total() for watch in self.watches)
        self.check(told == self.sent, f"{told} records of {self.sent} requests")
        for watch in self.watches:
            watch.check_end()

    def _say(self, text: str) -> None:
        if self.verbose:
            print(f"{self.loop.now - 1000:8.3f} {text}")


def play(seed: int, verbose: bool = False) -> Play:
    """Play one seed. Raises `Broken` with the command that plays it again."""
    one = Play(seed, verbose)
    try:
        one.run()
    except Exception as error:
        raise Broken(f"{error!r}; python -m tests.simulator {seed}") from error
    return one


def play_many(seeds: range) -> tuple[Counter[str], list[str]]:
    """Play many seeds in this process. Returns what came of the requests, and the failures."""
    logging.getLogger("serving_kit").setLevel(logging.CRITICAL)
    outcomes: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        try:
            one = play(seed)
        except Broken as error:
            failures.append(str(error))
        else:
            outcomes.update({outcome.value: n for outcome, n in one.seen.items()})
            outcomes["batches"] += one.batches
    return outcomes, failures


def play_in_processes(seeds: range, processes: int, chunk: int = 250) -> tuple[Counter[str], list[str]]:
    """The same in several processes."""
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    parts = [seeds[start : start + chunk] for start in range(0, len(seeds), chunk)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for counted, failed in pool.map(play_many, parts):
            outcomes += counted
            failures += failed
    return outcomes, failures


def main(arguments: Sequence[str]) -> int:
    """Play one seed with what happens, or a range of them."""
    numbers = [int(each) for each in arguments if each.isdigit()]
    if len(numbers) == 1:
        logging.getLogger("serving_kit").setLevel(logging.CRITICAL)
        print(play(numbers[0], verbose=True).seen)
        return 0
    outcomes, failures = play_in_processes(range(numbers[0], numbers[1]), 2)
    print(*failures[:20], sep="\n")
    print(f"{numbers[1] - numbers[0]} seeds, {len(failures)} failed; {dict(outcomes)}")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
