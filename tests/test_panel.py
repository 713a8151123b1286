"""The panel without a browser: what it sends, what it answers, what it leaves behind."""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ipywidgets = pytest.importorskip("ipywidgets")

import serving_kit
from serving_kit import panel as panel_module
from serving_kit import process_guard
from serving_kit.settings import KNOBS
from tests.conftest import until

VIEW = "application/vnd.jupyter.widget-view+json"
SCRIPT = Path(panel_module.__file__).with_name("panel.js")


def shout(texts):
    return [text.upper() for text in texts]


@pytest.fixture
def server():
    with serving_kit.serve(shout, port=0) as server:
        yield server


def publishers():
    return [thread for thread in threading.enumerate() if thread.name == panel_module.THREAD_NAME]


def frame(panel):
    return json.loads(panel.widget.frame)


def count_frames(panel):
    sent = []
    panel.widget.observe(lambda change: sent.append(change.new), "frame")
    return sent


def ask(panel, message):
    """What the browser would get for `message`, as the kernel reads it."""
    answers = []
    panel.controls.send = lambda content, buffers=None: answers.append(content)
    panel.controls._handle_msg({"content": {"data": {"method": "custom", "content": message}}, "buffers": []})
    return answers


# -- frames ---------------------------------------------------------------------------------------


def test_numbers_move_while_requests_flow(server):
    sent = count_frames(server.panel)
    server(["a", "b", "c"])
    assert until(lambda: sent and json.loads(sent[-1])["requests"]["ok"] == 1)
    shown = json.loads(sent[-1])
    assert shown["url"] == server.url
    assert shown["window"]["latency_ms"]["p99"] > 0
    series = shown["series"]
    assert "3" in [str(len(sizes) * series["step"]) for sizes in series["sizes"] if sizes]
    assert any(value is not None for value in series["p50"])
    lengths = {len(series[name]) for name in ("queue_depth", "sizes", "p50", "p95", "p99")}
    assert len(lengths) == 1


def test_nothing_is_sent_while_nothing_changes(server):
    panel = server.panel
    time.sleep(0.3)
    sent = count_frames(panel)
    time.sleep(1.2)
    assert sent == []
    assert len(publishers()) == 1


def test_a_moved_knob_is_marked(server):
    sent = count_frames(server.panel)
    server.tune(max_batch_size=5)
    assert until(lambda: sent and json.loads(sent[-1])["settings"]["max_batch_size"] == 5)
    assert json.loads(sent[-1])["changes"][-1]["knobs"] == {"max_batch_size": 5}


def test_a_full_frame_is_small_and_quick():
    many_sizes = {size: size for size in range(1, 4097, 7)}
    latency = {"p50": 123.456, "p95": 1234.567, "p99": 12345.678}
    busy = {"queue_depth": 99_999, "arrivals": 9, "sizes": many_sizes, "latency_ms": latency}
    columns = panel_module._columns(dict.fromkeys(range(100_000, 100_120), busy))
    assert len(json.dumps(columns, separators=(",", ":"))) < 8192
    assert max(map(len, columns["sizes"])) <= 24


def test_sizes_as_digits():
    assert panel_module._digits({}, 1) == ""
    assert panel_module._digits({1: 1, 3: 8}, 1) == "108"
    assert panel_module._digits({1: 1, 2: 1, 6: 2}, 2) == "505"


# -- life -----------------------------------------------------------------------------------------


def test_finish_says_how_it_ended_and_ends_the_thread(server):
    panel = server.panel
    server("a")
    server.stop()
    assert publishers() == []
    assert frame(panel)["state"] == "stopped"
    assert frame(panel)["requests"]["ok"] == 1
    sent = count_frames(panel)
    panel.finish()
    panel.finish()
    assert sent == []
    assert server._repr_mimebundle_()[VIEW]["model_id"] == panel.widget.model_id
    assert "stopped" in server._repr_mimebundle_()["text/html"]
    assert publishers() == []


def test_a_stopped_server_can_still_be_shown(server):
    server("a")
    server.stop()
    assert frame(server.panel)["state"] == "stopped"
    assert frame(server.panel)["requests"]["ok"] == 1
    assert publishers() == []


def test_a_replaced_server_says_so(server):
    panel = server.panel
    with serving_kit.serve(shout, port=0):
        assert frame(panel)["state"] == "replaced"
        assert "replaced" in frame(panel)["reason"]
        assert publishers() == []


def test_displays_leave_nothing_behind(server):
    def widgets():
        return len(ipywidgets.widgets.widget._instances)

    before = widgets()
    views = {server._repr_mimebundle_()[VIEW]["model_id"] for _ in range(50)}
    assert len(views) == 1
    assert widgets() - before == 3  # frames, controls, and the layout that every widget has
    assert len(publishers()) == 1


def test_the_publisher_keeps_no_server_alive():
    class Fleeting:
        token, running = "t", True

        def stats(self, series=0):
            return server.stats(series)

    with serving_kit.serve(shout, port=0) as server:
        fleeting = Fleeting()
        panel = panel_module.make_panel(fleeting)
        thread = panel._thread
        del fleeting
        thread.join(3)
        assert not thread.is_alive()
        panel.finish()


def test_a_publisher_that_fails_is_silent(server, monkeypatch, capfd):
    panel = server.panel
    monkeypatch.setattr(panel, "_look", lambda server: 1 / 0)
    panel._thread.join(3)
    assert not panel._thread.is_alive()
    panel.finish()
    assert any("ZeroDivisionError" in line for line in process_guard.lines())
    assert capfd.readouterr() == ("", "")


# -- the browser asks -----------------------------------------------------------------------------


def test_hello_is_answered_with_the_token_which_is_nowhere_else(server):
    panel = server.panel
    assert ask(panel, {"kind": "hello", "id": 1}) == [{"id": 1, "token": server.token}]
    assert server.token not in repr(panel.widget.get_state()) + repr(server._repr_mimebundle_())


def test_a_slider_tunes_the_server(server):
    answers = ask(server.panel, {"kind": "tune", "id": 7, "knobs": {"max_batch_size": 3}})
    assert server.settings.max_batch_size == 3
    assert answers == [{"id": 7, "settings": server.settings.to_dict()}]


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be"),
        ({"max_batch_size": 3, "timeout_ms": -1}, "timeout_ms must be"),
        ({"nonsense": 1}, "no setting named"),
        ({"group_by_length": "yes"}, "true or false"),
    ],
)
def test_a_bad_value_is_refused_and_changes_nothing(server, knobs, words):
    before = server.settings
    [answer] = ask(server.panel, {"kind": "tune", "id": 7, "knobs": knobs})
    assert words in answer["error"]
    assert server.settings == before


@pytest.mark.parametrize(
    "message", [None, "x", [], {}, {"kind": "tune"}, {"kind": "tune", "knobs": {"a b": []}}]
)
def test_nonsense_never_raises_or_prints(server, message, capfd):
    server.panel  # noqa: B018
    ask(server.panel, message)
    assert capfd.readouterr() == ("", "")


def test_a_stopped_server_refuses(server):
    panel = server.panel
    server.stop()
    [answer] = ask(panel, {"kind": "tune", "id": 7, "knobs": {"max_batch_size": 3}})
    assert "stopped" in answer["error"]


# -- where nothing is live ------------------------------------------------------------------------


def test_the_card_escapes_what_others_wrote():
    def hostile(texts):
        return texts

    hostile.__name__ = hostile.__qualname__ = "<img src=x onerror=alert(1)>&\"'"
    with serving_kit.serve(hostile, port=0, name="</table><script>") as server:
        card = server._repr_mimebundle_()["text/html"]
    assert "<img" not in card
    assert "<script" not in card
    assert "&lt;img src=x onerror=alert(1)&gt;&amp;&quot;&#x27;" in card


def test_works_without_widgets(server, monkeypatch):
    for name in ("anywidget", "ipywidgets"):
        monkeypatch.setitem(sys.modules, name, None)
        panel_module._classes.cache_clear()
        panel = panel_module.make_panel(server)
        assert panel.widget is None
        assert set(panel.bundle()) == {"text/html"}
        panel.finish()
    assert publishers() == []
    panel_module._classes.cache_clear()


def test_importing_the_kit_imports_no_widgets():
    code = "import sys, serving_kit; sys.exit(any(m in sys.modules for m in ('ipywidgets', 'anywidget')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- the script -----------------------------------------------------------------------------------


def test_the_script_knows_the_knobs():
    knobs = json.loads(re.search(r"const KNOBS = (\[.*?\]);", SCRIPT.read_text(), re.S)[1])
    for knob in knobs:
        known = KNOBS[knob["name"]]
        assert (knob.get("low"), knob.get("high"), knob.get("unit", "")) == (
            known.low,
            known.high,
            known.unit,
        )


def test_the_script_needs_nothing_from_elsewhere():
    text = SCRIPT.read_text() + SCRIPT.with_name("panel.html").read_text()
    assert "//cdn" not in text
    assert not re.search(r"https?://", text)
    assert not re.search(r"^\s*import .* from ", SCRIPT.read_text(), re.M)
    assert len(SCRIPT.read_bytes()) <= 20 * 1024


def test_the_notebook_looks_like_the_page(server):
    css = server.panel.widget._css
    assert css.lstrip().startswith(".sk {")
    assert css in SCRIPT.with_name("panel.html").read_text()
