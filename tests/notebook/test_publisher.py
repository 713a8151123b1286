"""The thread that reads the server for the panel."""

import threading

import pytest

from serving_kit.notebook import publisher as module
from serving_kit.notebook.publisher import THREAD_NAME, Publisher, Tick
from tests.support import until

pytestmark = pytest.mark.light


def alive():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture
def publish():
    """Starts a publisher of `tick`, and stops it at the end."""
    started = []

    def start(tick, on_error=lambda error: None):
        started.append(Publisher(tick, on_error))
        started[-1].start()
        return started[-1]

    yield start
    for publisher in started:
        publisher.stop(5)
    assert alive() == []


def test_ticks_until_none(publish):
    ticks = iter([Tick(10, active=True), Tick(0, active=False), None])
    publisher = publish(lambda: next(ticks))
    assert until(lambda: not alive())
    assert publisher.cost.kb_per_s > 0


def test_errors_are_reported(publish):
    errors, ticks = [], []

    def tick():
        ticks.append(1)
        if len(ticks) == 1:
            raise LookupError("once")
        return Tick(0, active=True)

    publish(tick, errors.append)
    assert until(lambda: len(ticks) > 2)
    assert [str(error) for error in errors] == ["once"]


def test_wake(publish, monkeypatch):
    monkeypatch.setattr(module, "_TICK_S", 60.0)
    ticked = threading.Event()

    def tick():
        ticked.set()
        return Tick(0, active=True)

    publish(tick).wake()
    assert ticked.wait(10)


def test_stop_before_the_first_tick(publish):
    ticks = []

    def tick():
        ticks.append(1)
        return Tick(0, active=True)

    publish(tick).stop(5)
    assert ticks == []
