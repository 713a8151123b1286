"""The load generator: a process of its own, on a core of its own. One job in (stdin), one result out.

Open loop: the arrival times are planned before the first request is sent, and latency counts from the
planned time, so a server does not look better by delaying its clients. Closed loop: n clients that send
the next request as soon as they are answered, and 100 ms after a refusal.

Raw HTTP/1.1 over keep-alive connections with a parser of twenty lines, because the generator must not be
the bottleneck: it reports its own lag, and a run in which that was large is void.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

clock = time.perf_counter  # uvloop's own time is constant during an iteration of the loop
LOST, UNANSWERED = "lost", "unanswered"
REFUSALS = ("503", "429")  # on admission
DROPPED = "dropped"  # admitted, and refused later
_DROPPED = re.compile(rb'"dropped": *true')  # in the body of a refusal
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_MOST_SOCKETS = 6_000
_OPENED_EARLY = 64
_PAUSE_AFTER_REFUSAL_S = 0.1
_STRAGGLER_SLOS = 3
_LAG_LIMIT_MS, _LAG_LIMIT_SHARE = 5.0, 0.02


@dataclass(frozen=True)
class Job:
    """What to send, where and how."""

    port: int
    path: str
    content_type: str
    texts: str  # file: [[text, tokens], ...]
    seconds: float
    warmup: float
    slo_ms: float
    template: str = ""  # JSON in which "$text" stands for the text, with its quotes; empty: plain text
    clients: int = 0  # closed loop
    rate: float = 0.0  # open loop
    seed: int = 1


@dataclass(slots=True)
class Sample:
    """One request. Times are on `clock`."""

    planned: float
    tokens: int
    sent: float = 0.0
    done: float = 0.0
    status: str = UNANSWERED


class Connection(asyncio.Protocol):
    """One keep-alive connection, one request at a time."""

    def __init__(self, idle: Callable[[Connection], None]) -> None:
        self._idle = idle  # called whenever the connection can take the next request
        self._sample: Sample | None = None
        self._head = b""
        self._refusal = b""  # the body of an answer other than 200
        self._missing = -1  # bytes of the body; below zero: the head is not complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance

    @property
    def open(self) -> bool:
        return not self._transport.is_closing()

    def ask(self, request: bytes, sample: Sample) -> None:
        self._sample, self._head, self._refusal, self._missing = sample, b"", b"", -1
        sample.sent = clock()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._missing >= 0:
            self._body(data)
            return
        self._head += data
        end = self._head.find(b"\r\n\r\n")
        if end < 0:
            return
        length = _LENGTH.search(self._head, 0, end)
        if length is None:
            self._transport.abort()
            return
        self._missing = int(length[1])
        self._body(self._head[end + 4 :])

    def _body(self, data: bytes) -> None:
        self._missing -= len(data)
        status = self._head[9:12].decode()
        if status in REFUSALS:
            self._refusal += data
        if self._missing == 0:
            self._end(DROPPED if _DROPPED.search(self._refusal) else status)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(LOST)

    def close(self) -> None:
        self._sample = None
        self._transport.abort()

    def _end(self, status: str) -> None:
        sample, self._sample = self._sample, None
        if sample is not None:
            sample.status, sample.done = status, clock()
            self._idle(self)


class Texts:
    """Encoded requests in an order that depends on the seed."""

    def __init__(self, job: Job) -> None:
        texts = json.loads(Path(job.texts).read_text())
        random.Random(job.seed).shuffle(texts)
        self._requests = [(_request(job, text), tokens) for text, tokens in texts]
        self._next = 0

    def next(self) -> tuple[bytes, int]:
        self._next += 1
        return self._requests[self._next % len(self._requests)]


def body(template: str, text: str) -> str:
    """What is sent for a text."""
    return template.replace("$text", json.dumps(text)) if template else text


def _request(job: Job, text: str) -> bytes:
    content = body(job.template, text).encode()
    head = (
        f"POST {job.path} HTTP/1.1\r\nHost: 127.0.0.1:{job.port}\r\n"
        f"Content-Type: {job.content_type}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


class OpenLoop:
    """Requests at planned times, whatever the server does."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._texts = Texts(job)
        self._connections: list[Connection] = []
        self._idle: list[Connection] = []
        self._overdue: deque[tuple[bytes, Sample]] = deque()  # waiting for a socket: late, never left out
        self._opening: set[asyncio.Task[None]] = set()

    async def run(self) -> tuple[list[Sample], float]:
        """Returns the samples and the start."""
        for _ in range(_OPENED_EARLY):
            await self._connect()
        start = clock() + 0.1
        samples = []
        for at in arrivals(self._job):
            await _until(start + at)
            request, tokens = self._texts.next()
            sample = Sample(start + at, tokens)
            samples.append(sample)
            self._send(request, sample)
            if self._overdue and len(self._overdue) % 32 == 0:
                await asyncio.sleep(0)  # answers are read also when the generator is behind schedule
        await self._wait_for_stragglers(samples)
        for connection in self._connections:
            connection.close()
        return samples, start

    async def _connect(self) -> None:
        loop, port = asyncio.get_running_loop(), self._job.port
        _, connection = await loop.create_connection(lambda: Connection(self._free), "127.0.0.1", port)
        self._connections.append(connection)
        self._free(connection)

    def _free(self, connection: Connection) -> None:
        """Take a connection back; overdue requests go first."""
        if connection.open:
            self._idle.append(connection)
        while self._overdue and self._idle:
            self._idle.pop().ask(*self._overdue.popleft())

    def _send(self, request: bytes, sample: Sample) -> None:
        """Send on an idle connection; without one open another and send when one is free."""
        while self._idle and not self._idle[-1].open:
            self._idle.pop()
        if self._idle:
            self._idle.pop().ask(request, sample)
            return
        self._overdue.append((request, sample))
        if len(self._connections) + len(self._opening) < _MOST_SOCKETS:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _wait_for_stragglers(self, samples: Sequence[Sample]) -> None:
        deadline = clock() + _STRAGGLER_SLOS * self._job.slo_ms / 1000
        for _ in range(1_000):
            if clock() > deadline or all(sample.status != UNANSWERED for sample in samples):
                return
            await asyncio.sleep(0.02)


async def _until(moment: float) -> None:
    """Sleep, never too short: event loops round to milliseconds."""
    left = moment - clock()
    while left > 0:
        await asyncio.sleep(left)
        left = moment - clock()


def arrivals(job: Job) -> list[float]:
    """Seconds from the start: a Poisson process of `rate`, over the warm-up and the measured time."""
    rng = random.Random(job.seed)
    times, now = [], 0.0
    while (now := now + rng.expovariate(job.rate)) < job.warmup + job.seconds:
        times.append(now)
    return times


async def closed_loop(job: Job) -> tuple[list[Sample], float]:
    """`clients` connections, each with one request at a time. Returns the samples and the start."""
    loop = asyncio.get_running_loop()
    texts = Texts(job)
    samples: list[Sample] = []
    connections: list[Connection] = []
    start = clock()
    end = start + job.warmup + job.seconds

    def ask(connection: Connection) -> None:
        if connection.open and clock() < end:
            request, tokens = texts.next()
            sample = Sample(clock(), tokens)
            samples.append(sample)
            last[connection] = sample
            connection.ask(request, sample)

    def again(connection: Connection) -> None:
        if last[connection].status == "200":
            ask(connection)
        else:
            loop.call_later(_PAUSE_AFTER_REFUSAL_S, ask, connection)

    last: dict[Connection, Sample] = {}
    for _ in range(job.clients):
        _, connection = await loop.create_connection(lambda: Connection(again), "127.0.0.1", job.port)
        connections.append(connection)
    for connection in connections:
        ask(connection)
    await asyncio.sleep(end - clock() + 0.01)
    for connection in connections:
        connection.close()
    return samples, start


def summarise(samples: Sequence[Sample], job: Job, start: float) -> dict[str, Any]:
    """The numbers of one run. Open loop: by planned time. Closed loop: by the time of the answer."""
    begin = start + job.warmup
    end = begin + job.seconds
    closed = job.clients > 0
    counted = [s for s in samples if begin <= (s.done if closed else s.planned) < end]
    slo = job.slo_ms / 1000
    answered = [s for s in counted if s.status == "200"]
    good = [s for s in answered if s.done - s.planned <= slo]
    latencies = sorted(s.done - s.planned for s in answered)
    refusals = sorted(s.done - s.planned for s in counted if s.status in REFUSALS)
    admitted = [s for s in counted if s.status not in REFUSALS]
    lag_ms = 1e3 * (quantile(sorted(s.sent - s.planned for s in counted if s.sent), 0.99) or 0.0)
    return {
        "offered_per_s": len(counted) / job.seconds,
        "answers_per_s": len(answered) / job.seconds,
        "goodput_per_s": len(good) / job.seconds,
        "attainment": len(good) / len(counted) if counted else None,
        "p50_ms": _ms(quantile(latencies, 0.5)),
        "p99_ms": _ms(quantile(latencies, 0.99)),
        "late_share": 1 - len(good) / len(answered) if answered else None,
        "admitted_late_share": 1 - len(good) / len(admitted) if admitted else None,
        "reject_p50_ms": _ms(quantile(refusals, 0.5)),
        "reject_p99_ms": _ms(quantile(refusals, 0.99)),
        "long_ratio": long_ratio(counted, slo),
        "tokens_per_s": sum(s.tokens for s in good) / job.seconds,
        "statuses": dict(Counter(s.status for s in counted)),
        "lag_p99_ms": round(lag_ms, 3),
        "void": lag_ms > min(_LAG_LIMIT_MS, _LAG_LIMIT_SHARE * job.slo_ms),
    }


def long_ratio(samples: Sequence[Sample], slo: float) -> float | None:
    """Success of the longest tenth over the success of all: 1 when length does not matter."""
    longest = sorted(samples, key=lambda s: s.tokens)[-max(1, len(samples) // 10) :]

    def success(group: Sequence[Sample]) -> float:
        return statistics.fmean(s.status == "200" and s.done - s.planned <= slo for s in group)

    return success(longest) / success(samples) if samples and success(samples) else None


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The value that a share `q` of them does not exceed."""
    return ordered[max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1)] if ordered else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 2)


def main() -> None:
    job = Job(**json.load(sys.stdin))
    gc.disable()  # a collection is a pause, and the process runs for seconds
    try:
        import uvloop

        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        loop_factory = None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        samples, start = runner.run(closed_loop(job) if job.clients else OpenLoop(job).run())
    json.dump(summarise(samples, job, start), sys.stdout)


if __name__ == "__main__":
    main()
