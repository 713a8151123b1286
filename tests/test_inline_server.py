"""`InlineServer`: start, stop, swap, run; bounded, without output, and without leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import itertools
import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from serving_kit.errors import StartError
from serving_kit.http.app import build_app
from serving_kit.inline_server import InlineServer, bind
from serving_kit.models.loading import load_model
from serving_kit.notebook import process_settings
from serving_kit.service import Service
from serving_kit.settings import Settings
from tests.support import interrupt_the_main_thread, our_threads, run_script, until

pytestmark = pytest.mark.light


# -- apps and clients ---------------------------------------------------------------------------------


def text_app(text: str) -> Any:
    """An ASGI function without lifespan support that answers with `text`."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        headers = [(b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})

    return app


def named_app(name: str, events: list[str], **routes: Callable[..., Any]) -> Starlette:
    """A Starlette app that answers with `name` and adds its start and end to `events`."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        events.append(f"{name} starts")
        yield {"name": name}
        events.append(f"{name} ends")

    async def index(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.state.name)

    paths = [Route("/", index), *(Route(f"/{path}", handler) for path, handler in routes.items())]
    return Starlette(routes=paths, lifespan=lifespan)


@pytest.fixture
def start() -> Iterator[Callable[..., InlineServer]]:
    """Start an app on a free port; everything is stopped in the end."""
    servers = []

    def start(app: Any, port: int = 0) -> InlineServer:
        server = InlineServer(app, bind("127.0.0.1", port))
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop(0)


class Client(http.client.HTTPConnection):
    """One keep-alive connection that does not reconnect by itself."""

    def __init__(self, server: InlineServer, timeout: float = 15) -> None:
        super().__init__(server.host, server.port, timeout=timeout)
        self.connect()
        self.auto_open = 0

    def ask(self, path: str = "/", body: str | None = None) -> tuple[int, str]:
        self.request("GET" if body is None else "POST", path, body)
        response = self.getresponse()
        return response.status, response.read().decode()


def ask(server: InlineServer, path: str = "/", body: str | None = None) -> tuple[int, str]:
    """One request on a connection of its own."""
    with contextlib.closing(Client(server)) as client:
        return client.ask(path, body)


def is_free(port: int) -> bool:
    """Whether that port can be listened on now."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


@contextlib.contextmanager
def stopwatch(limit: float) -> Iterator[None]:
    """Fail if the block takes longer than `limit` seconds, which is far above what it takes."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < limit, f"took {took:.2f} s, limit {limit} s"


# -- start --------------------------------------------------------------------------------------------


def test_start_serves_asgi_function(start: Any) -> None:
    server = start(text_app("hello"))
    assert server.alive
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert ask(server) == (200, "hello")
    assert server.stop() is True
    assert not server.alive
    assert is_free(server.port)


def test_tcp_nodelay(start: Any) -> None:
    """An answer does not wait for the client's acknowledgement."""
    options: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":  # uvicorn's `send` is a method of an object that has the transport
            accepted = send.__self__.transport.get_extra_info("socket")
            options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            await text_app("hello")(scope, receive, send)

    assert ask(start(app)) == (200, "hello")
    assert options[0] != 0


def test_app_that_ignores_lifespan(start: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await text_app("still here")(scope, receive, send)

    assert ask(start(app)) == (200, "still here")


def test_lifespan_within_start_and_stop(start: Any) -> None:
    events: list[str] = []
    server = start(named_app("app", events))
    assert events == ["app starts"]
    assert ask(server) == (200, "app")  # what the lifespan yields reaches the requests
    server.stop()
    assert events == ["app starts", "app ends"]


def test_lifespan_exception_is_raised() -> None:
    failure = LookupError("no such model")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        raise failure
        yield

    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with pytest.raises(LookupError) as caught:
        InlineServer(Starlette(lifespan=lifespan), sock).start()
    assert caught.value is failure
    assert not our_threads()
    assert is_free(port)


def test_lifespan_startup_failed_event() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    sock = bind("127.0.0.1", 0)
    with pytest.raises(StartError, match="failed to start"):
        InlineServer(app, sock).start()
    assert not our_threads()
    assert sock.fileno() == -1


def test_system_exit_in_lifespan_is_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        InlineServer(app, bind("127.0.0.1", 0)).start()
    assert not our_threads()


def test_interrupt_during_start() -> None:
    cancelled = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        interrupt_the_main_thread(during="start")
        try:
            await asyncio.sleep(30)
        finally:
            cancelled.set()

    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    with stopwatch(10), pytest.raises(KeyboardInterrupt):
        InlineServer(app, sock).start()
    assert cancelled.is_set()
    assert not our_threads()
    assert is_free(port)


# -- ports --------------------------------------------------------------------------------------------


def test_port_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"port {port} is taken.*port=0"):
            bind("127.0.0.1", port)


def test_next_free_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with bind("127.0.0.1", port, tries=50) as sock:
            assert port < sock.getsockname()[1] < port + 50


@pytest.mark.parametrize("port", [-1, 65536, 10**9, "8000", 8000.5, None])
def test_port_out_of_range(port: Any) -> None:
    with pytest.raises(StartError, match=rf"0 to 65535, got {port!r}"):
        bind("127.0.0.1", port)


def test_no_port_above_65535() -> None:
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # in use already: taken either way
            stack.enter_context(socket.create_server(("127.0.0.1", 65535)))
        with pytest.raises(StartError, match="65535 is taken"):
            bind("127.0.0.1", 65535, tries=100)


def test_address_of_another_machine() -> None:
    with pytest.raises(StartError, match=r"cannot listen on 203\.0\.113\.7:0"):
        bind("203.0.113.7", 0)  # an address reserved for examples


def test_ipv6_url() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    server = InlineServer(text_app("six"), bind("::1", 0))
    server.start()
    try:
        assert server.url == f"http://[::1]:{server.port}"
        assert ask(server) == (200, "six")
    finally:
        server.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_url_of_wildcard_address(host: str) -> None:
    try:
        sock = bind(host, 0)
    except StartError:
        pytest.skip(f"cannot listen on {host} here")
    with sock:
        server = InlineServer(text_app("never started"), sock)
        assert server.url.rpartition(":")[0] in ("http://127.0.0.1", "http://[::1]")


# -- stop ---------------------------------------------------------------------------------------------


def test_stop_is_idempotent(start: Any) -> None:
    """From several threads as well."""
    events: list[str] = []
    server = start(named_app("app", events))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: server.stop(), range(4))) == [True] * 4
    assert server.stop() is True
    assert events == ["app starts", "app ends"]


def test_stop_without_start() -> None:
    server = InlineServer(text_app("never"), bind("127.0.0.1", 0))
    assert server.stop() is True
    assert is_free(server.port)


def test_stop_on_own_thread(start: Any) -> None:
    server = start(text_app("hello"))

    async def stop() -> None:
        server.stop()

    with pytest.raises(RuntimeError, match="own thread"):
        server.run(stop())
    assert ask(server) == (200, "hello")


def test_stop_with_idle_connection(start: Any) -> None:
    server = start(text_app("hello"))
    with contextlib.closing(Client(server)) as client:
        assert client.ask() == (200, "hello")
        with stopwatch(2.5):
            assert server.stop() is True
        assert client.sock.recv(1) == b""  # closed without a reset
    assert is_free(server.port)


@pytest.mark.parametrize("seconds", [0.3, 2.0])
def test_stop_finishes_running_request(start: Any, seconds: float) -> None:
    events: list[str] = []
    inside = threading.Event()

    async def slow(request: Request) -> PlainTextResponse:
        inside.set()
        await asyncio.sleep(seconds)
        events.append("answered")
        return PlainTextResponse("slow answer")

    server = start(named_app("app", events, slow=slow))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, "/slow")
        assert inside.wait(10)
        assert server.stop(drain_s=20) is True
        assert answer.result(10) == (200, "slow answer")
    # A request may need what the app closes when it ends.
    assert events == ["app starts", "answered", "app ends"]


def test_stop_cancels_request_after_drain(start: Any) -> None:
    inside, cancelled = threading.Event(), threading.Event()

    async def endless(request: Request) -> PlainTextResponse:
        inside.set()
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        return PlainTextResponse("never")

    server = start(named_app("app", [], endless=endless))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, "/endless")
        assert inside.wait(10)
        with stopwatch(10):
            assert server.stop(drain_s=0.2) is True
        assert cancelled.is_set()
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            assert answer.result(10)[0] >= 500
    assert is_free(server.port)


def test_stop_with_uncancellable_request(start: Any) -> None:
    inside, released = threading.Event(), threading.Event()

    async def ignores_cancel(request: Request) -> PlainTextResponse:
        inside.set()
        while not released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)
        return PlainTextResponse("released")

    server = start(named_app("app", [], ignores_cancel=ignores_cancel))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, "/ignores_cancel")
        assert inside.wait(10)
        with stopwatch(15):
            assert server.stop(drain_s=0.2) is False  # the thread goes on, and the result says so
        assert is_free(server.port)
        released.set()
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            answer.result(10)
    until(lambda: not server.alive, what="the end of the thread")


def test_stop_with_blocked_loop(start: Any) -> None:
    inside, released = threading.Event(), threading.Event()

    async def blocking(request: Request) -> PlainTextResponse:
        inside.set()
        released.wait(30)
        return PlainTextResponse("released")

    server = start(named_app("app", [], blocking=blocking))
    with socket.create_connection((server.host, server.port), timeout=10) as client:
        client.sendall(b"GET /blocking HTTP/1.1\r\nHost: x\r\n\r\n")
        assert inside.wait(10)
        try:
            with stopwatch(15):
                assert server.stop(drain_s=0.2) is False
            assert is_free(server.port)
        finally:
            released.set()
        with contextlib.suppress(ConnectionError):
            while client.recv(1000):  # until the server closes the connection
                pass
    until(lambda: not server.alive, what="the end of the thread")


def test_interrupt_during_stop(start: Any) -> None:
    """It ends the wait for requests; the server still stops."""
    inside = threading.Event()

    async def endless(request: Request) -> PlainTextResponse:
        inside.set()
        await asyncio.sleep(60)
        return PlainTextResponse("never")

    events: list[str] = []
    server = start(named_app("app", events, endless=endless))
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, server, "/endless")
        assert inside.wait(10)
        interrupting = pool.submit(interrupt_the_main_thread, during="stop")
        with stopwatch(15), pytest.raises(KeyboardInterrupt):
            server.stop(drain_s=40)
        interrupting.result(10)
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            assert answer.result(10)[0] >= 500
    assert not server.alive
    assert events == ["app starts", "app ends"]
    assert is_free(server.port)
    assert server.stop() is True


def test_stop_with_stuck_model_call(start: Any) -> None:
    inside, released = threading.Event(), threading.Event()

    def model(values: list[Any]) -> list[Any]:
        inside.set()
        released.wait(30)
        return values

    server = start(build_app(Service(load_model(model), Settings())))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, "/", "stuck")
        assert inside.wait(10)
        with stopwatch(10):
            assert server.stop(drain_s=0.2) is True  # the model thread is stuck, the server thread is not
        try:
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                status, body = answer.result(10)
                assert status == 503, body
        finally:
            released.set()
    assert is_free(server.port)


def test_port_reusable_after_stop(start: Any) -> None:
    port = 0
    for round_ in range(5):
        server = start(text_app(f"round {round_}"), port)
        port = server.port
        client = Client(server)  # its side stays open after the server has stopped
        assert client.ask() == (200, f"round {round_}")
        server.stop()
        client.close()


# -- swap ---------------------------------------------------------------------------------------------


def test_swap_keeps_connections(start: Any) -> None:
    events: list[str] = []
    server = start(named_app("old", events))
    with contextlib.closing(Client(server)) as client:
        assert client.ask() == (200, "old")
        server.swap(named_app("new", events))
        assert client.ask() == (200, "new")
    assert events == ["old starts", "new starts", "old ends"]


def test_swaps_under_traffic(start: Any) -> None:
    """Twenty swaps; every request is answered."""
    swaps = 20
    server = start(named_app("0", []))
    done = threading.Event()
    seen: list[list[int]] = [[], []]

    def keep_asking() -> None:
        with contextlib.closing(Client(server)) as client:
            while not done.is_set():
                status, name = client.ask()
                assert status == 200
                seen[0].append(int(name))

    def keep_connecting() -> None:
        while not done.is_set():
            status, name = ask(server)
            assert status == 200
            seen[1].append(int(name))

    with ThreadPoolExecutor(2) as pool:
        clients = [pool.submit(keep_asking), pool.submit(keep_connecting)]

        def both_have_seen(version: int) -> bool:
            failed = any(client.done() for client in clients)
            return failed or all(names and names[-1] == version for names in seen)

        try:
            for version in range(1, swaps + 1):
                server.swap(named_app(str(version), []))
                until(lambda version=version: both_have_seen(version), what="an answer to both")
        finally:
            done.set()
        for client in clients:
            client.result(10)
    for names in seen:
        assert names == sorted(names)  # once a newer app has answered, no older one answers


def test_swap_finishes_running_request(start: Any) -> None:
    events: list[str] = []
    inside = threading.Event()

    async def slow(request: Request) -> PlainTextResponse:
        inside.set()
        await asyncio.sleep(0.3)
        return PlainTextResponse(f"by {request.state.name}, {events[-1]}")

    server = start(named_app("old", events, slow=slow))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, "/slow")
        assert inside.wait(10)
        server.swap(named_app("new", events))
        assert answer.result(10) == (200, "by old, new starts")
    assert events[-1] == "old ends"


def test_swap_bounded_by_drain(start: Any) -> None:
    inside, released = threading.Event(), threading.Event()

    async def stuck(request: Request) -> PlainTextResponse:
        inside.set()
        await asyncio.to_thread(released.wait, 30)
        return PlainTextResponse("late")

    server = start(named_app("old", [], stuck=stuck))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, "/stuck")
        assert inside.wait(10)
        with stopwatch(10):
            server.swap(named_app("new", []), drain_s=0.2)
        assert ask(server) == (200, "new")
        released.set()
        assert answer.result(10) == (200, "late")


def test_failed_swap_keeps_old_app(start: Any) -> None:
    events: list[str] = []
    failure = ValueError("broken")

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        raise failure
        yield

    server = start(named_app("old", events))
    with contextlib.closing(Client(server)) as client:
        client.ask()
        with pytest.raises(ValueError, match="broken") as caught:
            server.swap(Starlette(lifespan=lifespan))
        assert caught.value is failure
        assert client.ask() == (200, "old")
    assert events == ["old starts"]


def test_interrupt_while_new_app_starts(start: Any) -> None:
    events: list[str] = []
    given_up = threading.Event()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> Any:
        interrupt_the_main_thread(during="swap")
        try:
            await asyncio.sleep(30)
        finally:
            given_up.set()
        yield

    server = start(named_app("old", events))
    with stopwatch(10), pytest.raises(KeyboardInterrupt):
        server.swap(Starlette(lifespan=lifespan))
    assert given_up.wait(5)
    assert ask(server) == (200, "old")
    assert events == ["old starts"]


def test_interrupt_while_old_app_drains(start: Any) -> None:
    events: list[str] = []
    inside, released = threading.Event(), threading.Event()

    async def slow(request: Request) -> PlainTextResponse:
        inside.set()
        await asyncio.to_thread(released.wait, 30)
        return PlainTextResponse("late")

    def interrupt() -> None:
        until(lambda: ask(server) == (200, "new"), what="the new app")
        interrupt_the_main_thread(during="swap")

    server = start(named_app("old", events, slow=slow))
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(ask, server, "/slow")
        assert inside.wait(10)
        interrupting = pool.submit(interrupt)
        with stopwatch(10), pytest.raises(KeyboardInterrupt):
            server.swap(named_app("new", events), drain_s=30)
        interrupting.result(5)
        released.set()
        assert answer.result(10)[0] == 200
    assert ask(server) == (200, "new")
    until(lambda: events[-1] == "old ends", what="the end of the old app")


# -- run ----------------------------------------------------------------------------------------------


def test_run(start: Any) -> None:
    server = start(text_app("hello"))

    async def add(a: int, b: int) -> int:
        assert threading.current_thread().name == "serving-kit-http"
        return a + b

    async def fail() -> None:
        raise KeyError("mine")

    assert server.run(add(1, 2)) == 3
    with pytest.raises(KeyError, match="mine"):
        server.run(fail())


def test_run_on_own_thread(start: Any) -> None:
    server = start(text_app("hello"))

    async def inner() -> None:
        pytest.fail("never runs")

    async def outer() -> None:
        server.run(inner())

    with stopwatch(5), pytest.raises(RuntimeError, match="await instead"):
        server.run(outer())


def test_run_after_stop(start: Any) -> None:
    server = start(text_app("hello"))
    server.stop()
    with pytest.raises(RuntimeError, match="stopped"):
        server.run(asyncio.sleep(0))


def test_run_timeout(start: Any) -> None:
    server = start(text_app("hello"))
    cancelled = threading.Event()

    async def endless() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with stopwatch(5), pytest.raises(TimeoutError):
        server.run(endless(), timeout=0.05)
    assert cancelled.wait(5)


def test_interrupt_during_run(start: Any) -> None:
    server = start(text_app("hello"))
    cancelled = threading.Event()

    async def endless() -> None:
        interrupt_the_main_thread(during="run")
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with stopwatch(5), pytest.raises(KeyboardInterrupt):
        server.run(endless())
    assert cancelled.wait(5)
    assert ask(server) == (200, "hello")


# -- the process around it ----------------------------------------------------------------------------

NOISE = """
    import contextlib, http.client, logging, socket, sys, warnings
    if "basicConfig" in sys.argv:
        logging.basicConfig(level=logging.DEBUG)
    from serving_kit.notebook import process_settings
    from serving_kit.inline_server import InlineServer, bind

    async def app(scope, receive, send):
        if scope["type"] != "http":
            raise RuntimeError("no lifespan support")
        if scope["path"] == "/late":
            await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/warn":
            warnings.warn("from a server thread")
        if scope["path"] == "/task":
            import asyncio
            async def forgotten():
                raise RuntimeError("this is not awaited")
            asyncio.create_task(forgotten())
            await asyncio.sleep(0.01)
        raise LookupError("in the app")

    server = InlineServer(app, bind("127.0.0.1", 0))
    server.start()
    for path in "/", "/late", "/warn", "/task":
        connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
        with contextlib.suppress(http.client.HTTPException, ConnectionError):
            connection.request("GET", path)
            connection.getresponse().read()
        connection.close()
    upgrade = b"GET / HTTP/1.1\\r\\nHost: x\\r\\nConnection: upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n"
    for garbage in b"\\x00\\xff\\xfe garbage\\r\\n\\r\\n", b"\\x16\\x03\\x01\\x02", b"GET", upgrade:
        with socket.create_connection((server.host, server.port), timeout=10) as sock:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while sock.recv(1000):
                    pass
    server.stop()
    print(process_settings.lines())
"""


@pytest.mark.parametrize("user", ["basicConfig", "nothing"])
def test_no_output_from_server_thread(user: str) -> None:
    """Also with broken apps, bytes that are no HTTP, forgotten tasks, and logging set to DEBUG."""
    kept = run_script(NOISE, user).stdout
    assert len(kept.splitlines()) == 1, kept  # the one line that the main thread prints
    for line in ("LookupError: in the app", "Invalid HTTP request", "UserWarning: from a server thread"):
        assert line in kept
    assert "this is not awaited" in kept


def test_no_output_with_root_handler(start: Any, capfd: Any) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError("in the app")

    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    try:
        server = start(broken)
        assert ask(server) == (500, "Internal Server Error")
        with socket.create_connection((server.host, server.port), timeout=10) as sock:
            sock.sendall(b"\x00\xff\r\n\r\n")
            assert b"400" in sock.recv(1000)
        server.stop()
    finally:
        logging.getLogger().removeHandler(handler)
    assert capfd.readouterr() == ("", "")


def logging_setup() -> dict[str, Any]:
    """What a user may have set up, by logger."""
    loggers: dict[str, Any] = {"": logging.getLogger()}
    loggers |= {n: each for n, each in logging.root.manager.loggerDict.items() if hasattr(each, "handlers")}
    setup: dict[str, Any] = {
        name: (
            each.level,
            each.propagate,
            each.disabled,
            list(each.filters),
            [(handler, handler.level, list(handler.filters)) for handler in each.handlers],
        )
        for name, each in loggers.items()
    }
    last_resort = logging.lastResort
    setup["last resort"] = (last_resort, last_resort and list(last_resort.filters))
    setup["warnings"] = (warnings.showwarning, list(warnings.filters))
    return setup


def test_logging_setup_restored(start: Any, capfd: Any) -> None:
    mine = logging.getLogger("uvicorn.error")  # another uvicorn may be set up in this process
    handler = logging.StreamHandler(sys.stderr)
    mine.addHandler(handler)
    mine.setLevel(logging.INFO)
    mine.propagate = False
    try:
        start(text_app("warm-up: loggers are made when they are first used")).stop()
        before = logging_setup()
        server = start(text_app("hello"))
        during = logging_setup()
        for name, state in before.items():
            if name not in ("last resort", "warnings"):
                assert during[name][:3] == state[:3]
                assert [each[:2] for each in during[name][4]] == [each[:2] for each in state[4]]
        mine.info("a line of the user's own")
        assert "a line of the user's own" in capfd.readouterr().err
        ask(server)
        server.stop()
        assert logging_setup() == before
        mine.info("and another one")
        assert capfd.readouterr().err == "and another one\n"
    finally:
        mine.removeHandler(handler)
        mine.setLevel(logging.NOTSET)
        mine.propagate = True


def test_errors_of_server_thread_are_kept(start: Any) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError(f"found by {id(start)}")

    ask(start(broken))
    until(lambda: any(f"found by {id(start)}" in line for line in process_settings.lines()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_does_not_hold_port() -> None:
    done = run_script(
        """
        import os, socket
        import serving_kit
        server = serving_kit.serve(list, port=0)
        port = int(server.url.rpartition(":")[2])
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writing)
            os.read(reading, 1)  # until the parent closes its end
            os._exit(0)
        os.close(reading)
        assert server("still answers") == "still answers"
        server.stop()
        try:
            socket.create_server(("127.0.0.1", port)).close()
        finally:
            os.close(writing)
            os.waitpid(child, 0)
        print("free")
        """,
        warnings="ignore",  # Python warns of forks in threaded programs since 3.12
    )
    assert done.stdout.splitlines()[-1] == "free"


@pytest.mark.parametrize("connected", [False, True])
def test_app_shut_down_at_script_end(tmp_path: Path, connected: bool) -> None:
    written = tmp_path / "events"
    with stopwatch(20):
        run_script(
            """
            import contextlib, pathlib, socket, sys
            from starlette.applications import Starlette
            from serving_kit.inline_server import InlineServer, bind

            @contextlib.asynccontextmanager
            async def lifespan(app):
                yield
                pathlib.Path(sys.argv[1]).write_text("shut down")

            server = InlineServer(Starlette(lifespan=lifespan), bind("127.0.0.1", 0))
            server.start()
            if sys.argv[2] == "True":
                client = socket.create_connection((server.host, server.port))
                client.sendall(b"GET / HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
                assert client.recv(100)
            """,
            str(written),
            str(connected),
            warnings="ignore::ResourceWarning",  # of the script's own client
        )
    assert written.read_text() == "shut down"


# -- patched event loops ----------------------------------------------------------------------

NESTED = """
    import importlib, sys
    nest, uvloop, order = sys.argv[1:]
    if uvloop == "without uvloop":
        sys.modules["uvloop"] = None  # as if it were not installed
    else:
        import uvloop

    def patch():
        if nest != "none":
            importlib.import_module(nest).apply()

    def double(values):
        return [2 * value for value in values]

    if order == "before import":
        patch()
    import serving_kit
    if order == "after import":
        patch()
    server = serving_kit.serve(double, port=0)
    if order == "while it runs":
        patch()

    import asyncio, http.client
    def ask():
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
        connection.request("POST", "/", '{"inputs": [1, 2]}', {"content-type": "application/json"})
        answer = connection.getresponse().read()
        connection.close()
        return answer

    assert ask() == b"[2,4]", ask()
    assert server(21) == 42
    assert asyncio.run(server.predict([1, 2, 3])) == [2, 4, 6]

    async def cell():  # a cell of a notebook: a loop runs in this thread
        assert server(21) == 42
        assert await server.predict(21) == 42
        return serving_kit.serve(double, port=0)

    again = asyncio.run(cell())
    assert again.url == server.url and again(1) == 2 and ask() == b"[2,4]"
    again.stop()
    import threading
    left = [each.name for each in threading.enumerate() if each.name.startswith("serving-kit")]
    assert not left, left
    print("done")
"""


@pytest.mark.parametrize("uvloop", ["with uvloop", "without uvloop"])
@pytest.mark.parametrize(
    ("nest", "order"),
    [
        ("none", "never"),
        *itertools.product(
            ["nest_asyncio", "nest_asyncio2"], ["before import", "after import", "while it runs"]
        ),
    ],
)
def test_patched_event_loops(nest: str, uvloop: str, order: str) -> None:
    for package in {nest, uvloop.removeprefix("with ")} - {"none", "without uvloop"}:
        pytest.importorskip(package)
    if nest == "nest_asyncio" and sys.version_info >= (3, 14):
        pytest.skip("nest_asyncio has no release for this Python")
    ignored = "ignore::DeprecationWarning"  # of nest_asyncio, which is archived
    done = run_script(NESTED, nest, uvloop, order, warnings=ignored)
    assert done.stdout.splitlines()[-1] == "done"
