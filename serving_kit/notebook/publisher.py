"""The thread of the panel ("serving-kit-panel"), which calls one function a few times per second.

Not here: what that function reads and sends (`panel.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from serving_kit.thread_warnings import THREAD_PREFIX

THREAD_NAME = THREAD_PREFIX + "panel"
_TICK_S, _IDLE_TICK_S = 0.25, 1.0
_QUIET_TICKS = 8  # without a change, before the slower tick
_MAX_CPU_SHARE = 0.01  # of one core: a slow machine gets fewer frames, not a slower model
_MAX_WAIT_S = 30.0  # after ticks that raised
_SMOOTHING = 0.1  # the weight of the newest tick in the cost


class Tick(NamedTuple):
    """What one tick did."""

    sent_bytes: int
    active: bool  # whether anything happened at the server


class Cost(NamedTuple):
    """What the panel costs, smoothed."""

    ms_per_s: float  # processor time
    kb_per_s: float


class Publisher:
    """Calls `tick` on a daemon thread until that returns None or `stop()` is called.

    A tick that raises is passed to `on_error`, and the next one comes later.
    """

    def __init__(self, tick: Callable[[], Tick | None], on_error: Callable[[Exception], None]) -> None:
        self._tick = tick
        self._on_error = on_error
        self._wake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._quiet = self._failures = 0  # ticks in a row
        self._ticked_at = 0.0
        self.cost = Cost(0.0, 0.0)

    def start(self) -> None:
        """Start the thread. Once."""
        self._ticked_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Make the next tick come now. Any thread."""
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """End the thread after the tick that runs. Any thread; idempotent."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        wait_s = _TICK_S
        while True:
            self._wake.wait(wait_s)
            self._wake.clear()
            if self._stopped:
                return
            began = time.thread_time()
            try:
                tick = self._tick()
            except Exception as error:
                wait_s = self._failed(error)
                continue
            if tick is None:
                return
            wait_s = self._succeeded(tick, time.thread_time() - began)

    def _failed(self, error: Exception) -> float:
        """Seconds until the next tick."""
        self._failures += 1
        self._on_error(error)
        return min(_TICK_S * 2.0**self._failures, _MAX_WAIT_S)

    def _succeeded(self, tick: Tick, cpu_s: float) -> float:
        """Seconds until the next tick."""
        self._failures = 0
        self._quiet = 0 if tick.active else self._quiet + 1
        self._add_cost(cpu_s, tick.sent_bytes)
        return max(_TICK_S if self._quiet < _QUIET_TICKS else _IDLE_TICK_S, cpu_s / _MAX_CPU_SHARE)

    def _add_cost(self, cpu_s: float, sent_bytes: int) -> None:
        now = time.monotonic()
        weight = _SMOOTHING / max(now - self._ticked_at, _TICK_S)
        self._ticked_at = now
        self.cost = Cost(
            self.cost.ms_per_s * (1 - _SMOOTHING) + weight * cpu_s * 1e3,
            self.cost.kb_per_s * (1 - _SMOOTHING) + weight * sent_bytes / 1e3,
        )
