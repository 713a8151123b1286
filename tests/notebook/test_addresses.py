"""The address for a browser, in each supported kind of notebook."""

import pytest

from serving_kit.notebook.addresses import Address, browser_address

pytestmark = pytest.mark.light


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, "http://127.0.0.1:8123/"),
        ({"JUPYTERHUB_SERVICE_PREFIX": "/user/ada/"}, "/user/ada/proxy/8123/"),
        ({"VSCODE_PROXY_URI": "https://box.example/proxy/{{port}}/"}, "https://box.example/proxy/8123/"),
        ({"VSCODE_PROXY_URI": "https://{{port}}.box.example"}, "https://8123.box.example/"),
        (
            {"CODESPACE_NAME": "ada-x1", "GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN": "app.example.dev"},
            "https://ada-x1-8123.app.example.dev/",
        ),
        ({"VSCODE_PID": "77"}, "http://localhost:8123/"),
        ({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}, ""),
        ({"SERVING_KIT_URL": "https://{WHO}.example/{port}/{nothing}", "WHO": "ada"},
         "https://ada.example/8123/{nothing}"),
    ],
)  # fmt: skip
def test_environments(environ, url):
    assert browser_address(8123, environ, ()).url == url


def test_variable_has_precedence():
    environ = {
        "SERVING_KIT_URL": "/mine/{port}/",
        "JUPYTERHUB_SERVICE_PREFIX": "/user/ada/",
        "CODESPACE_NAME": "x",
    }
    assert browser_address(8123, environ, ()).url == "/mine/8123/"


def test_local():
    assert browser_address(8123, {}, ()).local
    hub = browser_address(8123, {"JUPYTERHUB_SERVICE_PREFIX": "/user/ada/"}, ())
    assert not hub.local
    assert "jupyter-server-proxy" in hub.note


def test_colab():
    colab = {"google.colab"}
    assert browser_address(8123, {}, colab, lambda port: f"https://{port}.colab.example/") == Address(
        "https://8123.colab.example/"
    )

    def refuse(port):
        raise TimeoutError

    refused = browser_address(8123, {}, colab, refuse)
    assert refused.url == ""
    assert "TimeoutError" in refused.note
