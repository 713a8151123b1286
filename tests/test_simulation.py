"""The whole core under virtual time, from many seeds: see `simulator.py` for what is checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from serving_kit.batching import Batcher
from serving_kit.engine import Engine, Output
from serving_kit.events import Done
from serving_kit.failures.breaker import Breaker
from serving_kit.failures.memory_limit import MemoryLimit
from serving_kit.items import Item
from serving_kit.scheduling import sequences
from serving_kit.scheduling.scheduler import Scheduler
from tests.simulator import Broken, SimulatedModel, play, play_in_processes, play_many

SEEDS = 5_000


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The simulator silences the log of its process."""
    level = logging.getLogger("serving_kit").level
    yield
    logging.getLogger("serving_kit").setLevel(level)


def test_seeds() -> None:
    """`make simulate` plays a million."""
    outcomes, failures = play_in_processes(range(SEEDS), 2)
    assert failures == []
    assert all(outcomes[each] > SEEDS / 10 for each in ("ok", "expired", "shed", "failed", "cancelled"))


def play_all(seeds: range) -> None:
    for seed in seeds:
        play(seed)


@pytest.mark.light
def test_some_seeds() -> None:
    assert play_many(range(SEEDS, SEEDS + 200))[1] == []


@pytest.mark.light
def test_a_seed_repeats() -> None:
    first, second = play(7), play(7)
    assert (first.seen, first.batches, first.loop.now) == (second.seen, second.batches, second.loop.now)


@pytest.mark.light
def test_a_broken_seed_names_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: a model that mixes up its answers is noticed."""
    monkeypatch.setattr(SimulatedModel, "finish", lambda self, prepared, output: output + 1)
    with pytest.raises(Broken, match=r"python -m tests.simulator \d+$"):
        play_all(range(20))


@pytest.mark.light
def test_a_lost_release_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedModel, "release", lambda self, prepared: None)
    with pytest.raises(Broken, match="still holds items"):
        play_all(range(20))


# -- mistakes of the kit that must be noticed --------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def _wrap(cls: type, name: str, wrapped: Callable[..., Any]) -> Patch:
    """Replace a method by a function that takes the method first."""
    method = getattr(cls, name)
    return lambda patch: patch.setattr(
        cls, name, lambda self, *args, **more: wrapped(method, self, *args, **more)
    )


def _never_done(take: Callable[..., Output], self: Engine) -> Output:
    output = take(self)
    return Output([each for each in output.events if not isinstance(each[1], Done)], output.records)


def _done_twice(take: Callable[..., Output], self: Engine) -> Output:
    output = take(self)
    again = [each for each in output.events if isinstance(each[1], Done)]
    return Output([*output.events, *again], output.records)


def _end_in_silence(end: Callable[..., None], self: Any, items: Sequence[Item], *told: object) -> None:
    for item in items:
        self._release(item)


def _youngest_first(go_on: Callable[..., Any], self: Any, now: float, hopeless: list[Item]) -> Any:
    self._queue.reverse()
    try:
        return go_on(self, now, hopeless)
    finally:
        self._queue.reverse()


def _run_on(cancel: Callable[..., bool], self: Scheduler, item: Item) -> bool:
    ended = cancel(self, item)
    item.cancelled = False
    return ended


MUTANTS = {
    "answers are lost": (_wrap(Engine, "take", _never_done), "without an event"),
    "answers come twice": (_wrap(Engine, "take", _done_twice), "after the end"),
    "what is dropped gets no event": (_wrap(Engine, "_end", _end_in_silence), "without an event"),
    "a crash ends no job": (
        _wrap(Batcher, "_crashed", lambda crashed, self, failed, output: self._receive(output)),
        "its client not told",
    ),
    "a lack of memory is not remembered": (
        _wrap(MemoryLimit, "limit", lambda limit, self, longest, now: float("inf")),
        "as large as what did not fit",
    ),
    "the youngest joins first": (_wrap(Scheduler, "_go_on", _youngest_first), "joins before an older one"),
    "what was cancelled goes on": (_wrap(Scheduler, "cancel", _run_on), "an item runs that has left"),
    "a prompt starts without room in the cache": (
        lambda patch: patch.setattr(sequences, "_with_room", lambda holding, new, cache: list(new)),
        "the caches hold more than they may",
    ),
    "no sequence gives its cache back": (
        lambda patch: patch.setattr(sequences, "_evicted", lambda holding, cache: []),
        "the caches hold more than they may",
    ),
    "a lost device is used on": (
        _wrap(Breaker, "latch", lambda latch, self, reason: False),
        "though the device is lost",
    ),
}


@pytest.mark.light
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, noticed = MUTANTS[mutant]
    change(monkeypatch)
    found = (failure for seed in range(100) for failure in play_many(range(seed, seed + 1))[1])
    assert any(noticed in failure for failure in found)
