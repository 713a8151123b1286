"""The static HTML of a saved notebook."""

import re

import pytest

from serving_kit.notebook.static_html import static_html

pytestmark = pytest.mark.light

SNAPSHOT = {
    "name": "default",
    "model": "m",
    "task": "t",
    "device": "cpu",
    "state": "ready",
    "reason": "",
    "url": "http://127.0.0.1:1",
    "queue_depth": 3,
    "requests": {"ok": 12345, "shed": 1, "expired": 2, "failed": 3, "unavailable": 4},
    "window": {
        "answers_per_s": 1.5,
        "batch_size_mean": None,
        "latency_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
    },
}
POINT = {"queue_depth": 1, "ok": 2, "latency_ms": {"p95": None}}


def test_numbers():
    text = re.sub(r"<[^>]*>", " ", static_html(SNAPSHOT))
    for number in ("12,345", "1 / 2 / 3 / 4", "1.0 / 2.0 / 3.0 ms"):
        assert number in text


def test_everything_is_escaped():
    hostile = "<img src=x onerror=alert(1)>&\"'</table><script>"
    page = static_html(
        {**SNAPSHOT, **dict.fromkeys(("name", "model", "task", "reason", "url"), hostile)}, (), '"><b>'
    )
    assert "<img" not in page
    assert "<script" not in page
    assert '"><b>' not in page
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&quot;&#x27;" in page


def test_picture():
    assert "<img" not in static_html(SNAPSHOT, [POINT])
    assert 'alt="The last 2 seconds"' in static_html(SNAPSHOT, [POINT, POINT])


def test_mark():
    """Only with a live panel after it may it hide the next output."""
    assert "<style>" not in static_html(SNAPSHOT)
    marked = static_html(SNAPSHOT, (), "abc")
    assert marked.count('data-serving-kit="abc"') == 2
    assert "{ display: none; }" in marked
