"""The server as a static picture: for saved notebooks, and for where there are no widgets.

One table and one small SVG, as HTML that GitHub shows too: no script, every text escaped.

Not here: what is live (`panel.py`).
"""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_INSTEAD = (
    '.jp-OutputArea-child:has([data-serving-kit="MARK"]) + .jp-OutputArea-child:not(:has(.sk)) '
    "{ display: none; }"
)
_BAD = ("shed", "expired", "failed", "unavailable")
_WIDTH, _HEIGHT, _GAP = 560, 44, 18
_BLUE, _SOFT = "#4a86c5", "#8b949e"  # readable on white and on black


def card(snapshot: Mapping[str, Any], points: Sequence[Mapping[str, Any]] = (), mark: str = "") -> str:
    """The last numbers as HTML.

    Args:
        snapshot: As `Server.stats()`.
        points: Its series; without any there is no picture.
        mark: By which the panel in the output after this one knows the card. That hides the card while
            it lives; the card hides the error that JupyterLab shows in its place when it is gone.
    """
    window, requests = snapshot["window"], snapshot["requests"]
    latency = window["latency_ms"]
    rows = {
        "state": snapshot["reason"] or snapshot["state"],
        "address": snapshot.get("url", ""),
        "answered": f"{requests['ok']:,}",
        ", ".join(_BAD): " / ".join(f"{requests[k]:,}" for k in _BAD),
        "answers per second": f"{window['answers_per_s']:,.1f}",
        "latency p50, p95, p99": " / ".join(_number(latency[k]) for k in ("p50", "p95", "p99")) + " ms",
        "mean batch": _number(window["batch_size_mean"]),
        "waiting": f"{snapshot['queue_depth']:,}",
        "as of": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    title = f"{snapshot['model']} ({snapshot['task']}, {snapshot['device']})"
    body = "".join(f"<tr><th>{_text(k)}</th><td>{_text(v)}</td></tr>" for k, v in rows.items())
    picture = ""
    if len(points) > 1:
        data = base64.b64encode(_svg(points).encode()).decode()
        picture = f'<p><img alt="The last {len(points)} seconds" src="data:image/svg+xml;base64,{data}"></p>'
    rule = f"<style>{_INSTEAD.replace('MARK', _text(mark))}</style>" if mark else ""
    return (
        f'<div data-serving-kit="{_text(mark)}">{rule}'
        f"<table><caption><b>{_text(snapshot['name'])}</b>: {_text(title)}</caption>"
        f"<tbody>{body}</tbody></table>{picture}</div>"
    )


def _svg(points: Sequence[Mapping[str, Any]]) -> str:
    """Three lines above each other, on one time axis."""
    lanes: list[tuple[str, Callable[[Mapping[str, Any]], float | None]]] = [
        ("waiting items", lambda point: point["queue_depth"]),
        ("answers per second", lambda point: point["ok"]),
        ("latency p95, ms", lambda point: point["latency_ms"]["p95"]),
    ]
    parts, top = [], 0
    for name, value in lanes:
        values = [value(point) or 0.0 for point in points]
        most = max(*values, 1.0)
        step, base = _WIDTH / (len(values) - 1), top + _GAP + _HEIGHT
        line = " ".join(f"{i * step:.0f},{base - v / most * _HEIGHT:.0f}" for i, v in enumerate(values))
        parts.append(
            f'<text x="0" y="{top + 12}">{name}, at most {_number(max(values))}</text>'
            f'<path d="M0 {base}H{_WIDTH}" stroke="{_SOFT}" stroke-opacity=".5"/>'
            f'<polyline points="{line}" fill="none" stroke="{_BLUE}" stroke-width="1.5"/>'
        )
        top = base + 4
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{top}" '
        f'font-family="sans-serif" font-size="11" fill="{_SOFT}">{"".join(parts)}</svg>'
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}"
