"""The `serving-kit` command: the same engine without a notebook.

    serving-kit serve google-bert/bert-base-uncased --max-batch-size 8

Its process is its own: it handles signals, prints, and configures the log.

Not here: the options and where they come from (`options.py`), the server that is built (`spec.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

import uvicorn
import uvicorn.server

from serving_kit import __version__, log
from serving_kit.cpus import allowed_cpus
from serving_kit.errors import SettingError, StartError
from serving_kit.http.access import is_loopback
from serving_kit.http.connection import Connection
from serving_kit.inline_server import bind, leave_out_of_children
from serving_kit.options import (
    OPTIONS,
    PREFIX,
    SETTINGS_VARIABLE,
    TOKEN_VARIABLE,
    from_outside,
    unknown_variables,
)
from serving_kit.script import pass_on
from serving_kit.service import Service
from serving_kit.settings import KNOBS
from serving_kit.spec import ServeSpec
from serving_kit.values import UNSET, Flag, Number, Spec, Texts

_ANSWER_S = 0.5  # for the answers to requests that are broken off
_NAMES = {"allowed_hosts": ("--allow-host", "NAME"), "allowed_origins": ("--allow-origin", "URL")}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0 after a stop that was asked for, 2 if the server could not start, 130 if it was
        interrupted before.
    """
    try:
        return _run(vars(_parser().parse_args(argv)))
    except (SettingError, StartError) as error:
        print(f"serving-kit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(line: dict[str, object]) -> int:
    """Serve until asked to stop.

    Args:
        line: The command line: option: value, or None.
    """
    options = _options(line)
    spec = ServeSpec.from_options(options)
    sock = bind(spec.host, spec.port)
    log.configure(str(options["log_level"]), str(options["log_format"]))
    for warning in unknown_variables(os.environ):
        logging.getLogger(log.NAME).warning(warning)
    print(f"loading {spec.model or 'the demo model'}", flush=True)
    service = spec.build(most_threads=allowed_cpus())
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(16)
    _introduce(spec, service, sock, token)
    # Without a log_config its lines go where ours go.
    config = uvicorn.Config(
        spec.app(service, token), log_config=None, log_level="warning", access_log=False, http=Connection
    )
    _DrainingUvicorn(config, service, spec.drain_s, spec.lame_duck_s).run(sockets=[sock])
    if not service.join(_ANSWER_S):
        # A model call still runs. The end of the interpreter would take the GIL away from native code, which
        # aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _options(line: dict[str, object]) -> dict[str, object]:
    """All options: the command line before the environment before the file before the defaults."""
    file = line.pop("settings")
    defaults = {
        name: spec.default
        for name, spec in OPTIONS.items()
        if name not in KNOBS and spec.default is not UNSET  # a knob is passed on only if it was given
    }
    given = {name: value for name, value in line.items() if value is not None}
    return {**defaults, **from_outside(os.environ, str(file) if file else None), **given}


def _introduce(spec: ServeSpec, service: Service, sock: socket.socket, token: str) -> None:
    """Print what is served, where, and with which token."""
    address, port = sock.getsockname()[:2]
    url = f"http://{'[' + address + ']' if ':' in address else address}:{port}"
    where = f"serving {service.model_name} ({service.task}, {service.device}) at {url}"
    print("; ".join([where, *service.notes]))
    from_variable = bool(os.environ.get(TOKEN_VARIABLE))
    named = f"the one in {TOKEN_VARIABLE}" if from_variable else token
    if spec.require_token:
        print(f"everything needs the token: {named}", flush=True)
    elif is_loopback(spec.host):
        print(f"token for PATCH /settings: {named}", flush=True)
    else:
        print(f"other machines can reach it, so everything needs the token: {named}", flush=True)
        if not from_variable:
            print(f"in a browser: {url}/?token={token}", flush=True)


class _DrainingUvicorn(uvicorn.Server):
    """uvicorn that stops in phases: not ready, then refusing, then without a port; every request is answered.

    SIGTERM, SIGINT and SIGHUP ask it to stop; under nohup SIGHUP stays ignored. A second signal ends the
    waiting, not the answering: what is unfinished gets its 503 at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float, lame_duck_s: float) -> None:
        super().__init__(config)
        leave_out_of_children(self)
        self._service = service
        self._drain_s = drain_s
        self._lame_duck_s = lame_duck_s
        self._close_port_at: float | None = None  # on the monotonic clock; None: not asked to stop
        self._process = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals meanwhile. Other than uvicorn's, it does not raise them again afterwards."""
        signals = list(uvicorn.server.HANDLED_SIGNALS)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        before = {each: signal.signal(each, self.handle_exit) for each in signals}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal, in the thread that runs the loop."""
        if os.getpid() != self._process:  # a forked child, which must end as it would have without us
            pass_on(sig)
            return
        if self._close_port_at is not None:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._break_off)
            return
        self._close_port_at = time.monotonic() + self._lame_duck_s
        self._service.announce_stop()
        if not self._lame_duck_s:
            self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._close_port_at is not None and time.monotonic() >= self._close_port_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, finish what was admitted, answer the rest, end."""
        self._service.drain()
        asyncio.get_running_loop().call_later(self._drain_s, self._break_off)
        await super().shutdown(sockets)

    def _break_off(self) -> None:
        """End without waiting any longer: what is unfinished gets its 503."""
        for task in self.server_state.tasks:
            task.cancel()
        self._service.release()
        self.should_exit = True
        asyncio.get_running_loop().call_later(_ANSWER_S, self._close_connections)

    def _close_connections(self) -> None:
        """Close the connections of clients that do not read their answers."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


# -- the command line ----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serving-kit", description="Serve a Hugging Face model over HTTP: batched, bounded, tuned live."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve one model",
        description="Serve one model. Each option can also be given as an environment variable, "
        f"{PREFIX}MAX_BATCH_SIZE=8, and in a TOML file, max_batch_size = 8. The command line comes before "
        "the environment, the environment before the file.",
    )
    serve.add_argument("model", nargs="?", metavar="MODEL", help=OPTIONS["model"].doc)
    serve.add_argument(
        "--settings", metavar="FILE", help=f"TOML file with options (default: {SETTINGS_VARIABLE}, if set)"
    )
    knobs = serve.add_argument_group(
        "settings", "all of them can also be changed while it runs: PATCH /settings"
    )
    for name, spec in OPTIONS.items():
        if name in KNOBS:
            _add(knobs.add_argument, name, spec, f" ({spec.range}; default: {_words(spec.default)})")
        elif name != "model":
            _add(serve.add_argument, name, spec)
    return parser


def _add(add_argument: Callable[..., object], name: str, spec: Spec, more: str = "") -> None:
    """One option of the command line. Without a default, so that it is known whether it was given."""
    flag, metavar = _NAMES.get(name, (f"--{name.replace('_', '-')}", _metavar(name, spec)))
    about = {"dest": name, "default": None, "help": f"{spec.doc}{more}".replace("%", "%%")}
    if isinstance(spec, Flag) and name not in KNOBS:
        add_argument(flag, action=argparse.BooleanOptionalAction, **about)
        return
    # An option that takes several values may be given several times, and hold several each time.
    action = {"action": "extend"} if isinstance(spec, Texts) else {}
    add_argument(flag, metavar=metavar, type=functools.partial(_read, name, spec), **action, **about)


def _metavar(name: str, spec: Spec) -> str:
    if isinstance(spec, Flag):
        return "yes|no"
    if isinstance(spec, Number):
        return (spec.unit or "N").upper()
    return "|".join(map(str, spec.choices)) or name.upper()


def _read(name: str, spec: Spec, text: str) -> object:
    """A value from the command line."""
    try:
        return spec.read(name, text)
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
