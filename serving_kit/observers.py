"""Who is told of the records: any number of observers. On the loop thread."""

from __future__ import annotations

from collections.abc import Callable

from serving_kit.records import Record

Observer = Callable[[Record], None]


class Observers:
    """Calls every observer with every record, in the order in which they were added.

    One that raises is removed.

    Args:
        removed: Called with the exception of an observer that was removed.
    """

    def __init__(self, removed: Callable[[Exception], None]) -> None:
        self._observers: tuple[Observer, ...] = ()
        self._removed = removed

    def add(self, observer: Observer) -> None:
        """Call it with every record from now on. Any thread."""
        self._observers = (*self._observers, observer)

    def remove(self, observer: Observer) -> None:
        """Call it no more. Any thread."""
        self._observers = tuple(each for each in self._observers if each != observer)

    def report(self, record: Record) -> None:
        """Tell all observers of a record."""
        for observer in self._observers:
            try:
                observer(record)
            except Exception as error:
                self.remove(observer)
                self._removed(error)
