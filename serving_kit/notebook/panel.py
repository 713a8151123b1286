"""The live panel of one server: what the browser is sent, and what it may ask.

    server.stats() ──"serving-kit-panel", 4 Hz──▶ _Frames.frame ──▶ panel.js draws
    server.tune()  ◀──────── _answer ◀──────────── _Controls    ◀── a slider moves

Two widget models on purpose: ipykernel 7.4 hands a comm's messages to the shell that last published
on that comm. Frames are published by a thread, so a slider on their comm would wait for the running
cell; the controls' comm carries nothing but answers to the browser, so that a slider works during it.

A frame is the whole picture, so a view that opens late, or again, is right at once. Nothing is sent
while nothing changes, or before a view has said that it is in sight. Nothing here prints, and nothing
raises where a cell would show it; a tick that raises is logged and the next one comes a little later.

A notebook gets two outputs: a static card, which is all that a saved notebook still has when its kernel
is gone, and the widget, which hides the card for as long as it lives.

Not here: how it looks (`panel.js`), the card (`static_html.py`), what the numbers mean (`metrics.py`), the
page (`app.py`).
"""

from __future__ import annotations

import functools
import html
import math
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import orjson

from serving_kit.errors import SettingError, Unavailable
from serving_kit.incidents import make_incident
from serving_kit.log import ServerLog
from serving_kit.notebook import process_settings
from serving_kit.notebook.addresses import browser_address
from serving_kit.notebook.static_html import card
from serving_kit.records import BatchReason, Incident
from serving_kit.settings import KNOBS, Settings, settings_schema

THREAD_NAME = process_settings.THREAD_PREFIX + "panel"
SECONDS = 120  # what the charts show
REASONS = [reason.value for reason in BatchReason]
_TICK_S, _IDLE_TICK_S = 0.25, 1.0
_QUIET_TICKS = 8  # without a change, before the slower tick
_MOST_OF_A_CORE = 0.01  # a slow machine gets fewer frames, not a slower model
_CARD_S = 10.0  # between two pictures of the card behind a live panel
_JOIN_S = 0.5
_LONGEST_WAIT_S = 30.0  # after ticks that raised
_SIZE_ROWS = 24  # rows of the batch-size chart, which bounds a frame
_KEPT_ERRORS = 8
_MIME = "application/vnd.jupyter.widget-view+json"
_COUNTS = (
    "queue_depth",
    "in_flight",
    "arrivals",
    "ok",
    "shed",
    "expired",
    "failed",
    "unavailable",
    "samples",
)
_EVENTS = ("requests", "batches", "queue_depth", "in_flight", "settings", "state", "errors")
_SILENT = b"0"  # a second in which nothing happened


class Server(Protocol):
    """What the panel needs of a server."""

    url: str
    token: str

    @property
    def running(self) -> bool:
        """Whether it answers."""

    def stats(self, series: int = 0) -> dict[str, Any]:
        """A snapshot with the last `series` seconds."""

    def _tune(self, by: str, knobs: Mapping[str, Any]) -> Settings:
        """Change knobs, all or none; raises `SettingError`. `by`: who asks, for the log."""

    def errors(self) -> list[Incident]:
        """The latest failures, newest first."""

    def as_code(self) -> str:
        """The call that makes this server with the settings in force."""


def make_panel(server: Server) -> Panel:
    """The panel of `server`; call it once for each."""
    return Panel(server)


class Panel:
    """One panel, however often it is shown.

    Attributes:
        widget: For `ipywidgets.VBox` and its like: the live panel; without anywidget, plain sliders;
            None without ipywidgets, and once the server has ended and no view is left.
        controls: The model that the live panel's sliders talk to; None where there is no live panel.
    """

    def __init__(self, server: Server) -> None:
        # Weak: a thread, or the widget registry, must not keep a server (and its model) alive.
        self._server = weakref.ref(server)
        self._address = browser_address(int(server.url.rpartition(":")[2]))
        self._seconds: dict[int, dict[str, Any]] = {}
        self._rows: dict[int, bytes] = {}
        self._read_at = time.monotonic() - SECONDS
        self._snapshot: dict[str, Any] = {}
        self._unsent = self._unprinted = self._moved = False
        self._cost_ms = self._cost_kb = 0.0  # per second, smoothed
        self._out_of_sight: set[str] = set()
        self._in_sight: set[str] = set()
        self._cards: Any = None  # what refreshes the card; None: never shown
        self._card_at = 0.0
        self._looking = threading.RLock()  # the publisher, and the cell that shows the card
        self._wake = threading.Event()
        self._finished = False
        self._thread: threading.Thread | None = None
        self.widget: Any = None
        self.controls: Any = None
        self._look(server)
        self._log = ServerLog(str(self._snapshot["name"]))
        self._make_widgets()
        if not server.running:
            self._finished = True
        else:
            self._thread = threading.Thread(target=self._publish, name=THREAD_NAME, daemon=True)
            self._thread.start()

    def _make_widgets(self) -> None:
        classes = _classes()
        if classes is not None:
            frames, controls = classes
            self.controls = controls()
            _take_replies_anywhere(self.controls)
            self.controls.on_msg(functools.partial(_answer, weakref.ref(self)))
            self.widget = frames(controls=self.controls, knobs=settings_schema(), frame=self._frame())
        else:
            self.widget = _plain_sliders(self._server)

    # -- showing it ------------------------------------------------------------------------------

    def show(self, text: str = "") -> None:
        """Display it in the running cell: the card, and what is live. In a terminal, `text`."""
        from IPython.display import display

        self._cards = display(self._card(text), raw=True, display_id=True)
        self._card_at = time.monotonic()
        if self.widget is not None:
            # In a display of its own: a widget that is gone shows an error in place of its whole output.
            display(self._view(), raw=True)

    def bundle(self) -> dict[str, object]:
        """Mime types and contents, for what shows one output only."""
        return {**self._card(), **(self._view() if self.widget is not None else {})}

    def _ipython_display_(self) -> None:
        self.show(repr(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, object]:
        return {"text/plain": repr(self), **self.bundle()}

    def _view(self) -> dict[str, object]:
        return {_MIME: {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}}

    def _card(self, text: str = "") -> dict[str, object]:
        server = self._server()
        if server is not None and not self._finished:  # a stopped server's last picture says more
            self._look(server)
        self._unprinted = False
        with self._looking:
            points = [self._seconds[second] for second in sorted(self._seconds)]
        busy = [i for i, point in enumerate(points) if point["arrivals"] or point["queue_depth"]]
        controls = self.controls  # without a live panel to follow, the card must not hide what follows it
        mark = controls.model_id if controls is not None else ""
        bundle: dict[str, object] = {
            "text/html": card(self._snapshot, points[busy[0] :] if busy else (), mark)
        }
        return {"text/plain": text, **bundle} if text else bundle

    def _refresh_card(self) -> None:
        if self._cards is not None and self._unprinted:
            self._card_at = time.monotonic()
            self._cards.update(self._card(), raw=True)

    def finish(self) -> None:
        """Show the end of the server and end the thread; the last picture stays. Idempotent."""
        if self._finished:
            return  # and not look again: the numbers of the last 30 seconds would have gone
        try:
            server = self._server()
            self._finished = True
            self._wake.set()
            if self._thread is not None:
                self._thread.join(_JOIN_S)
            if server is not None and (self._look(server) or self._unsent) and self._has_views():
                self._send()
            self._refresh_card()  # before the widgets go: the card must know which view comes after it
            self._let_go()
        except Exception as error:
            process_settings.keep(f"panel: {type(error).__name__}: {error}")

    def _see(self, view: str, seen: bool | None) -> None:
        """A view has come into sight, or gone out of it; None: it was removed."""
        self._in_sight.discard(view)
        self._out_of_sight.discard(view)
        if seen is not None:
            (self._in_sight if seen else self._out_of_sight).add(view)
        elif self._finished:
            self._let_go()
        self._wake.set()

    def _has_views(self) -> bool:
        return bool(self._in_sight or self._out_of_sight)

    def _let_go(self) -> None:
        """Close the widgets of a server that has ended once no view is left: the kernel would keep them.

        Showing the server again gives the static card, as in a notebook whose kernel is gone.
        """
        with self._looking:  # the cell that stops the server, and the thread that reads the last view's end
            widget, controls = self.widget, self.controls
            if controls is None or self._has_views():
                return
            self.widget = self.controls = None
        widget.layout.close()
        widget.close()
        controls.close()

    # -- the publisher ---------------------------------------------------------------------------

    def _publish(self) -> None:
        quiet, failures, wait, last = 0, 0, _TICK_S, time.monotonic()
        while True:
            self._wake.wait(wait)
            self._wake.clear()
            began = time.thread_time()
            try:
                sent = self._step()
            except Exception as error:  # one bad moment must not end it
                failures += 1
                wait = min(2**failures * _TICK_S, _LONGEST_WAIT_S)
                self._log.panel_failed(make_incident(error))
                continue
            if sent is None:
                return
            failures, quiet = 0, 0 if self._moved else quiet + 1
            cost, now = time.thread_time() - began, time.monotonic()
            share = 0.1 / max(now - last, _TICK_S)
            self._cost_ms += share * cost * 1e3 - 0.1 * self._cost_ms
            self._cost_kb += share * sent / 1e3 - 0.1 * self._cost_kb
            last = now
            wait = max(_TICK_S if quiet < _QUIET_TICKS else _IDLE_TICK_S, cost / _MOST_OF_A_CORE)

    def _step(self) -> int | None:
        """One tick. Returns how many bytes were sent; None: there will be no more to send.

        A function of its own, so that nothing holds the server between two ticks.
        """
        server = self._server()
        if server is None or self._finished:
            return None
        sent = self._tick(server)
        return sent if server.running else None

    def _tick(self, server: Server) -> int:
        """Look, and tell the views that are in sight. Returns how many bytes were sent.

        Views say that they are there: a notebook that no front end shows is sent no frames.
        """
        self._moved = False
        watched = self.controls is not None and bool(self._in_sight)
        pause = _CARD_S if self.controls is not None else _IDLE_TICK_S
        card_due = self._cards is not None and time.monotonic() - self._card_at >= pause
        if not watched and not card_due and server.running:
            return 0
        self._unsent |= self._look(server)
        if card_due:
            self._refresh_card()
        return self._send() if watched and self._unsent else 0

    def _look(self, server: Server) -> bool:
        """Read the server; return whether the picture has changed."""
        with self._looking:
            return self._read(server)

    def _read(self, server: Server) -> bool:
        # Seconds that are over do not change (three for slow threads), so they are asked for once.
        now = time.monotonic()
        snapshot = server.stats(series=min(SECONDS, math.ceil(now - self._read_at) + 3))
        self._read_at = now
        points = snapshot.pop("series")
        last = points[-1]["second"]
        for point in points:
            self._seconds[point["second"]] = point
            self._rows[point["second"]] = _row(point)
        for second in [second for second in self._rows if second <= last - SECONDS]:
            del self._rows[second], self._seconds[second]
        if not server.running and snapshot["state"] in ("ready", "draining"):
            snapshot["state"] = "stopped"
        errors = server.errors()
        snapshot["errors"] = errors[0].id if errors else ""
        before, self._snapshot = self._snapshot, snapshot
        changed = _picture(before) != _picture(snapshot)
        # Else only the window of the last 30 seconds has moved on: once a second is enough for that.
        self._moved = any(before.get(key) != snapshot[key] for key in _EVENTS)
        self._unprinted |= changed
        same = before.get("settings") == snapshot["settings"]
        snapshot["code"] = before["code"] if same else server.as_code()
        return changed

    def _send(self) -> int:
        widget = self.widget
        if self.controls is None or widget is None:
            return 0
        self._unsent = False
        frame = self._frame()
        widget.frame = frame
        return len(frame)

    def _frame(self) -> bytes:
        """The picture as compact JSON: at most about 14 kB, bytes because they are not escaped again."""
        with self._looking:
            snapshot = {key: value for key, value in self._snapshot.items() if key != "cost"}
            seconds = sorted(self._rows)
            rows = b",".join([self._rows[second] for second in seconds])
        snapshot["changes"] = _recent(snapshot["changes"])
        snapshot["browser"] = self._address._asdict()
        snapshot["panel"] = {"ms": round(self._cost_ms, 2), "kb": round(self._cost_kb, 1)}
        snapshot["first"] = seconds[0]
        return orjson.dumps(snapshot)[:-1] + b',"rows":[' + rows + b"]}"


def _picture(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """What a viewer would notice: time that passes is the browser's own business."""
    unseen = ("uptime_s", "cost", "changes", "code")
    return {key: value for key, value in snapshot.items() if key not in unseen}


def _recent(changes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The changes that the charts show, and of each knob the last: since when its value is in force."""
    last = {name: id(change) for change in changes for name in change["knobs"]}
    kept = [c for c in changes if c["ago_s"] < SECONDS or id(c) in last.values()]
    return kept[-40:]


def _row(point: Mapping[str, Any]) -> bytes:
    """One second as compact JSON; `panel.js` (unpack) knows the order."""
    if not any(point[name] for name in _COUNTS) and not point["sizes"]:
        return _SILENT
    sizes = {int(size): batches for size, batches in point["sizes"].items()}
    step = math.ceil(max(sizes, default=1) / _SIZE_ROWS)
    latency, padding = point["latency_ms"], point["padding"]
    return orjson.dumps(
        [
            *(point[name] for name in _COUNTS),
            *(_short(latency[name]) for name in ("p50", "p95", "p99")),
            _short(point["queue_wait_ms"]["p50"]),
            _short(point["forward_ms"]["p50"]),
            None if padding is None else round(padding, 2),
            step,
            _digits(sizes, step),
            [point["reasons"].get(reason, 0) for reason in REASONS] if sizes else 0,
        ]
    )


def _digits(sizes: Mapping[int, int], step: int) -> str:
    """One digit (0 to 9, a share of the batches) for each row of `step` sizes, from the smallest."""
    if not sizes:
        return ""
    total = sum(sizes.values())
    rows = [0] * ((max(sizes) - 1) // step + 1)
    for size, batches in sizes.items():
        rows[(size - 1) // step] += batches
    return "".join([str(-(-9 * batches // total)) for batches in rows])


def _short(value: float | None) -> float | None:
    """Three digits: more than a pixel can show."""
    if value is None:
        return None
    return round(value) if value >= 100 else float(f"{value:.3g}")


# -- the browser asks ------------------------------------------------------------------------------


def _answer(panel_ref: weakref.ref[Panel], controls: Any, message: Any, buffers: Any) -> None:
    """Answer one message of the panel, in whichever thread the kernel reads it.

    On the same comm, and also a mere hello: the answer is what tells ipykernel 7.4 to hand the next
    message to the browser's own subshell, so that a slider works while a cell runs.
    """
    try:
        panel = panel_ref()
        server = panel._server() if panel is not None else None
        answer: dict[str, Any] = {"id": message["id"]}
        if message["kind"] == "hello":
            # Here and not in a trait: what is in a trait is saved with the notebook.
            answer["token"] = server.token if server is not None else None
        elif message["kind"] == "seen" and panel is not None:
            panel._see(str(message["view"]), message["seen"])
        elif message["kind"] == "errors":
            errors = server.errors()[:_KEPT_ERRORS] if server is not None else []
            answer["errors"] = [incident.to_dict() for incident in errors]
        elif server is None or not server.running:
            answer["error"] = "the server has stopped"
        else:
            try:
                answer["settings"] = server._tune("panel", message["knobs"]).to_dict()
            except (SettingError, Unavailable) as error:
                answer["error"] = str(error)
        controls.send(answer)
    except Exception as error:  # it would be printed into whichever cell runs
        process_settings.keep(f"panel: {type(error).__name__}: {error}")


def _take_replies_anywhere(widget: Any) -> None:
    """Let the browser choose the shell that reads its messages, until we answer for the first time.

    ipykernel 7.4 remembers the shell that opened a comm, which is the one that runs cells: after "Run
    all", a slider would wait for the cell behind the panel. A private name, hence only if it is there;
    else the first hello that is answered does the same.
    """
    getattr(getattr(widget, "comm", None), "__dict__", {}).pop("_reply_subshell_id", None)


@functools.cache
def _classes() -> tuple[Any, Any] | None:
    """The two widget classes, or None where there is no anywidget."""
    try:
        import anywidget
        import ipywidgets
        import traitlets
    except ImportError:
        return None

    here = Path(__file__).parent
    page = (here / "panel.html").read_text(encoding="utf-8")

    class _Frames(anywidget.AnyWidget):  # type: ignore[misc]
        # A str and not a Path: anywidget watches a path, and the watch keeps the widget forever.
        _esm = "".join((here / name).read_text(encoding="utf-8") for name in ("charts.js", "panel.js"))
        _css = page.partition('<style id="panel">')[2].partition("</style>")[0]
        frame = traitlets.Bytes().tag(sync=True)
        knobs = traitlets.Dict().tag(sync=True)
        controls = traitlets.Instance(ipywidgets.Widget).tag(sync=True, **ipywidgets.widget_serialization)

    class _Controls(ipywidgets.Widget):  # type: ignore[misc]
        """Carries messages only, which the plainest widget of every front end can do."""

    return _Frames, _Controls


def _plain_sliders(server_ref: weakref.ref[Server]) -> Any:
    """The knobs as plain ipywidgets, below the card; None without ipywidgets."""
    try:
        import ipywidgets
    except ImportError:
        return None
    server = server_ref()
    assert server is not None
    settings, refusal = server.stats()["settings"], ipywidgets.HTML()

    def control(name: str) -> Any:
        knob, value = KNOBS[name], settings[name]
        text = {"description": name, "tooltip": knob.doc, "style": {"description_width": "11em"}}
        if knob.kind is bool:
            return ipywidgets.Checkbox(value=value, indent=False, **text)
        if knob.choices:
            return ipywidgets.Dropdown(value=value, options=knob.choices, **text)
        if knob.auto:
            return ipywidgets.Text(value=str(value), continuous_update=False, **text)
        kind = ipywidgets.BoundedIntText if knob.kind is int else ipywidgets.BoundedFloatText
        return kind(value=value, min=knob.low, max=knob.high, **text)

    def listen(name: str, event: Any) -> None:
        server, value = server_ref(), event["new"]
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        try:
            if server is not None:
                server._tune("panel", {name: value})
            refusal.value = ""
        except (SettingError, Unavailable) as error:
            refusal.value = html.escape(str(error))

    box = []
    for name in KNOBS:
        one = control(name)
        one.observe(functools.partial(listen, name), "value")
        box.append(one)
    return ipywidgets.VBox([*box, refusal])
