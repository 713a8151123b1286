"""The live panel of one server in a notebook.

    server.stats() --- publisher.py, 4 Hz ---> picture.py ---> frames.py ---> frontend/ draws
    server._tune() <--- messages.py <--------- widgets.py <------------------ a slider moves

Nothing is sent while nothing changes, or before a view has reported that it is visible. Nothing here
prints, and nothing raises where a cell would show it.

A notebook gets two outputs: static HTML, which is all that a saved notebook has when its kernel is gone,
and the widget, which hides the static HTML while it is live.

Not here: how the panel looks (`frontend/`), the static HTML (`static_html.py`), what the numbers mean
(`metrics.py`), the page at `GET /` (`http/`).
"""

from __future__ import annotations

import functools
import threading
import time
import weakref
from typing import Protocol

from serving_kit.incidents import make_incident
from serving_kit.log import ServerLog
from serving_kit.notebook import messages, process_settings, widgets
from serving_kit.notebook.addresses import Address, browser_address
from serving_kit.notebook.frames import JSON
from serving_kit.notebook.picture import PanelServer, Picture
from serving_kit.notebook.publisher import Publisher, Tick
from serving_kit.settings import settings_schema

_HTML_S = 10.0  # between two updates of the static HTML behind a live panel
_PLAIN_HTML_S = 1.0  # the same without a live panel
_JOIN_S = 0.5
_WIDGET_MIME = "application/vnd.jupyter.widget-view+json"


class _Display(Protocol):
    """An output of a cell; IPython's `DisplayHandle`."""

    def update(self, bundle: dict[str, object], *, raw: bool) -> None:
        """Replace what the output shows."""


def make_panel(server: PanelServer) -> Panel:
    """The panel of `server`, started; call it once for each."""
    picture = Picture()
    picture.read(server)
    panel = Panel(server, picture, browser_address(int(server.url.rpartition(":")[2])))
    panel.start(server.running)
    return panel


class Panel:
    """One panel, however often it is shown.

    Every method may be called from any thread, except that `show` and `bundle` belong to a cell.
    """

    def __init__(self, server: PanelServer, picture: Picture, address: Address) -> None:
        # Weak, so that neither a thread nor the registry of widgets keeps a server and its model alive.
        self._server = weakref.ref(server)
        self._address = address
        self._picture = picture
        self._log = ServerLog(picture.name)
        self._publisher = Publisher(self._step, self._log_failure)
        self._views = _Views()
        self._live: widgets.LiveWidgets | None = None
        self._plain: widgets.Widget | None = None
        self._closing = threading.Lock()  # the cell that stops the server, and the thread that reads messages
        self._display: _Display | None = None  # of the static HTML; None: never shown
        self._displayed_at = 0.0
        self._unsent = False  # whether the last frame lacks a change
        self._undisplayed = True  # whether the static HTML does
        self._finished = False

    def start(self, running: bool) -> None:
        """Make the widgets and, while the server is running, start the thread."""
        on_message = functools.partial(_on_message, weakref.ref(self))
        self._live = widgets.make_live(settings_schema(), self._frame(), on_message)
        if self._live is None:
            self._plain = widgets.make_plain(self._picture.settings, functools.partial(_tune, self._server))
        self._finished = not running
        if running:
            self._publisher.start()

    @property
    def widget(self) -> widgets.Widget | None:
        """For `ipywidgets.VBox` and its like: the live panel; without anywidget, plain sliders.

        None without ipywidgets, and once the server has ended and no view is left.
        """
        return self._live.frames if self._live is not None else self._plain

    @property
    def controls(self) -> widgets.Controls | None:
        """The model that the live panel's sliders talk to; None where there is no live panel."""
        return self._live.controls if self._live is not None else None

    # -- showing it ------------------------------------------------------------------------------

    def show(self, text: str = "") -> None:
        """Display static HTML and the widget in the running cell; in a terminal, `text`."""
        from IPython.display import display

        self._display = display(self._html_bundle(text), raw=True, display_id=True)
        self._displayed_at = time.monotonic()
        if self.widget is not None:
            # In an output of its own: a widget that is gone shows an error in place of its whole output.
            display(_widget_bundle(self.widget), raw=True)

    def bundle(self) -> dict[str, object]:
        """Mime types and contents, for what shows one output only."""
        live = _widget_bundle(self.widget) if self.widget is not None else {}
        return {**self._html_bundle(), **live}

    def _ipython_display_(self) -> None:
        self.show(repr(self))

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, object]:
        return {"text/plain": repr(self), **self.bundle()}

    def _html_bundle(self, text: str = "") -> dict[str, object]:
        server = self._server()
        if server is not None and not self._finished:  # the last numbers of a stopped server say more
            self._read(server)
        self._undisplayed = False
        # Without a live panel that follows it, the static HTML must not hide what follows it.
        mark = self.controls.model_id if self.controls is not None else ""
        bundle: dict[str, object] = {"text/html": self._picture.static_html(mark)}
        return {"text/plain": text, **bundle} if text else bundle

    def _update_html(self) -> None:
        if self._display is not None and self._undisplayed:
            self._displayed_at = time.monotonic()
            self._display.update(self._html_bundle(), raw=True)

    # -- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Show the end of the server and end the thread; the last numbers stay. Any thread; idempotent."""
        if self._finished:
            return  # without reading again: the numbers of the last 30 seconds would be gone
        try:
            self._finish()
        except Exception as error:
            _keep(error)

    def _finish(self) -> None:
        server = self._server()
        self._finished = True
        self._publisher.stop(_JOIN_S)
        if server is not None:
            self._read(server)
            if self._unsent and self._views.exist:
                self._send()
        self._update_html()  # before the widgets are closed: it names the one that follows it
        self._close_unless_shown()

    def on_view(self, view: str, visible: bool | None) -> None:
        """A view has become visible or invisible; None: it was removed. Any thread."""
        self._views.put(view, visible)
        if visible is None and self._finished:
            self._close_unless_shown()
        self._publisher.wake()

    def _close_unless_shown(self) -> None:
        """Close the widgets of a server that has ended once no view is left, or the kernel would keep them.

        When the server is shown again, that is static HTML, as in a notebook whose kernel is gone.
        """
        with self._closing:
            live = self._live
            if live is None or self._views.exist:
                return
            self._live = None
        live.close()

    # -- the publisher ---------------------------------------------------------------------------

    def _step(self) -> Tick | None:
        """One tick of the publisher; None: the server has ended.

        A function of its own, so that nothing holds the server between two ticks.
        """
        server = self._server()
        if server is None or self._finished:
            return None
        tick = self._update(server)
        return tick if server.running else None

    def _update(self, server: PanelServer) -> Tick:
        """Read the server, if anything shows it, and send what has changed."""
        watched = self._live is not None and self._views.any_visible
        period_s = _HTML_S if self._live is not None else _PLAIN_HTML_S
        html_due = self._display is not None and time.monotonic() - self._displayed_at >= period_s
        if not watched and not html_due and server.running:
            return Tick(0, active=False)
        active = self._read(server)
        if html_due:
            self._update_html()
        return Tick(self._send() if watched and self._unsent else 0, active)

    def _read(self, server: PanelServer) -> bool:
        """Whether anything happened at the server."""
        change = self._picture.read(server)
        self._unsent |= change.visible
        self._undisplayed |= change.visible
        return change.active

    def _send(self) -> int:
        """Send a frame to all views; returns its bytes."""
        live = self._live
        if live is None:
            return 0
        self._unsent = False
        frame = live.frames.frame = self._frame()
        return len(frame)

    def _frame(self) -> bytes:
        cost = self._publisher.cost
        return self._picture.frame(
            {
                "browser": self._address._asdict(),
                "panel": {"ms": round(cost.ms_per_s, 2), "kb": round(cost.kb_per_s, 1)},
            }
        )

    def _log_failure(self, error: Exception) -> None:
        self._log.panel_failed(make_incident(error))


class _Views:
    """The views of one panel, in all front ends, and whether each is visible."""

    def __init__(self) -> None:
        self._visible: dict[str, bool] = {}

    def put(self, view: str, visible: bool | None) -> None:
        """None: the view was removed."""
        if visible is None:
            self._visible.pop(view, None)
        else:
            self._visible[view] = visible

    @property
    def exist(self) -> bool:
        return bool(self._visible)

    @property
    def any_visible(self) -> bool:
        return any(list(self._visible.values()))


def _widget_bundle(widget: widgets.Widget) -> dict[str, object]:
    return {_WIDGET_MIME: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}}


def _on_message(
    panel_ref: weakref.ref[Panel], controls: widgets.Controls, message: JSON, buffers: object
) -> None:
    """Answer one message of the browser, on whichever thread the kernel reads it.

    Every message is answered, also a hello: the answer is what makes ipykernel 7.4 pass the next
    message to the browser's own subshell, so that a slider is read while a cell runs.
    """
    try:
        panel = panel_ref()
        server = panel._server() if panel is not None else None
        on_view = panel.on_view if panel is not None else _ignore_view
        controls.send(messages.answer(message, server, on_view))
    except Exception as error:  # it would be printed into the cell that runs
        _keep(error)


def _ignore_view(view: str, visible: bool | None) -> None:
    """The panel is gone."""


def _tune(server_ref: weakref.ref[PanelServer], name: str, value: object) -> None:
    server = server_ref()
    if server is not None:
        server._tune("panel", {name: value})


def _keep(error: Exception) -> None:
    process_settings.keep(f"panel: {type(error).__name__}: {error}")
