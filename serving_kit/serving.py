"""`serve()`: start a server, or put it in place of the running one of the same name.

    no server of that name     bind a port, load the model, start
    same address               load the model, swap the app behind the socket (`_take_over`)
    same port, another host    load the model, move the port to a new socket, drain the old server (`_move`)
    another port               bind, load the model, start, drain the old server

The old server answers until the new one can; if the new model cannot be loaded, the old server stays.

This module and `server.py` share the private attributes of `Server`. Not here: threads (`inline_server.py`).
"""

from __future__ import annotations

import gc
import inspect
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Unpack

from serving_kit.errors import SettingError, StartError
from serving_kit.http.access import is_loopback
from serving_kit.inline_server import InlineServer, bind
from serving_kit.script import in_a_script
from serving_kit.server import SERVERS, Server, lock_of, servers
from serving_kit.service import Service
from serving_kit.settings import Knobs, Settings, refuse_unknown, with_knobs
from serving_kit.spec import ServeSpec

_PORTS_TO_TRY = 100
_loading = threading.RLock()  # transformers sets the process's default dtype while it loads


@with_knobs(defaults=True)
def serve(
    model: object = None,
    *,
    task: str | None = None,
    port: int = 8000,
    host: str = "127.0.0.1",
    name: str = "default",
    device: object = None,
    pipeline_kwargs: Mapping[str, object] | None = None,
    shortcuts: bool = True,
    retry: bool = True,
    allowed_hosts: Sequence[str] = (),
    allowed_origins: Sequence[str] = (),
    live_timeout_s: float | None = None,
    require_token: bool = False,
    drain_s: float = 5.0,
    lame_duck_s: float = 0.0,
    threads: int | None = None,
    precision: str = "exact",
    stop_first: bool = False,
    **knobs: Unpack[Knobs],
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
        shortcuts: Compute the same answers faster: fill-mask scores the vocabulary at its masks only,
            linear layers on a CPU use oneDNN where that is faster. The numbers differ
            from the pipeline's by rounding (1e-6).
        retry: Call the model again with parts of a batch on which it has raised, so that a bad input fails
            alone. False: such a batch fails whole, and the model gets no input twice; for
            functions with side effects.
        allowed_hosts: Names by which a proxy may ask for it, besides localhost: "models.example.org".
        allowed_origins: Sites whose pages may ask it, and get CORS: "https://example.org".
        live_timeout_s: Seconds after which a model call that hangs makes `GET /live` answer 503, so that an
            orchestrator restarts the process; None: never. `GET /health` says so much sooner.
        require_token: Every request but /live and /health needs the token, also from this machine. Use it
            with a proxy on this machine that rewrites `Host`: without it, the proxy's clients count as
            clients of this machine.
        drain_s: Seconds that admitted requests get to finish when the server stops; the rest is answered
            with 503.
        lame_duck_s: Seconds before that in which `/health` says 503 and requests are still answered, so
            that a load balancer sends no new requests.
        threads: torch's threads for one operation. It holds for the whole process, which is yours: None
            leaves the number alone.
        precision: "exact": the numbers are the pipeline's, within rounding. "fast": bfloat16, if it is
            measured to be faster here; the printed line says what it gains and how far answers move. For
            pipelines.
        stop_first: Stop the running server of that name before the new model is loaded: where both do not
            fit into memory. Meanwhile clients wait for the new one; if it cannot be loaded, none is left.
        **knobs: The knobs of `Settings`, such as max_batch_size=8. The environment's SERVING_KIT_ variables
            are not for notebooks: this function does not read them.

    Raises:
        SettingError: a knob has an unknown name or a bad value.
        StartError: the model cannot be loaded, or nothing can listen there; says what to do.
    """
    refuse_unknown(knobs, inspect.signature(serve).parameters)
    spec = ServeSpec(
        model=model,
        task=task,
        port=port,
        host=host,
        name=name,
        device=device,
        pipeline_kwargs=pipeline_kwargs or {},
        shortcuts=shortcuts,
        retry=retry,
        allowed_hosts=allowed_hosts,
        allowed_origins=allowed_origins,
        live_timeout_s=live_timeout_s,
        require_token=require_token,
        drain_s=drain_s,
        lame_duck_s=lame_duck_s,
        threads=threads,
        precision=precision,
        settings=Settings(**knobs),
        given=frozenset(knobs),
    )
    with lock_of(name):
        return _serve(spec, stop_first)


def _serve(spec: ServeSpec, stop_first: bool) -> Server:
    """Start what was asked for. Under the lock of its name."""
    old, port = SERVERS.get(spec.name), spec.port
    token = old.token if old is not None and old.running else secrets.token_urlsafe(16)
    if old is not None and (stop_first or not old.running):
        if (old.spec.host, old.spec.port) == (spec.host, spec.port):
            port = old._inline.port
        old.stop()  # also if its thread has died: its resources are freed here
        old = None
        gc.collect()  # models are full of cycles
    if old is not None and spec.host == old.spec.host and spec.port in (old.spec.port, old._inline.port):
        return _take_over(old, spec, token)
    if old is not None and spec.port and spec.port == old._inline.port:
        return _move(old, spec, token)
    sock = bind(spec.host, port, tries=_PORTS_TO_TRY)  # first: a model may take minutes to load
    try:
        service = _load(spec, old)
    except BaseException:
        sock.close()
        raise
    return _start(spec, service, sock, old, token)


def _load(spec: ServeSpec, old: Server | None) -> Service:
    """Load the model; the panel of the old server says so meanwhile."""
    if old is not None:
        old._successor_since = time.monotonic()
    try:
        with _loading:
            return spec.build()
    except SettingError as error:
        raise StartError(f"{error}. Or serve one at a time: max_batch_size=1") from error
    finally:
        if old is not None:
            old._successor_since = None


def _take_over(old: Server, spec: ServeSpec, token: str) -> Server:
    """Put a new service behind the socket of a running server."""
    service = _load(spec, old)
    server = Server(spec, service, old._inline, token)
    before = _history(old)

    def register() -> None:
        SERVERS[server.name] = server
        old._become_replaced()

    old._inline.swap(spec.app(service, token), old.drain_s, then=register)
    service.log.replaced(service.model_name, server.url)
    _say(f"{_introduction(server)}, in place of the one that was {before}", server)
    return server


def _move(old: Server, spec: ServeSpec, token: str) -> Server:
    """Replace a running server by one that listens to another host on the same port.

    The system gives no port to two sockets whose addresses overlap, so the old one closes its own when the
    new model is loaded, and finishes what it has admitted when the new one answers.
    """
    bind(spec.host, 0).close()  # fails here, while the old one still answers, if that host cannot be had
    service = _load(spec, old)
    old._inline.close_port()
    try:
        return _start(spec, service, bind(spec.host, spec.port, tries=_PORTS_TO_TRY), old, token)
    except BaseException:
        old.stop()
        raise


def _start(spec: ServeSpec, service: Service, sock: socket.socket, old: Server | None, token: str) -> Server:
    """Start a service on a socket of its own, and stop the server of that name, if there is one."""
    inline = InlineServer(spec.app(service, token), sock)
    server = Server(spec, service, inline, token)
    inline.start()
    SERVERS[server.name] = server
    note = _introduction(server)
    if spec.port not in (0, inline.port):
        note += f", because port {spec.port} is taken by {_holder(spec.port)}"
    if old is not None:
        place = "" if old.url == server.url else f" at {old.url}"
        note += f", in place of the one{place} that was {_history(old)}"
    _say(note, server)
    if old is not None:
        service.log.replaced(service.model_name, server.url)
        try:
            old._end(old.drain_s)
        finally:  # also when ■ interrupts the drain: it has stopped then, too
            old._become_replaced()
    return server


# -- what it prints ------------------------------------------------------------------------------


def _say(line: str, server: Server) -> None:
    """Print the one line of `serve()`, with what its owner should know, in the caller's own cell."""
    notes = [line, *server._service.notes]
    if server.spec.access(server.token).private:
        local = is_loopback(server.spec.host)
        who = "every request" if local else "other machines can reach it, so every request"
        notes.append(
            f"{who} needs server.token: as Authorization: Bearer <token>, or once as /?token=<token> in a "
            "browser"
        )
    if in_a_script():
        notes.append("a script must call server.wait(), or the server ends with it")
    print("; ".join(notes))


def _introduction(server: Server) -> str:
    service = server._service
    return f"serving {service.model_name} ({service.task}, {service.device}) at {server.url}"


def _history(server: Server) -> str:
    """How long a server has run, and how many requests it has had."""
    service = server._service
    up = service.status().uptime_s
    words = f"{up:.0f} s" if up < 120 else f"{up / 60:.0f} min"
    return f"up {words}, {service.metrics.requests()} requests"


def _holder(port: int) -> str:
    """Which program has a port that could not be bound."""
    ours = (each.name for each in servers() if each._inline.port == port)
    return f"the server {name!r}" if (name := next(ours, None)) is not None else "another program"
