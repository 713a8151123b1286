"""The numbers of one server as the panel last read them, and what has changed since the reading before.

Not here: when they are read (`publisher.py`), how they are encoded (`frames.py`, `static_html.py`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from serving_kit.notebook.frames import JSON, SECONDS, encode_frame, encode_row, recent_changes
from serving_kit.notebook.static_html import static_html
from serving_kit.records import Incident
from serving_kit.settings import Settings

_OVERLAP_S = 3  # seconds that are read again, because records of slow threads still change them
_UNSEEN = ("uptime_s", "cost", "changes", "code")  # a change of these alone sends no frame
_EVENTS = ("requests", "batches", "queue_depth", "in_flight", "settings", "state", "errors")


class PanelServer(Protocol):
    """What the panel needs of a server."""

    url: str
    token: str

    @property
    def running(self) -> bool:
        """Whether it answers."""

    def stats(self, series: int = 0) -> JSON:
        """A snapshot with the last `series` seconds."""

    def _tune(self, by: str, knobs: Mapping[str, object]) -> Settings:
        """Change settings, all or none; raises `SettingError`. `by` is who asks, for the log."""

    def errors(self) -> list[Incident]:
        """The latest failures, newest first."""

    def as_code(self) -> str:
        """The call that makes this server with the settings in force."""


class Change(NamedTuple):
    """What is different from the last reading.

    Attributes:
        visible: Whether the panel would look different.
        active: Whether anything happened at the server; else only the window of 30 s has moved on.
    """

    visible: bool
    active: bool


class Picture:
    """What was read. Any thread may call it: the publisher does, and a cell that shows the server."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._snapshot: JSON = {}
        self._points: dict[int, JSON] = {}  # by second of the server's clock
        self._rows: dict[int, bytes] = {}
        self._read_at = time.monotonic() - SECONDS

    @property
    def name(self) -> str:
        """The name of the server."""
        return str(self._snapshot["name"])

    @property
    def settings(self) -> JSON:
        """The settings that were in force."""
        settings: JSON = self._snapshot["settings"]
        return settings

    def read(self, server: PanelServer) -> Change:
        """Read the server."""
        with self._lock:
            now = time.monotonic()
            snapshot = server.stats(series=min(SECONDS, math.ceil(now - self._read_at) + _OVERLAP_S))
            self._read_at = now
            self._keep_seconds(snapshot.pop("series"))
            errors = server.errors()
            snapshot["errors"] = errors[0].id if errors else ""
            if not server.running and snapshot["state"] in ("ready", "draining"):
                snapshot["state"] = "stopped"
            before, self._snapshot = self._snapshot, snapshot
            same_settings = before.get("settings") == snapshot["settings"]
            snapshot["code"] = before["code"] if same_settings else server.as_code()
            return Change(
                visible=_visible(before) != _visible(snapshot),
                active=any(before.get(key) != snapshot[key] for key in _EVENTS),
            )

    def frame(self, more: Mapping[str, object]) -> bytes:
        """What was read, and `more`, as one frame."""
        with self._lock:
            snapshot = {key: value for key, value in self._snapshot.items() if key != "cost"}
            snapshot["changes"] = recent_changes(snapshot["changes"])
            seconds = sorted(self._rows)
            return encode_frame({**snapshot, **more}, seconds[0], [self._rows[each] for each in seconds])

    def static_html(self, mark: str) -> str:
        """What was read as HTML, from the first second with requests. `mark`: see `static_html.py`."""
        with self._lock:
            points = [self._points[second] for second in sorted(self._points)]
            busy = [i for i, point in enumerate(points) if point["arrivals"] or point["queue_depth"]]
            return static_html(self._snapshot, points[busy[0] :] if busy else (), mark)

    def _keep_seconds(self, points: list[JSON]) -> None:
        """Seconds that are over do not change, so each is encoded about once."""
        for point in points:
            self._points[point["second"]] = point
            self._rows[point["second"]] = encode_row(point)
        oldest = points[-1]["second"] - SECONDS
        for second in [second for second in self._rows if second <= oldest]:
            del self._rows[second], self._points[second]


def _visible(snapshot: JSON) -> JSON:
    return {key: value for key, value in snapshot.items() if key not in _UNSEEN}
