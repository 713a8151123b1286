"""Tab and Shift+Tab in a notebook show the knobs."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("IPython")

from serving_kit.settings import KNOBS
from tests.support import run_script

# What the kernel answers to Tab (completions) and to Shift+Tab (inspection).
SCRIPT = """
import json
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
from serving_kit.settings import KNOBS

shell = InteractiveShell.instance()
shell.run_cell("import serving_kit; tune = serving_kit.Server.tune", silent=True)
found = {}
for name in ("serving_kit.serve", "serving_kit.create_app", "tune"):
    texts = []
    with provisionalcompleter():
        for start in sorted({knob[0] for knob in KNOBS}):
            code = f"{name}({start}"
            texts += [each.text for each in shell.Completer.completions(code, len(code))]
    found[name] = [texts, shell.object_inspect_mime(name)["text/plain"]]
print(json.dumps(found))
"""


def test_knobs_are_completed_and_shown() -> None:
    found = json.loads(run_script(SCRIPT, timeout=60).stdout.splitlines()[-1])
    for texts, shown in found.values():
        assert {f"{name}=" for name in KNOBS} <= set(texts)
        assert all(f"{name}:" in shown for name in KNOBS)
