"""The `serving-kit` command: the same engine without a notebook.

serving-kit serve google-bert/bert-base-uncased --max-batch-size 8
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
from typing import Any

import uvicorn
import uvicorn.server

from serving_kit import __version__, log
from serving_kit.cpus import allowed_cpus
from serving_kit.errors import SettingError, StartError
from serving_kit.http.access import access, is_loopback
from serving_kit.http.app import build_app
from serving_kit.http.connection import Connection
from serving_kit.inline_server import bind, leave_out_of_children
from serving_kit.models.loading import load_model
from serving_kit.options import (
    DRAIN_S,
    OPTIONS,
    PREFIX,
    SETTINGS_VARIABLE,
    TOKEN_VARIABLE,
    Option,
    from_outside,
    unknown_variables,
)
from serving_kit.service import Service
from serving_kit.settings import KNOBS, Settings

_LAST_WORDS_S = 0.5  # for the answers to what is broken off
_DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 8000,
    "allowed_hosts": [],
    "allowed_origins": [],
    "drain_s": DRAIN_S,
    "lame_duck_s": 0.0,
    "require_token": False,
    "log_level": "info",
    "log_format": "text",
    "access_log": False,
}
_FLAGS = {"allowed_hosts": ("--allow-host", "NAME"), "allowed_origins": ("--allow-origin", "URL")}


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


def _run(given: dict[str, Any]) -> int:
    """Serve until asked to stop.

    Args:
        given: The command line: option: value, or None.
    """
    options: dict[str, Any] = {**dict.fromkeys(OPTIONS), **_DEFAULTS}
    options |= from_outside(os.environ, given.pop("settings"))
    options |= {name: value for name, value in given.items() if value is not None}
    for name, option in OPTIONS.items():
        if option.many:  # each may be given several times, and hold several
            options[name] = [one for text in options[name] for one in option.read(name, text)]
    knobs = {name: options[name] for name in KNOBS if options[name] is not None}
    settings = Settings(**knobs)
    host = options["host"]
    sock = bind(host, options["port"])
    log.configure(options["log_level"], options["log_format"])
    for warning in unknown_variables(os.environ):
        logging.getLogger(log.NAME).warning(warning)
    print(f"loading {options['model'] or 'the demo model'}", flush=True)
    loaded = load_model(
        options["model"],
        task=options["task"],
        device=options["device"],
        threads=options["threads"],
        most_threads=allowed_cpus(),
    )
    service = Service(loaded, settings, given=knobs, live_timeout_s=options["live_timeout_s"])
    own_token = os.environ.get(TOKEN_VARIABLE)
    token = own_token or secrets.token_urlsafe(16)
    address, port = sock.getsockname()[:2]
    url = f"http://{'[' + address + ']' if ':' in address else address}:{port}"
    where = f"serving {service.model_name} ({service.task}, {service.device}) at {url}"
    print("; ".join([where, *service.notes]))
    named = f"the one in {TOKEN_VARIABLE}" if own_token else token
    if options["require_token"]:
        print(f"everything needs the token: {named}", flush=True)
    elif is_loopback(host):
        print(f"token for PATCH /settings: {named}", flush=True)
    else:
        print(f"other machines can reach it, so everything needs the token: {named}", flush=True)
        if not own_token:
            print(f"in a browser: {url}/?token={token}", flush=True)
    rule = access(
        token,
        host,
        allowed_hosts=options["allowed_hosts"],
        allowed_origins=options["allowed_origins"],
        require_token=options["require_token"],
    )
    app = build_app(service, access=rule, access_log=options["access_log"], drain_s=options["drain_s"])
    # Without a log_config its lines go where ours go.
    config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, http=Connection)
    _Server(config, service, options["drain_s"], options["lame_duck_s"]).run(sockets=[sock])
    if not service.join(_LAST_WORDS_S):
        # A forward still runs. The end of the interpreter would take the GIL away from under native code,
        # which aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


class _Server(uvicorn.Server):
    """uvicorn that ends in order: not ready, then refusing, then without a port; nothing is left unanswered.

    SIGTERM, SIGINT and SIGHUP ask it to stop; under nohup SIGHUP stays ignored. A second signal ends the
    waiting, not the answering: what is unfinished gets its 503 at once.
    """

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float, lame_duck_s: float) -> None:
        super().__init__(config)
        leave_out_of_children(self)
        self._service = service
        self._drain_s = drain_s
        self._lame_duck_s = lame_duck_s
        self._leave_at: float | None = None  # when to close the port
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
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)
            return
        if self._leave_at is not None:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._break_off)
            return
        self._leave_at = time.monotonic() + self._lame_duck_s
        self._service.announce_stop()
        if not self._lame_duck_s:
            self._service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
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
        self._service.abandon()
        self.should_exit = True
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._hang_up)

    def _hang_up(self) -> None:
        """Close the connections of clients that do not read their answers."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


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
    defaults = Settings()
    for name, option in OPTIONS.items():
        if name in KNOBS:
            _add(
                knobs.add_argument,
                name,
                option,
                f" ({KNOBS[name].range}; default: {_words(getattr(defaults, name))})",
            )
        elif name != "model":
            _add(serve.add_argument, name, option)
    return parser


def _add(add_argument: Callable[..., object], name: str, option: Option, more: str = "") -> None:
    """One option of the command line. Without a default, so that it can be told whether it was given."""
    flag, metavar = _FLAGS.get(name, (f"--{name.replace('_', '-')}", name.upper()))
    help_text = f"{option.doc}{more}".replace("%", "%%")
    if option.knob is not None and option.knob.kind is bool and name not in KNOBS:
        add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        return
    if option.knob is not None:
        metavar = "yes|no" if option.knob.kind is bool else (option.knob.unit or "N").upper()
    kind: dict[str, Any] = {"type": functools.partial(_read, name, option)}
    add_argument(
        flag,
        dest=name,
        metavar="|".join(option.choices) or metavar,
        help=help_text,
        **{"action": "append"} if option.many else kind,
    )


def _read(name: str, option: Option, text: str) -> object:
    """A value from the command line."""
    try:
        return option.read(name, text)
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
