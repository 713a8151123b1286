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
    """Two that may hold the changes; whatever a test does, they let go."""
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


def test_the_switch_interval_is_short_while_held_and_as_before_afterwards(owners: Any) -> None:
    before = sys.getswitchinterval()
    assert before > SWITCH_INTERVAL_S
    hold(owners[0])
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    release(owners[0])
    assert sys.getswitchinterval() == before


def test_it_is_put_back_when_the_last_of_two_lets_go(owners: Any) -> None:
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


def test_a_value_that_the_user_has_set_meanwhile_stays(owners: Any) -> None:
    hold(owners[0])
    sys.setswitchinterval(0.02)
    release(owners[0])
    assert sys.getswitchinterval() == pytest.approx(0.02)


def test_an_interval_that_is_shorter_already_is_left_alone(owners: Any) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S / 2)
    shorter = sys.getswitchinterval()
    hold(owners[0])
    assert sys.getswitchinterval() == shorter
    release(owners[0])
    assert sys.getswitchinterval() == shorter


def test_it_can_be_held_again_after_it_was_let_go(owners: Any) -> None:
    before = sys.getswitchinterval()
    for _ in range(3):
        hold(owners[0])
        assert sys.getswitchinterval() < before
        release(owners[0])
        assert sys.getswitchinterval() == before


def test_two_servers_share_the_short_interval_until_both_have_stopped(serve: Any) -> None:
    before = sys.getswitchinterval()
    one, two = serve(list, name="one"), serve(list, name="two")
    one.stop()
    assert sys.getswitchinterval() == pytest.approx(SWITCH_INTERVAL_S)
    two.stop()
    assert sys.getswitchinterval() == before


# -- what the threads would have printed --------------------------------------------------------------


@pytest.mark.parametrize("logger", ["uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "asyncio"])
def test_log_lines_of_our_threads_are_kept_and_others_pass(owners: Any, logger: str, caplog: Any) -> None:
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
    in_a_thread("serving-kit-http", lambda: log.error("nobody holds %s", logger))
    assert caplog.records[-1].getMessage() == f"nobody holds {logger}"


def test_a_traceback_is_kept_with_its_line(owners: Any) -> None:
    def fail() -> None:
        try:
            raise LookupError("deep inside")
        except LookupError:
            logging.getLogger("uvicorn.error").exception("request failed")

    hold(owners[0])
    in_a_thread("serving-kit-http", fail)
    assert kept("LookupError: deep inside")


def test_lines_that_transformers_prints_itself_are_kept_too(owners: Any, capsys: Any) -> None:
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


def test_a_library_that_is_imported_later_is_covered_from_the_next_hold(owners: Any, capsys: Any) -> None:
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


def test_warnings_of_our_threads_are_kept_and_others_pass(owners: Any) -> None:
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


def test_a_hook_that_the_user_has_set_meanwhile_stays(owners: Any) -> None:
    with warnings.catch_warnings():
        hold(owners[0])

        def mine(*_: Any, **__: Any) -> None: ...

        warnings.showwarning = mine
        release(owners[0])
        assert warnings.showwarning is mine


def test_only_the_latest_lines_are_kept(owners: Any) -> None:
    for number in range(1000):
        process_settings.keep(f"line {number}")
    lines = process_settings.lines()
    assert len(lines) < 1000
    assert lines[-1].endswith("line 999")


def test_holding_and_letting_go_from_many_threads_ends_as_it_began() -> None:
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
