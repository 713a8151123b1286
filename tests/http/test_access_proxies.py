"""Proxies on this machine, and hosted notebooks: which names are admitted, and `require_token`."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import serving_kit
from serving_kit import SettingError
from tests.support import REPOSITORY, until
from tests.support_http import answers, ended, free_port

pytestmark = pytest.mark.light
Serve = Callable[..., Any]
VARIABLES = (
    "CODESPACE_NAME",
    "GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN",
    "COLAB_RELEASE_TAG",
    "JUPYTERHUB_PUBLIC_URL",
    "JUPYTERHUB_SERVICE_PREFIX",
    "VSCODE_PROXY_URI",
)


def shout(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


@pytest.fixture(autouse=True)
def no_hosted_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of these tests names no hosted notebook."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def asked_by(server: Any, host: str) -> int:
    """The status for a client that asks by this name; "{port}" in it is the server's own."""
    host = host.replace("{port}", server.url.rpartition(":")[2])
    return httpx.post(server.url, content="a", headers={"host": host}).status_code


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JUPYTERHUB_SERVICE_PREFIX": "/user/me/"},
        {"JUPYTERHUB_SERVICE_PREFIX": "/user/me/", "JUPYTERHUB_PUBLIC_URL": "https://hub.example/user/me/"},
        {"VSCODE_PROXY_URI": "./proxy/{{port}}"},
        {"VSCODE_PROXY_URI": "https://code.example/proxy/{{port}}/"},
        {"CODESPACE_NAME": "fluffy"},
        {"COLAB_RELEASE_TAG": "release"},
    ],
)
def test_rebound_name(serve: Serve, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    server = serve(shout)
    assert asked_by(server, "evil.example:{port}") == 403
    assert asked_by(server, "127.0.0.1:{port}") == 200
    token = {
        "host": f"evil.example:{server.url.rpartition(':')[2]}",
        "authorization": f"Bearer {server.token}",
    }
    assert httpx.post(server.url, content="a", headers=token).json() == "A"


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/me/"}, "hub.example"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/me/"}, "hub.example:8443"),
        (
            {"JUPYTERHUB_SERVICE_PREFIX": "/", "JUPYTERHUB_PUBLIC_URL": "https://Hub.example:80/user/me/"},
            "hub.example",
        ),
        ({"VSCODE_PROXY_URI": "./proxy/{{port}}"}, "code.example"),
        ({"VSCODE_PROXY_URI": "https://code.example/proxy/{{port}}/"}, "code.example"),
        ({"VSCODE_PROXY_URI": "https://{{port}}--me.code.example"}, "{port}--me.code.example"),
        ({"CODESPACE_NAME": "Fluffy"}, "fluffy-{port}.app.github.dev"),
        (
            {"CODESPACE_NAME": "fluffy", "GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN": "dev.example"},
            "fluffy-{port}.dev.example",
        ),
        ({"COLAB_RELEASE_TAG": "release"}, "x.colab.example"),
    ],
)
def test_proxy_of_a_hosted_notebook(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], name: str
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert asked_by(serve(shout), name) == 200


@pytest.mark.parametrize(
    "environment",
    [
        {"JUPYTERHUB_SERVICE_PREFIX": "/user/me/", "JUPYTERHUB_PUBLIC_URL": "https://hub.example/user/me/"},
        {"VSCODE_PROXY_URI": "https://code.example/proxy/{{port}}/"},
        {"CODESPACE_NAME": "fluffy"},
    ],
)
def test_other_names_than_the_proxys(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    server = serve(shout)
    assert asked_by(server, "evil.example") == 403
    assert asked_by(server, "fluffy-1.app.github.dev") == 403, "the name of another port"


@pytest.mark.parametrize("allowed", ["fd00::1", "[fd00::1]", "[FD00::1]:8000"])
def test_allowed_ipv6_address(serve: Serve, allowed: str) -> None:
    assert asked_by(serve(shout, allowed_hosts=[allowed]), "[fd00::1]:8000") == 200


def test_one_allowed_name(serve: Serve) -> None:
    server = serve(shout, allowed_hosts="Models.example:443", allowed_origins="https://app.example")
    assert asked_by(server, "models.example") == 200
    assert asked_by(server, "m") == 403
    page = {"origin": "https://app.example", "sec-fetch-site": "cross-site"}
    assert (
        httpx.post(server.url, content="a", headers=page).headers["access-control-allow-origin"]
        == page["origin"]
    )
    assert httpx.post(server.url, content="a", headers={"origin": "h"}).status_code == 403


# -- require_token ---------------------------------------------------------------------------------


def check_every_route_needs(token: str, url: str) -> None:
    # As a proxy on this machine sends it that rewrites Host: nothing tells it from a local client.
    with httpx.Client(base_url=url) as client:
        for method, path in (
            ("POST", "/"),
            ("GET", "/"),
            ("GET", "/stats"),
            ("GET", "/metrics"),
            ("GET", "/x"),
        ):
            refused = client.request(method, path, content="a")
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/health").status_code == client.get("/live").status_code == 200
        bearer = {"authorization": f"Bearer {token}"}
        assert client.post("/", content="a [MASK]", headers=bearer).status_code == 200
        assert client.get(f"/?token={token}", follow_redirects=True).status_code == 200
        assert client.get("/stats").status_code == 200, "by its cookie"


def test_serve_requires_the_token(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(shout, require_token=True)
    check_every_route_needs(server.token, server.url)
    assert server("a") == "A", "the owner's cell needs none"
    assert "require_token=True" in server.as_code()
    assert server.token not in capsys.readouterr().out
    again = serve(shout)
    assert httpx.post(again.url, content="a").json() == "A", "running the cell again without it takes it back"


def test_app_requires_the_token(tmp_path: Any) -> None:
    (tmp_path / "server.py").write_text(
        "import serving_kit\n\n"
        "app = serving_kit.create_app(lambda texts: texts, token='a-token', require_token=True)\n"
    )
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path, env=environment
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: answers(url), timeout=60)
            check_every_route_needs("a-token", url)
        finally:
            ended(process)


def test_required_token_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERVING_KIT_TOKEN", raising=False)
    with pytest.raises(SettingError, match="SERVING_KIT_TOKEN"):
        serving_kit.create_app(shout, require_token=True)
    with pytest.raises(SettingError, match="public"):
        serving_kit.create_app(shout, token="t", public=True, require_token=True)


def test_command_requires_the_token() -> None:
    pytest.importorskip("torch")
    port = free_port()
    command = [sys.executable, "-m", "serving_kit.cli", "serve", "--port", str(port), "--require-token"]
    environment = {**os.environ, "SERVING_KIT_TOKEN": "a-token"}
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
    ) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            until(lambda: answers(url), timeout=60)
            check_every_route_needs("a-token", url)
        finally:
            _, said = ended(process)
    assert "Traceback" not in said
