"""`serve()` and what it returns: the one-liner that wires the rest.

Not here: anything that could be said without the kernel (`service.py`), threads (`inline_server.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from starlette.applications import Starlette

from serving_kit import process_guard
from serving_kit.app import build_app
from serving_kit.batching import THREAD_NAME as MODEL_THREAD_NAME
from serving_kit.errors import ServingError, SettingError, StartError
from serving_kit.guard import Access, access, is_loopback
from serving_kit.inline_server import InlineServer, bind
from serving_kit.loading import load_model
from serving_kit.metrics import HISTORY_S
from serving_kit.records import BatchReason, Incident
from serving_kit.service import Service, check_live_timeout
from serving_kit.settings import Settings, as_python, refuse_unknown

TOKEN_VARIABLE = "SERVING_KIT_TOKEN"
_PORTS_TO_TRY = 100
# Kept on `sys`, so that reloading this module (%autoreload) does not lose track of what runs.
_servers: dict[str, Server] = sys.__dict__.setdefault("_serving_kit_servers", {})
_lock = threading.RLock()
_waiting: dict[threading.Thread, Server] = {}  # model threads that wait for an answer, and whose
_waiting_lock = threading.Lock()


class Server:
    """A model server in this process. Made by `serve()`; every method may be called from any cell.

    Attributes:
        name: What `serve(name=...)` said; a second server of that name replaces this one.
        url: Where code in this kernel reaches it.
        token: What changing settings wants as bearer token, and other machines for everything.
    """

    def __init__(self, service: Service, inline: InlineServer, asked: tuple[str, int], token: str) -> None:
        self.name = service.name
        self.url = inline.url
        self.token = token
        self.asked = asked  # host and port as serve() was given them
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
            ServingError: as HTTP clients get it; a note holds the details.
            RuntimeError: called by the function that this server serves, on its model thread, where the
                answer would wait for itself; also when several servers would wait in a circle.
        """
        with _explained(), self._wait():
            return self._inline.run(self._ask(inputs, parameters))

    async def predict(self, inputs: Any, **parameters: Any) -> Any:
        """The same for `await`: the cell's event loop goes on while the model works."""
        self._refuse_to_wait_for(threading.current_thread())
        with _explained():
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

    def tune(self, **knobs: Any) -> Settings:
        """Change knobs of the running server, all or none; they count from the next batch.

        Returns:
            All the knobs.

        Raises:
            SettingError: an unknown knob or a bad value; nothing was changed.
        """
        return self._tune("tune()", knobs)

    def _tune(self, by: str, knobs: Mapping[str, Any]) -> Settings:
        """The same; `by` is who asks, for the log."""
        return self._service.tune(by, **knobs)

    def stats(self, series: int = 0) -> dict[str, Any]:
        """What the panel shows. Durations in milliseconds; `window` covers the last 30 seconds.

        Args:
            series: Add one entry for each of the last so many seconds, and the knobs that moved.
        """
        snapshot = self._service.snapshot(series)
        if self._replaced:
            snapshot["reason"] = "replaced by a newer run of serve()"
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
        return process_guard.lines()

    @property
    def panel(self) -> Any:
        """The live panel: one for each server, however often it is shown."""
        if self._panel is None:
            from serving_kit.panel import make_panel

            self._panel = make_panel(self)
        return self._panel

    # -- life ------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it answers: not stopped, not replaced."""
        return self._inline.alive and not self._service.stopped

    def stop(self, timeout: float = 5.0) -> None:
        """Finish what was admitted, within `timeout` seconds; close the port; let the model go.

        New requests get 503 meanwhile. Idempotent; a server that was replaced has stopped already.
        """
        with _lock:
            try:
                if not self._replaced:
                    self._service.drain()
                    self._inline.stop(timeout)
                    self._service.abandon()  # a loop that has died could not
            finally:  # also when ■ has ended the patience: it has stopped then, too
                if _servers.get(self.name) is self:
                    del _servers[self.name]
                self._finish_panel()

    def wait(self) -> None:
        """Block until ■ (or Ctrl+C), then stop. For scripts, and for cells that should look busy."""
        with contextlib.suppress(KeyboardInterrupt):
            while self.running:
                time.sleep(0.2)
        self.stop()

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
        **knobs: Any of `Settings`, such as max_batch_size=8.

    Raises:
        SettingError: a knob has an unknown name or a bad value.
        StartError: the model cannot be loaded, or nothing can listen there; says what to do.
    """
    refuse_unknown(knobs)
    settings = Settings(**knobs)
    check_live_timeout(live_timeout_s)
    port = as_python(port)

    def load() -> Service:
        if old is not None:
            old._successor_since = time.monotonic()
        try:
            loaded = load_model(
                model, task=task, device=device, pipeline_kwargs=pipeline_kwargs, shortcuts=shortcuts
            )
            return Service(
                loaded, settings, given=knobs, name=name, retry=retry, live_timeout_s=live_timeout_s
            )
        except SettingError as error:
            raise StartError(f"{error}. Or serve one at a time: max_batch_size=1") from error
        finally:
            if old is not None:
                old._successor_since = None

    with _lock:
        old = _servers.get(name)
        if old is not None and not old.running:
            old.stop()  # its thread has died: what it holds is ours to free
            old = None
        token = old.token if old is not None else secrets.token_urlsafe(16)
        rule = access(
            token,
            host,
            allowed_hosts=allowed_hosts,
            allowed_origins=allowed_origins,
            require_token=require_token,
        )
        if old is not None and old.asked == (host, port):
            server = _take_over(old, load(), rule)
        else:
            sock = bind(host, port, tries=_PORTS_TO_TRY)  # first: a model may take minutes to load
            try:
                server = _start(load(), sock, (host, port), old, rule)
            except BaseException:
                sock.close()
                raise
    given = {"task": task, "port": port, "host": host, "name": name, "device": device}
    given |= {"pipeline_kwargs": pipeline_kwargs, "shortcuts": shortcuts, "retry": retry}
    given |= {"live_timeout_s": live_timeout_s, "require_token": require_token}
    usual = inspect.signature(serve).parameters
    server._model_code = _as_called(model)
    server._named = {key: value for key, value in given.items() if value != usual[key].default}
    return server


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


def _take_over(old: Server, service: Service, rule: Access) -> Server:
    """Put a new service behind the socket of a running server."""
    server = Server(service, old._inline, old.asked, old.token)
    was = _biography(old)

    def register() -> None:
        _servers[server.name] = server
        old._become_replaced()

    old._inline.swap(build_app(service, access=rule), then=register)
    service.log.replaced(service.model_name, server.url)
    print("; ".join([f"{_introduction(server)}, in place of the one that was {was}", *service.notes]))
    return server


def _start(
    service: Service, sock: socket.socket, asked: tuple[str, int], old: Server | None, rule: Access
) -> Server:
    """Start a service on a socket of its own, and stop the server of that name, if there is one."""
    inline = InlineServer(build_app(service, access=rule), sock)
    inline.start()
    server = _servers[service.name] = Server(service, inline, asked, rule.token or "")
    note = _introduction(server)
    host, port = asked
    if port not in (0, inline.port):
        note += f", because port {port} is taken by another program"
    if not is_loopback(host):
        note += (
            ". Other machines can reach it, so everything needs server.token: as Authorization: Bearer "
            "<token>, or once as /?token=<token> in a browser"
        )
    print("; ".join([note, *service.notes]))
    if old is not None:
        print(f"the one at {old.url} ({_biography(old)}) stops")
        service.log.replaced(service.model_name, server.url)
        old._inline.stop()
        old._become_replaced()
    return server


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
    require_token: bool = False,
    **knobs: Any,
) -> Starlette:
    """The same engine as an ASGI app, for `uvicorn server:app` and its like.

    The model is loaded when the app starts, once. An app that is mounted in another one starts with the
    lifespan of that one, which has to pass it on; until then every route but /live answers 503 and says so:

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
        **knobs: Any of `Settings`.

    Raises:
        SettingError: a knob has an unknown name or a bad value, or a token is required and there is none.
    """
    refuse_unknown(knobs)
    settings = Settings(**knobs)
    check_live_timeout(live_timeout_s)

    def make_service() -> Service:
        loaded = load_model(
            model, task=task, device=device, pipeline_kwargs=pipeline_kwargs, shortcuts=shortcuts
        )
        return Service(loaded, settings, given=knobs, name=name, retry=retry, live_timeout_s=live_timeout_s)

    rule = access(
        token or os.environ.get(TOKEN_VARIABLE) or None,
        allowed_hosts=allowed_hosts,
        allowed_origins=allowed_origins,
        public=public,
        require_token=require_token,
    )
    return build_app(make_service, access=rule)


@contextlib.contextmanager
def _explained() -> Any:
    """In the owner's own cell, an error carries what a stranger is not told."""
    try:
        yield
    except ServingError as error:
        if error.detail:
            error.add_note(error.detail)
        if error.incident:
            error.add_note(f"server.errors() has the traceback, as incident {error.incident}")
        raise


def _introduction(server: Server) -> str:
    service = server._service
    return f"serving {service.model_name} ({service.task}, {service.device}) at {server.url}"


def _biography(server: Server) -> str:
    service = server._service
    up = service.snapshot()["uptime_s"]
    words = f"{up:.0f} s" if up < 120 else f"{up / 60:.0f} min"
    return f"up {words}, {service.metrics.requests()} requests"
