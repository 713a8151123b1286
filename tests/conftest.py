"""Fixtures of all tests, and the check that a test leaves nothing behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import serving_kit
from tests.support import our_threads


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test that leaves a thread, a registered server or a changed process behind.

    What a fixture of a wider scope has started before the test may stay.
    """
    registry: dict[str, Any] = sys.__dict__.setdefault("_serving_kit_servers", {})
    servers, threads, interval = dict(registry), our_threads(), sys.getswitchinterval()
    yield
    if servers:
        for name, server in list(registry.items()):
            if servers.get(name) is not server:
                server.stop()
    elif registry:
        serving_kit.stop_all()
    deadline = time.monotonic() + 5
    while our_threads() - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(each.name for each in our_threads() - threads) == []
    assert set(registry) == set(servers)
    assert sys.getswitchinterval() == interval


@pytest.fixture
def serve() -> Iterator[Callable[..., Any]]:
    """`serving_kit.serve` on any free port; every server is stopped in the end."""
    started = []

    def serve(model: Any, **arguments: Any) -> Any:
        server = serving_kit.serve(model, **{"port": 0, **arguments})
        started.append(server)
        return server

    yield serve
    for server in reversed(started):
        server.stop()
