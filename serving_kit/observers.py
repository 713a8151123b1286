"""Any number of functions that are called with every record of one kind.

    step_observers = Observers(metrics.add_batch, on_failure=log.observer_failed)
    step_observers.add(my_function)
    step_observers(record)

What an observer raises is reported and goes no further: a request must not fail because it is observed.

Not here: the records (`records.py`), who observes them (`telemetry.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

R = TypeVar("R")


class Observers(Generic[R]):
    """Calls the observers in the order in which they were added, on the thread that emits the record.

    They must be quick and must not block. `add` and `remove` may be called from any thread. An observer that
    raises is removed, unless it is one of the first ones: a passing lack of memory must not end the counting.

    Args:
        first: The kit's own.
        on_failure: Called with what an observer raised.
    """

    def __init__(self, *first: Callable[[R], None], on_failure: Callable[[Exception], None]) -> None:
        self._first = first
        self._all = first  # replaced and never changed, so that it can be read without a lock
        self._on_failure = on_failure
        self._lock = threading.Lock()

    def add(self, observer: Callable[[R], None]) -> None:
        """Call `observer` with every later record."""
        with self._lock:
            self._all = (*self._all, observer)

    def remove(self, observer: Callable[[R], None]) -> None:
        """Call `observer` no more; without effect if it was not added, or is one of the first ones."""
        with self._lock:
            self._all = tuple(each for each in self._all if each != observer or each in self._first)

    def __call__(self, record: R) -> None:
        """Emit a record."""
        for observer in self._all:
            try:
                observer(record)
            except Exception as error:
                self.remove(observer)
                self._on_failure(error)
