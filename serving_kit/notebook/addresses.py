"""The address at which a browser reaches a port of this kernel.

A kernel may run far from the browser that shows its notebook. Each hosted notebook has its own way to
pass a port through, and its own environment variables; any other environment is taken to be local.

Not here: the address for code in the kernel, which is always `Server.url`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

VARIABLE = "SERVING_KIT_URL"  # has precedence: "https://example.org/{USER}/{port}/"


class Address(NamedTuple):
    """Where to point a browser.

    Attributes:
        url: Absolute, or a path below the notebook's own host; "" where no browser can reach the port.
        note: What the user has to do for it, or why there is none; may be empty.
        local: Whether it works only where browser and kernel share a machine.
    """

    url: str
    note: str = ""
    local: bool = False


def browser_address(
    port: int,
    environ: Mapping[str, str] = os.environ,
    modules: Container[str] = sys.modules,
    colab: Callable[[int], str] | None = None,
) -> Address:
    """The address of `port` for the browser that shows this notebook.

    Args:
        port: The port, on this machine.
        environ: The environment.
        modules: Names of the modules that are loaded.
        colab: Asks Colab's page for its proxy; None: the real one, from the main thread only.
    """
    if environ.get(VARIABLE):
        return _fill_in(environ[VARIABLE], port, environ)
    template = environ.get("VSCODE_PROXY_URI", "")
    if "{{port}}" in template:
        return Address(template.replace("{{port}}", str(port)).rstrip("/") + "/")
    name, domain = environ.get("CODESPACE_NAME"), environ.get("GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN")
    if name and domain:
        return Address(f"https://{name}-{port}.{domain}/")
    if "google.colab" in modules:
        return _ask_colab(port, colab)
    if "JUPYTERHUB_SERVICE_PREFIX" in environ:  # also Binder
        prefix = environ["JUPYTERHUB_SERVICE_PREFIX"].rstrip("/")
        return Address(f"{prefix}/proxy/{port}/", "needs jupyter-server-proxy beside the notebook server")
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:
        return Address("", "Kaggle passes no port to a browser; ask from cells")
    if "VSCODE_PID" in environ or "VSCODE_CWD" in environ:
        return Address(f"http://localhost:{port}/", "on a remote machine, forward the port in VS Code first")
    return Address(f"http://127.0.0.1:{port}/", local=True)


class _KeepUnknown(dict[str, object]):
    """For `str.format_map`: a name without a value stays as it is written."""

    def __missing__(self, name: str) -> str:
        return f"{{{name}}}"


def _fill_in(template: str, port: int, environ: Mapping[str, str]) -> Address:
    """The template of the user, with `{port}` and environment variables replaced."""
    try:
        return Address(template.format_map(_KeepUnknown(environ, port=port)))
    except (ValueError, LookupError, AttributeError) as error:
        return Address("", f"{VARIABLE} is not a template: {error}")


def _ask_colab(port: int, ask: Callable[[int], str] | None) -> Address:
    """Only Colab's page knows the address, and it answers only while a cell of its notebook waits for it."""
    try:
        if ask is None:
            if threading.current_thread() is not threading.main_thread():
                return Address("", "show the server in a cell once more for its address")
            ask = _colab_proxy
        return Address(ask(port))
    except Exception as error:
        return Address("", f"Colab gave no address for the port ({type(error).__name__})")


def _colab_proxy(port: int) -> str:
    from google.colab.output import eval_js  # type: ignore[import-not-found]

    return str(eval_js(f"google.colab.kernel.proxyPort({port})"))
