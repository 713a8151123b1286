"""Fixtures of the tests of HTTP: the port of a server in this process, and of the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import REPOSITORY, until
from tests.support_http import answers, ended, free_port


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
