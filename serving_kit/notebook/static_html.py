"""The numbers of a server as static HTML, for saved notebooks and for front ends without widgets.

One table and one small SVG, which GitHub shows too: no script, every text escaped.

Not here: what is live (`panel.py`).
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from serving_kit.notebook.frames import JSON

# JupyterLab shows an error in place of a widget that is gone. It stands in the next output.
_HIDE_NEXT = (
    '<style>.jp-OutputArea-child:has([data-serving-kit="{mark}"]) + .jp-OutputArea-child:not(:has(.sk)) '
    "{{ display: none; }}</style>"
)
_NOT_ANSWERED = ("shed", "expired", "failed", "unavailable")
_WIDTH, _HEIGHT, _GAP = 560, 44, 18
_BLUE, _SOFT = "#4a86c5", "#8b949e"  # readable on white and on black

Series: TypeAlias = Sequence[JSON]
_LANES: Mapping[str, Callable[[JSON], float | None]] = {
    "waiting items": lambda point: point["queue_depth"],
    "answers per second": lambda point: point["ok"],
    "latency p95, ms": lambda point: point["latency_ms"]["p95"],
}


def static_html(snapshot: JSON, points: Series = (), mark: str = "") -> str:
    """The last numbers as HTML.

    Args:
        snapshot: As `Server.stats()`.
        points: Its series; with fewer than two there is no picture.
        mark: The id of the live panel in the next output. That panel hides this HTML while it is live;
            this HTML hides the error that JupyterLab shows in place of the panel once it is gone.
    """
    title = f"{snapshot['model']} ({snapshot['task']}, {snapshot['device']})"
    rows = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in _rows(snapshot).items())
    return (
        f'<div data-serving-kit="{_text(mark)}">{_HIDE_NEXT.format(mark=_text(mark)) if mark else ""}'
        f"<table><caption><b>{_text(snapshot['name'])}</b>: {_text(title)}</caption>"
        f"<tbody>{rows}</tbody></table>{_picture(points) if len(points) > 1 else ''}</div>"
    )


def _rows(snapshot: JSON) -> dict[str, str]:
    window, requests = snapshot["window"], snapshot["requests"]
    latency = [_number(window["latency_ms"][name]) for name in ("p50", "p95", "p99")]
    return {
        "state": snapshot["reason"] or snapshot["state"],
        "address": snapshot.get("url", ""),
        "answered": f"{requests['ok']:,}",
        ", ".join(_NOT_ANSWERED): " / ".join(f"{requests[name]:,}" for name in _NOT_ANSWERED),
        "answers per second": f"{window['answers_per_s']:,.1f}",
        "latency p50, p95, p99": " / ".join(latency) + " ms",
        "mean batch": _number(window["batch_size_mean"]),
        "waiting": f"{snapshot['queue_depth']:,}",
        "as of": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _picture(points: Series) -> str:
    """An image of the series: three lines above each other, on one axis of time."""
    lanes, top = [], 0
    for name, value in _LANES.items():
        lanes.append(_lane(name, [value(point) or 0.0 for point in points], top))
        top += _GAP + _HEIGHT + 4
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" '
        f'font-family="sans-serif" font-size="11" fill="{_SOFT}">{"".join(lanes)}</svg>'
    )
    data = base64.b64encode(svg.encode()).decode()
    return f'<p><img alt="The last {len(points)} seconds" src="data:image/svg+xml;base64,{data}"></p>'


def _lane(name: str, values: Sequence[float], top: int) -> str:
    largest = max(*values, 1.0)
    step, base = _WIDTH / (len(values) - 1), top + _GAP + _HEIGHT
    line = " ".join(f"{i * step:.0f},{base - v / largest * _HEIGHT:.0f}" for i, v in enumerate(values))
    return (
        f'<text x="0" y="{top + 12}">{name}, at most {_number(max(values))}</text>'
        f'<path d="M0 {base}H{_WIDTH}" stroke="{_SOFT}" stroke-opacity=".5"/>'
        f'<polyline points="{line}" fill="none" stroke="{_BLUE}" stroke-width="1.5"/>'
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"
