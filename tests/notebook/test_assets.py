"""The panel's files: modules that fit together, and what becomes of them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from serving_kit.notebook import assets, frames
from serving_kit.settings import KNOBS

pytestmark = pytest.mark.light

FRONTEND = Path(assets.__file__).parent / "frontend"
IMPORT = re.compile(r'^import \{([^}]*)\} from "\./(\w+)\.js";$', re.MULTILINE)
NAME = re.compile(r"^(?:export )?(?:async )?(?:const|let|class|function) (\w+)", re.MULTILINE)
EXPORT = re.compile(r"^export (?:async )?(?:const|class|function) (\w+)", re.MULTILINE)


def source(name):
    return (FRONTEND / f"{name}.js").read_text()


def names(constant):
    return re.findall(r'"(\w+)"', re.search(rf"const {constant} = \[(.*?)\];", assets.script(), re.DOTALL)[1])


def test_every_module_is_in_the_script():
    assert sorted(assets.MODULES) == sorted(path.stem for path in FRONTEND.glob("*.js"))
    assert len(set(assets.MODULES)) == len(assets.MODULES)


@pytest.mark.parametrize("module", assets.MODULES)
def test_imports(module):
    """Each import names what an earlier module exports."""
    earlier = assets.MODULES[: assets.MODULES.index(module)]
    imports = IMPORT.findall(source(module))
    assert len(imports) == len(re.findall(r"^import\b", source(module), re.MULTILINE))
    for imported, origin in imports:
        assert origin in earlier
        assert set(re.findall(r"\w+", imported)) <= set(EXPORT.findall(source(origin)))


def test_names_are_unique():
    """Joined, the modules share one scope."""
    found = sorted(NAME.findall(assets.script()))
    assert len(found) > 50
    assert [name for name, following in pairwise(found) if name == following] == []


def test_script():
    script = assets.script()
    assert not re.search(r"^import\b", script, re.MULTILINE)
    assert script.count("export default { render };") == 1
    assert "export async function poll(" in script
    assert len(script) <= 60_000


def test_module_size():
    assert max(len(source(name).splitlines()) for name in assets.MODULES) <= 250


def test_nothing_is_loaded_from_elsewhere():
    text = assets.script() + assets.page()
    assert "//cdn" not in text
    assert not re.search(r"https?://", text)


def test_page_has_the_style_of_the_notebook():
    assert ".sk {" in assets.style()
    assert assets.style() in assets.page()
    assert "$" not in assets.page().replace('/\\/?$/, "/"', "")


def test_names_of_the_server():
    assert set(frames.REASONS) <= set(names("REASONS"))
    assert set(names("FIRST")) <= set(KNOBS)
