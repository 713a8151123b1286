"""`ServeSpec`, and the signatures that ask for one."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
import typing
from typing import Any

import pytest

import serving_kit
from serving_kit import ServeSpec, SettingError, Settings, StartError
from serving_kit.settings import KNOBS, Knobs
from serving_kit.spec import LiveModel
from serving_kit.values import UNSET
from tests.support import REPOSITORY

pytestmark = pytest.mark.light


def shout(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


def test_build_makes_a_service() -> None:
    settings = Settings(max_wait_ms=3)
    service = ServeSpec(model=shout, name="loud", settings=settings).build()
    assert (service.name, service.model_name, service.settings) == ("loud", "shout", settings)


def test_a_spec_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServeSpec().port = 1  # type: ignore[misc]


def test_a_spec_by_name_is_picklable() -> None:
    spec = ServeSpec(model="some/model", device="cpu", allowed_hosts=["a"], settings=Settings(timeout_ms=5))
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_a_live_model_is_not_picklable() -> None:
    with pytest.raises(pickle.PicklingError, match=r"shout is an object of this process.*Hub id or folder"):
        pickle.dumps(ServeSpec(model=shout))


def test_name_of_live_model_is_picklable() -> None:
    named = ServeSpec(model=shout).without_object()
    assert pickle.loads(pickle.dumps(named)).model == LiveModel("shout")
    assert named.as_code() == "serving_kit.serve(shout)"
    with pytest.raises(StartError, match="only the name of shout"):
        named.build()


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (ServeSpec(), "serving_kit.serve()"),
        (ServeSpec(model="a/b", port=0), "serving_kit.serve('a/b', port=0)"),
        (ServeSpec(model=lambda xs: xs, retry=False), "serving_kit.serve(model, retry=False)"),
        (ServeSpec(allowed_hosts="a", threads=2), "serving_kit.serve(allowed_hosts=['a'], threads=2)"),
        (ServeSpec(settings=Settings(max_wait_ms=1)), "serving_kit.serve(max_wait_ms=1.0)"),
        (ServeSpec(precision="fast"), "serving_kit.serve(precision='fast')"),
        (ServeSpec(public=True, access_log=True), "serving_kit.serve()"),
    ],
)
def test_as_code(spec: ServeSpec, code: str) -> None:
    assert spec.as_code() == code


def test_as_code_with_the_knobs_in_force() -> None:
    assert ServeSpec().as_code(Settings(max_batch_size=8)) == "serving_kit.serve(max_batch_size=8)"


@pytest.mark.parametrize(
    ("arguments", "kind", "complaint"),
    [
        ({"port": 65536}, StartError, "port must be a whole number from 0 to 65535, got 65536"),
        ({"port": True}, StartError, "port must be"),
        ({"host": ""}, StartError, "host must be a name or an address"),
        ({"drain_s": -1}, SettingError, "drain_s must be a number from 0 to 86,400 s, got -1"),
        ({"lame_duck_s": "x"}, SettingError, "lame_duck_s must be a number"),
        ({"threads": 0}, SettingError, "threads must be a whole number from 1"),
        ({"precision": "int8"}, SettingError, "precision must be one of exact, fast, got 'int8'"),
        ({"precision": None}, SettingError, "precision must be one of exact, fast, got None"),
        ({"live_timeout_s": 0}, SettingError, "live_timeout_s must be a number of seconds above 0"),
    ],
)
def test_bad_values(arguments: dict[str, Any], kind: type[Exception], complaint: str) -> None:
    with pytest.raises(kind, match=complaint):
        ServeSpec(**arguments)


def test_from_options_knows_what_was_given() -> None:
    spec = ServeSpec.from_options({"model": "m", "max_batch_size": 32, "log_level": "info", "drain_s": 9})
    assert (spec.model, spec.drain_s, spec.given) == ("m", 9.0, {"max_batch_size"})
    assert spec.settings == Settings()


def test_importing_spec_imports_no_torch_and_no_web_server() -> None:
    script = "import sys, serving_kit.spec; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert not set(done.stdout.split()) & {"torch", "transformers", "starlette", "uvicorn", "ipywidgets"}


# -- signatures -----------------------------------------------------------------------------------


def knobs_of(function: Any) -> list[tuple[str, object, object]]:
    """Name, type and default of the knobs in a signature."""
    parameters = inspect.signature(function).parameters
    assert not any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return [(name, each.annotation, each.default) for name, each in parameters.items() if name in KNOBS]


def test_knobs_have_the_names_order_and_types_of_settings() -> None:
    assert typing.get_type_hints(Knobs) == typing.get_type_hints(Settings)
    assert list(Knobs.__annotations__) == [each.name for each in dataclasses.fields(Settings)]


def test_serve_shows_every_knob_with_its_default() -> None:
    types = typing.get_type_hints(Settings)
    fields = dataclasses.fields(Settings)
    assert knobs_of(serving_kit.serve) == [(each.name, types[each.name], each.default) for each in fields]


@pytest.mark.parametrize("function", [serving_kit.Server.tune, serving_kit.create_app])
def test_knobs_that_stay_as_they_are_show_no_default(function: Any) -> None:
    types = typing.get_type_hints(Settings)
    assert knobs_of(function) == [(name, types[name], UNSET) for name in KNOBS]
    assert "max_batch_size: int = ..." in str(inspect.signature(function))


@pytest.mark.parametrize("function", [serving_kit.serve, serving_kit.create_app])
def test_arguments_are_fields_of_the_spec(function: Any) -> None:
    fields = {each.name: each.default for each in dataclasses.fields(ServeSpec)}
    own = {"stop_first", "token"}
    for name, each in inspect.signature(function).parameters.items():
        if name in KNOBS or name in own or name == "pipeline_kwargs":
            continue
        assert each.default in (fields[name], None), name


@pytest.mark.parametrize("function", [serving_kit.serve, serving_kit.create_app])
def test_a_misspelt_knob(function: Any) -> None:
    with pytest.raises(
        SettingError, match=r"no setting named 'max_batchsize'; did you mean max_batch_size\?"
    ):
        function(shout, max_batchsize=3)


def test_tune_with_a_misspelt_knob(serve: Any) -> None:
    server = serve(shout)
    with pytest.raises(SettingError, match="did you mean max_batch_size"):
        server.tune(max_batchsize=3)
    assert server.tune() == Settings()


@pytest.mark.parametrize("value", [None, ...])
def test_create_app_refuses_a_knob_that_is_no_value(value: Any) -> None:
    with pytest.raises(SettingError, match="max_wait_ms must be a number"):
        serving_kit.create_app(shout, max_wait_ms=value)
