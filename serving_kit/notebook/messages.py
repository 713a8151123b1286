"""The messages of the panel in a browser, and the answer to each. No widgets, no threads.

Not here: how they travel (`widgets.py`), their thread (`panel.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from serving_kit.errors import SettingError, Unavailable
from serving_kit.notebook.frames import JSON
from serving_kit.notebook.picture import PanelServer

OnView: TypeAlias = Callable[[str, bool | None], None]

_MAX_ERRORS = 8
_STOPPED = "the server has stopped"


def answer(message: JSON, server: PanelServer | None, on_view: OnView) -> JSON:
    """The answer to one message.

    Args:
        message: Its `kind` is "hello" (for the token), "errors", "seen" or "tune".
        server: None: it is gone.
        on_view: Called with the id of a view and whether it is visible; None: the view was removed.

    Raises:
        Exception: The message is not one of the panel's.
    """
    return {"id": message["id"], **_answer(message, server, on_view)}


def _answer(message: JSON, server: PanelServer | None, on_view: OnView) -> JSON:
    match message["kind"]:
        case "hello":
            # Not as a trait of the widget, because traits are saved with the notebook.
            return {"token": server.token if server is not None else None}
        case "seen":
            on_view(str(message["view"]), message["seen"])
            return {}
        case "errors":
            errors = server.errors()[:_MAX_ERRORS] if server is not None else []
            return {"errors": [incident.to_dict() for incident in errors]}
    if server is None or not server.running:
        return {"error": _STOPPED}
    try:
        return {"settings": server._tune("panel", message["knobs"]).to_dict()}
    except (SettingError, Unavailable) as error:
        return {"error": str(error)}
