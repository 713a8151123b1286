"""The first requests to a server are answered, although the cost of a call is not known yet."""

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.support import REPOSITORY, until
from tests.support_http import answers, ended, free_port

Serve = Callable[..., Any]


def statuses(url: str, clients: int, requests: int, body: str) -> Counter[int]:
    """The statuses that closed-loop clients get: `requests` in all."""
    with httpx.Client(limits=httpx.Limits(max_connections=clients), timeout=60) as http:

        def ask(number: int) -> int:
            return http.post(url, content=f"{number} {body}").status_code

        with ThreadPoolExecutor(clients) as pool:
            return Counter(pool.map(ask, range(requests)))


@pytest.mark.light
def test_burst_after_quiet_period(serve: Serve) -> None:
    """Batch sizes double: 32 items take five calls, not 32."""
    calls: list[int] = []

    def slow(texts: list[str]) -> list[str]:
        calls.append(len(texts))
        time.sleep(0.3)
        return texts

    server = serve(slow, timeout_ms=6000)
    for _ in range(3):
        server("quiet")
    assert statuses(server.url, 32, 32, "burst") == {200: 32}
    assert len(calls) - 3 <= 16


@pytest.mark.light
def test_slow_function_gets_batches(serve: Serve) -> None:
    """A call takes most of the time that one batch may take; smaller batches would save nothing."""
    sizes: list[int] = []

    def slow(texts: list[str]) -> list[str]:
        sizes.append(len(texts))
        time.sleep(0.5)
        return texts

    server = serve(slow, timeout_ms=2000)
    for _ in range(3):
        server("quiet")
    outcomes: Counter[int] = Counter()

    def ask(number: int) -> None:
        outcomes[httpx.post(server.url, content=str(number), timeout=30).status_code] += 1

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(40)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # ten a second: five times what batches of one could do
    for thread in threads:
        thread.join()
    assert outcomes[200] >= 32
    assert max(sizes) >= 4


def test_cold_start_of_command() -> None:
    port = free_port()
    command = [sys.executable, "-m", "serving_kit.cli", "serve", "--port", str(port), "--timeout-ms", "5000"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        url = f"http://127.0.0.1:{port}"
        until(lambda: answers(url), timeout=60)
        assert statuses(url, 32, 200, "cats sat on the [MASK] and looked at the birds.") == {200: 200}
    finally:
        ended(process)
