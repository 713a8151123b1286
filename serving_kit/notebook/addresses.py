"""The address at which a browser reaches a port of this kernel.

A kernel may run far from the browser that shows its notebook. Every hosted notebook has its own way to
pass a port through, and says so in its environment; what is not recognised is taken to be local.

Not here: the address for code in the kernel, which is always `Server.url`.
"""

from __future__ import annotations

import os
import string
import sys
import threading
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

VARIABLE = "SERVING_KIT_URL"  # wins: "https://example.org/{USER}/{port}/"


class Address(NamedTuple):
    """Where to point a browser.

    Attributes:
        url: Absolute, or a path below the notebook's own host; "" where no browser can get through.
        note: What it takes, for people; "" if nothing.
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
    template = environ.get(VARIABLE, "")
    if template:
        return Address(_Template(template).format(port=port, **environ))
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


def _ask_colab(port: int, ask: Callable[[int], str] | None) -> Address:
    """Colab knows the address only in the page, and answers only while a cell of its own waits."""
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


class _Template(string.Formatter):
    """`{name}` from the environment; what is not there stays as it is written."""

    def __init__(self, template: str) -> None:
        self._template = template

    def format(self, **values: Any) -> str:  # type: ignore[override]
        """The template with its names replaced."""
        return self.vformat(self._template, (), values)

    def get_value(self, key: int | str, args: Any, kwargs: Any) -> Any:
        """The value of one name."""
        return kwargs.get(str(key), f"{{{key}}}")
