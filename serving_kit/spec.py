"""`ServeSpec`: what `serve`, `create_app` and the command were asked for, in one frozen value.

    serve(...)        ─┐
    create_app(...)    ├──▶ ServeSpec ── build() ──▶ Service ── app(service, token) ──▶ ASGI app
    serving-kit serve ─┘        │
                                └── as_code() ──▶ "serving_kit.serve(...)"

Values are checked here, once. Importing this module imports neither torch nor starlette.

Not here: what the environment and a file say (`options.py`), ports and threads (`serving.py`).
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from serving_kit.errors import StartError
from serving_kit.http.access import Access, access
from serving_kit.options import OPTIONS, check_host, check_port
from serving_kit.service import Service, check_live_timeout
from serving_kit.settings import KNOBS, Settings
from serving_kit.values import as_python

if TYPE_CHECKING:
    from starlette.applications import Starlette

_NOT_IN_CODE = ("model", "settings", "given", "public", "access_log")  # the rest are arguments of `serve`


@dataclass(frozen=True, slots=True)
class LiveModel:
    """The name of a pipeline or function that was passed as an object, in place of the object."""

    name: str


@dataclass(frozen=True, kw_only=True)
class ServeSpec:
    """One server as it was asked for. The defaults are those of `serve()`, which documents the arguments.

    Picklable, unless `model` is a live pipeline or function.

    Attributes:
        model: None: the demo model; a Hub id or folder; a pipeline or function; or the name of one.
        settings: The knobs at the start.
        given: The knobs that a person has set; the others may be lowered to what the model can do.
        public: No request needs a token or a known name.
        access_log: One log line for each HTTP request.

    Raises:
        SettingError: a value is outside its range.
        StartError: a host or a port that cannot be one.
    """

    model: object = None
    task: str | None = None
    port: int = 8000
    host: str = "127.0.0.1"
    name: str = "default"
    device: object = None
    pipeline_kwargs: Mapping[str, object] = field(default_factory=dict)
    shortcuts: bool = True
    retry: bool = True
    allowed_hosts: Iterable[str] = ()
    allowed_origins: Iterable[str] = ()
    live_timeout_s: float | None = None
    require_token: bool = False
    drain_s: float = 5.0
    lame_duck_s: float = 0.0
    threads: int | None = None
    precision: str = "exact"
    settings: Settings = field(default_factory=Settings)
    given: frozenset[str] = frozenset()
    public: bool = False
    access_log: bool = False

    def __post_init__(self) -> None:
        check_host(self.host)
        check_live_timeout(self.live_timeout_s)
        self._set("port", as_python(self.port))
        check_port(self.port)
        for name in ("drain_s", "lame_duck_s", "threads", "precision"):
            if name != "threads" or self.threads is not None:
                self._set(name, OPTIONS[name].check(name, getattr(self, name)))
        self._set("allowed_hosts", _tuple(self.allowed_hosts))
        self._set("allowed_origins", _tuple(self.allowed_origins))
        given: object = self.pipeline_kwargs
        if given is not None and not isinstance(given, Mapping):
            raise StartError(f"pipeline_kwargs must be a mapping, got {given!r}")
        self._set("pipeline_kwargs", dict(self.pipeline_kwargs or {}))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def from_options(cls, options: Mapping[str, object]) -> ServeSpec:
        """The spec that these options ask for.

        Args:
            options: What was given, by name: fields of this class and knobs. Other options are left out.
        """
        fields = {each.name for each in dataclasses.fields(cls)} - {"settings", "given"}
        ours: dict[str, Any] = {name: value for name, value in options.items() if name in fields}
        knobs: dict[str, Any] = {name: value for name, value in options.items() if name in KNOBS}
        return cls(**ours, settings=Settings(**knobs), given=frozenset(knobs))

    def build(self, *, most_threads: int | None = None) -> Service:
        """Load the model and make its service. In the caller's thread; may take minutes.

        Args:
            most_threads: As for `load_model`.

        Raises:
            StartError: the model cannot be loaded; says what to do.
            SettingError: the given knobs ask this model for more than it can do.
        """
        from serving_kit.models.loading import load_model

        if isinstance(self.model, LiveModel):
            raise StartError(f"this spec has only the name of {self.model.name}; pass the object itself")
        model = load_model(
            self.model,
            task=self.task,
            device=self.device,
            pipeline_kwargs=self.pipeline_kwargs,
            shortcuts=self.shortcuts,
            threads=self.threads,
            precision=self.precision,
            most_threads=most_threads,
        )
        return Service(
            model,
            self.settings,
            given=self.given,
            name=self.name,
            retry=self.retry,
            live_timeout_s=self.live_timeout_s,
        )

    def access(self, token: str | None) -> Access:
        """Who may ask.

        Raises:
            SettingError: a token is required, but there is none or the server is public.
        """
        return access(
            token,
            self.host,
            allowed_hosts=self.allowed_hosts,
            allowed_origins=self.allowed_origins,
            public=self.public,
            require_token=self.require_token,
        )

    def app(self, service: Service | Callable[[], Service], token: str | None) -> Starlette:
        """The ASGI app of a service, or of one that is made when the app starts.

        Raises:
            SettingError: as `access` does.
        """
        from serving_kit.http.app import build_app

        return build_app(service, access=self.access(token), access_log=self.access_log, drain_s=self.drain_s)

    def as_code(self, settings: Settings | None = None) -> str:
        """The call of `serve()` that asks for this: every argument that is not at its default.

        A pipeline or function is called by its name, which may differ from that of the caller's variable.

        Args:
            settings: The knobs in force; None: those at the start.
        """
        usual, knobs = ServeSpec(), (settings or self.settings).to_dict()
        values = {
            each.name: getattr(self, each.name)
            for each in dataclasses.fields(self)
            if each.name not in _NOT_IN_CODE and getattr(self, each.name) != getattr(usual, each.name)
        }
        values |= {name: value for name, value in knobs.items() if value != KNOBS[name].default}
        shown = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        named = [f"{name}={value!r}" for name, value in shown.items()]
        return f"serving_kit.serve({', '.join([*_model_code(self.model), *named])})"

    def without_object(self) -> ServeSpec:
        """The same with the name of a live pipeline or function, so that it keeps no model in memory."""
        if _is_by_name(self.model):
            return self
        return dataclasses.replace(self, model=LiveModel(_model_name(self.model)))

    def __getstate__(self) -> dict[str, object]:
        if not _is_by_name(self.model):
            raise pickle.PicklingError(
                f"{_model_name(self.model)} is an object of this process, so its ServeSpec cannot be "
                "pickled; name the model by its Hub id or folder"
            )
        return dict(self.__dict__)


def is_loaded_by_name(model: object) -> bool:
    """Whether `model` is the demo model, a Hub id or a folder: what task and device are for."""
    return model is None or isinstance(model, (str, os.PathLike))


def _is_by_name(model: object) -> bool:
    return is_loaded_by_name(model) or isinstance(model, LiveModel)


def _model_name(model: object) -> str:
    name = str(getattr(model, "__name__", "pipe"))
    return name if name.isidentifier() else "model"


def _model_code(model: object) -> list[str]:
    """The first argument of `serve()`, as code."""
    if model is None:
        return []
    if isinstance(model, LiveModel):
        return [model.name]
    return [repr(os.fspath(model))] if isinstance(model, (str, os.PathLike)) else [_model_name(model)]


def _tuple(texts: str | Iterable[str] | None) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts or ())
