"""The widgets of the panel: the live one, and plain sliders where anywidget is not installed.

The live panel has two models, because ipykernel 7.4 passes the messages of a comm to the subshell that
published on it last. Frames are published by a thread; a slider on the same comm would wait for the cell
that runs. The comm of the controls carries nothing but answers to the browser, so that a slider is read
while a cell runs.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

from serving_kit.errors import SettingError, Unavailable
from serving_kit.notebook import assets
from serving_kit.settings import KNOBS
from serving_kit.values import Spec

# What an ipywidget is called back with: the widget, the content of the message, its buffers.
OnMessage: TypeAlias = Callable[["Controls", Any, object], None]


class Widget(Protocol):
    """A model that a front end can show."""

    model_id: str

    def close(self) -> None:
        """Remove it from the kernel and from the front end."""


class Frames(Widget, Protocol):
    """The model that every view of the panel draws."""

    frame: bytes
    layout: Widget


class Controls(Widget, Protocol):
    """The model that the views send their messages to."""

    def send(self, content: Mapping[str, object]) -> None:
        """Send an answer to every view."""

    def on_msg(self, callback: OnMessage) -> None:
        """Call `callback` for each message."""


class LiveWidgets(NamedTuple):
    """The two models of one live panel."""

    frames: Frames
    controls: Controls

    def close(self) -> None:
        """Remove both, with the layout that every widget has."""
        self.frames.layout.close()
        self.frames.close()
        self.controls.close()


def make_live(schema: Mapping[str, object], frame: bytes, on_message: OnMessage) -> LiveWidgets | None:
    """The models of a live panel; None without anywidget.

    Args:
        schema: The JSON schema of each setting.
        frame: The first frame.
        on_message: Called for each message, on whichever thread the kernel reads it.
    """
    classes = live_classes()
    if classes is None:
        return None
    frames_class, controls_class = classes
    controls = controls_class()
    _forget_subshell(controls)
    controls.on_msg(on_message)
    return LiveWidgets(frames_class(controls=controls, knobs=schema, frame=frame), controls)


def _forget_subshell(controls: Controls) -> None:
    """Let the browser choose the subshell that reads its messages, until the first answer.

    ipykernel 7.4 keeps the subshell that opened a comm, which is the one that runs cells: after "Run all",
    a slider would wait for the cell behind the panel. The attribute is private; where it is absent, the
    answer to the first hello has the same effect, only later.
    """
    getattr(getattr(controls, "comm", None), "__dict__", {}).pop("_reply_subshell_id", None)


@functools.cache
def live_classes() -> tuple[Callable[..., Frames], Callable[[], Controls]] | None:
    """The widget classes, or None without anywidget."""
    try:
        import anywidget
        import ipywidgets
        import traitlets
    except ImportError:
        return None

    class _Frames(anywidget.AnyWidget):  # type: ignore[misc]
        # Text and not a Path: anywidget watches a path for changes, and the watch keeps the widget alive.
        _esm = assets.script()
        _css = assets.style()
        frame = traitlets.Bytes().tag(sync=True)
        knobs = traitlets.Dict().tag(sync=True)
        controls = traitlets.Instance(ipywidgets.Widget).tag(sync=True, **ipywidgets.widget_serialization)

    class _Controls(ipywidgets.Widget):  # type: ignore[misc]
        """Only carries messages, which every front end can do for the plainest widget."""

    return _Frames, _Controls


def make_plain(settings: Mapping[str, object], tune: Callable[[str, object], None]) -> Widget | None:
    """The settings as plain ipywidgets; None without ipywidgets.

    Args:
        settings: The values in force.
        tune: Called with the name and the value of a setting that the user has changed; may raise
            `SettingError` or `Unavailable`, whose text is shown.
    """
    try:
        import ipywidgets
    except ImportError:
        return None
    refusal = ipywidgets.HTML()

    def on_change(name: str, event: Mapping[str, object]) -> None:
        value = event["new"]
        if isinstance(value, str) and value.isdigit():
            value = int(value)
        try:
            tune(name, value)
            refusal.value = ""
        except (SettingError, Unavailable) as error:
            refusal.value = html.escape(str(error))

    inputs = [_plain_input(name, knob, settings[name]) for name, knob in KNOBS.items()]
    for each in inputs:
        each.observe(functools.partial(on_change, each.description), "value")
    box: Widget = ipywidgets.VBox([*inputs, refusal])
    return box


def _plain_input(name: str, knob: Spec, value: object) -> Any:
    import ipywidgets

    text = {"description": name, "tooltip": knob.doc, "style": {"description_width": "11em"}}
    if knob.kind is bool:
        return ipywidgets.Checkbox(value=value, indent=False, **text)
    if knob.choices:
        return ipywidgets.Dropdown(value=value, options=knob.choices, **text)
    if knob.auto:
        return ipywidgets.Text(value=str(value), continuous_update=False, **text)
    number = ipywidgets.BoundedIntText if knob.kind is int else ipywidgets.BoundedFloatText
    return number(value=value, min=knob.low, max=knob.high, **text)
