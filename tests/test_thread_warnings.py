"""Filters of `warnings` in a cell decide about the cell's own warnings, never about a client's answer."""

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


def test_a_warning_on_the_model_thread_is_no_error_and_is_kept_for_the_owner(serve: Any) -> None:
    server = serve(warn)
    warnings.simplefilter("error")
    assert_answers(server)
    assert sum("RuntimeWarning: about" in line for line in server.logs()[-3:]) == 3
    with pytest.raises(RuntimeWarning, match="about mine"):
        warn(["mine"])


def test_however_the_cell_changes_the_filters_meanwhile(serve: Any) -> None:
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
def test_what_the_model_has_warned_of_is_still_shown_in_the_cell(serve: Any, action: Any) -> None:
    assert_answers(serve(warn))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter(action)
        warn(["x"])
    assert [str(each.message) for each in shown] == ["about x"]


def test_the_filters_are_the_users_own_again_after_the_last_server(serve: Any) -> None:
    warnings.simplefilter("error")
    before = list(warnings.filters)
    first, second = serve(warn, name="first"), serve(warn, name="second")
    first.stop()
    assert_answers(second)
    second.stop()
    assert list(warnings.filters) == before


def test_libraries_may_copy_the_filters_and_send_them_to_processes_without_the_kit(serve: Any) -> None:
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


def test_a_thread_of_the_users_own_keeps_the_users_filters(serve: Any) -> None:
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


def test_nothing_is_printed_in_a_process_that_makes_every_warning_an_error() -> None:
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
