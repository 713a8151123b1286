"""The panel where anywidget or ipywidgets is not installed."""

import sys
import threading

import pytest

pytest.importorskip("ipywidgets")

from serving_kit.notebook import publisher, widgets
from serving_kit.notebook.panel import make_panel
from serving_kit.settings import KNOBS

VIEW = "application/vnd.jupyter.widget-view+json"


def shout(texts):
    return [text.upper() for text in texts]


def publishers():
    return [thread for thread in threading.enumerate() if thread.name == publisher.THREAD_NAME]


def test_without_anywidget(serve, monkeypatch):
    server = serve(shout)
    monkeypatch.setattr(widgets, "live_classes", widgets.live_classes.__wrapped__)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    panel = make_panel(server)
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
    panel = make_panel(server)
    assert panel.widget is None
    assert set(panel.bundle()) == {"text/html"}
    panel.finish()
    assert publishers() == []
