"""The live panel of one server: what the browser is sent, and what it may ask.

    server.stats() ──"serving-kit-panel", 4 Hz──▶ _Frames.frame ──▶ panel.js draws
    server.tune()  ◀──────── _answer ◀──────────── _Controls    ◀── a slider moves

Two widget models on purpose: ipykernel 7.4 hands a comm's messages to the shell that last published
on that comm. Frames are published by a thread, so a slider on their comm would wait for the running
cell; the controls' comm carries nothing but answers to the browser, so that a slider works during it.

A frame is the whole picture, so a view that opens late, or again, is right at once. Nothing is sent
while nothing changes. Nothing here prints, and nothing raises where a cell would show it.

Not here: how it looks (`panel.js`), what the numbers mean (`metrics.py`), the page (`app.py`).
"""

from __future__ import annotations

import functools
import html
import json
import math
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from serving_kit import process_guard
from serving_kit.errors import SettingError
from serving_kit.settings import Settings

THREAD_NAME = process_guard.THREAD_PREFIX + "panel"
SECONDS = 120  # what the charts show
_TICK_S, _IDLE_TICK_S = 0.25, 1.0
_QUIET_TICKS = 8  # without a change, before the slower tick
_MOST_OF_A_CORE = 0.02  # a slow machine gets fewer frames, not a slower model
_JOIN_S = 0.5
_SIZE_ROWS = 24  # rows of the batch-size chart, which bounds a frame
_MIME = "application/vnd.jupyter.widget-view+json"


class Server(Protocol):
    """What the panel needs of a server."""

    token: str

    @property
    def running(self) -> bool:
        """Whether it answers."""

    def stats(self, series: int = 0) -> dict[str, Any]:
        """A snapshot with the last `series` seconds."""

    def tune(self, **knobs: Any) -> Settings:
        """Change knobs, all or none; raises `SettingError`."""


def make_panel(server: Server) -> Panel:
    """The panel of `server`; call it once for each."""
    return Panel(server)


def mimebundle(server: Any) -> dict[str, object]:
    """What a notebook shows for `server`: its one panel, and a card for where nothing is live."""
    panel: Panel = server.panel
    return panel.bundle()


class Panel:
    """One panel, however often it is shown. Without anywidget there is only the static card.

    Attributes:
        widget: The anywidget, for `ipywidgets.VBox` and its like; None if anywidget is missing.
        controls: The model that the sliders talk to; None likewise.
    """

    def __init__(self, server: Server) -> None:
        # Weak: a thread, or the widget registry, must not keep a server (and its model) alive.
        self._server = weakref.ref(server)
        self._points: dict[int, dict[str, Any]] = {}
        self._read_at = time.monotonic() - SECONDS
        self._snapshot: dict[str, Any] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.widget: Any = None
        self.controls: Any = None
        self._look(server)
        classes = _classes()
        if classes is not None:
            frames, controls = classes
            self.controls = controls()
            self.controls.on_msg(functools.partial(_answer, self._server))
            self.widget = frames(controls=self.controls, frame=self._frame())
        if not server.running:
            self._stop.set()
        elif self.widget is not None:
            self._thread = threading.Thread(target=self._publish, name=THREAD_NAME, daemon=True)
            self._thread.start()

    def bundle(self) -> dict[str, object]:
        """Mime types and contents for a notebook's output."""
        server = self._server()
        # A stopped server's window empties within seconds: its last picture says more.
        snapshot = self._snapshot if server is None or not server.running else server.stats()
        bundle: dict[str, object] = {"text/html": card(snapshot)}
        if self.widget is not None:
            bundle[_MIME] = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return bundle

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, object]:
        return {"text/plain": repr(self), **self.bundle()}

    def finish(self) -> None:
        """Show the end of the server and end the thread; the last picture stays. Idempotent."""
        if self._stop.is_set():
            return  # and not look again: the numbers of the last 30 seconds would have gone
        self._stop.set()
        try:
            if self._thread is not None:
                self._thread.join(_JOIN_S)
            server = self._server()
            if server is not None and self._look(server):
                self._send()
        except Exception as error:
            process_guard.keep(f"panel: {type(error).__name__}: {error}")

    # -- the publisher ---------------------------------------------------------------------------

    def _publish(self) -> None:
        quiet, wait = 0, _TICK_S
        try:
            while not self._stop.wait(wait):
                began = time.thread_time()
                server = self._server()
                if server is None:
                    return
                if self._look(server):
                    self._send()
                    quiet = 0
                else:
                    quiet += 1
                if not server.running:
                    return
                del server  # while we sleep, nothing of ours holds it
                cost = time.thread_time() - began
                wait = max(_TICK_S if quiet < _QUIET_TICKS else _IDLE_TICK_S, cost / _MOST_OF_A_CORE)
        except Exception as error:
            process_guard.keep(f"panel: {type(error).__name__}: {error}; it shows no more numbers")

    def _look(self, server: Server) -> bool:
        """Read the server; return whether the picture has changed."""
        # Seconds that are over do not change (three for slow threads), so they are asked for once.
        now = time.monotonic()
        snapshot = server.stats(series=min(SECONDS, math.ceil(now - self._read_at) + 3))
        self._read_at = now
        points = snapshot.pop("series")
        last = points[-1]["second"]
        for point in points:
            point["sizes"] = {int(size): batches for size, batches in point["sizes"].items()}
            before = self._points.get(point["second"])
            if before is not None:  # what we saw between two batches counts as well
                point["queue_depth"] = max(point["queue_depth"], before["queue_depth"])
            self._points[point["second"]] = point
        points[-1]["queue_depth"] = max(points[-1]["queue_depth"], snapshot["queue_depth"])
        for second in [second for second in self._points if second <= last - SECONDS]:
            del self._points[second]
        if not server.running and snapshot["state"] in ("ready", "draining"):
            snapshot["state"] = "stopped"
        if snapshot["reason"].startswith("replaced"):
            snapshot["state"] = "replaced"
        before_this, self._snapshot = self._snapshot, snapshot
        return _picture(before_this) != _picture(snapshot)

    def _send(self) -> None:
        if self.widget is not None:
            self.widget.frame = self._frame()

    def _frame(self) -> bytes:
        """The picture as compact JSON: at most about 8 kB, bytes because they are not escaped again."""
        snapshot = {key: value for key, value in self._snapshot.items() if key != "cost"}
        snapshot["changes"] = [c for c in snapshot["changes"] if c["ago_s"] < SECONDS][-30:]
        snapshot["series"] = _columns(self._points)
        return json.dumps(snapshot, separators=(",", ":")).encode()


def _picture(snapshot: Mapping[str, Any]) -> dict[str, Any]:
    """What a viewer would notice: time that passes is the browser's own business."""
    return {key: value for key, value in snapshot.items() if key not in ("uptime_s", "cost", "changes")}


def _columns(points: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The seconds as one list for each number, from the first with anything in it."""
    seconds = sorted(points)
    busy = [s for s in seconds if points[s]["queue_depth"] or points[s]["arrivals"] or points[s]["sizes"]]
    first = busy[0] if busy else seconds[-1]
    rows = [points.get(second, {}) for second in range(first, seconds[-1] + 1)]
    largest = max((size for row in rows for size in row.get("sizes", ())), default=1)
    step = math.ceil(largest / _SIZE_ROWS)
    latencies = [row.get("latency_ms", {}) for row in rows]
    return {
        "second": first,
        "queue_depth": [row.get("queue_depth", 0) for row in rows],
        "step": step,
        "sizes": [_digits(row.get("sizes", {}), step) for row in rows],
        **{name: [_short(latency.get(name)) for latency in latencies] for name in ("p50", "p95", "p99")},
    }


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


def _answer(server_ref: weakref.ref[Server], controls: Any, message: Any, buffers: Any) -> None:
    """Answer one message of the panel, in whichever thread the kernel reads it.

    On the same comm, and also a mere hello: the answer is what tells ipykernel 7.4 to hand the next
    message to the browser's own subshell, so that a slider works while a cell runs.
    """
    try:
        server = server_ref()
        answer: dict[str, Any] = {"id": message["id"]}
        if message["kind"] == "hello":
            # Here and not in a trait: what is in a trait is saved with the notebook.
            answer["token"] = server.token if server is not None else None
        elif server is None or not server.running:
            answer["error"] = "the server has stopped"
        else:
            try:
                answer["settings"] = server.tune(**message["knobs"]).to_dict()
            except SettingError as error:
                answer["error"] = str(error)
        controls.send(answer)
    except Exception as error:  # it would be printed into whichever cell runs
        process_guard.keep(f"panel: {type(error).__name__}: {error}")


@functools.cache
def _classes() -> tuple[Any, Any] | None:
    """The two widget classes, or None where there are no widgets."""
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
        _esm = (here / "panel.js").read_text(encoding="utf-8")
        _css = page.partition('<style id="panel">')[2].partition("</style>")[0]
        frame = traitlets.Bytes().tag(sync=True)
        controls = traitlets.Instance(ipywidgets.Widget).tag(sync=True, **ipywidgets.widget_serialization)

    class _Controls(ipywidgets.Widget):  # type: ignore[misc]
        """Carries messages only, which the plainest widget of every front end can do."""

    return _Frames, _Controls


# -- where nothing is live -------------------------------------------------------------------------


def card(snapshot: Mapping[str, Any]) -> str:
    """The last numbers as HTML that GitHub shows too: no style, no script, every text escaped."""
    window, requests = snapshot["window"], snapshot["requests"]
    latency = window["latency_ms"]
    rows = {
        "state": snapshot["reason"] or snapshot["state"],
        "address": snapshot.get("url", ""),
        "answered": f"{requests['ok']:,}",
        "shed, expired, failed": " / ".join(f"{requests[k]:,}" for k in ("shed", "expired", "failed")),
        "answers per second": f"{window['answers_per_s']:,.1f}",
        "latency p50, p95, p99": " / ".join(_number(latency[k]) for k in ("p50", "p95", "p99")) + " ms",
        "mean batch": _number(window["batch_size_mean"]),
        "waiting": f"{snapshot['queue_depth']:,}",
    }
    title = f"{snapshot['model']} ({snapshot['task']}, {snapshot['device']})"
    body = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows.items())
    return (
        f"<table><caption><b>{_text(snapshot['name'])}</b>: {_text(title)}</caption>"
        f"<tbody>{body}</tbody></table>"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"
