"""The panel without a browser: frames, messages, widgets, the end."""

import json
import subprocess
import sys
import threading
import time

import pytest

ipywidgets = pytest.importorskip("ipywidgets")

import serving_kit
from serving_kit.metrics import HISTORY_S
from serving_kit.notebook import frames, process_settings, publisher
from serving_kit.notebook.panel import make_panel
from tests.support import until

VIEW = "application/vnd.jupyter.widget-view+json"


def shout(texts):
    return [text.upper() for text in texts]


@pytest.fixture
def server():
    with serving_kit.serve(shout, port=0) as server:
        yield server


def publishers():
    return [thread for thread in threading.enumerate() if thread.name == publisher.THREAD_NAME]


def frame(panel):
    return json.loads(panel.widget.frame)


def count_frames(panel):
    sent = []
    panel.widget.observe(lambda change: sent.append(change.new), "frame")
    return sent


def ask(panel, message):
    """The answers to `message`, delivered as the kernel does it."""
    answers = []
    panel.controls.send = lambda content, buffers=None: answers.append(content)
    panel.controls._handle_msg({"content": {"data": {"method": "custom", "content": message}}, "buffers": []})
    return answers


def see(panel, view="one", seen=True):
    """A view has become visible or invisible, or (None) was removed."""
    assert ask(panel, {"kind": "seen", "id": 1, "view": view, "seen": seen}) == [{"id": 1}]


# -- frames ---------------------------------------------------------------------------------------


def test_frames_during_requests(server):
    see(server.panel)
    sent = count_frames(server.panel)
    server(["a", "b", "c"])
    assert until(lambda: sent and json.loads(sent[-1])["requests"]["ok"] == 1)
    shown = json.loads(sent[-1])
    assert shown["items"] == 3
    assert shown["url"] == server.url
    assert shown["window"]["latency_ms"]["p99"] > 0
    rows = [row for row in shown["rows"] if row]
    assert sum(row[2] for row in rows) == 1, "the request may have arrived in the second before its answer"
    row = rows[-1]
    depth, in_flight, _, ok, *bad, samples, p50, p95, p99, wait, forward, padding = row[:-4]
    tokens, step, sizes, why = row[-4:]
    assert tokens == 0
    assert (ok, bad, samples) == (1, [0, 0, 0, 0], 1)
    assert in_flight >= depth
    assert p99 >= p95 >= p50 > 0
    assert p50 + 0.1 >= wait + forward > 0
    assert (padding, len(sizes) * step) == (0, 3)
    assert sum(why) == 1
    assert shown["panel"]["ms"] >= 0


def test_frame_equals_stats(server):
    server(["a", "b"])
    assert until(lambda: server.stats()["items"] == 2)
    shown, stats = frame(server.panel), server.stats(series=frames.SECONDS)
    for key in ("requests", "batches", "items", "settings", "model", "state"):
        assert shown[key] == stats[key]
    rows = {shown["first"] + i: row for i, row in enumerate(shown["rows"])}
    for point in stats["series"]:
        if point["arrivals"]:
            row = rows[point["second"]]
            assert row[2:8] == [point[key] for key in frames.COUNTS[2:8]]
            assert row[-1] == [point["reasons"].get(reason, 0) for reason in frames.REASONS]


def test_idle_sends_nothing(server):
    panel = server.panel
    see(panel)
    time.sleep(0.3)
    sent = count_frames(panel)
    time.sleep(1.2)
    assert sent == []
    assert len(publishers()) == 1


def test_changed_setting(server):
    see(server.panel)
    sent = count_frames(server.panel)
    server.tune(max_batch_size=5)
    assert until(lambda: sent and json.loads(sent[-1])["settings"]["max_batch_size"] == 5)
    assert json.loads(sent[-1])["changes"][-1]["knobs"] == {"max_batch_size": 5}


def test_invisible_views_get_no_frames(server):
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


def test_finish(server):
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


def test_panel_of_stopped_server(server):
    server("a")
    server.stop()
    assert frame(server.panel)["state"] == "stopped"
    assert frame(server.panel)["requests"]["ok"] == 1
    assert publishers() == []


def test_widgets_close_with_last_view(server):
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


def test_widgets_close_without_views(server):
    before = set(ipywidgets.widgets.widget._instances)
    panel = server.panel
    server.stop()
    assert set(ipywidgets.widgets.widget._instances) <= before
    assert panel.widget is None


def test_replaced_server(server):
    panel = server.panel
    see(panel)
    with serving_kit.serve(shout, port=0):
        assert frame(panel)["state"] == "replaced"
        assert "replaced" in frame(panel)["reason"]
        assert publishers() == []


def test_newer_run_loading(server, monkeypatch):
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


def test_repeated_displays_share_widgets(server):
    def widgets():
        return len(ipywidgets.widgets.widget._instances)

    before = widgets()
    views = {server._repr_mimebundle_()[VIEW]["model_id"] for _ in range(50)}
    assert len(views) == 1
    assert widgets() - before == 3  # frames, controls, and the layout that every widget has
    assert len(publishers()) == 1


def test_publisher_holds_server_weakly():
    class Other:
        url, token, running = "http://127.0.0.1:1", "t", True
        errors, as_code, tune = list, str, None

        def stats(self, series=0):
            return server.stats(series)

    with serving_kit.serve(shout, port=0) as server:
        other = Other()
        panel = make_panel(other)
        assert len(publishers()) == 1
        del other
        assert until(lambda: not publishers())
        panel.finish()


def test_failed_reading_is_logged(server, monkeypatch, capfd):
    """The publisher goes on after it."""
    panel = server.panel
    see(panel)
    stats, failing = server.stats, threading.Event()

    def fail_once(series=0):
        if failing.is_set():
            return stats(series)
        failing.set()
        raise RuntimeError("deque mutated during iteration")

    monkeypatch.setattr(server, "stats", fail_once)
    sent = count_frames(panel)
    assert failing.wait(10)
    server("a")
    assert until(lambda: sent and json.loads(sent[-1])["requests"]["ok"] == 1)
    assert any("the panel failed" in line and "deque mutated" in line for line in process_settings.lines())
    assert capfd.readouterr() == ("", "")


def test_no_frames_without_views(server):
    panel = server.panel
    sent = count_frames(panel)
    for _ in range(3):
        server("a")
        time.sleep(0.3)
    assert sent == []
    see(panel)
    assert until(lambda: sent)
    assert json.loads(sent[-1])["requests"]["ok"] == 3


# -- messages of the browser -----------------------------------------------------------------------------


def test_token_only_in_hello_answer(server):
    panel = server.panel
    assert ask(panel, {"kind": "hello", "id": 1}) == [{"id": 1, "token": server.token}]
    assert server.token not in repr(panel.widget.get_state()) + repr(server._repr_mimebundle_())


def test_tune_is_logged_as_panel(server, caplog):
    caplog.set_level("INFO", "serving_kit")
    answers = ask(server.panel, {"kind": "tune", "id": 7, "knobs": {"max_batch_size": 3}})
    assert server.settings.max_batch_size == 3
    assert answers == [{"id": 7, "settings": server.settings.to_dict()}]
    [record] = caplog.records
    assert (record.by, record.setting, record.after) == ("panel", "max_batch_size", 3)


def test_errors_with_tracebacks():
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
def test_invalid_values_are_rejected(server, knobs, words):
    before = server.settings
    [answer] = ask(server.panel, {"kind": "tune", "id": 7, "knobs": knobs})
    assert words in answer["error"]
    assert server.settings == before


@pytest.mark.parametrize(
    "message", [None, "x", [], {}, {"kind": "tune"}, {"kind": "tune", "knobs": {"a b": []}}]
)
def test_malformed_messages(server, message, capfd):
    server.panel  # noqa: B018
    ask(server.panel, message)
    assert capfd.readouterr() == ("", "")


def test_tune_of_stopped_server(server):
    panel = server.panel
    see(panel)
    server.stop()
    [answer] = ask(panel, {"kind": "tune", "id": 7, "knobs": {"max_batch_size": 3}})
    assert "stopped" in answer["error"]


# -- where there are no widgets -------------------------------------------------------------------


def test_import_without_widgets():
    code = "import sys, serving_kit; sys.exit(any(m in sys.modules for m in ('ipywidgets', 'anywidget')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- the numbers elsewhere --------------------------------------------------------------------------


def test_history(server, monkeypatch):
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


def test_as_code(serve):
    server = serve(shout, name="loud", max_batch_size=4)
    server.tune(overload_status=429, max_wait_ms=2)
    see(server.panel)
    code = server.as_code()
    expected = "port=0, name='loud', max_batch_size=4, max_wait_ms=2.0, overload_status=429"
    assert code == f"serving_kit.serve(shout, {expected})"
    assert until(lambda: frame(server.panel)["code"] == code)
    again = eval(code, {"serving_kit": serving_kit, "shout": shout})
    assert again.settings == server.settings
