"""A long run with faults of every kind, which checks that every request is accounted for.

    python scripts/soak.py                      # 100,000 requests, at most 5 minutes
    python scripts/soak.py --requests 3000

A real server on loopback and 64 clients. The model raises, runs out of memory, is slow, returns too few
outputs and for a while fails every call; the model thread is killed; clients disconnect, send slowly, set
short timeouts, or send malformed bodies; meanwhile settings change and the server is replaced. In the end
every request has had exactly one outcome, clients and server agree on how many of each, no request hangs,
no answer has reached the wrong client, the queue is empty, and memory has not grown.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import serving_kit
from serving_kit.errors import ServingError

CLIENTS = 64
HANGS_AFTER_S = 30.0  # without an answer
MAX_GROWTH_BYTES = 20 * 2**20
MAX_BODY_BYTES = 4096
STATUS = {200: "ok", 400: "malformed", 408: "malformed", 413: "too_large", 422: "rejected", 429: "shed"}
STATUS |= {500: "failed", 503: "shed", 504: "expired"}


class Model:
    """Answers in capitals; the first word of an input may ask for a fault instead."""

    __name__ = "soak"

    def __init__(self) -> None:
        self.broken = False  # fails every call
        self.capacity = 24  # items that fit into memory together

    def __call__(self, texts: list[str]) -> list[str]:
        """Answer a batch, or fail."""
        words = {text.partition(" ")[0] for text in texts}
        if self.broken:
            raise LookupError("the model is broken")
        if len(texts) > self.capacity or "huge" in words:
            raise MemoryError
        if "slow" in words:
            time.sleep(0.02)
        if "poison" in words:
            raise ValueError("an input cannot be processed")
        if "exit" in words:
            raise SystemExit(1)
        answers = [text.upper() for text in texts]
        return answers[1:] if "short" in words else answers


FAULTS = ("poison", "poison", "huge", "slow", "exit", "short", "odd", "unfinished", "no json")


# -- where the soak reaches into the server ----------------------------------------------------------


def add_faults(server: serving_kit.Server) -> None:
    """Make the served model reject some inputs in `prepare`, and fail on some outputs in `finish`."""
    model: Any = server._service.model
    prepare, finish = model.prepare, model.finish

    def faulty_prepare(value: object, parameters: Mapping[str, object]) -> object:
        if not isinstance(value, str) or value.startswith("odd "):
            raise serving_kit.InputRejected("odd inputs are not taken")
        return prepare(value, parameters)

    def faulty_finish(prepared: object, output: str) -> object:
        if output.startswith("UNFINISHED "):
            raise KeyError(output)
        return {1, 2} if output.startswith("NO JSON ") else finish(prepared, output)

    model.prepare, model.finish = faulty_prepare, faulty_finish


def add_kills(server: serving_kit.Server, rng: random.Random, killed: Callable[[], None]) -> None:
    """End the model thread with an exception, before or after one in 1,000 of its cycles."""
    handover: Any = server._service.batcher._handover
    cycle = handover.cycle

    def mortal_cycle() -> bool:
        draw = rng.random()
        if draw < 0.0005:
            killed()
            raise SystemExit("killed before its work")
        goes_on = bool(cycle())
        if draw > 0.9995:
            killed()
            raise SystemExit("killed after its work")
        return goes_on

    handover.cycle = mortal_cycle


def unanswered(server: serving_kit.Server) -> int:
    """Requests that are admitted and have no outcome."""
    batcher: Any = server._service.batcher
    return int(server.stats()["in_flight"]) + len(batcher._unanswered)


class Connection:
    """A raw HTTP/1.1 connection: sends exactly the bytes given, and can be closed at any time."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, data: bytes) -> None:
        """Send some bytes, connecting first if there is no connection."""
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
        """Close it; the next `send` connects again."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    """The bytes of a POST /."""
    size = f"content-length: {len(body) if length is None else length}"
    return "\r\n".join(["POST / HTTP/1.1", "host: localhost", size, *headers, "", ""]).encode() + body


def chunked(body: bytes) -> bytes:
    """A POST / without a Content-Length that could be refused."""
    head = b"POST / HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in [*pieces, b""])


JSON = "content-type: application/json"
BAD_REQUESTS: list[tuple[bytes, int]] = [  # and the status of each
    (post(b"{'not': json}", JSON), 400),
    (post(b'{"inputs"', JSON), 400),
    (post(b"[" * 3000, JSON), 400),
    (post(b'{"inputs": ["a"], "parameters": {"no_such": 1}}', JSON), 400),
    (post(b"\xff\xfe\xfd"), 400),
    (post(b"\x1f\x8b" + b"x" * 20, "content-encoding: gzip"), 400),
    (post(b"x", "x-request-timeout-ms: soon"), 400),
    (post(b"x" * (MAX_BODY_BYTES + 1)), 413),
    (chunked(b"x" * (2 * MAX_BODY_BYTES)), 413),
    (post(json.dumps({"inputs": ["x"] * 1000}).encode(), JSON), 413),
]


@dataclass
class Soak:
    """One run: what clients saw, and what is wrong with it."""

    requests: int
    seconds: float
    seed: int = 1
    seen: Counter[str] = field(default_factory=Counter)  # outcomes, by the clients
    left: int = 0  # requests whose clients disconnected before the outcome
    gone: int = 0  # calls on a handle whose server was replaced at that moment
    problems: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0
    growth_bytes: int = 0
    kills: int = 0
    replacements: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.numbers = itertools.count()
        self.model = Model()
        self.servers: list[serving_kit.Server] = []
        self.early_bytes: int | None = None  # resident memory after the first quarter

    def run(self) -> None:
        """Serve, send all requests, and check."""
        self._serve()
        self.port = int(self.servers[0].url.rpartition(":")[2])
        try:
            asyncio.run(self._send_all())
            self._check()
        finally:
            self.servers[-1].stop()

    def _serve(self) -> None:
        """What running the cell does: start a server, or replace the one before."""
        with contextlib.redirect_stdout(None):
            server = serving_kit.serve(
                self.model,
                port=0,
                name="soak",
                max_body_bytes=MAX_BODY_BYTES,
                timeout_ms=5000,
                max_queue_size=100,
            )
        add_faults(server)
        add_kills(server, self.rng, self._count_kill)
        self.servers.append(server)

    def _count_kill(self) -> None:
        self.kills += 1

    async def _send_all(self) -> None:
        began = time.monotonic()
        self.until = began + self.seconds
        async with asyncio.TaskGroup() as group:
            changes = group.create_task(self._change_things())
            async with asyncio.TaskGroup() as clients:
                for _ in range(CLIENTS):
                    clients.create_task(self._client())
            changes.cancel()
        self.elapsed_s = time.monotonic() - began

    # -- what happens to the server ----------------------------------------------------------------

    async def _change_things(self) -> None:
        """Change settings, replace the server, break the model and mend it."""
        for step in itertools.count(1):
            await asyncio.sleep(0.05)
            self._change_settings()
            if step % 200 == 60:
                self.model.broken = True
                await asyncio.sleep(0.3)  # long enough to open the breaker
                self.model.broken = False
            if step % 100 == 90:
                self.replacements += 1
                await asyncio.to_thread(self._serve)

    def _change_settings(self) -> None:
        rng = self.rng
        self.servers[-1].tune(
            max_batch_size=rng.choice([1, 4, 16, 32, 64]),
            max_wait_ms=rng.choice([0, 0, 0, 1, 5]),
            max_queue_size=rng.choice([8, 50, 100]),
            group_by_length=rng.random() < 0.5,
            drop_hopeless=rng.random() < 0.5,
            max_batch_tokens=rng.choice(["auto", 3, 100]),
            overload_status=rng.choice([503, 429]),
        )
        self.model.capacity = rng.choice([6, 24, 24, 1000])

    # -- what clients do ---------------------------------------------------------------------------

    async def _client(self) -> None:
        """Send one request after the other until enough are sent."""
        connection = Connection(self.port)
        while (number := next(self.numbers)) < self.requests and time.monotonic() < self.until:
            if number == self.requests // 4:
                self.early_bytes = resident_bytes()
            try:
                async with asyncio.timeout(HANGS_AFTER_S):
                    await self._send_one(connection, number)
            except TimeoutError:
                self.problems.append(f"request {number} hangs")
                connection.close()
            except (OSError, asyncio.IncompleteReadError) as error:
                self.problems.append(f"request {number} got no answer: {error!r}")
                connection.close()
        connection.close()

    async def _send_one(self, connection: Connection, number: int) -> None:
        """One request of a kind drawn at random."""
        rng = self.rng
        draw = rng.random()
        text = f"text {number} {'x' * rng.randrange(40)}"
        if draw < 0.55:
            await self._post(connection, post(text.encode()), text.upper())
        elif draw < 0.62:
            texts = [f"{text} {n}" for n in range(rng.randrange(1, 8))]
            body = json.dumps({"inputs": texts}).encode()
            await self._post(connection, post(body, JSON), [each.upper() for each in texts])
        elif draw < 0.72:
            text = f"{rng.choice(FAULTS)} {text}"
            await self._post(connection, post(text.encode()), text.upper())
        elif draw < 0.80:
            await self._post_bad_request()
        elif draw < 0.86:
            await self._disconnect_early(text)
        elif draw < 0.92:
            timeout = f"x-request-timeout-ms: {rng.choice([1, 2, 5, 20])}"
            await self._post(connection, post(text.encode(), timeout), text.upper())
        elif draw < 0.925:
            await self._post_incomplete(text)
        elif draw < 0.96:
            await self._predict(text)
        else:
            await self._get_and_post(connection, text)

    async def _post(self, connection: Connection, request: bytes, expected: object) -> None:
        await connection.send(request)
        status, body = await connection.receive()
        unavailable = status == 503 and b"unavailable" in body
        self._count(status, unavailable=unavailable)
        if status == 200 and json.loads(body) != expected:
            self.problems.append(f"expected {expected!r}, got {body[:200]!r}")
        if unavailable:
            await asyncio.sleep(1)  # Retry-After asks for longer

    async def _post_bad_request(self) -> None:
        request, due = self.rng.choice(BAD_REQUESTS)
        with contextlib.closing(Connection(self.port)) as connection:
            await connection.send(request)
            status, body = await connection.receive()
        self._count(status, unavailable=status == 503 and b"unavailable" in body)
        if status not in (due, 503):
            self.problems.append(f"{request[:120]!r} got {status}: {body[:200]!r}")

    async def _disconnect_early(self, text: str) -> None:
        """Disconnect before the answer, or before the whole body is sent."""
        with contextlib.closing(Connection(self.port)) as connection:
            whole = self.rng.random() < 0.7
            await connection.send(post(text.encode(), length=None if whole else 1000))
            self.left += 1
            await asyncio.sleep(self.rng.choice([0, 0.001, 0.01]))

    async def _post_incomplete(self, text: str) -> None:
        """Keep the connection open without sending the rest of the body."""
        with contextlib.closing(Connection(self.port)) as connection:
            await connection.send(post(text.encode(), "x-request-timeout-ms: 50", length=1000))
            status, _ = await connection.receive()
        self._count(status)
        if status != 408:
            self.problems.append(f"an incomplete body got {status}")

    async def _predict(self, text: str) -> None:
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

    async def _get_and_post(self, connection: Connection, text: str) -> None:
        path = self.rng.choice(["/health", "/stats", "/metrics", "/info", "/nothing"])
        await connection.send(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        status, _ = await connection.receive()
        if status not in ((404,) if path == "/nothing" else (200, 503)):
            self.problems.append(f"GET {path} got {status}")
        await self._post(connection, post(text.encode()), text.upper())

    def _count(self, status: int, *, unavailable: bool = False) -> None:
        outcome = "unavailable" if unavailable else STATUS.get(status, f"status {status}")
        self.seen[outcome] += 1

    # -- what must hold afterwards -----------------------------------------------------------------

    def counted(self) -> Counter[str]:
        """Outcomes of requests, by the servers."""
        total: Counter[str] = Counter()
        for server in self.servers:
            total.update(server.stats()["requests"])
        return total

    def _check(self) -> None:
        """Add to `problems` whatever does not hold."""
        done = self.seen.total() + self.left
        wait(lambda: self.counted().total() >= done and not unanswered(self.servers[-1]))
        counted = self.counted()
        if counted.total() != done:
            self.problems.append(f"{done} requests were sent and {counted.total()} counted")
        for outcome, seen in self.seen.items():
            if seen > counted[outcome]:
                self.problems.append(f"clients saw {seen} {outcome}, the server {counted[outcome]}")
        if any(unanswered(server) for server in self.servers):
            self.problems.append("the queue is not empty")
        gc.collect()
        if self.early_bytes is not None:
            self.growth_bytes = resident_bytes() - self.early_bytes
            if self.growth_bytes > MAX_GROWTH_BYTES:
                self.problems.append(f"memory has grown by {self.growth_bytes / 2**20:.0f} MB")

    def report(self) -> str:
        """The table of outcomes."""
        counted = self.counted()
        lines = [f"{'outcome':<11} {'clients':>8} {'server':>8} {'left before':>12}"]
        for outcome, number in counted.items():
            seen = self.seen[outcome]
            lines.append(f"{outcome:<11} {seen:>8} {number:>8} {number - seen:>12}")
        lines.append(f"{'all':<11} {self.seen.total():>8} {counted.total():>8} {self.left:>12}")
        faults: Counter[str] = Counter()
        for server in self.servers:
            faults.update(server.stats()["faults"])
        lines += [
            f"faults: {', '.join(f'{n} {kind}' for kind, n in faults.items() if n)}",
            f"{self.gone} calls on a handle that had just been replaced, which no server counts",
            f"{self.kills} kills of the model thread, {self.replacements} replacements of the server, "
            f"memory {self.growth_bytes / 2**20:+.1f} MB after the first quarter",
            f"{self.elapsed_s:.0f} s, {counted.total() / max(self.elapsed_s, 1e-9):.0f} requests/s",
        ]
        return "\n".join(lines)


def resident_bytes() -> int:
    """Memory that this process holds; 0 on systems without /proc."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def wait(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait until a condition holds: records are reported after the answers."""
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def main() -> int:
    """Run it and print the table; 1 if there are problems."""
    parser = argparse.ArgumentParser(description="Sends requests while faults of every kind happen.")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=300.0, help="end after this time at the latest")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    soak = Soak(options.requests, options.seconds, options.seed)
    soak.run()
    print(soak.report())
    for problem in soak.problems[:20]:
        print(f"PROBLEM: {problem}")
    print("every request is accounted for" if not soak.problems else f"{len(soak.problems)} problems")
    return bool(soak.problems)


if __name__ == "__main__":
    sys.exit(main())
