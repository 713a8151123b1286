"""Fixtures of the tests of HTTP: servers in this process and the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support import REPOSITORY, until
from tests.support_http import GatedModel, answers, ended, free_port


@pytest.fixture(scope="package")
def command() -> Iterator[int]:
    """The port of `serving-kit serve` with the demo model."""
    port = free_port()
    arguments = [sys.executable, "-m", "serving_kit.cli", "serve", "--port", str(port)]
    with subprocess.Popen(
        arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY
    ) as process:
        try:
            until(lambda: answers(f"http://127.0.0.1:{port}"), timeout=60)
            yield port
        finally:
            _, printed = ended(process)
        assert "Traceback" not in printed


@pytest.fixture
def port(request: pytest.FixtureRequest, serve: Callable[..., Any]) -> int:
    """The port of a server: in this process, or of the command where the parameter says so."""
    if request.param == "command":
        return int(request.getfixturevalue("command"))
    return int(serve(lambda texts: texts).url.rpartition(":")[2])


@pytest.fixture
def model() -> Iterator[GatedModel]:
    model = GatedModel()
    yield model
    model.gate.set()


@pytest.fixture
def client(serve: Callable[..., Any], model: GatedModel) -> Iterator[httpx.Client]:
    """A client of a server with `model` and a queue of four; `server_of(client)` is the server."""
    server = serve(model, max_queue_size=4)
    with httpx.Client(base_url=server.url, timeout=10) as client:
        client.server = server  # type: ignore[attr-defined]
        yield client


@pytest.fixture
def server(serve: Callable[..., Any]) -> Any:
    """A server whose answers are its inputs."""
    return serve(lambda texts: texts)
