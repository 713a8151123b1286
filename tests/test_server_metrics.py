"""`/metrics` and `/stats` of a server, also while other threads change what they read."""

import itertools
import sys
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import serving_kit
from tests.support import until

pytestmark = pytest.mark.light
Serve = Callable[..., Any]


def shout(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


def test_metrics_route(serve: Serve) -> None:
    server = serve(shout, name="loud")
    text = httpx.get(f"{server.url}/metrics").text
    for line in (
        "serving_kit_ready 1.0",
        f'serving_kit_build_info{{version="{serving_kit.__version__}"}} 1.0',
        'serving_kit_model_info{device="python",model="shout",server="loud",task="function"} 1.0',
        'serving_kit_breaker_state{state="closed"} 1.0',
        'serving_kit_breaker_state{state="open"} 0.0',
        'serving_kit_requests_total{outcome="unavailable"} 0.0',
    ):
        assert line in text.splitlines(), line
    assert "python_info{" in text
    if sys.platform == "linux":
        assert "process_resident_memory_bytes " in text
        assert "process_cpu_seconds_total " in text
    kinds = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)), "every name is described once"
    openmetrics = httpx.get(f"{server.url}/metrics", headers={"accept": "application/openmetrics-text"})
    assert openmetrics.text.endswith("# EOF\n")


def test_breaker_rejections_are_not_shed(serve: Serve) -> None:
    def broken(texts: list[str]) -> list[str]:
        raise LookupError

    server = serve(broken)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        # For a function it takes 10 s and 5 different inputs until the breaker opens.
        numbers = itertools.count()
        until(lambda: client.post("/", content=f"x{next(numbers)}").status_code == 503, timeout=40)
        stats = client.get("/stats", params={"series": 60}).json()
    assert stats["requests"]["unavailable"] == 1
    assert stats["requests"]["shed"] == 0
    assert sum(point["unavailable"] for point in stats["series"]) == 1
    assert sum(point["other"] for point in stats["series"]) == 0


def test_reads_during_changes(serve: Serve) -> None:
    def fail_on_request(texts: list[str]) -> list[str]:
        if "raise" in texts:
            raise LookupError
        return texts

    server, over = serve(fail_on_request, max_batch_size=2), threading.Event()
    server("a")
    problems: list[BaseException] = []

    def repeat(action: Callable[[int], object]) -> None:
        number = 0
        while not over.is_set():
            number += 1
            try:
                action(number)
            except serving_kit.ServingError:
                pass
            except BaseException as error:
                problems.append(error)
                return

    actions: list[Callable[[int], object]] = [
        lambda n: server.tune(max_wait_ms=n % 2),
        lambda n: server("raise" if n % 3 else "a"),
        lambda n: server("a"),
        lambda n: (server.stats(series=2), server.errors(), repr(server)),
        lambda n: httpx.get(f"{server.url}/metrics", timeout=30).raise_for_status(),
    ]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    over.wait(3)
    over.set()
    for thread in threads:
        thread.join(30)
    assert problems == []
