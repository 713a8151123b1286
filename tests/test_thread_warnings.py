"""Filters of `warnings` in a cell apply to the cell's own warnings, not to those of the model thread."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support import run_script

pytestmark = pytest.mark.light


@pytest.fixture(autouse=True)
def users_filters() -> Iterator[None]:
    """Filters that a test may change."""
    with warnings.catch_warnings():
        yield


def warn(texts: list[str]) -> list[str]:
    """A function that warns and answers."""
    for text in texts:
        warnings.warn(f"about {text}", RuntimeWarning, stacklevel=1)
    return [text.upper() for text in texts]


def assert_answers(server: Any) -> None:
    assert httpx.post(server.url, content="x").json() == "X"
    assert server(["a", "b"]) == ["A", "B"]


def test_warning_on_model_thread_is_kept(serve: Any) -> None:
    server = serve(warn)
    warnings.simplefilter("error")
    assert_answers(server)
    assert sum("RuntimeWarning: about" in line for line in server.logs()[-3:]) == 3
    with pytest.raises(RuntimeWarning, match="about mine"):
        warn(["mine"])


def test_filters_changed_while_serving(serve: Any) -> None:
    server = serve(warn)
    warnings.simplefilter("error")
    assert_answers(server)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="about")
        assert_answers(server)
    warnings.resetwarnings()
    assert_answers(server)
    warnings.simplefilter("error", RuntimeWarning)
    assert_answers(server)


@pytest.mark.parametrize("action", ["once", "default", "module"])
def test_warning_registry_stays_clean(serve: Any, action: Any) -> None:
    """A cell still shows what the model has warned of."""
    assert_answers(serve(warn))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter(action)
        warn(["x"])
    assert [str(each.message) for each in shown] == ["about x"]


def test_filters_restored(serve: Any) -> None:
    warnings.simplefilter("error")
    before = list(warnings.filters)
    first, second = serve(warn, name="first"), serve(warn, name="second")
    first.stop()
    assert_answers(second)
    second.stop()
    assert list(warnings.filters) == before


def test_filters_can_be_copied_and_pickled(serve: Any) -> None:
    """For processes that do not have the kit."""
    script = """
        import pickle, sys, warnings
        warnings.filters[:] = pickle.load(sys.stdin.buffer)
        warnings.warn("ignored")
        assert "serving_kit" not in sys.modules
    """
    server = serve(warn)
    warnings.simplefilter("ignore")
    assert_answers(server)
    assert len(copy.deepcopy(warnings.filters)) == len(warnings.filters)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        input=pickle.dumps(warnings.filters),
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_user_thread_keeps_user_filters(serve: Any) -> None:
    server = serve(warn)
    warnings.simplefilter("error")
    assert_answers(server)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            warn(["x"])
        except RuntimeWarning as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert len(raised) == 1


def test_process_with_warnings_as_errors() -> None:
    run_script(
        """
        import warnings
        import serving_kit

        def warn(texts):
            warnings.warn("about it", DeprecationWarning)
            return texts

        with serving_kit.serve(warn, port=0) as server:
            assert server(["a"] * 3) == ["a"] * 3
        """,
        warnings="error",
    )
