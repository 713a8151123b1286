"""Any number of observers, of which none can end another or the caller."""

import threading

import pytest

from serving_kit.observers import Observers

pytestmark = pytest.mark.light


def broken(record: int) -> None:
    raise LookupError(record)


def test_order_add_and_remove() -> None:
    seen: list[str] = []
    observers = Observers[int](lambda record: seen.append(f"first {record}"), on_failure=pytest.fail)

    def second(record: int) -> None:
        seen.append(f"second {record}")

    observers.add(second)
    observers(1)
    observers.remove(second)
    observers.remove(second)
    observers(2)
    assert seen == ["first 1", "second 1", "first 2"]


def test_added_observer_that_raises_is_removed() -> None:
    seen: list[int] = []
    failures: list[Exception] = []
    observers = Observers[int](on_failure=failures.append)
    observers.add(broken)
    observers.add(seen.append)
    observers(1)
    observers(2)
    assert seen == [1, 2]
    assert [type(each) for each in failures] == [LookupError]


def test_first_observer_that_raises_stays() -> None:
    failures: list[Exception] = []
    observers = Observers[int](broken, on_failure=failures.append)
    observers(1)
    observers(2)
    assert len(failures) == 2


def test_interrupt_passes() -> None:
    """What is no `Exception`, as KeyboardInterrupt, is not for the observers to keep."""

    def interrupt(record: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Observers[int](interrupt, on_failure=pytest.fail)(1)


def test_add_while_another_thread_emits() -> None:
    seen: list[int] = []
    observers = Observers[int](seen.append, on_failure=pytest.fail)
    emitter = threading.Thread(target=lambda: [observers(number) for number in range(1000)])
    emitter.start()
    for _ in range(20):
        observers.add(lambda record: None)
    emitter.join()
    assert seen == list(range(1000))
