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
from serving_kit.metrics import HISTORY_S
from serving_kit.notebook import panel as panel_module
from serving_kit.notebook import process_settings
from serving_kit.settings import KNOBS
from tests.support import until

VIEW = "application/vnd.jupyter.widget-view+json"
PLACE = Path(panel_module.__file__).parent
SCRIPT = "".join(PLACE.joinpath(name).read_text() for name in ("charts.js", "panel.js"))


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


def see(panel, view="one", seen=True):
    """What a view says when it comes into sight, leaves it, or (None) is removed."""
    assert ask(panel, {"kind": "seen", "id": 1, "view": view, "seen": seen}) == [{"id": 1}]


# -- frames ---------------------------------------------------------------------------------------


def test_numbers_move_while_requests_flow(server):
    see(server.panel)
    sent = count_frames(server.panel)
    server(["a", "b", "c"])
    assert until(lambda: sent and json.loads(sent[-1])["requests"]["ok"] == 1)
    shown = json.loads(sent[-1])
    assert shown["items"] == 3
    assert shown["url"] == server.url
    assert shown["window"]["latency_ms"]["p99"] > 0
    rows = [row for row in shown["rows"] if row]
    assert sum(row[2] for row in rows) == 1, "it may have arrived in the second before its answer"
    row = rows[-1]
    depth, in_flight, _, ok, *bad, samples, p50, p95, p99, wait, forward, padding, step, sizes, why = row
    assert (ok, bad, samples) == (1, [0, 0, 0, 0], 1)
    assert in_flight >= depth
    assert p99 >= p95 >= p50 > 0
    assert p50 + 0.1 >= wait + forward > 0
    assert (padding, len(sizes) * step) == (0, 3)
    assert sum(why) == 1
    assert shown["panel"]["ms"] >= 0


def test_the_frame_has_what_stats_has(server):
    server(["a", "b"])
    assert until(lambda: server.stats()["items"] == 2)
    shown, stats = frame(server.panel), server.stats(series=panel_module.SECONDS)
    for key in ("requests", "batches", "items", "settings", "model", "state"):
        assert shown[key] == stats[key]
    rows = {shown["first"] + i: row for i, row in enumerate(shown["rows"])}
    for point in stats["series"]:
        if point["arrivals"]:
            row = rows[point["second"]]
            assert row[2:8] == [point[key] for key in panel_module._COUNTS[2:8]]
            assert row[-1] == [point["reasons"].get(reason, 0) for reason in panel_module.REASONS]


def test_nothing_is_sent_while_nothing_changes(server):
    panel = server.panel
    see(panel)
    time.sleep(0.3)
    sent = count_frames(panel)
    time.sleep(1.2)
    assert sent == []
    assert len(publishers()) == 1


def test_a_moved_knob_is_marked(server):
    see(server.panel)
    sent = count_frames(server.panel)
    server.tune(max_batch_size=5)
    assert until(lambda: sent and json.loads(sent[-1])["settings"]["max_batch_size"] == 5)
    assert json.loads(sent[-1])["changes"][-1]["knobs"] == {"max_batch_size": 5}


def test_a_full_frame_is_small_and_quick():
    times = {"p50": 123.456, "p95": 1234.567, "p99": 12345.678}
    busy = {
        **dict.fromkeys(panel_module._COUNTS, 99_999),
        **dict.fromkeys(("latency_ms", "queue_wait_ms", "forward_ms"), times),
        "sizes": {str(size): size for size in range(1, 4097, 7)},
        "reasons": dict.fromkeys(panel_module.REASONS, 999),
        "padding": 0.123,
    }
    row = panel_module._row(busy)
    assert len(row) * panel_module.SECONDS < 20_000
    assert len(json.loads(row)[-2]) <= 24
    silent = {**busy, **dict.fromkeys(panel_module._COUNTS, 0), "sizes": {}}
    assert panel_module._row(silent) == b"0"


def test_sizes_as_digits():
    assert panel_module._digits({}, 1) == ""
    assert panel_module._digits({1: 1, 3: 8}, 1) == "108"
    assert panel_module._digits({1: 1, 2: 1, 6: 2}, 2) == "505"


def test_out_of_sight_nothing_is_sent_and_nothing_is_lost(server):
    panel = server.panel
    see(panel, "one")
    see(panel, "two", False)
    sent = count_frames(panel)
    server("a")
    assert until(lambda: sent), "one of two views is in sight"
    see(panel, "one", False)
    time.sleep(0.1)  # for a frame that is under way
    sent.clear()
    for _ in range(3):
        server("b")
        time.sleep(0.2)
    assert sent == []
    see(panel, "two")
    assert until(lambda: sent)
    assert json.loads(sent[-1])["requests"]["ok"] == 4


# -- life -----------------------------------------------------------------------------------------


def test_finish_says_how_it_ended_and_ends_the_thread(server):
    panel = server.panel
    see(panel)
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


def test_the_widgets_of_an_ended_server_are_closed_with_their_last_view(server):
    def live():
        return set(ipywidgets.widgets.widget._instances)

    before = live()
    panel = server.panel
    ours = live() - before
    see(panel, "one")
    see(panel, "two", False)
    see(panel, "one", None)
    server.stop()
    assert ours <= live(), "a view that is out of sight may come back"
    see(panel, "two", None)
    assert not ours & live()
    assert set(server._repr_mimebundle_()) == {"text/plain", "text/html"}
    card = server._repr_mimebundle_()["text/html"]
    assert "stopped" in card
    assert "<style>" not in card, "no live view follows it, so it hides no other output"


def test_the_widgets_of_an_ended_server_that_was_never_seen_are_closed(server):
    before = set(ipywidgets.widgets.widget._instances)
    panel = server.panel
    server.stop()
    assert set(ipywidgets.widgets.widget._instances) <= before
    assert panel.widget is None


def test_a_replaced_server_says_so(server):
    panel = server.panel
    see(panel)
    with serving_kit.serve(shout, port=0):
        assert frame(panel)["state"] == "replaced"
        assert "replaced" in frame(panel)["reason"]
        assert publishers() == []


def test_while_a_newer_run_loads_the_panel_says_so(server, monkeypatch):
    panel, seen = server.panel, []
    see(panel)

    def load(*args, **more):
        assert until(lambda: "newer run is loading" in frame(panel)["reason"])
        seen.append(frame(panel)["state"])
        raise serving_kit.StartError("no such model")

    monkeypatch.setattr("serving_kit.models.loading.load_model", load)
    with pytest.raises(serving_kit.StartError):
        serving_kit.serve("no/such", port=0)
    assert seen == ["ready"]
    assert until(lambda: frame(panel)["reason"] == "")


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
        url, token, running = "http://127.0.0.1:1", "t", True
        errors, as_code, tune = list, str, None

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


def test_a_publisher_whose_look_fails_says_so_in_the_log_and_goes_on(server, monkeypatch, capfd):
    panel = server.panel
    see(panel)
    look, failing = panel._look, threading.Event()

    def fail_once(server):
        if failing.is_set():
            return look(server)
        failing.set()
        raise RuntimeError("deque mutated during iteration")

    monkeypatch.setattr(panel, "_look", fail_once)
    sent = count_frames(panel)
    assert failing.wait(10)
    server("a")
    assert until(lambda: sent and json.loads(sent[-1])["requests"]["ok"] == 1)
    assert any("the panel failed" in line and "deque mutated" in line for line in process_settings.lines())
    assert capfd.readouterr() == ("", "")


def test_before_a_view_says_that_it_is_there_nothing_is_sent(server):
    panel = server.panel
    sent = count_frames(panel)
    for _ in range(3):
        server("a")
        time.sleep(0.3)
    assert sent == []
    see(panel)
    assert until(lambda: sent)
    assert json.loads(sent[-1])["requests"]["ok"] == 3


# -- the browser asks -----------------------------------------------------------------------------


def test_hello_is_answered_with_the_token_which_is_nowhere_else(server):
    panel = server.panel
    assert ask(panel, {"kind": "hello", "id": 1}) == [{"id": 1, "token": server.token}]
    assert server.token not in repr(panel.widget.get_state()) + repr(server._repr_mimebundle_())


def test_a_slider_tunes_the_server_and_the_log_says_that_it_was_the_panel(server, caplog):
    caplog.set_level("INFO", "serving_kit")
    answers = ask(server.panel, {"kind": "tune", "id": 7, "knobs": {"max_batch_size": 3}})
    assert server.settings.max_batch_size == 3
    assert answers == [{"id": 7, "settings": server.settings.to_dict()}]
    [record] = caplog.records
    assert (record.by, record.setting, record.after) == ("panel", "max_batch_size", 3)


def test_the_last_errors_come_with_their_incidents_and_tracebacks():
    def broken(texts):
        raise LookupError("deep inside")

    with serving_kit.serve(broken, port=0) as server:
        panel = server.panel
        see(panel)
        with pytest.raises(serving_kit.ModelFailed):
            server("a")
        [answer] = ask(panel, {"kind": "errors", "id": 3})
        [error] = answer["errors"]
        assert error["id"] == server.errors()[0].id
        assert "LookupError: deep inside" in error["traceback"]
        assert until(lambda: frame(panel)["errors"] == error["id"])
        assert "deep inside" not in panel.widget.frame.decode(), "a frame may be saved with the notebook"


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
    see(panel)
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
    monkeypatch.setattr(panel_module, "_classes", panel_module._classes.__wrapped__)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    panel = panel_module.make_panel(server)
    assert set(panel.bundle()) == {"text/html", VIEW}
    controls = {each.description: each for each in panel.widget.children[:-1]}
    assert set(controls) == set(KNOBS)
    controls["max_batch_size"].value = 5
    controls["max_batch_tokens"].value = "4000"
    assert (server.settings.max_batch_size, server.settings.max_batch_tokens) == (5, 4000)
    controls["max_batch_tokens"].value = "<b>many"
    assert "max_batch_tokens must be" in panel.widget.children[-1].value
    assert "<b>" not in panel.widget.children[-1].value
    controls["max_batch_tokens"].value = "auto"
    assert server.settings.max_batch_tokens == "auto"
    assert panel.widget.children[-1].value == ""
    panel.finish()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    panel = panel_module.make_panel(server)
    assert panel.widget is None
    assert set(panel.bundle()) == {"text/html"}
    panel.finish()
    assert publishers() == []


def test_importing_the_kit_imports_no_widgets():
    code = "import sys, serving_kit; sys.exit(any(m in sys.modules for m in ('ipywidgets', 'anywidget')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- the script -----------------------------------------------------------------------------------


def test_the_script_knows_the_reasons_and_the_knobs(server):
    def names(constant):
        return json.loads(re.search(rf"const {constant} = (\[.*?\]);", SCRIPT)[1])

    assert set(panel_module.REASONS) <= set(names("REASONS"))
    assert list(frame(server.panel)["batches"]) == panel_module.REASONS, "rows count in this order"
    assert set(names("FIRST")) <= set(KNOBS)
    assert set(server.panel.widget.knobs) == set(KNOBS)


def test_the_script_needs_nothing_from_elsewhere():
    text = SCRIPT + PLACE.joinpath("panel.html").read_text()
    assert "//cdn" not in text
    assert not re.search(r"https?://", text)
    assert not re.search(r"^\s*import .* from ", SCRIPT, re.M)


@pytest.mark.parametrize("name", ["charts.js", "panel.js"])
def test_the_script_is_small(name):
    assert len(PLACE.joinpath(name).read_bytes()) <= 20_000


def test_the_notebook_looks_like_the_page(server):
    css = server.panel.widget._css
    assert css.lstrip().startswith(".sk {")
    assert css in PLACE.joinpath("panel.html").read_text()


# -- the numbers elsewhere --------------------------------------------------------------------------


def test_history_is_a_table_of_what_the_panel_shows(server, monkeypatch):
    pandas = pytest.importorskip("pandas")
    server(["a", "b", "c"])
    assert until(lambda: server.stats()["items"] == 3)
    table = server.history()
    assert isinstance(table, pandas.DataFrame)
    assert table.index.name == "ago_s"
    assert (table.index[0], table.index[-1]) == (HISTORY_S - 1, 0)
    assert (table.ok.sum(), table.batches.sum(), table.batch_size_mean.max()) == (1, 1, 3)
    assert table["latency_ms.p50"].max() > 0
    assert table.filter(like="batches.").sum().sum() == 1
    monkeypatch.setitem(sys.modules, "pandas", None)
    rows = server.history()
    assert rows[-1]["ago_s"] == 0
    assert set(rows[-1]) == {*table.columns, "ago_s"}


def test_the_call_as_code(serve):
    server = serve(shout, name="loud", max_batch_size=4)
    server.tune(overload_status=429, max_wait_ms=2)
    see(server.panel)
    code = server.as_code()
    expected = "port=0, name='loud', max_batch_size=4, max_wait_ms=2.0, overload_status=429"
    assert code == f"serving_kit.serve(shout, {expected})"
    assert until(lambda: frame(server.panel)["code"] == code)
    again = eval(code, {"serving_kit": serving_kit, "shout": shout})
    assert again.settings == server.settings
