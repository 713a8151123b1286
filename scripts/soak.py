"""A long run in which everything goes wrong, to see that nothing is lost.

    python scripts/soak.py                      # 100,000 requests, at most 5 minutes
    python scripts/soak.py --requests 3000

A real server on loopback, 64 clients, a model that raises, runs out of memory, stalls, returns too few
outputs and breaks down altogether for a while; a model thread that is killed; clients that leave, that
are slow, in a hurry, or send bodies of every bad kind; knobs that turn and cells that are run again
meanwhile. In the end every request has had exactly one outcome, clients and server agree on how many of
each, nobody hangs, no answer has reached the wrong client, the queue is empty, and memory is flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import serving_kit
from serving_kit.errors import ServingError

CLIENTS = 64
PATIENCE_S = 30.0  # a client that waits longer hangs
MOST_GROWTH = 20 * 2**20  # bytes
MAX_BODY = 4096
STATUS = {200: "ok", 400: "malformed", 408: "malformed", 413: "too_large", 422: "rejected", 429: "shed"}
STATUS |= {500: "failed", 503: "shed", 504: "expired"}


class Model:
    """Shouts, unless an input tells it to misbehave."""

    __name__ = "soak"

    def __init__(self) -> None:
        self.broken = False  # for everything and everybody
        self.room = 24  # items that fit into memory together

    def __call__(self, texts: list[str]) -> list[str]:
        """Answer a batch, or not."""
        if self.broken:
            raise LookupError("the model is broken")
        if len(texts) > self.room or any(text.startswith("huge") for text in texts):
            raise MemoryError
        for text in texts:
            if text.startswith("slow"):
                time.sleep(0.02)
            elif text.startswith("poison"):
                raise ValueError(f"cannot digest {text}")
            elif text.startswith("exit"):
                raise SystemExit(1)
        answers = [text.upper() for text in texts]
        return answers[1:] if any(text.startswith("short") for text in texts) else answers


def refuse_odd(model: Any) -> None:
    """Make the served model reject some inputs before they are queued for a forward, and fail after it."""
    prepare, finish = model.prepare, model.finish

    def odd_prepare(value: Any, parameters: Any) -> Any:
        if not isinstance(value, str) or value.startswith("odd"):
            raise serving_kit.InputRejected("odd inputs are not taken")
        return prepare(value, parameters)

    def odd_finish(prepared: Any, output: Any) -> Any:
        if output.startswith("UNFINISHED"):
            raise KeyError(output)
        return {1, 2} if output.startswith("NO JSON") else finish(prepared, output)

    model.prepare, model.finish = odd_prepare, odd_finish


class Connection:
    """HTTP/1.1 by hand: exactly what is written is sent, and it can be left at any time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, data: bytes) -> None:
        """Send some bytes, connecting first if need be."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self.port)
        self._streams[1].write(data)

    async def receive(self) -> tuple[int, bytes]:
        """The status and the body of one answer."""
        assert self._streams is not None
        reader = self._streams[0]
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        if b"connection: close" in head:
            self.close()
        return int(head[9:12]), body

    def close(self) -> None:
        """Leave."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """The bytes of a POST /."""
    size = f"content-length: {len(body) if length is None else length}"
    return "\r\n".join(["POST / HTTP/1.1", "host: localhost", size, *headers, "", ""]).encode() + body


def chunked(body: bytes) -> bytes:
    """The same without a length that could be refused."""
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


JSON = "content-type: application/json"
BAD_BODIES: list[tuple[bytes, int]] = [  # and the status that each has to get
    (post(b"{'not': json}", JSON), 400),
    (post(b'{"inputs"', JSON), 400),
    (post(b"[" * 3000, JSON), 400),
    (post(b'{"inputs": ["a"], "parameters": {"no_such": 1}}', JSON), 400),
    (post(b"\xff\xfe\xfd"), 400),
    (post(b"\x1f\x8b" + b"x" * 20, "content-encoding: gzip"), 400),
    (post(b"x", "x-request-timeout-ms: soon"), 400),
    (post(b"x" * (MAX_BODY + 1)), 413),
    (chunked(b"x" * (2 * MAX_BODY)), 413),
    (post(json.dumps({"inputs": ["x"] * 1000}).encode(), JSON), 413),
]


@dataclass
class Soak:
    """One run: what clients saw, and what is wrong with it."""

    requests: int
    seconds: float
    seed: int = 1
    seen: Counter[str] = field(default_factory=Counter)  # by the clients
    left: int = 0  # requests whose clients did not wait for the outcome
    gone: int = 0  # calls on a handle whose server was replaced at that moment
    problems: list[str] = field(default_factory=list)
    took: float = 0.0
    growth: int = 0  # bytes
    kills: int = 0
    reruns: int = 0

    def run(self) -> None:
        """Serve, and let them loose."""
        self.dice = random.Random(self.seed)
        self.numbers = itertools.count()
        self.model = Model()
        self.servers: list[Any] = []
        self.early: int | None = None
        self._serve()
        self.port = int(self.servers[0].url.rpartition(":")[2])
        try:
            asyncio.run(self._all())
            self._judge()
        finally:
            self.servers[-1].stop()

    def _serve(self) -> None:
        """What running the cell does."""
        with contextlib.redirect_stdout(None):
            server = serving_kit.serve(
                self.model, port=0, name="soak", max_body_bytes=MAX_BODY, timeout_ms=5000, max_queue_size=100
            )
        refuse_odd(server._service.model)
        batcher = server._service.batcher
        cycle = batcher._cycle

        def mortal_cycle() -> bool:
            fate = self.dice.random()
            if fate < 0.0005:
                self.kills += 1
                raise SystemExit("killed before its work")
            goes_on = cycle()
            if fate > 0.9995:
                self.kills += 1
                raise SystemExit("killed after its work")
            return bool(goes_on)

        batcher._cycle = mortal_cycle
        self.servers.append(server)

    async def _all(self) -> None:
        began = time.monotonic()
        self.until = began + self.seconds
        async with asyncio.TaskGroup() as group:
            disturber = group.create_task(self._disturb())
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(self._client())
            disturber.cancel()
        self.took = time.monotonic() - began

    # -- what the world does -----------------------------------------------------------------------

    async def _disturb(self) -> None:
        """Turn knobs, run the cell again, break the model and mend it."""
        dice = self.dice
        for step in itertools.count(1):
            await asyncio.sleep(0.05)
            server = self.servers[-1]
            server.tune(
                max_batch_size=dice.choice([1, 4, 16, 32, 64]),
                max_wait_ms=dice.choice([0, 0, 0, 1, 5]),
                max_queue_size=dice.choice([8, 50, 100]),
                group_by_length=dice.random() < 0.5,
                drop_hopeless=dice.random() < 0.5,
                max_batch_tokens=dice.choice(["auto", 3, 100]),
                overload_status=dice.choice([503, 429]),
            )
            self.model.room = dice.choice([6, 24, 24, 1000])
            if step % 200 == 60:  # long enough to open the breaker
                self.model.broken = True
                await asyncio.sleep(0.3)
                self.model.broken = False
            if step % 100 == 90:
                self.reruns += 1
                await asyncio.to_thread(self._serve)

    async def _client(self) -> None:
        connection = Connection(self.port)
        while (number := next(self.numbers)) < self.requests and time.monotonic() < self.until:
            if number == self.requests // 4:
                self.early = resident()
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._one(connection, number)
            except TimeoutError:
                self.problems.append(f"request {number} hangs")
                connection.close()
            except (OSError, asyncio.IncompleteReadError) as error:
                self.problems.append(f"request {number} got no answer: {error!r}")
                connection.close()
        connection.close()

    async def _one(self, connection: Connection, number: int) -> None:
        """One request of some kind."""
        dice = self.dice
        kind = dice.random()
        text = f"text {number} {'x' * dice.randrange(40)}"
        if kind < 0.55:
            await self._ask(connection, post(text.encode()), text.upper())
        elif kind < 0.62:
            texts = [f"{text} {n}" for n in range(dice.randrange(1, 8))]
            body = json.dumps({"inputs": texts}).encode()
            await self._ask(connection, post(body, JSON), [each.upper() for each in texts])
        elif kind < 0.72:
            odd = ["poison", "poison", "huge", "slow", "exit", "short", "odd", "unfinished", "no json"]
            text = f"{dice.choice(odd)} {text}"
            await self._ask(connection, post(text.encode()), text.upper())
        elif kind < 0.80:
            await self._send_garbage()
        elif kind < 0.86:
            await self._leave(text)
        elif kind < 0.92:
            hurry = f"x-request-timeout-ms: {dice.choice([1, 2, 5, 20])}"
            await self._ask(connection, post(text.encode(), hurry), text.upper())
        elif kind < 0.925:
            await self._dawdle(text)
        elif kind < 0.96:
            await self._ask_in_the_kernel(text)
        else:
            await self._look_and_ask(connection, text)

    async def _ask(self, connection: Connection, request: bytes, expected: Any) -> None:
        await connection.send(request)
        status, body = await connection.receive()
        unavailable = status == 503 and b"unavailable" in body
        self._saw(status, unavailable=unavailable)
        if status == 200 and json.loads(body) != expected:
            self.problems.append(f"expected {expected!r}, got {body[:200]!r}")
        if unavailable:
            await asyncio.sleep(1)  # as Retry-After asks, but sooner

    async def _send_garbage(self) -> None:
        request, due = self.dice.choice(BAD_BODIES)
        with contextlib.closing(Connection(self.port)) as connection:
            await connection.send(request)
            status, body = await connection.receive()
        self._saw(status, unavailable=status == 503 and b"unavailable" in body)
        if status not in (due, 503):
            self.problems.append(f"{request[:120]!r} got {status}: {body[:200]!r}")

    async def _leave(self, text: str) -> None:
        """Go before the answer comes, or even before all is said."""
        with contextlib.closing(Connection(self.port)) as connection:
            whole = self.dice.random() < 0.7
            await connection.send(post(text.encode(), length=None if whole else 1000))
            self.left += 1
            await asyncio.sleep(self.dice.choice([0, 0.001, 0.01]))

    async def _dawdle(self, text: str) -> None:
        """Never finish the body."""
        with contextlib.closing(Connection(self.port)) as connection:
            await connection.send(post(text.encode(), "x-request-timeout-ms: 50", length=1000))
            status, _ = await connection.receive()
        self._saw(status)
        if status != 408:
            self.problems.append(f"a body that never came got {status}")

    async def _ask_in_the_kernel(self, text: str) -> None:
        """What `await server.predict(...)` in a cell does."""
        try:
            answer = await self.servers[-1].predict(text)
        except ServingError as error:
            if "replaced by a newer run" in str(error):
                self.gone += 1  # this handle has no server that could count it
            else:
                self.seen[error.outcome.value] += 1
        else:
            self.seen["ok"] += 1
            if answer != text.upper():
                self.problems.append(f"expected {text.upper()!r}, got {answer!r}")

    async def _look_and_ask(self, connection: Connection, text: str) -> None:
        path = self.dice.choice(["/health", "/stats", "/metrics", "/info", "/nothing"])
        await connection.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        status, _ = await connection.receive()
        if status not in ((404,) if path == "/nothing" else (200, 503)):
            self.problems.append(f"GET {path} got {status}")
        await self._ask(connection, post(text.encode()), text.upper())

    def _saw(self, status: int, *, unavailable: bool = False) -> None:
        outcome = "unavailable" if unavailable else STATUS.get(status, f"status {status}")
        self.seen[outcome] += 1

    # -- what has to hold afterwards ---------------------------------------------------------------

    def counted(self) -> Counter[str]:
        """How the servers say that requests have ended."""
        total: Counter[str] = Counter()
        for server in self.servers:
            total.update(server.stats()["requests"])
        return total

    def _judge(self) -> None:
        done = self.seen.total() + self.left
        wait(lambda: self.counted().total() >= done and not self.servers[-1].stats()["in_flight"])
        counted = self.counted()
        if counted.total() != done:
            self.problems.append(f"{done} requests were sent and {counted.total()} counted")
        for outcome, seen in self.seen.items():
            if seen > counted[outcome]:
                self.problems.append(f"clients saw {seen} {outcome}, the server {counted[outcome]}")
        for server in self.servers:
            if server.stats()["in_flight"] or server._service.batcher._unanswered:
                self.problems.append("something is left in the queue")
        gc.collect()
        if self.early is not None:
            self.growth = resident() - self.early
            if self.growth > MOST_GROWTH:
                self.problems.append(f"memory has grown by {self.growth / 2**20:.0f} MB")

    def report(self) -> str:
        """The table of outcomes."""
        counted = self.counted()
        lines = [f"{'outcome':<11} {'clients':>8} {'server':>8} {'left before':>12}"]
        for outcome, number in counted.items():
            seen = self.seen[outcome]
            lines.append(f"{outcome:<11} {seen:>8} {number:>8} {number - seen:>12}")
        lines.append(f"{'all':<10} {self.seen.total():>8} {counted.total():>8} {self.left:>12}")
        faults: Counter[str] = Counter()
        for server in self.servers:
            faults.update(server.stats()["faults"])
        lines += [
            f"faults: {', '.join(f'{n} {kind}' for kind, n in faults.items() if n)}",
            f"{self.gone} calls on a handle that had just been replaced, which no server counts",
            f"{self.kills} kills of the model thread, {self.reruns} re-runs of the cell, "
            f"memory {self.growth / 2**20:+.1f} MB after the first quarter",
            f"{self.took:.0f} s, {counted.total() / max(self.took, 1e-9):.0f} requests/s",
        ]
        return "\n".join(lines)


def resident() -> int:
    """Bytes of memory that this process holds; 0 where nobody tells."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def wait(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Give late records a moment."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def main() -> int:
    """Run it and print the table; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description="Everything goes wrong, and nothing is lost.")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=300.0, help="end after this time at the latest")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    soak = Soak(options.requests, options.seconds, options.seed)
    soak.run()
    print(soak.report())
    for problem in soak.problems[:20]:
        print(f"PROBLEM: {problem}")
    print("nothing is lost" if not soak.problems else f"{len(soak.problems)} problems")
    return bool(soak.problems)


if __name__ == "__main__":
    sys.exit(main())
