"""The `serving-kit` command: the same engine without a notebook.

serving-kit serve google-bert/bert-base-uncased --max-batch-size 8
"""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import sys
from collections.abc import Sequence
from types import FrameType

import uvicorn

from serving_kit import __version__, log
from serving_kit.app import build_app
from serving_kit.connection import Connection
from serving_kit.errors import SettingError, StartError
from serving_kit.guard import access, is_loopback
from serving_kit.inline_server import bind
from serving_kit.kit import TOKEN_VARIABLE
from serving_kit.loading import load_model
from serving_kit.service import Service, check_live_timeout
from serving_kit.settings import KNOBS, Knob, Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 if the server could not start."""
    options = _parser().parse_args(argv)
    try:
        given = {name: value for name in KNOBS if (value := getattr(options, name)) is not None}
        settings = Settings(**given)
        check_live_timeout(options.live_timeout_s)
        sock = bind(options.host, options.port)
        log.configure(options.log_level, options.log_format)
        print(f"loading {options.model or 'the demo model'}", flush=True)
        model = load_model(options.model, task=options.task, device=options.device)
        service = Service(model, settings, given=given, live_timeout_s=options.live_timeout_s)
    except (SettingError, StartError) as error:
        print(f"serving-kit: {error}", file=sys.stderr)
        return 2
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(16)
    host, port = sock.getsockname()[:2]
    url = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    print(
        "; ".join(
            [f"serving {service.model_name} ({service.task}, {service.device}) at {url}", *service.notes]
        )
    )
    if options.require_token:
        print(f"everything needs the token: {token}", flush=True)
    elif is_loopback(options.host):
        print(f"token for PATCH /settings: {token}", flush=True)
    else:
        print(f"other machines can reach it, so everything needs the token: {token}")
        print(f"in a browser: {url}/?token={token}", flush=True)
    rule = access(
        token,
        options.host,
        allowed_hosts=options.allow_host,
        allowed_origins=options.allow_origin,
        require_token=options.require_token,
    )
    app = build_app(service, access=rule, access_log=options.access_log)
    config = uvicorn.Config(
        app,
        log_config=None,  # its lines go where ours go
        log_level="warning",
        access_log=False,
        http=Connection,
        timeout_graceful_shutdown=10,
    )
    _Server(config, service).run(sockets=[sock])
    return 0


class _Server(uvicorn.Server):
    """uvicorn that refuses new work from the moment that it is asked to go, and not only new connections."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGTERM and SIGINT, in the thread that runs the loop."""
        self._service.drain()
        super().handle_exit(sig, frame)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serving-kit", description="Serve a Hugging Face model over HTTP: batched, bounded, tuned live."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve", help="serve one model", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    serve.add_argument("model", nargs="?", metavar="MODEL", help="Hub id or folder; default: the demo model")
    serve.add_argument("--task", help="task of transformers.pipeline; default: what the model is for")
    serve.add_argument("--device", help="cpu, cuda:0, mps...; default: the first accelerator, else cpu")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes any free one (default: %(default)s)"
    )
    serve.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name that it may be asked by"
    )
    serve.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="a site whose pages may ask (CORS)"
    )
    serve.add_argument(
        "--require-token", action="store_true", help="every request needs the token, also from this machine"
    )
    serve.add_argument(
        "--live-timeout-s",
        type=float,
        metavar="S",
        help="seconds after which a forward that hangs makes GET /live answer 503 (default: never)",
    )
    log.add_options(serve)
    knobs = serve.add_argument_group(
        "settings", "all of them can also be changed while it runs: PATCH /settings"
    )
    defaults = Settings()
    for name, knob in KNOBS.items():
        knobs.add_argument(
            f"--{name.replace('_', '-')}",
            type=functools.partial(_read, name, knob),
            metavar="yes|no" if knob.kind is bool else (knob.unit or "N").upper(),
            help=f"{knob.doc} ({knob.range}; default: {_words(getattr(defaults, name))})".replace("%", "%%"),
        )
    return parser


def _read(name: str, knob: Knob, text: str) -> object:
    """A knob's value from the command line."""
    value: object = text
    if knob.kind is bool:
        value = {"yes": True, "true": True, "no": False, "false": False}.get(text.lower(), text)
    elif not (knob.auto and text == "auto"):
        try:
            value = float(text)
        except ValueError:
            value = text
    try:
        return knob.check(name, value)
    except SettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _words(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    sys.exit(main())
