"""What the panel reads of a server, and what counts as a change."""

import copy
import json

import pytest

from serving_kit.notebook.frames import COUNTS, SECONDS
from serving_kit.notebook.picture import Change, Picture

pytestmark = pytest.mark.light

QUIET = {
    **dict.fromkeys(COUNTS, 0),
    **dict.fromkeys(("latency_ms", "queue_wait_ms", "forward_ms"), dict.fromkeys(("p50", "p95", "p99"))),
    "sizes": {},
    "reasons": {},
    "padding": None,
    "tokens": None,
}


class Server:
    """With as many seconds as it has been up for."""

    url, token, running = "http://127.0.0.1:1", "secret", True

    def __init__(self):
        self.second = 2
        self.asked = []
        self.written = 0
        self.numbers = {
            "name": "default",
            "state": "ready",
            "reason": "",
            "requests": {"ok": 0},
            "batches": {},
            "queue_depth": 0,
            "in_flight": 0,
            "settings": {"max_batch_size": 32},
            "window": {"answers_per_s": 0.0},
            "changes": [],
            "cost": {},
            "uptime_s": 0.0,
        }

    def stats(self, series=0):
        self.asked.append(series)
        self.numbers["uptime_s"] += 1.0
        first = max(0, self.second - series + 1)
        points = [{**QUIET, "second": second} for second in range(first, self.second + 1)]
        return {**copy.deepcopy(self.numbers), "series": points}

    def errors(self):
        return []

    def as_code(self):
        self.written += 1
        return "serving_kit.serve(...)"


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def picture(server):
    picture = Picture()
    picture.read(server)
    return picture


def frame(picture):
    return json.loads(picture.frame({"panel": {}}))


def test_passing_time_is_no_change(server, picture):
    assert picture.read(server) == Change(visible=False, active=False)


def test_moved_window_is_visible(server, picture):
    server.numbers["window"]["answers_per_s"] = 1.0
    assert picture.read(server) == Change(visible=True, active=False)


@pytest.mark.parametrize(
    ("key", "value"), [("queue_depth", 1), ("state", "draining"), ("requests", {"ok": 1})]
)
def test_events(server, picture, key, value):
    server.numbers[key] = value
    assert picture.read(server) == Change(visible=True, active=True)


def test_only_new_seconds_are_asked_for(server, picture):
    picture.read(server)
    assert server.asked[0] == SECONDS
    assert server.asked[1] <= 5


def test_old_seconds_are_dropped(server, picture):
    server.second = 1000
    picture.read(server)
    assert frame(picture)["first"] > 1000 - SECONDS


def test_stopped(server, picture):
    server.running = False
    picture.read(server)
    assert frame(picture)["state"] == "stopped"


def test_code_is_written_for_new_settings_only(server, picture):
    picture.read(server)
    assert server.written == 1
    server.numbers["settings"] = {"max_batch_size": 1}
    picture.read(server)
    assert server.written == 2


def test_frame(picture):
    shown = frame(picture)
    assert shown["rows"] == [0, 0, 0]
    assert (shown["errors"], shown["panel"]) == ("", {})
    assert "cost" not in shown
