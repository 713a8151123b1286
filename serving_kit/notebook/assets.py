"""The files in `frontend/` as a browser needs them: one script, one style sheet, one page.

The sources are ES modules, as linters and editors understand them. They are joined to one module, because
anywidget takes its script as one text, and so that the page needs one request below any proxy's prefix.
All functions are pure, cached and may be called from any thread.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from string import Template

# In this order, so that each module imports from earlier ones only.
MODULES = (
    "format",
    "dom",
    "snapshot",
    "timeline",
    "plot",
    "chart_list",
    "charts",
    "tiles",
    "setting_inputs",
    "settings",
    "errors",
    "header",
    "visibility",
    "panel",
    "widget",
    "page",
)
_FRONTEND = Path(__file__).parent / "frontend"
_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)  # as the formatter writes it


@cache
def script() -> str:
    """One ES module: its default export is anywidget's, `poll(element, base)` fills the page.

    The imports are left out: joined, the modules share one scope, in which every name is used once.
    """
    return "\n".join(_IMPORT.sub("", _read(f"{name}.js")).strip() + "\n" for name in MODULES)


@cache
def style() -> str:
    """The style sheet of the panel, for a notebook and for the page."""
    return _read("panel.css")


@cache
def page() -> str:
    """The HTML of `GET /`, which loads `panel.js` from beside itself."""
    return Template(_read("page.html")).substitute(page_css=_read("page.css"), panel_css=style())


def _read(name: str) -> str:
    return (_FRONTEND / name).read_text(encoding="utf-8")
