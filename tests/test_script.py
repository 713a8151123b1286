"""`serve()` in a script and in an interactive interpreter."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.support import REPOSITORY, until

pytestmark = pytest.mark.light


WAITING = """
import signal, sys, time
from pathlib import Path
import serving_kit

def slow(texts):
    print("inside", flush=True)
    sys.stdin.readline()
    return texts

server = serving_kit.serve(slow, port=0, drain_s=60)
print(server.url, flush=True)
server.wait()
print("after", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
"""


@pytest.fixture
def script() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WAITING],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_wait_drains_on_signal(script: subprocess.Popen[str], number: signal.Signals) -> None:
    assert script.stdin is not None
    assert script.stdout is not None
    assert "a script must call server.wait()" in script.stdout.readline()
    url = script.stdout.readline().strip()
    client = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=60)
    client.request("POST", "/", b"x")
    assert script.stdout.readline() == "inside\n"
    with httpx.Client(base_url=url) as other:
        script.send_signal(number)
        until(lambda: other.get("/health").status_code == 503, timeout=30)
    script.stdin.write("\n")
    script.stdin.flush()
    assert json.loads(client.getresponse().read()) == "x"
    client.close()
    rest, _ = script.communicate(timeout=60)
    assert rest == "after True\n"
    assert script.returncode == 0


def test_no_wait_hint_in_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-i", "-c", "import serving_kit"],
        input="serving_kit.serve(lambda texts: texts, port=0).stop()\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert "serving <lambda> (function, python) at" in done.stdout
    assert "wait()" not in done.stdout
