"""`serve()` and what it returns: the one-liner that wires the rest.

Not here: anything that could be said without the kernel (`service.py`), threads (`inline_server.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType, TracebackType
from typing import Any

from starlette.applications import Starlette

from serving_kit.batching import THREAD_NAME as MODEL_THREAD_NAME
from serving_kit.cpus import allowed_cpus
from serving_kit.errors import ServingError, SettingError, StartError, Stopping
from serving_kit.http.access import Access, access, is_loopback
from serving_kit.http.app import build_app
from serving_kit.inline_server import InlineServer, ServerGone, bind, check_host
from serving_kit.metrics import HISTORY_S
from serving_kit.models.loading import load_model
from serving_kit.notebook import process_settings
from serving_kit.options import DRAIN_S, OPTIONS, TOKEN_VARIABLE, from_outside, unknown_variables
from serving_kit.records import BatchReason, Incident
from serving_kit.service import Service, check_live_timeout
from serving_kit.settings import KNOBS, Settings, as_python, refuse_unknown

_PORTS_TO_TRY = 100
_STOP_SIGNALS = ("SIGTERM", "SIGHUP")  # those that `Server.wait` takes over; Ctrl+C is an exception already
# Kept on `sys`, so that reloading this module (%autoreload) does not lose track of what runs.
_servers: dict[str, Server] = sys.__dict__.setdefault("_serving_kit_servers", {})
# A server is started, replaced and stopped under the lock of its name, so that servers of different names
# do not wait for each other. Loading has a lock of its own: transformers sets the process's default dtype
# meanwhile.
_locks: dict[str, threading.RLock] = sys.__dict__.setdefault("_serving_kit_locks", {})
_loading = threading.RLock()
_waiting: dict[threading.Thread, Server] = {}  # model threads that wait for an answer, and whose
_waiting_lock = threading.Lock()


class Server:
    """A model server in this process. Made by `serve()`; every method may be called from any cell.

    Attributes:
        name: What `serve(name=...)` said; a second server of that name replaces this one.
        url: Where code in this kernel reaches it.
        token: What changing settings wants as bearer token, and other machines for everything.
        drain_s: Seconds that admitted requests get to finish when it stops.
        lame_duck_s: Seconds before that in which `/health` says 503 and requests are still answered.
    """

    def __init__(
        self,
        service: Service,
        inline: InlineServer,
        asked: tuple[str, int],
        token: str,
        drain_s: float,
        lame_duck_s: float,
    ) -> None:
        self.name = service.name
        self.url = inline.url
        self.token = token
        self.asked = asked  # host and port as serve() was given them
        self.drain_s = drain_s
        self.lame_duck_s = lame_duck_s
        self._service = service
        self._inline = inline
        self._replaced = False
        self._successor_since: float | None = None  # since when a newer run loads its model
        self._panel: Any = None
        self._model_code: list[str] = []  # how serve() was called, for `as_code`
        self._named: dict[str, Any] = {}

    # -- asking ----------------------------------------------------------------------------------

    def __call__(self, inputs: Any, **parameters: Any) -> Any:
        """What the pipeline returns for `inputs`, through the same queue as everybody else.

        A list is always several inputs, also for a function: one input that is itself a list goes as a
        list of one, `server([[1, 2, 3]])`. A tuple or an array is one input.

        Args:
            inputs: One input, or a list of them: each is a queue item, answered in the same order.
            parameters: As for the pipeline.

        Raises:
            ServingError: as HTTP clients get it; a note holds the details. `Unavailable` if the server has
                stopped or was replaced.
            RuntimeError: called by the function that this server serves, on its model thread, where the
                answer would wait for itself; also when several servers would wait in a circle.
        """
        with self._explained(), self._wait():
            return self._inline.run(self._ask(inputs, parameters))

    async def predict(self, inputs: Any, **parameters: Any) -> Any:
        """The same for `await`: the cell's event loop goes on while the model works."""
        self._refuse_to_wait_for(threading.current_thread())
        with self._explained():
            return await asyncio.wrap_future(self._inline.submit(self._ask(inputs, parameters)))

    async def _ask(self, inputs: Any, parameters: Mapping[str, Any]) -> Any:
        service = self._service
        parameters = {name: as_python(value) for name, value in parameters.items()}
        with service.observe() as ticket:
            values = inputs if isinstance(inputs, list) else [inputs]
            answers = await service.predict(values, parameters, ticket)
            return answers if isinstance(inputs, list) else answers[0]

    @contextlib.contextmanager
    def _wait(self) -> Iterator[None]:
        """Let a model thread wait for this server's answer, if the answer does not wait for that thread."""
        me = threading.current_thread()
        if me.name != MODEL_THREAD_NAME:
            yield
            return
        with _waiting_lock:
            self._refuse_to_wait_for(me)
            _waiting[me] = self
        try:
            yield
        finally:
            del _waiting[me]

    def _refuse_to_wait_for(self, me: threading.Thread) -> None:
        server: Server | None = self
        while server is not None and (thread := server._service.batcher.thread) is not None:
            if thread is me:
                raise RuntimeError(
                    f"a function that {self.name!r} waits for cannot ask {self.name!r}: it would wait for "
                    "its own answer until the timeout. Call the function or the model itself"
                )
            server = _waiting.get(thread)

    # -- tuning and looking ----------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The knobs in force."""
        return self._service.settings

    def tune(self, /, **knobs: Any) -> Settings:
        """Change knobs of the running server, all or none; they count from the next batch.

        Returns:
            All the knobs.

        Raises:
            SettingError: an unknown knob or a bad value; nothing was changed.
            Unavailable: the server has stopped or was replaced.
        """
        return self._tune("tune()", knobs)

    def _tune(self, by: str, knobs: Mapping[str, Any]) -> Settings:
        """The same; `by` is who asks, for the log."""
        self._refuse_if_gone()
        return self._service.tune(by, **knobs)

    def stats(self, series: int = 0) -> dict[str, Any]:
        """What the panel shows. Durations in milliseconds; `window` covers the last 30 seconds.

        Args:
            series: Add one entry for each of the last so many seconds, and the knobs that moved.
        """
        snapshot = self._service.snapshot(series)
        if self._replaced:
            snapshot |= {"state": "replaced", "reason": "replaced by a newer run of serve()"}
        elif self._inline.died:
            snapshot |= {"state": "failed", "reason": "the server's thread has died: run serve() again"}
        elif self._successor_since is not None:
            waited = time.monotonic() - self._successor_since
            snapshot["reason"] = f"a newer run is loading its model, for {waited:.0f} s"
        return {**snapshot, "url": self.url}

    def history(self) -> Any:
        """The last five minutes, one row for each second: a DataFrame, or without pandas a list of dicts.

        The same numbers as in the panel and in `stats(series=300)`, with the nested ones as columns of
        their own (`latency_ms.p99`). `ago_s` counts back from now.
        """
        points = self.stats(HISTORY_S)["series"]
        last = points[-1]["second"]
        rows = [{"ago_s": last - point["second"], **_flat(point)} for point in points]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows).set_index("ago_s")

    def as_code(self) -> str:
        """The call that makes this server with the settings in force: every knob that is not at its default.

        A pipeline or function is called by its name, which may not be what your notebook calls it.
        """
        defaults = Settings().to_dict()
        knobs = {name: v for name, v in self.settings.to_dict().items() if v != defaults[name]}
        named = [f"{name}={value!r}" for name, value in {**self._named, **knobs}.items()]
        return f"serving_kit.serve({', '.join([*self._model_code, *named])})"

    def errors(self) -> list[Incident]:
        """The latest failures, newest first, with tracebacks and the ids that clients were told."""
        return self._service.incidents()

    def logs(self) -> list[str]:
        """The latest lines that the server's threads would have printed, oldest first."""
        return process_settings.lines()

    @property
    def panel(self) -> Any:
        """The live panel: one for each server, however often it is shown."""
        if self._panel is None:
            from serving_kit.notebook.panel import make_panel

            self._panel = make_panel(self)
        return self._panel

    # -- life ------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it answers: not stopped, not replaced."""
        return self._inline.alive and not self._service.stopped

    def stop(self, timeout: float | None = None) -> None:
        """Finish what was admitted; close the port; let the model go.

        What is not finished in time is answered with 503, and so are new requests meanwhile. Idempotent; a
        server that was replaced has stopped already. Any thread but the server's own; waits while a newer
        run of the same name loads its model.

        Args:
            timeout: Seconds for what was admitted; None: the server's `drain_s`. Before that, `/health`
                says 503 for the server's `lame_duck_s` while requests are still answered.
        """
        with _lock_of(self.name):
            try:
                if not self._replaced:
                    self._announce_stop()
                    self._end(self.drain_s if timeout is None else timeout)
            finally:  # also when ■ interrupts the drain: it has stopped then, too
                if _servers.get(self.name) is self:
                    del _servers[self.name]
                self._finish_panel()

    def wait(self) -> None:
        """Block until ■ (or Ctrl+C), then stop. For scripts, and for cells that should look busy.

        In the main thread of a script, SIGTERM and SIGHUP end it too, unless the script handles them
        itself; a second one ends the draining. The script goes on after it.
        """
        with _signals_caught() as caught:
            with contextlib.suppress(KeyboardInterrupt):
                while self.running and not caught:
                    time.sleep(0.2)
            try:
                self.stop()
            except KeyboardInterrupt:
                if not caught:
                    raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state, _ = self._service.state()
        state = "replaced" if self._replaced else "failed" if self._inline.died else state
        requests = self._service.metrics.requests()
        return (
            f"<serving_kit.Server {self.name!r}: {self._service.model_name} ({self._service.task}) "
            f"at {self.url}, {state}, {requests} requests>"
        )

    def _ipython_display_(self) -> None:
        self.panel.show(repr(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), **self.panel.bundle()}

    @contextlib.contextmanager
    def _explained(self) -> Any:
        """In the owner's own cell, an error carries what a client is not told."""
        self._refuse_if_gone()
        try:
            yield
        except ServerGone:
            raise Stopping(self._why_gone() or "the server has stopped") from None
        except ServingError as error:
            if error.detail:
                error.add_note(error.detail)
            if error.incident:
                error.add_note(f"server.errors() has the traceback, as incident {error.incident}")
            raise

    def _announce_stop(self) -> None:
        """Be not ready for `lame_duck_s`; ■ ends the server at once."""
        if not self.running or not self.lame_duck_s:
            return
        self._service.announce_stop()
        try:
            time.sleep(self.lame_duck_s)
        except BaseException:
            self._end(0)
            raise

    def _end(self, drain_s: float) -> None:
        self._service.drain()
        try:
            self._inline.stop(drain_s)
        finally:  # also if its loop has died, or ■ interrupts the drain
            self._service.abandon()

    def _refuse_if_gone(self) -> None:
        if why := self._why_gone():
            raise Stopping(why)

    def _why_gone(self) -> str:
        """Why this handle has no server any more; empty if it has one."""
        if self._replaced:
            return "this server has stopped: it was replaced by a newer run of serve()"
        if self._inline.died:
            return "the server has stopped: its thread has died. Run serve() again"
        return "" if self.running else "the server has stopped: run serve() again"

    def _finish_panel(self) -> None:
        if self._panel is not None:
            self._panel.finish()

    def _become_replaced(self) -> None:
        self._replaced = True
        self._finish_panel()


def serve(
    model: Any = None,
    *,
    task: str | None = None,
    port: int = 8000,
    host: str = "127.0.0.1",
    name: str = "default",
    device: Any = None,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    shortcuts: bool = True,
    retry: bool = True,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    live_timeout_s: float | None = None,
    require_token: bool = False,
    drain_s: float = 5.0,
    lame_duck_s: float = 0.0,
    threads: int | None = None,
    stop_first: bool = False,
    **knobs: Any,
) -> Server:
    """Serve a model from this process, on a thread of its own. Returns when it can answer.

    Running it again replaces the server of that `name`: same port, same connections, and the old
    model answers until the new one can. If the new one fails to load, the old one stays.

    A pipeline that is handed over shares its weights with the server, so values that change in place get
    through. The server has its own tokenizer and processors. Where a shortcut applies, it has its own modules
    too: the panel says if the notebook's were replaced, hooked or compiled since.

    Args:
        model: None for the bundled demo model; a Hub id or folder, as `pipeline(model=...)` takes it;
            a `transformers` Pipeline, which is not loaded twice; or any `list -> list` function: it gets
            a list of inputs, of one request or of several, and returns one output for each, in order.
        task: As for `transformers.pipeline`; None lets it find out.
        port: Port; if another program has it, the next free one is taken and named. 0: any.
        host: Address to listen on. The default is reachable from this machine only; on any other, every
            request needs the token.
        name: Servers of different names run side by side.
        device: As for `transformers.pipeline`.
        pipeline_kwargs: More arguments for `transformers.pipeline`.
        shortcuts: Take roads to the same answers that are shorter: fill-mask scores the vocabulary at
            its masks only, linear layers on a CPU use oneDNN where that is faster. The numbers differ
            from the pipeline's by rounding (1e-6).
        retry: Call the model again with parts of a batch on which it has raised, so that a bad input fails
            alone. False: such a batch fails whole, and the model never sees an input twice; for
            functions with side effects.
        allowed_hosts: Names by which a proxy may ask for it, besides localhost: "models.example.org".
        allowed_origins: Sites whose pages may ask it, and get CORS: "https://example.org".
        live_timeout_s: Seconds after which a forward that hangs makes `GET /live` answer 503, so that an
            orchestrator restarts the process; None: never. `GET /health` says so much sooner.
        require_token: Every request but /live and /health needs the token, also from this machine. For
            behind a proxy on this machine that rewrites `Host`: without it, whoever the proxy lets in
            is taken for a client of this machine.
        drain_s: Seconds that admitted requests get to finish when the server stops; the rest is answered
            with 503.
        lame_duck_s: Seconds before that in which `/health` says 503 and requests are still answered, so
            that a load balancer can turn away.
        threads: torch's threads for one operation. It holds for the whole process, which is yours: None
            leaves the number alone.
        stop_first: Stop the running server of that name before the new model is loaded: where both do not
            fit into memory. Meanwhile clients wait for the new one; if it cannot be loaded, none is left.
        **knobs: Any of `Settings`, such as max_batch_size=8. The environment's SERVING_KIT_ variables are
            not for notebooks: this function does not read them.

    Raises:
        SettingError: a knob has an unknown name or a bad value.
        StartError: the model cannot be loaded, or nothing can listen there; says what to do.
    """
    refuse_unknown(knobs, inspect.signature(serve).parameters)
    settings = Settings(**knobs)
    check_live_timeout(live_timeout_s)
    port = as_python(port)
    drain_s = OPTIONS["drain_s"].check("drain_s", drain_s)
    lame_duck_s = OPTIONS["lame_duck_s"].check("lame_duck_s", lame_duck_s)
    if threads is not None:
        threads = OPTIONS["threads"].check("threads", threads)
    check_host(host)

    def load() -> Service:
        if old is not None:
            old._successor_since = time.monotonic()
        try:
            with _loading:
                loaded = load_model(
                    model,
                    task=task,
                    device=device,
                    pipeline_kwargs=pipeline_kwargs,
                    shortcuts=shortcuts,
                    threads=threads,
                )
            return Service(
                loaded, settings, given=knobs, name=name, retry=retry, live_timeout_s=live_timeout_s
            )
        except SettingError as error:
            raise StartError(f"{error}. Or serve one at a time: max_batch_size=1") from error
        finally:
            if old is not None:
                old._successor_since = None

    def made(service: Service, inline: InlineServer) -> Server:
        return Server(service, inline, (host, port), token, drain_s, lame_duck_s)

    with _lock_of(name):
        old = _servers.get(name)
        token = old.token if old is not None and old.running else secrets.token_urlsafe(16)
        rule = access(
            token,
            host,
            allowed_hosts=allowed_hosts,
            allowed_origins=allowed_origins,
            require_token=require_token,
        )
        wanted = port
        if old is not None and (stop_first or not old.running):
            wanted = old._inline.port if old.asked == (host, port) else port
            old.stop()  # if its thread has died: what it holds is ours to free
            old = None
            gc.collect()  # models are full of cycles
        if old is not None and port in (old.asked[1], old._inline.port) and host == old.asked[0]:
            server = _take_over(old, made(load(), old._inline), rule)
        elif old is not None and port and port == old._inline.port:
            server = _move(old, load, made, (host, port), rule, drain_s)
        else:
            sock = bind(host, wanted, tries=_PORTS_TO_TRY)  # first: a model may take minutes to load
            try:
                service = load()
            except BaseException:
                sock.close()
                raise
            server = _start(service, sock, made, old, rule, drain_s)
    given = {"task": task, "port": port, "host": host, "name": name, "device": device}
    given |= {"pipeline_kwargs": pipeline_kwargs, "shortcuts": shortcuts, "retry": retry}
    given |= {"allowed_hosts": allowed_hosts, "allowed_origins": allowed_origins}
    given |= {"live_timeout_s": live_timeout_s, "require_token": require_token}
    given |= {"drain_s": drain_s, "lame_duck_s": lame_duck_s, "threads": threads}
    usual = inspect.signature(serve).parameters
    server._model_code = _as_called(model)
    server._named = {key: value for key, value in given.items() if value != usual[key].default}
    return server


def _lock_of(name: str) -> threading.RLock:
    return _locks.setdefault(name, threading.RLock())


def _as_called(model: Any) -> list[str]:
    """The first argument of `serve()`, as code."""
    if model is None:
        return []
    if isinstance(model, (str, os.PathLike)):
        return [repr(os.fspath(model))]
    name = str(getattr(model, "__name__", "pipe"))
    return [name if name.isidentifier() else "model"]


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """One second of the series without nesting, and with totals of what has open keys."""
    row = {key: value for key, value in point.items() if not isinstance(value, dict)}
    for key in ("latency_ms", "queue_wait_ms", "forward_ms"):
        row |= {f"{key}.{name}": value for name, value in point[key].items()}
    batches = sum(point["sizes"].values())
    items = sum(int(size) * count for size, count in point["sizes"].items())
    row |= {"batches": batches, "batch_size_mean": items / batches if batches else None}
    return row | {f"batches.{reason.value}": point["reasons"].get(reason.value, 0) for reason in BatchReason}


def _take_over(old: Server, server: Server, rule: Access) -> Server:
    """Put a new service behind the socket of a running server."""
    was = _biography(old)

    def register() -> None:
        _servers[server.name] = server
        old._become_replaced()

    app = build_app(server._service, access=rule, drain_s=server.drain_s)
    old._inline.swap(app, old.drain_s, then=register)
    server._service.log.replaced(server._service.model_name, server.url)
    _say(f"{_introduction(server)}, in place of the one that was {was}", server, rule)
    return server


def _move(
    old: Server,
    load: Callable[[], Service],
    made: Callable[[Service, InlineServer], Server],
    address: tuple[str, int],
    rule: Access,
    drain_s: float,
) -> Server:
    """Replace a running server by one that listens to another host on the same port.

    The system gives no port to two sockets whose addresses overlap, so the old one closes its own when the
    new model is loaded, and finishes what it has admitted when the new one answers.
    """
    bind(address[0], 0).close()  # whether that host can be had at all, while the old one still answers
    service = load()
    old._inline.close_port()
    try:
        return _start(service, bind(*address, tries=_PORTS_TO_TRY), made, old, rule, drain_s)
    except BaseException:
        old.stop()
        raise


def _start(
    service: Service,
    sock: socket.socket,
    made: Callable[[Service, InlineServer], Server],
    old: Server | None,
    rule: Access,
    drain_s: float,
) -> Server:
    """Start a service on a socket of its own, and stop the server of that name, if there is one."""
    inline = InlineServer(build_app(service, access=rule, drain_s=drain_s), sock)
    server = made(service, inline)
    inline.start()
    _servers[server.name] = server
    note = _introduction(server)
    _, port = server.asked
    if port not in (0, inline.port):
        note += f", because port {port} is taken by {_holder(port)}"
    if old is not None:
        place = "" if old.url == server.url else f" at {old.url}"
        note += f", in place of the one{place} that was {_biography(old)}"
    _say(note, server, rule)
    if old is not None:
        service.log.replaced(service.model_name, server.url)
        try:
            old._end(old.drain_s)
        finally:  # also when ■ interrupts the drain: it has stopped then, too
            old._become_replaced()
    return server


def _holder(port: int) -> str:
    """Who has a port that could not be bound."""
    ours = (each.name for each in servers() if each._inline.port == port)
    return f"the server {name!r}" if (name := next(ours, None)) is not None else "another program"


def _in_a_script() -> bool:
    """Whether the process ends with the code that runs now: no kernel, no interactive interpreter."""
    if hasattr(sys, "ps1") or sys.flags.interactive or sys.flags.inspect:
        return False
    ipython = sys.modules.get("IPython")
    return ipython is None or ipython.get_ipython() is None


def _say(line: str, server: Server, rule: Access) -> None:
    """Print the one line of `serve()`, with what its owner should know, in the caller's own cell."""
    notes = [line, *server._service.notes]
    if rule.private:
        who = (
            "every request"
            if is_loopback(server.asked[0])
            else "other machines can reach it, so every request"
        )
        notes.append(
            f"{who} needs server.token: as Authorization: Bearer <token>, or once as /?token=<token> in a "
            "browser"
        )
    if _in_a_script():
        notes.append("a script must call server.wait(), or the server ends with it")
    print("; ".join(notes))


@contextlib.contextmanager
def _signals_caught() -> Iterator[list[int]]:
    """The stop signals that have come, in the main thread of a script; a second one interrupts."""
    caught: list[int] = []
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child, which must end as it would have without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        caught.append(number)
        if len(caught) > 1:
            raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread() and _in_a_script():
        for name in _STOP_SIGNALS:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_all() -> None:
    """Stop every server of this process."""
    for server in servers():
        server.stop()


def servers() -> list[Server]:
    """The servers that run in this process."""
    return [server for server in list(_servers.values()) if server.running]


def create_app(
    model: Any = None,
    *,
    task: str | None = None,
    name: str = "default",
    device: Any = None,
    pipeline_kwargs: Mapping[str, Any] | None = None,
    shortcuts: bool = True,
    retry: bool = True,
    token: str | None = None,
    public: bool = False,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    live_timeout_s: float | None = None,
    require_token: bool | None = None,
    drain_s: float | None = None,
    threads: int | None = None,
    **knobs: Any,
) -> Starlette:
    """The same engine as an ASGI app, for `uvicorn server:app` and its like.

    The model is loaded when the app starts, once. What is not given here is taken from the environment
    (SERVING_KIT_MODEL, SERVING_KIT_MAX_BATCH_SIZE and so on), then from the TOML file that
    SERVING_KIT_SETTINGS names.

    How long a stop takes is up to the ASGI server, too: say `uvicorn --timeout-graceful-shutdown 30`. What it
    then cuts off is answered with 503. It closes the port before the app is told of the stop, so there is no
    lame-duck time here.

    An app that is mounted in another one starts with the lifespan of that one, which has to pass it on; until
    then every route but /live answers 503 and says so:

        model_app = serving_kit.create_app()

        @contextlib.asynccontextmanager
        async def lifespan(app):
            async with model_app.router.lifespan_context(model_app):
                yield

        app = FastAPI(lifespan=lifespan)
        app.mount("/model", model_app)

    Args:
        model: As for `serve()`; so are task, name, device and pipeline_kwargs.
        task: A task of `transformers.pipeline`.
        name: Shown on /info and the panel.
        device: As for `transformers.pipeline`.
        pipeline_kwargs: More arguments for `transformers.pipeline`.
        shortcuts: As for `serve()`.
        retry: As for `serve()`.
        token: What changing settings wants as bearer token, and everything else that does not come from
            this machine. None takes it from the environment variable SERVING_KIT_TOKEN; without that,
            settings are fixed and only this machine may ask.
        public: Ask for no token, whoever comes by whatever name: for behind a gateway that decides.
        allowed_hosts: As for `serve()`.
        allowed_origins: As for `serve()`.
        live_timeout_s: As for `serve()`.
        require_token: As for `serve()`.
        drain_s: Seconds for what is still admitted when the ASGI server ends the app's lifespan; default 25.
        threads: torch's threads for one operation, in the whole process. Default: the CPUs that affinity and
            cgroup quota allow, at most as many as torch itself would take. Divide them among the processes
            if there are several.
        **knobs: Any of `Settings`.

    Raises:
        SettingError: a knob has an unknown name or a bad value, the text names its source; or a token is
            required and there is none.
    """
    refuse_unknown(knobs, inspect.signature(create_app).parameters)
    for warning in unknown_variables(os.environ):
        warnings.warn(warning, stacklevel=2)
    outside = from_outside(os.environ)
    given = {name: outside[name] for name in KNOBS if name in outside} | knobs
    settings = Settings(**given)
    if model is None or isinstance(model, (str, os.PathLike)):  # the others are for loading by name
        model = outside.get("model") if model is None else model
        task = task or outside.get("task")
        device = outside.get("device") if device is None else device
    live_timeout_s = outside.get("live_timeout_s") if live_timeout_s is None else live_timeout_s
    check_live_timeout(live_timeout_s)
    threads = outside.get("threads") if threads is None else OPTIONS["threads"].check("threads", threads)
    drain_s = (
        outside.get("drain_s", DRAIN_S) if drain_s is None else OPTIONS["drain_s"].check("drain_s", drain_s)
    )

    def make_service() -> Service:
        loaded = load_model(
            model,
            task=task,
            device=device,
            pipeline_kwargs=pipeline_kwargs,
            shortcuts=shortcuts,
            threads=threads,
            most_threads=allowed_cpus(),
        )
        return Service(loaded, settings, given=given, name=name, retry=retry, live_timeout_s=live_timeout_s)

    rule = access(
        token or os.environ.get(TOKEN_VARIABLE) or None,
        allowed_hosts=allowed_hosts or outside.get("allowed_hosts", ()),
        allowed_origins=allowed_origins or outside.get("allowed_origins", ()),
        public=public,
        require_token=bool(outside.get("require_token") if require_token is None else require_token),
    )
    return build_app(make_service, access=rule, drain_s=drain_s)


def _introduction(server: Server) -> str:
    service = server._service
    return f"serving {service.model_name} ({service.task}, {service.device}) at {server.url}"


def _biography(server: Server) -> str:
    service = server._service
    up = service.snapshot()["uptime_s"]
    words = f"{up:.0f} s" if up < 120 else f"{up / 60:.0f} min"
    return f"up {words}, {service.metrics.requests()} requests"
