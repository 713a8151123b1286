"""`serve()`: the arguments, and running a cell again."""

from __future__ import annotations

import functools
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

import serving_kit
from serving_kit import StartError
from serving_kit.inline_server import InlineServer
from tests.support import BlockingFunction, NamedModel, until
from tests.support_http import free_port

pytestmark = pytest.mark.light


def port_of(server: Any) -> int:
    return int(server.url.rpartition(":")[2])


@pytest.mark.parametrize("host", [None, "", 8000])
def test_bad_host(host: Any) -> None:
    with pytest.raises(StartError, match=r'host must be a name or an address.*"0\.0\.0\.0"'):
        serving_kit.serve(NamedModel(), port=0, host=host)


def two_arguments(texts: list[str], mark: str) -> list[str]:
    return [text + mark for text in texts]


@pytest.mark.parametrize(
    ("function", "names"),
    [(two_arguments, "two_arguments"), (lambda: [1], "<lambda>"), (lambda *, texts: texts, "<lambda>")],
)
def test_function_signature_refused(function: Any, names: str) -> None:
    with pytest.raises(serving_kit.StartError, match=f"{names} cannot be called with one list"):
        serving_kit.serve(function, port=0)


@pytest.mark.parametrize("function", [str.split, sorted, list, functools.partial(two_arguments, mark="!")])
def test_function_signature_accepted(serve: Any, function: Any) -> None:
    assert serve(function).running


@pytest.mark.parametrize(
    ("typo", "meant"), [("devce", "device"), ("prot", "port"), ("max_batch_siz", "max_")]
)
def test_misspelt_argument(typo: str, meant: str) -> None:
    with pytest.raises(serving_kit.SettingError, match=f"did you mean {meant}"):
        serving_kit.serve(two_arguments, **{typo: 1})


def test_required_token_message(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(sorted, require_token=True)
    assert "every request needs server.token" in capsys.readouterr().out
    refused = httpx.post(server.url, content="x")
    assert refused.status_code == 401
    assert (
        "server.token in a notebook, what the command printed, or SERVING_KIT_TOKEN"
        in refused.json()["error"]
    )


def test_port_of_other_server(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = serve(NamedModel(), name="first")
    capsys.readouterr()
    serve(NamedModel(), name="second", port=port_of(first))
    assert f"because port {port_of(first)} is taken by the server 'first'" in capsys.readouterr().out


# -- a re-run -------------------------------------------------------------------------------------


def test_rerun_with_other_host_keeps_port(serve: Any, capsys: pytest.CaptureFixture[str]) -> None:
    old = serve(NamedModel("old"))
    port = port_of(old)
    capsys.readouterr()
    new = serve(NamedModel("new"), port=port, host="0.0.0.0")
    printed = capsys.readouterr().out
    assert port_of(new) == port
    assert "taken" not in printed
    assert new.token == old.token
    answer = httpx.post(new.url, content="x", headers={"authorization": f"Bearer {new.token}"})
    assert answer.json() == "new"
    assert httpx.post(new.url, content="x").status_code == 401, "the access rule of the new host holds"
    back = serve(NamedModel("back"), port=port)
    assert port_of(back) == port
    assert httpx.post(back.url, content="x").json() == "back"
    assert serving_kit.servers() == [back]


def test_rerun_with_unusable_host(serve: Any) -> None:
    """The old server stays."""
    old = serve(NamedModel("old"))
    port = port_of(old)
    with pytest.raises(StartError, match="cannot listen"):
        serve(NamedModel("new"), port=port, host="192.0.2.1")
    assert httpx.post(old.url, content="x").json() == "old"
    assert serving_kit.servers() == [old]


class Watching(NamedModel):
    """Notes, when it is about to be loaded, whether another model is still in memory."""

    def __init__(self, other: weakref.ref[Any]) -> None:
        super().__init__("new")
        self._other = other
        self.saw: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        if name == "preprocess":  # is it a pipeline?
            self.saw.append(self._other() is not None)
        raise AttributeError(name)


@pytest.mark.parametrize("stop_first", [False, True])
def test_stop_first_frees_old_model(serve: Any, stop_first: bool) -> None:
    model = NamedModel("old")
    old = serve(model)
    port = port_of(old)
    new_model = Watching(weakref.ref(model))
    del model
    new = serve(new_model, stop_first=stop_first)
    assert new_model.saw == [not stop_first]
    assert port_of(new) == port
    assert new.token == old.token
    assert new("hello") == "new"
    assert serving_kit.servers() == [new]


def test_stop_first_with_unloadable_model(serve: Any) -> None:
    old = serve(NamedModel("old"))
    with pytest.raises(StartError):
        serve(42, stop_first=True)
    assert not old.running
    assert serving_kit.servers() == []


def test_rerun_on_other_port_drains_old(serve: Any) -> None:
    """Admitted requests are answered; new ones are rejected, or the drain would not end."""
    blocking = BlockingFunction()
    old = serve(blocking, drain_s=30, max_batch_size=1)
    with ThreadPoolExecutor(3) as pool:
        admitted = pool.submit(httpx.post, old.url, content="x", timeout=60)
        assert blocking.inside.wait(10)
        again = pool.submit(serve, NamedModel("new"), port=free_port())
        until(lambda: httpx.get(f"{old.url}/health").json()["status"] == "draining")
        late = httpx.post(old.url, content="y", timeout=60)
        blocking.open.set()
        new = again.result(30)
        assert admitted.result(30).status_code == 200
    assert (late.status_code, late.json()["error_type"]) == (503, "unavailable")
    assert new("x") == "new"


def test_interrupt_during_drain_of_old(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new server stays."""
    old = serve(NamedModel("old"))
    stop, port = InlineServer.stop, free_port()

    def interrupted(inline: InlineServer, drain_s: float = 5.0) -> bool:
        stop(inline, 0)
        if inline.port != port:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr(InlineServer, "stop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            serving_kit.serve(NamedModel("new"), port=port)
    [new] = serving_kit.servers()
    try:
        assert httpx.post(f"http://127.0.0.1:{port}/", content="x").json() == "new"
        assert "replaced" in repr(old)
    finally:
        new.stop()
