"""Refuses a call of a served function to a server that would wait for that function.

A served function runs on the model thread of its server. If it asks that server, or one whose function asks
that server in turn, its answer waits for the thread that waits for the answer.

Any thread. Not here: the call itself (`server.py`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from serving_kit.service import Service
from serving_kit.worker import THREAD_NAME

_waiting: dict[threading.Thread, Service] = {}  # model threads that wait for an answer, and whose
_lock = threading.Lock()


@contextlib.contextmanager
def waiting_for(service: Service) -> Iterator[None]:
    """Note that this thread waits for an answer of `service`, if it is a model thread.

    Raises:
        RuntimeError: the answer would wait for this thread.
    """
    me = threading.current_thread()
    if me.name != THREAD_NAME:
        yield
        return
    with _lock:
        refuse_circle(service, me)
        _waiting[me] = service
    try:
        yield
    finally:
        del _waiting[me]


def refuse_circle(service: Service, me: threading.Thread) -> None:
    """Raise `RuntimeError` if an answer of `service` waits for the thread `me`."""
    other: Service | None = service
    while other is not None and (thread := other.batcher.thread) is not None:
        if thread is me:
            raise RuntimeError(
                f"a function that {service.name!r} waits for cannot ask {service.name!r}: it would wait for "
                "its own answer until the timeout. Call the function or the model itself"
            )
        other = _waiting.get(thread)
