"""Any ASGI app on a background thread of the kernel: start, swap, stop.

    caller's thread                     "serving-kit-http"
    bind the socket  ───────────────▶   an event loop of its own, uvicorn on that socket
    start() ◀── ready, or the error ─   lifespan of the app
    swap(app) ──────────────────────▶   new app's lifespan, then one reference; then the old one ends
    run(coroutine) ◀── its result ───   ...
    stop() ◀── thread gone ──────────   lifespan ends, connections close

The kernel and the loop meet only here. An exception on the thread is raised in the caller. The listening
socket and the open connections outlive a swap, so that no client's connection is refused.

uvicorn is not started with its own `Server.run`: that needs `asyncio.run`, which a notebook may have
patched (nest_asyncio); an `asyncio.Runner` with a loop of our own works either way.

`run` and `submit` are not anyio's `BlockingPortal`: its futures stay pending when the loop dies, and a caller
would wait without end. Here they fail with `ServerGone`, which needs the set of pending futures in any case.

Not here: which app (`http/app.py`), re-runs and which port (`serving.py`).
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import errno
import os
import socket
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving_kit import thread_warnings
from serving_kit.errors import StartError
from serving_kit.http.connection import Connection
from serving_kit.notebook import process_settings
from serving_kit.options import check_host, check_port

THREAD_NAME = "serving-kit-http"
_BACKLOG = 2048
_CLOSE_CONNECTIONS_S = 1  # uvicorn waits this long for open connections, in whole seconds
_GRACE_S = 0.3  # beyond the bound of an app's shutdown, and for requests that were cancelled
_AT_EXIT_S = 1.0  # the kernel is killed 2.5 s after it was asked to go

T = TypeVar("T")

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
_servers: weakref.WeakSet[uvicorn.Server] = weakref.WeakSet()


def bind(host: str, port: int, *, tries: int = 1) -> socket.socket:
    """A listening socket on `port`, or on the first free one of the `tries` ports from there.

    Bound in the caller's thread and kept, so that no other program can take the port in between. Port 0
    takes any free port.

    Raises:
        StartError: naming the port and the remedy.
    """
    check_host(host)
    check_port(port)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, min(port + max(1, tries), 65536)):
        try:
            sock = socket.create_server((host, candidate), family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            if error.errno == errno.EACCES:
                raise StartError(f"port {candidate} needs more rights; take one above 1023") from error
            raise StartError(f"cannot listen on {host}:{candidate}: {error.strerror or error}") from error
        # asyncio turns Nagle's algorithm off only on sockets that are said to be TCP, and accepted ones
        # inherit from this one. With it every answer on a kept connection waits 40 ms for the client's ACK.
        sock = socket.socket(sock.family, sock.type, socket.IPPROTO_TCP, fileno=sock.detach())
        _sockets.add(sock)
        return sock
    raise StartError(f"port {port} is taken by another program; pass another one, or port=0 for any free one")


def leave_out_of_children(server: uvicorn.Server) -> None:
    """Let no forked child inherit the server's connections. Any thread."""
    _servers.add(server)


def _close_in_child() -> None:
    """In a forked child: close our ports and connections, which it would keep open after our end."""
    for sock in list(_sockets):
        with contextlib.suppress(OSError):
            sock.close()
    sockets = [
        connection.transport.get_extra_info("socket")
        for server in _servers
        for connection in server.server_state.connections
    ]
    # uvloop has duplicates of the listening sockets, so that `close` alone does nothing.
    for server in _servers:
        sockets += [sock for listener in getattr(server, "servers", ()) for sock in listener.sockets]
    if not sockets:
        return
    # The sockets belong to event loops that do not run here. If a descriptor is closed
    # without its socket object, that object later closes whatever gets the same number next.
    nothing = os.open(os.devnull, os.O_RDWR)
    for sock in sockets:
        with contextlib.suppress(OSError, AttributeError, ValueError):
            if sock.fileno() >= 0:
                os.dup2(nothing, sock.fileno(), inheritable=False)
    os.close(nothing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


class ServerGone(RuntimeError):
    """The server has stopped: nothing can run on its loop any more."""


class InlineServer:
    """uvicorn on a thread of its own, serving one app at a time.

    `start`, `swap`, `run` and `stop` are for any thread but the server's own.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        self.sock = sock
        self.host, self.port = sock.getsockname()[:2]
        self._app = app
        self._mounted: _MountedApp | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self._uvicorn: _SignallingUvicorn | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()  # it answers, or it has failed
        self._failure: BaseException | None = None
        self._retirements: set[asyncio.Task[None]] = set()
        self._pending: set[concurrent.futures.Future[Any]] = set()  # of `submit`
        self._asked_to_end = False
        self.died = False  # the thread has ended without `stop`
        self._stopping = threading.Lock()

    @property
    def url(self) -> str:
        """Where code in this kernel reaches it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return (
            f"http://[{host}]:{self.port}"
            if ":" in host and "[" not in host
            else f"http://{host}:{self.port}"
        )

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # -- the caller's side -----------------------------------------------------------------------

    def start(self) -> None:
        """Return when the app answers on its port.

        Raises:
            Exception: whatever the app's lifespan raised, or uvicorn did; nothing is left behind.
        """
        process_settings.hold(self)
        self._thread = threading.Thread(target=self._main, name=THREAD_NAME, daemon=True)
        try:
            self._thread.start()
            self._ready.wait()
        except BaseException:  # ■ while starting
            self.stop(0)
            raise
        if self._failure is not None:
            failure = self._failure
            self.stop(0)
            raise failure
        # A daemon thread does not keep the kernel from exiting; this gives the app its shutdown.
        atexit.register(self.stop, _AT_EXIT_S)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Run a coroutine on the server's loop and wait for its result.

        Raises:
            RuntimeError: called on the server's own thread, where waiting would never end.
            ServerGone: the server has stopped.
            TimeoutError: it took longer than `timeout` seconds; it is cancelled.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("this would wait for itself: on the server's own thread, await instead")
        future = self.submit(coroutine)
        try:
            return future.result(timeout)
        except BaseException:  # also ■: then the result is not needed any more
            if self.alive:
                future.cancel()
            raise

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine on the server's loop. If the loop dies, the future fails with `ServerGone`.

        Raises:
            ServerGone: the server has stopped.
        """
        loop = self.loop
        if loop is None or not self.alive or loop.is_closed():
            coroutine.close()
            raise ServerGone("the server has stopped")
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        if not self.alive:
            self._fail_pending()
        return future

    def swap(self, app: ASGIApp, drain_s: float = 5.0, *, then: Callable[[], None] | None = None) -> None:
        """Put another app in place of the present one, on the same socket and connections.

        The new app is started first; if that fails, its exception is raised and the old one stays.
        Requests that the old app has begun are finished by it, within `drain_s` seconds.

        Args:
            app: The new app.
            drain_s: Seconds for the requests of the old one.
            then: Called as soon as the new app answers. From there on nothing can be undone: an
                interrupt while the old app drains leaves the new one in place and the drain going on.
        """
        retirement = self.run(self._switch(app, drain_s))
        if then is not None:
            then()
        self.run(_finish(retirement))

    def close_port(self) -> None:
        """Take no new connections, so that another server can have the port. The open ones go on."""
        self.run(self._stop_listening())

    def stop(self, drain_s: float = 5.0) -> bool:
        """End the app and the thread, close the port. Bounded, idempotent.

        Requests under way are finished within about `drain_s` seconds, and so is the app. ■ ends the
        draining, not the stop. Returns whether the thread is gone; one that is stuck is left behind,
        as a daemon, without the port.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("a server cannot be stopped from its own thread")
        with self._stopping:
            atexit.unregister(self.stop)
            interrupt: BaseException | None = None
            self._asked_to_end = True
            if self.alive and self._uvicorn is not None and self._mounted is not None:
                try:
                    self._wait_for(self._mounted.retire(drain_s, cancel=True), drain_s)
                except BaseException as error:
                    interrupt = error
                    self._wait_for(self._mounted.retire(0, cancel=True), 0)
                self._uvicorn.should_exit = True
            gone = self._join()
            self._close_port()
            process_settings.release(self)
            if interrupt is not None:
                raise interrupt
            return gone

    def _close_port(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # a loop that is stuck has a duplicate of it
        with contextlib.suppress(OSError):
            self.sock.close()

    def _fail_pending(self) -> None:
        for future in list(self._pending):
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_exception(ServerGone("the server has stopped"))

    def _wait_for(self, coroutine: Coroutine[Any, Any, None], timeout_s: float) -> None:
        """Run a step of the shutdown; if it overruns or the loop has gone, go on to the next."""
        with contextlib.suppress(RuntimeError, TimeoutError, concurrent.futures.CancelledError):
            self.run(coroutine, timeout_s + 3 * _GRACE_S)

    def _join(self) -> bool:
        if self._thread is None:
            return True
        self._thread.join(_CLOSE_CONNECTIONS_S + 2)
        if self._thread.is_alive() and self._uvicorn is not None:
            self._uvicorn.force_exit = True
            self._thread.join(1)
        return not self._thread.is_alive()

    # -- the server's thread ---------------------------------------------------------------------

    def _main(self) -> None:
        config = uvicorn.Config(
            self._dispatch,
            interface="asgi3",
            http=Connection,
            proxy_headers=False,
            loop="asyncio",  # uvloop keeps copies of the socket that a forked child cannot close
            log_config=None,  # the default closes every logging handler of the process
            access_log=False,
            lifespan="off",  # ours: it must be able to change with the app
            timeout_graceful_shutdown=_CLOSE_CONNECTIONS_S,
        )
        self._uvicorn = _SignallingUvicorn(config, self._ready)
        try:
            with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
                runner.run(self._serve(self._uvicorn))
        except BaseException as error:
            self._failure = error
        finally:
            self.died = self._ready.is_set() and not self._asked_to_end
            if self.died:  # an open port would take connections that are never served
                process_settings.keep(f"the server's thread has died: {self._failure!r}")
                self._close_port()
            self._fail_pending()
            self._ready.set()

    async def _serve(self, server: uvicorn.Server) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(_keep_loop_error)
        self._mounted = _MountedApp(self._app)
        del self._app  # the present app is `_mounted`'s; keeping this one would keep its model
        await self._mounted.begin()
        try:
            await server.serve(sockets=[self.sock])
        finally:
            for connection in list(server.server_state.connections):
                connection.transport.abort()  # still open after the timeout; uvicorn would leave it so
            await self._mounted.end(0)

    async def _stop_listening(self) -> None:
        assert self._uvicorn is not None
        for server in self._uvicorn.servers:
            server.close()
        self._close_port()

    async def _switch(self, app: ASGIApp, drain_s: float) -> asyncio.Task[None]:
        """Start the new app, make it the present one, and begin to retire the old one."""
        new = _MountedApp(app)
        try:
            await new.begin()
        except BaseException:
            await new.end(0)
            raise
        old, self._mounted = self._mounted, new
        assert old is not None
        retirement = asyncio.create_task(old.retire(drain_s))
        self._retirements.add(retirement)  # asyncio itself holds tasks only weakly
        retirement.add_done_callback(self._retirements.discard)
        return retirement

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._mounted is not None
        thread_warnings.put_first()
        await self._mounted(scope, receive, send)


class _SignallingUvicorn(uvicorn.Server):
    """uvicorn that sets an event when it listens."""

    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        leave_out_of_children(self)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set()


class _MountedApp:
    """One app and its lifespan."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._state: dict[str, Any] = {}
        self._requests: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self._answers: dict[str, asyncio.Event] = {}
        self._failed = False
        self._lifespan: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        self._idle.clear()
        scope["state"] = self._state.copy()
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests.discard(task)
            if not self._requests:
                self._idle.set()

    async def begin(self) -> None:
        """Run the app's startup. An app without a lifespan is fine."""
        scope: Scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self._state,
        }
        self._lifespan = asyncio.create_task(self._app(scope, self._inbox.get, self._receive))  # type: ignore[arg-type]
        await self._send_event("startup")
        if self._failed:
            await self._lifespan  # raises what the app raised
            raise StartError("the app failed to start without saying why")
        if self._lifespan.done() and not self._lifespan.cancelled():
            self._lifespan.exception()  # it has no lifespan: it raised, which is read here

    async def retire(self, timeout: float, *, cancel: bool = False) -> None:
        """Let the requests inside finish, then run the app's shutdown: `timeout` seconds in all.

        Args:
            timeout: Seconds for both.
            cancel: Cancel what is not finished by then, which our app answers with 503.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(deadline):
                await self._idle.wait()
        except TimeoutError:
            if cancel:
                await self._cancel_requests()
        await self.end(max(0.0, deadline - loop.time()))

    async def _cancel_requests(self) -> None:
        """Cancel the requests inside, and give them 0.3 s to answer."""
        for request in self._requests:
            request.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GRACE_S):
                await self._idle.wait()

    async def end(self, timeout: float) -> None:
        """Run the app's shutdown. Idempotent; requests that are still inside may finish."""
        lifespan = self._lifespan
        if lifespan is None or lifespan.done():
            return
        try:
            async with asyncio.timeout(timeout + _GRACE_S):
                await self._send_event("shutdown")
                await lifespan
        except TimeoutError:
            lifespan.cancel()
            await asyncio.wait({lifespan}, timeout=_GRACE_S)
        except Exception as error:
            process_settings.keep(f"shutdown failed: {type(error).__name__}: {error}")

    async def _send_event(self, phase: str) -> None:
        """Send one lifespan event; return when it is answered or the app has left."""
        assert self._lifespan is not None
        answered = self._answers[phase] = asyncio.Event()
        self._inbox.put_nowait({"type": f"lifespan.{phase}"})
        waiter = asyncio.create_task(answered.wait())
        try:
            await asyncio.wait({waiter, self._lifespan}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()

    async def _receive(self, message: Message) -> None:
        _, phase, result = message["type"].split(".")
        self._failed = self._failed or (phase == "startup" and result == "failed")
        if phase in self._answers:  # an app that is torn down may send what it was not asked
            self._answers[phase].set()


async def _finish(task: asyncio.Task[None]) -> None:
    """Wait for a task, which goes on if the waiting is cancelled."""
    await asyncio.shield(task)


def _keep_loop_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    process_settings.keep(f"event loop: {context.get('message')} {context.get('exception') or ''}".rstrip())
