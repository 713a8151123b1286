"""`allow_nested_asyncio` in its environments. In processes of their own, because a patch cannot be undone."""

from __future__ import annotations

import sys

import pytest

from tests.support import run_script

pytestmark = pytest.mark.light

needs_2 = pytest.mark.skipif("not __import__('importlib').util.find_spec('nest_asyncio2')")
needs_1 = pytest.mark.skipif(
    "not __import__('importlib').util.find_spec('nest_asyncio')", reason="nest_asyncio is not installed"
)
QUIET = "ignore::DeprecationWarning"  # of nest_asyncio, which is archived


def said(script: str, *arguments: str) -> str:
    """What the script prints, with everything that these scripts use."""
    top = """
import asyncio, sys
import serving_kit
from serving_kit import allow_nested_asyncio

async def answer():
    await asyncio.sleep(0)
    return 42

"""
    return run_script(top + script, *arguments, warnings=QUIET).stdout


def test_import_patches_nothing() -> None:
    script = """
before = asyncio.run, asyncio.Task, asyncio.Future, asyncio.BaseEventLoop.run_until_complete
import serving_kit.server, serving_kit.notebook.nesting
assert before == (asyncio.run, asyncio.Task, asyncio.Future, asyncio.BaseEventLoop.run_until_complete)
assert not [name for name in sys.modules if name.startswith("nest_asyncio")]
print(hasattr(asyncio, "_nest_patched"))
"""
    assert said(script) == "False\n"


def test_without_running_loop() -> None:
    script = """
print(allow_nested_asyncio())
print(hasattr(asyncio, "_nest_patched"), asyncio.run(answer()))
"""
    sentence, rest = said(script).splitlines()
    assert "nothing was changed" in sentence
    assert rest == "False 42"


NESTED = """
async def cell():
    try:
        asyncio.run(coroutine := answer())
    except RuntimeError:
        coroutine.close()
    else:
        raise AssertionError("nesting works already: this test shows nothing")
    print(allow_nested_asyncio())
    print(asyncio.run(answer()), asyncio.get_running_loop().run_until_complete(answer()))
    print(allow_nested_asyncio())

asyncio.run(cell())
"""


@needs_2
def test_nesting_is_idempotent() -> None:
    first, answers, second = said(NESTED).splitlines()
    assert "allowed in this kernel now (nest_asyncio2)" in first
    assert answers == "42 42"
    assert "already" in second


@needs_1
def test_older_package() -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("it has no release for this Python")
    first, answers, second = said('sys.modules["nest_asyncio2"] = None\n' + NESTED).splitlines()
    assert "(nest_asyncio)" in first
    assert answers == "42 42"
    assert "already" in second


def test_without_packages() -> None:
    script = """
sys.modules["nest_asyncio"] = sys.modules["nest_asyncio2"] = None

async def cell():
    try:
        allow_nested_asyncio()
    except RuntimeError as error:
        print(error)

asyncio.run(cell())
print(asyncio.run(answer()))
"""
    sentence, rest = said(script).splitlines()
    assert "await" in sentence
    assert "pip install nest-asyncio2" in sentence
    assert rest == "42"


@pytest.mark.parametrize("package", ["nest_asyncio", "nest_asyncio2"])
def test_already_patched(package: str) -> None:
    pytest.importorskip(package)
    script = """
import importlib

async def cell():
    importlib.import_module(sys.argv[1]).apply()
    run = asyncio.run
    print(allow_nested_asyncio())
    assert asyncio.run is run

asyncio.run(cell())
"""
    assert "already" in said(script, package)


def test_uvloop() -> None:
    pytest.importorskip("uvloop")
    script = """
import uvloop

async def cell():
    try:
        allow_nested_asyncio()
    except RuntimeError as error:
        print(error)
    assert not hasattr(asyncio, "_nest_patched")

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(cell())
"""
    sentence = said(script)
    assert "uvloop" in sentence
    assert "await" in sentence


@needs_2
def test_server_with_nesting() -> None:
    script = """
server = serving_kit.serve(list, port=0)

async def cell():
    assert server("before") == "before"
    allow_nested_asyncio()
    assert server("after") == "after"
    assert asyncio.run(server.predict("nested")) == "nested"
    assert await server.predict("awaited") == "awaited"

asyncio.run(cell())
server.stop()
print("done")
"""
    assert said(script).splitlines()[-1] == "done"
