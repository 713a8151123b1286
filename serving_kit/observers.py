"""Any number of functions that are called with every record of one kind.

    step_observers = Observers(metrics.add_batch, on_failure=log.observer_failed)
    step_observers.add(my_function)
    step_observers(record)

An observer that raises is removed and reported, because what it observes must go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

R = TypeVar("R")


class Observers(Generic[R]):
    """Calls the observers in the order in which they were added, on the thread that emits the record.

    They must be quick and must not block. `add` and `remove` may be called from any thread.

    Args:
        observers: The first ones.
        on_failure: Called with what an observer raised.
    """

    def __init__(self, *observers: Callable[[R], None], on_failure: Callable[[Exception], None]) -> None:
        self._observers = observers  # replaced and never changed, so that no lock is needed to read it
        self._on_failure = on_failure

    def add(self, observer: Callable[[R], None]) -> None:
        """Call `observer` with every later record."""
        self._observers = (*self._observers, observer)

    def remove(self, observer: Callable[[R], None]) -> None:
        """Call it no more; without effect if it was not added."""
        self._observers = tuple(each for each in self._observers if each != observer)

    def __call__(self, record: R) -> None:
        """Emit a record."""
        for observer in self._observers:
            try:
                observer(record)
            except Exception as error:
                self.remove(observer)
                self._on_failure(error)
