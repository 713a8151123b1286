"""What a busy cell costs the server, and what the server costs a busy cell.

    .venv/bin/python benchmarks/busy_cell.py

A process stands for the kernel: it serves a model and its main thread either sleeps or counts in pure
Python, which holds the interpreter's lock. Another process sends 100 requests, one after the other.
Then the same loop counts with and without an idle server.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import time

import models
from kinds import KINDS

_REQUESTS, _WARM_UP, _COUNT_S = 100, 10, 3.0
_KERNEL = """
import sys, time, threading
import serving_kit

def count(stop):
    rounds, end = 0, time.perf_counter() + stop
    while time.perf_counter() < end:
        for _ in range(1000):
            rounds += 1
    return rounds

alone = count({seconds})
server = serving_kit.serve({model!r}, task={task!r}, device="cpu", port=0)
print("ready", alone, count({seconds}), server.url, flush=True)
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
while not over.is_set():
    if {busy}:
        count(0.1)
    else:
        over.wait(0.1)
server.stop()
"""


def latency_ms(model: str | None, text: str, *, busy: bool) -> tuple[float, float, float]:
    """p50 and p99 of one client in ms, and the share of its speed that a loop keeps beside an idle server."""
    script = _KERNEL.format(model=model, task="fill-mask", busy=busy, seconds=_COUNT_S)
    kernel = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert kernel.stdin is not None
    assert kernel.stdout is not None
    try:
        ready = next(line for line in kernel.stdout if line.startswith("ready"))
        _, alone, beside, url = ready.split()
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
        taken = []
        for _ in range(_WARM_UP + _REQUESTS):
            start = time.perf_counter()
            connection.request("POST", "/", text)
            connection.getresponse().read()
            taken.append(1e3 * (time.perf_counter() - start))
        connection.close()
        kernel.communicate("\n", timeout=30)
    finally:
        kernel.kill()
    taken = sorted(taken[_WARM_UP:])
    return statistics.median(taken), taken[int(0.99 * _REQUESTS)], int(beside) / int(alone)


def main() -> None:
    home = models.folder(KINDS["fill-mask"])
    texts = [text for text, _ in json.loads((home / models.EQUAL_TEXTS_FILE).read_text())]
    for name, model, text in (
        ("demo model", None, "the cat sat on the [MASK]."),
        ("MiniLM", str(home), texts[0]),
    ):
        idle, idle99, kept = latency_ms(model, text, busy=False)
        busy, busy99, _ = latency_ms(model, text, busy=True)
        print(
            f"{name}: p50 {idle:.1f} ms idle, {busy:.1f} ms busy ({busy / idle:.1f} x); "
            f"p99 {idle99:.1f}, {busy99:.1f} ms; beside an idle server a loop keeps {kept:.0%} of its speed"
        )


if __name__ == "__main__":
    main()
