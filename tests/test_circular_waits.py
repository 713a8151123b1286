"""Functions that send requests to servers: a chain is answered, a circle is an error at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from serving_kit import ModelFailed

pytestmark = pytest.mark.light

Serve = Callable[..., Any]


class Forwarding:
    """A function to serve that asks `server`, and answers with what it gets."""

    def __init__(self) -> None:
        self.server: Any = None

    def __call__(self, values: list[Any]) -> list[Any]:
        return [self.server(value) for value in values]


def test_chain(serve: Serve) -> None:
    function = Forwarding()
    function.server = serve(lambda values: [value + 1 for value in values], name="back")
    assert serve(function, name="front")(1) == 2


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circle(serve: Serve, length: int) -> None:
    """It is an error, and not a wait until the timeout; the servers answer others as before."""
    functions = [Forwarding() for _ in range(length)]
    servers = [
        serve(function, name=f"server{number}", timeout_ms=600_000)
        for number, function in enumerate(functions)
    ]
    for number, function in enumerate(functions):
        function.server = servers[(number + 1) % length]
    with pytest.raises(ModelFailed):
        servers[0]("x")
    assert any("would wait for its own answer" in incident.traceback for incident in servers[-1].errors())
    functions[-1].server = serve(lambda values: values, name="end")
    assert servers[0]("x") == "x"
