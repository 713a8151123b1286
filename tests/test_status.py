"""The typed status of a server."""

from __future__ import annotations

import dataclasses

import pytest

from serving_kit.settings import Settings
from serving_kit.spec import ServeSpec
from serving_kit.status import ServerStatus, State

pytestmark = pytest.mark.light


def status() -> ServerStatus:
    """Of a service that has not started."""
    return ServeSpec(model=list, name="one", settings=Settings(max_batch_size=4)).build().status()


def test_status_before_start() -> None:
    found = status()
    assert (found.name, found.model, found.task) == ("one", "list", "function")
    assert (found.state, found.uptime_s) == (State.STARTING, 0.0)
    assert found.core.load == (0, 0)
    assert found.core.running is None
    assert found.core.settings.max_batch_size == 4


def test_status_is_frozen() -> None:
    found = status()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.state = State.READY  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.core.draining = True  # type: ignore[misc]


def test_states_are_their_texts() -> None:
    """As `/health` and `/stats` show them."""
    assert [str(state) for state in State] == [
        "starting",
        "ready",
        "draining",
        "stopped",
        "stuck",
        "failed",
        "replaced",
    ]
