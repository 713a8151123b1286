"""The whole core under virtual time, from many seeds: see `simulator.py` for what is checked."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulator import Broken, SimulatedModel, play, play_in_processes, play_many

SEEDS = 5_000


def test_seeds() -> None:
    """`make simulate` plays a million."""
    outcomes, failures = play_in_processes(range(SEEDS), 2)
    assert failures == []
    assert all(outcomes[each] > SEEDS / 10 for each in ("ok", "expired", "shed", "failed", "cancelled"))


def play_all(seeds: range) -> None:
    for seed in seeds:
        play(seed)


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """The simulator silences the log of its process."""
    level = logging.getLogger("serving_kit").level
    yield
    logging.getLogger("serving_kit").setLevel(level)


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
