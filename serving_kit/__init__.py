"""Serve a Hugging Face model from a notebook: batched, bounded, tuned and watched live.

    import serving_kit
    server = serving_kit.serve("google-bert/bert-base-uncased")

Importing this package imports neither torch nor transformers nor ipywidgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from serving_kit.asgi import create_app
    from serving_kit.errors import (
        ClientGone,
        DeadlineExceeded,
        InputRejected,
        MalformedRequest,
        ModelFailed,
        Overloaded,
        RequestTooLarge,
        ServingError,
        SettingError,
        StartError,
        Unavailable,
    )
    from serving_kit.notebook.nesting import allow_nested_asyncio
    from serving_kit.server import Server, servers, stop_all
    from serving_kit.serving import serve
    from serving_kit.settings import Settings
    from serving_kit.spec import ServeSpec

_HOME = {
    "server": ("Server", "servers", "stop_all"),
    "serving": ("serve",),
    "asgi": ("create_app",),
    "spec": ("ServeSpec",),
    "settings": ("Settings",),
    "notebook.nesting": ("allow_nested_asyncio",),
    "errors": (
        "ClientGone",
        "DeadlineExceeded",
        "InputRejected",
        "MalformedRequest",
        "ModelFailed",
        "Overloaded",
        "RequestTooLarge",
        "ServingError",
        "SettingError",
        "StartError",
        "Unavailable",
    ),
}

__all__ = [
    "ClientGone",
    "DeadlineExceeded",
    "InputRejected",
    "MalformedRequest",
    "ModelFailed",
    "Overloaded",
    "RequestTooLarge",
    "ServeSpec",
    "Server",
    "ServingError",
    "SettingError",
    "Settings",
    "StartError",
    "Unavailable",
    "__version__",
    "allow_nested_asyncio",
    "create_app",
    "serve",
    "servers",
    "stop_all",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used (PEP 562)."""
    import importlib

    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"serving_kit.{module}"), name)
    raise AttributeError(f"module 'serving_kit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
