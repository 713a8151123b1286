"""`create_app`: the same engine as an ASGI app, for `uvicorn server:app` and other ASGI servers.

Not here: the app itself (`http/app.py`), the command (`cli.py`).
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Unpack

from starlette.applications import Starlette

from serving_kit.cpus import allowed_cpus
from serving_kit.options import DRAIN_S, TOKEN_VARIABLE, from_outside, unknown_variables
from serving_kit.service import Service
from serving_kit.settings import KNOBS, Knobs, refuse_unknown, with_knobs
from serving_kit.spec import ServeSpec, is_loaded_by_name

_FOR_LOADING = {"model", "task", "device"}  # a pipeline or function that is handed over is loaded already
_FOR_THE_COMMAND = {"host", "port", "lame_duck_s", "access_log"}  # the ASGI server's own business here


@with_knobs(defaults=False)
def create_app(
    model: object = None,
    *,
    task: str | None = None,
    name: str = "default",
    device: object = None,
    pipeline_kwargs: Mapping[str, object] | None = None,
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
    precision: str | None = None,
    **knobs: Unpack[Knobs],
) -> Starlette:
    """The same engine as an ASGI app, for `uvicorn server:app` and other ASGI servers.

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
        token: What changing settings needs as bearer token, and everything else that does not come from
            this machine. None takes it from the environment variable SERVING_KIT_TOKEN; without that,
            settings are fixed and only this machine may ask.
        public: Ask for no token, whatever address and name a request comes by. Use it behind a gateway that
            checks who may send requests.
        allowed_hosts: As for `serve()`.
        allowed_origins: As for `serve()`.
        live_timeout_s: As for `serve()`.
        require_token: As for `serve()`.
        drain_s: Seconds for what is still admitted when the ASGI server ends the app's lifespan; default 25.
        threads: torch's threads for one operation, in the whole process. Default: the CPUs that affinity and
            cgroup quota allow, at most as many as torch itself would take. Divide them among the processes
            if there are several.
        precision: As for `serve()`.
        **knobs: The knobs of `Settings`, such as max_batch_size=8; one that is not given is taken from
            the environment or the file.

    Raises:
        SettingError: a knob has an unknown name or a bad value, the text names its source; or a token is
            required and there is none.
    """
    refuse_unknown(knobs, inspect.signature(create_app).parameters)
    for warning in unknown_variables(os.environ):
        warnings.warn(warning, stacklevel=2)
    spec = _spec(
        {
            "model": model,
            "task": task or None,
            "name": name,
            "device": device,
            "pipeline_kwargs": pipeline_kwargs,
            "shortcuts": shortcuts,
            "retry": retry,
            "public": public,
            "allowed_hosts": allowed_hosts or None,
            "allowed_origins": allowed_origins or None,
            "live_timeout_s": live_timeout_s,
            "require_token": require_token,
            "drain_s": drain_s,
            "threads": threads,
            "precision": precision,
            **knobs,
        }
    )

    def make_service() -> Service:
        return spec.build(most_threads=allowed_cpus())

    return spec.app(make_service, token or os.environ.get(TOKEN_VARIABLE) or None)


def _spec(arguments: Mapping[str, object]) -> ServeSpec:
    """The spec of an app: its arguments before the environment before the file.

    Args:
        arguments: By name; None: not given.
    """
    ignored = _FOR_THE_COMMAND if is_loaded_by_name(arguments["model"]) else _FOR_THE_COMMAND | _FOR_LOADING
    outside = {name: value for name, value in from_outside(os.environ).items() if name not in ignored}
    given = {name: value for name, value in arguments.items() if value is not None or name in KNOBS}
    return ServeSpec.from_options({"drain_s": DRAIN_S, **outside, **given})
