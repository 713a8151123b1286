"""`Server`: the handle of a running server, and the servers of this process.

Not here: starting and replacing one (`serving.py`), what it does without a kernel (`service.py`), threads
(`inline_server.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Unpack

from serving_kit.circular_waits import refuse_circle, waiting_for
from serving_kit.durations import HISTORY_S
from serving_kit.errors import MalformedRequest, ServingError, Stopping
from serving_kit.inline_server import InlineServer, ServerGone
from serving_kit.notebook import process_settings
from serving_kit.records import BatchReason, Incident
from serving_kit.script import stop_signals
from serving_kit.service import Service
from serving_kit.settings import Knobs, Settings, with_knobs
from serving_kit.spec import ServeSpec
from serving_kit.stats_json import stats_json
from serving_kit.status import ServerStatus, State
from serving_kit.text_stream import TextStream
from serving_kit.values import as_python

# Kept on `sys`, so that reloading this module (%autoreload) does not lose track of what runs.
SERVERS: dict[str, Server] = sys.__dict__.setdefault("_serving_kit_servers", {})
# A server is started, replaced and stopped under the lock of its name, so that servers of different names
# do not wait for each other.
_locks: dict[str, threading.RLock] = sys.__dict__.setdefault("_serving_kit_locks", {})


class Server:
    """A model server in this process. Made by `serve()`; every method may be called from any cell.

    Attributes:
        name: What `serve(name=...)` said; a second server of that name replaces this one.
        url: Where code in this kernel reaches it.
        spec: What it was asked for, with the name of a live model in place of the object.
        token: What changing settings needs as bearer token, and other machines for everything.
        drain_s: Seconds that admitted requests get to finish when it stops.
        lame_duck_s: Seconds before that in which `/health` says 503 and requests are still answered.
    """

    def __init__(self, spec: ServeSpec, service: Service, inline: InlineServer, token: str) -> None:
        self.name = spec.name
        self.url = inline.url
        self.spec = spec.without_object()  # the service alone keeps the model, until it stops
        self.token = token
        self.drain_s = spec.drain_s
        self.lame_duck_s = spec.lame_duck_s
        self._service = service
        self._inline = inline
        self._replaced = False
        self._successor_since: float | None = None  # since when a newer run loads its model
        self._panel: Any = None

    # -- asking ----------------------------------------------------------------------------------

    def __call__(self, inputs: Any, **parameters: Any) -> Any:
        """What the pipeline returns for `inputs`, through the same queue as HTTP requests.

        A list is always several inputs, also for a function: one input that is itself a list goes as a
        list of one, `server([[1, 2, 3]])`. A tuple or an array is one input.

        Args:
            inputs: One input, or a list of them: each is a queue item, answered in the same order.
            parameters: As for the pipeline.

        Raises:
            ServingError: as HTTP clients get it; a note holds the details. `Unavailable` if the server has
                stopped or was replaced.
            RuntimeError: called by the function that this server serves, on its model thread, where the
                answer would wait for itself; also when several servers would wait in a circle.
        """
        with _explained(self), waiting_for(self._service):
            return self._inline.run(_ask(self._service, inputs, parameters))

    async def predict(self, inputs: Any, **parameters: Any) -> Any:
        """The same for `await`: the cell's event loop goes on while the model works."""
        refuse_circle(self._service, threading.current_thread())
        with _explained(self):
            return await asyncio.wrap_future(self._inline.submit(_ask(self._service, inputs, parameters)))

    def stream(self, prompt: str | list[dict[str, str]], **parameters: Any) -> TextStream:
        """The pieces of a generated text as they come, for `for` and `async for`.

            for piece in server.stream("Once upon a time", max_new_tokens=50):
                print(piece, end="")

        A model that generates in groups gives no pieces: the loop ends without any.

        Args:
            prompt: A text, or the messages of a chat.
            parameters: As for the pipeline.

        Returns:
            An iterator that raises as `server(...)` does. Leave it early with `close()`.
        """
        return TextStream(
            self._service, self._inline, functools.partial(_explained, self), prompt, parameters
        )

    def chat(self, messages: list[dict[str, str]], **parameters: Any) -> str:
        """The model's reply to messages, by the chat template of its tokenizer.

        Args:
            messages: The first is the oldest; each has a role and a content.
            parameters: As for the pipeline.

        Raises:
            ServingError: as `server(...)` does; InputRejected if the model has no chat template.
        """
        ((answer,),) = self([messages], **{**parameters, "return_full_text": False})
        return str(answer["generated_text"])

    # -- tuning and looking ----------------------------------------------------------------------

    @property
    def settings(self) -> Settings:
        """The knobs in force."""
        return self._service.settings

    @with_knobs(defaults=False)
    def tune(self, /, **knobs: Unpack[Knobs]) -> Settings:
        """Change knobs of the running server, all or none; they count from the next step.

        Args:
            **knobs: Those of `Settings` to change; the others stay as they are.

        Returns:
            All the knobs.

        Raises:
            SettingError: an unknown knob or a bad value; nothing was changed.
            Unavailable: the server has stopped or was replaced.
        """
        return self._tune("tune()", knobs)

    def _tune(self, by: str, knobs: Mapping[str, object]) -> Settings:
        """The same; `by` is who asks, for the log."""
        self._refuse_if_gone()
        return self._service.tune(by, **knobs)

    def stats(self, series: int = 0) -> dict[str, Any]:
        """What the panel shows. Durations in milliseconds; `window` covers the last 30 seconds.

        Args:
            series: Add one entry for each of the last so many seconds, and the knobs that moved.
        """
        return {**stats_json(self._status(), self._service.statistics(series)), "url": self.url}

    def _status(self) -> ServerStatus:
        """The status of the service, and what is known about it only here."""
        status = self._service.status()
        if self._replaced:
            reason = "replaced by a newer run of serve()"
            return dataclasses.replace(status, state=State.REPLACED, reason=reason)
        if self._inline.died:
            reason = "the server's thread has died: run serve() again"
            return dataclasses.replace(status, state=State.FAILED, reason=reason)
        if self._successor_since is not None:
            waited_s = time.monotonic() - self._successor_since
            reason = f"a newer run is loading its model, for {waited_s:.0f} s"
            return dataclasses.replace(status, reason=reason)
        return status

    def history(self) -> Any:
        """The last five minutes, one row for each second: a DataFrame, or without pandas a list of dicts.

        The same numbers as in the panel and in `stats(series=300)`, with the nested ones as columns of
        their own (`latency_ms.p99`). `ago_s` counts back from now.
        """
        points = self.stats(HISTORY_S)["series"]
        last = points[-1]["second"]
        rows = [{"ago_s": last - point["second"], **_flat(point)} for point in points]
        try:
            import pandas
        except ImportError:
            return rows
        return pandas.DataFrame(rows).set_index("ago_s")

    def as_code(self) -> str:
        """The call that makes this server with the settings in force: every knob that is not at its default.

        A pipeline or function is called by its name, which may differ from that of your variable.
        """
        return self.spec.as_code(self.settings)

    def errors(self) -> list[Incident]:
        """The latest failures, newest first, with tracebacks and the ids that clients were told."""
        return self._service.incidents()

    def logs(self) -> list[str]:
        """The latest lines that the server's threads would have printed, oldest first."""
        return process_settings.lines()

    @property
    def panel(self) -> Any:
        """The live panel: one for each server, however often it is shown."""
        if self._panel is None:
            from serving_kit.notebook.panel import make_panel

            self._panel = make_panel(self)
        return self._panel

    # -- life ------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether it answers: not stopped, not replaced."""
        return self._inline.alive and not self._service.stopped

    def stop(self, timeout: float | None = None) -> None:
        """Finish what was admitted; close the port; release the model.

        What is not finished in time is answered with 503, and so are new requests meanwhile. Idempotent: a
        server that was replaced has stopped already. Any thread but the server's own; waits while a newer
        run of the same name loads its model.

        Args:
            timeout: Seconds for what was admitted; None: the server's `drain_s`. Before that, `/health`
                says 503 for the server's `lame_duck_s` while requests are still answered.
        """
        with lock_of(self.name):
            try:
                if not self._replaced:
                    self._announce_stop()
                    self._end(self.drain_s if timeout is None else timeout)
            finally:  # also when ■ interrupts the drain: it has stopped then, too
                if SERVERS.get(self.name) is self:
                    del SERVERS[self.name]
                self._finish_panel()

    def wait(self) -> None:
        """Block until ■ (or Ctrl+C), then stop. For scripts, and for cells that should show as running.

        In the main thread of a script, SIGTERM and SIGHUP end it too, unless the script handles them
        itself; a second one ends the draining. The script goes on after it.
        """
        with stop_signals() as caught:
            with contextlib.suppress(KeyboardInterrupt):
                while self.running and not caught:
                    time.sleep(0.2)
            try:
                self.stop()
            except KeyboardInterrupt:
                if not caught:
                    raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        status, requests = self._status(), self._service.metrics.requests()
        return (
            f"<serving_kit.Server {self.name!r}: {status.model} ({status.task}) "
            f"at {self.url}, {status.state}, {requests} requests>"
        )

    def _ipython_display_(self) -> None:
        self.panel.show(repr(self))

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        return {"text/plain": repr(self), **self.panel.bundle()}

    def _announce_stop(self) -> None:
        """Report not ready for `lame_duck_s`; ■ ends the server at once."""
        if not self.running or not self.lame_duck_s:
            return
        self._service.announce_stop()
        try:
            time.sleep(self.lame_duck_s)
        except BaseException:
            self._end(0)
            raise

    def _end(self, drain_s: float) -> None:
        self._service.drain()
        try:
            self._inline.stop(drain_s)
        finally:  # also if its loop has died, or ■ interrupts the drain
            self._service.release()

    def _refuse_if_gone(self) -> None:
        if why := self._why_gone():
            raise Stopping(why)

    def _why_gone(self) -> str:
        """Why this handle has no server any more; empty if it has one."""
        if self._replaced:
            return "this server has stopped: it was replaced by a newer run of serve()"
        if self._inline.died:
            return "the server has stopped: its thread has died. Run serve() again"
        return "" if self.running else "the server has stopped: run serve() again"

    def _finish_panel(self) -> None:
        if self._panel is not None:
            self._panel.finish()

    def _become_replaced(self) -> None:
        self._replaced = True
        self._finish_panel()


def stop_all() -> None:
    """Stop every server of this process."""
    for server in servers():
        server.stop()


def servers() -> list[Server]:
    """The servers that run in this process."""
    return [server for server in list(SERVERS.values()) if server.running]


def lock_of(name: str) -> threading.RLock:
    """The lock under which the server of that name is started, replaced and stopped."""
    return _locks.setdefault(name, threading.RLock())


async def _ask(service: Service, inputs: object, parameters: Mapping[str, object]) -> Any:
    """One request of this process. On the loop thread."""
    parameters = {name: as_python(value) for name, value in parameters.items()}
    with service.observe() as ticket:
        if inputs == [] and isinstance(inputs, list):
            raise MalformedRequest("inputs is empty")
        answers = await service.predict(inputs if isinstance(inputs, list) else [inputs], parameters, ticket)
        return answers if isinstance(inputs, list) else answers[0]


@contextlib.contextmanager
def _explained(server: Server) -> Iterator[None]:
    """Add what a client is not told to an error in the owner's own cell."""
    server._refuse_if_gone()
    try:
        yield
    except ServerGone:
        raise Stopping(server._why_gone() or "the server has stopped") from None
    except ServingError as error:
        if error.detail:
            error.add_note(error.detail)
        if error.incident:
            error.add_note(f"server.errors() has the traceback, as incident {error.incident}")
        raise


def _flat(point: Mapping[str, Any]) -> dict[str, Any]:
    """One second of the series without nesting, and with totals where the keys are open."""
    row = {key: value for key, value in point.items() if not isinstance(value, dict)}
    for key in ("latency_ms", "queue_wait_ms", "forward_ms"):
        row |= {f"{key}.{name}": value for name, value in point[key].items()}
    batches = sum(point["sizes"].values())
    items = sum(int(size) * count for size, count in point["sizes"].items())
    row |= {"batches": batches, "batch_size_mean": items / batches if batches else None}
    return row | {f"batches.{reason.value}": point["reasons"].get(reason.value, 0) for reason in BatchReason}
