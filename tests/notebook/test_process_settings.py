"""What a running server changes in its process, and that all of it is put back."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serving_kit.notebook import process_settings
from serving_kit.notebook.process_settings import SWITCH_INTERVAL_S, hold, release

pytestmark = pytest.mark.light


@pytest.fixture
def owners() -> Iterator[tuple[object, object]]:
    """Two owners of the changes, which release them at the end of the test."""
    pair = (object(), object())
    interval = sys.getswitchinterval()
    yield pair
    for owner in pair:
        release(owner)
    sys.setswitchinterval(interval)


def in_a_thread(name: str, work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def kept(text: str) -> bool:
    return any(text in line for line in process_settings.lines())


# -- the switch interval ------------------------------------------------------------------------------


def test_switch_interval(owners: Any) -> None:
    before = sys.getswitchinterval()
    assert before > SWITCH_INTERVAL_S
    hold(owners[0])
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    release(owners[0])
    assert sys.getswitchinterval() == before


def test_two_owners(owners: Any) -> None:
    before = sys.getswitchinterval()
    first, second = owners
    hold(first)
    hold(second)
    release(first)
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    release(first)  # letting go twice is letting go once
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    release(second)
    assert sys.getswitchinterval() == before


def test_changed_interval_stays(owners: Any) -> None:
    hold(owners[0])
    sys.setswitchinterval(0.02)
    release(owners[0])
    assert sys.getswitchinterval() == pytest.approx(0.02)


def test_shorter_interval_stays(owners: Any) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S / 2)
    shorter = sys.getswitchinterval()
    hold(owners[0])
    assert sys.getswitchinterval() == shorter
    release(owners[0])
    assert sys.getswitchinterval() == shorter


def test_hold_again(owners: Any) -> None:
    before = sys.getswitchinterval()
    for _ in range(3):
        hold(owners[0])
        assert sys.getswitchinterval() < before
        release(owners[0])
        assert sys.getswitchinterval() == before


def test_two_servers(serve: Any) -> None:
    before = sys.getswitchinterval()
    one, two = serve(list, name="one"), serve(list, name="two")
    one.stop()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    two.stop()
    assert sys.getswitchinterval() == before


# -- what the threads would have printed --------------------------------------------------------------


@pytest.mark.parametrize("logger", ["uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "asyncio"])
def test_log_lines(owners: Any, logger: str, caplog: Any) -> None:
    log = logging.getLogger(logger)
    hold(owners[0])
    in_a_thread("serving-kit-http", lambda: log.error("ours to %s.%s", "keep", logger))
    in_a_thread("worker of the user", lambda: log.error("theirs on %s", logger))
    log.error("from a cell on %s", logger)
    assert [record.getMessage() for record in caplog.records] == [
        f"theirs on {logger}",
        f"from a cell on {logger}",
    ]
    assert kept(f"ERROR {logger}: ours to keep.{logger}")
    assert not kept(f"on {logger}")
    release(owners[0])
    in_a_thread("serving-kit-http", lambda: log.error("not held: %s", logger))
    assert caplog.records[-1].getMessage() == f"not held: {logger}"


def test_traceback(owners: Any) -> None:
    def fail() -> None:
        try:
            raise LookupError("deep inside")
        except LookupError:
            logging.getLogger("uvicorn.error").exception("request failed")

    hold(owners[0])
    in_a_thread("serving-kit-http", fail)
    assert kept("LookupError: deep inside")


def test_lines_of_transformers(owners: Any, capsys: Any) -> None:
    library = logging.getLogger("transformers")
    handler = logging.StreamHandler(sys.stderr)  # the library logs through one of its own
    library.addHandler(handler)
    propagate, library.propagate = library.propagate, False
    try:
        hold(owners[0])
        child = logging.getLogger("transformers.pipelines.base")
        in_a_thread("serving-kit-model", lambda: child.warning("from the model thread"))
        assert capsys.readouterr().err == ""
        assert kept("from the model thread")
        child.warning("from a cell")
        assert capsys.readouterr().err == "from a cell\n"
        release(owners[0])
        assert handler.filters == []
    finally:
        library.removeHandler(handler)
        library.propagate = propagate


def test_library_imported_later(owners: Any, capsys: Any) -> None:
    hold(owners[0])
    library = logging.getLogger("huggingface_hub")
    handler = logging.StreamHandler(sys.stderr)
    library.addHandler(handler)
    propagate, library.propagate = library.propagate, False
    try:
        hold(owners[1])
        in_a_thread("serving-kit-model", lambda: library.warning("downloaded"))
        assert capsys.readouterr().err == ""
        release(owners[0])
        release(owners[1])
        assert handler.filters == []
    finally:
        library.removeHandler(handler)
        library.propagate = propagate


def test_warnings(owners: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        seen = []
        warnings.showwarning = lambda message, *rest, **more: seen.append(str(message))
        before = warnings.showwarning
        hold(owners[0])
        in_a_thread("serving-kit-model", lambda: warnings.warn("ours alone", stacklevel=1))
        in_a_thread("worker of the user", lambda: warnings.warn("theirs", stacklevel=1))
        warnings.warn("of a cell", stacklevel=1)
        assert seen == ["theirs", "of a cell"]
        assert kept("UserWarning: ours alone")
        release(owners[0])
        assert warnings.showwarning is before


def test_changed_showwarning_stays(owners: Any) -> None:
    with warnings.catch_warnings():
        hold(owners[0])

        def mine(*_: Any, **__: Any) -> None: ...

        warnings.showwarning = mine
        release(owners[0])
        assert warnings.showwarning is mine


def test_line_limit(owners: Any) -> None:
    for number in range(1000):
        process_settings.keep(f"line {number}")
    lines = process_settings.lines()
    assert len(lines) < 1000
    assert lines[-1].endswith("line 999")


def test_many_threads() -> None:
    before = (sys.getswitchinterval(), warnings.showwarning, list(logging.getLogger("uvicorn").filters))
    failures: list[BaseException] = []

    def flicker() -> None:
        owner = object()
        try:
            for _ in range(100):
                hold(owner)
                release(owner)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=flicker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not failures
    after = (sys.getswitchinterval(), warnings.showwarning, list(logging.getLogger("uvicorn").filters))
    assert after == before
