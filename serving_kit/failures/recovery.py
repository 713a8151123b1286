"""A step has raised: which parts of it run again, which items have failed, and whether the model has.

    a step raised ──▶ recover() ──▶ Rerun, RunCanary, FreeMemory, Settle, ... ──▶ Conclusions

`recover` and `attribute` are generators. Each yields what is to be done, is sent what came of it (`Reply`),
and returns its conclusions; the engine does what they ask. They hold no lock, read no clock and call nothing.

Only the items that fail alone get the failure: a batch is bisected until each of them is isolated
(`bisection.py`). One that did not fit into memory is halved, and the size is remembered (`memory_limit.py`).

The canary is the model's own example (`Model.example`). While it is answered, a failure belongs to the
input; if it is not, a batch without one answer counts against the model. A model without an example, as every
function is, has no canary: a client's input runs again only to answer that client, never for others. There,
such a batch is inconclusive, and the breaker needs more of them (`breaker.py`).

Without `retry`, no input runs twice: a batch that raises fails whole.

Not here: which kind of failure it is (`classify.py`), when the model is asked again (`breaker.py`).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serving_kit.failures.bisection import Bisection
from serving_kit.failures.classify import Failure
from serving_kit.items import Item, computed, longest
from serving_kit.model import FailureKind


class Rerun(NamedTuple):
    """Run these items of the step again."""

    items: Sequence[Item]


class RunCanary(NamedTuple):
    """Run the model's own example."""


class FreeMemory(NamedTuple):
    """Give back what the failed step holds."""

    failure: Failure


class Settle(NamedTuple):
    """End these items with the failure."""

    items: Sequence[Item]
    failure: Failure
    alone: bool  # whether it came of one item while others fit into memory


class Expire(NamedTuple):
    """End these items: their time is up."""

    items: Sequence[Item]


Request = Rerun | RunCanary | FreeMemory | Settle | Expire


class Isolated(NamedTuple):
    """An item that failed, and how."""

    item: Item
    failure: Failure


class Reply(NamedTuple):
    """What came of a request."""

    now: float
    failure: Failure | None = None  # of a `Rerun` that raised as a whole
    isolated: Isolated | None = None  # of a `Rerun` that gave no answer, only failures of single items
    healthy: bool = False  # of a `RunCanary`
    skipped: bool = False  # a `Rerun` that was not run, because its clients have left meanwhile


class Attributed(NamedTuple):
    """A failure that may be the model's.

    Attributes:
        healthy: Whether the model answered its canary after it; None: not known.
        items: Of the step that raised it.
    """

    failure: Failure
    healthy: bool | None
    items: Sequence[Item]


class TooLarge(NamedTuple):
    """Items that did not fit into memory together, as they were then."""

    items: Sequence[Item]
    longest: int  # tokens of the longest
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Conclusions:
    """What a failure says beyond its own items.

    Attributes:
        attributed: To count against the model.
        too_large: The least that did not fit into memory together, though each item does; None: nothing.
        unreported: A failure that no client was told of.
    """

    attributed: Sequence[Attributed] = ()
    too_large: TooLarge | None = None
    unreported: Failure | None = None


Recovery = Generator[Request, Reply, Conclusions]


def recover(
    items: Sequence[Item],
    failure: Failure,
    now: float,
    *,
    has_canary: bool,
    retry: bool,
    thorough: bool,
    packed: bool = False,
) -> Recovery:
    """Settle every item of a step that raised; with `retry`, only those that fail alone get a failure.

    One failing item among n takes 2 * ceil(log2 n) + 1 further steps at most: one for the canary, and the
    bisection. After a wrong number of outputs it is n and one.

    Args:
        items: Of the step.
        failure: What it raised.
        now: When, in seconds on the engine's clock.
        has_canary: Whether the model has an example to run.
        retry: Whether parts of the step may run again.
        thorough: Whether to bisect to the end also while the model is not known to be healthy.
        packed: Whether the model needs no padding.
    """
    step = _FailedStep(items, failure, now, retry=retry, thorough=thorough, packed=packed)
    attributed: list[Attributed] = []
    if failure.kind is FailureKind.MEMORY:
        now = (yield FreeMemory(failure)).now
    if step.needs_canary:
        healthy, now = yield from _is_healthy(failure, has_canary, now)
        step.note_canary(healthy)
    while part := step.next(now):
        reply = yield Rerun(part)
        now = reply.now
        if reply.skipped:
            continue
        if reply.failure is None:
            step.passed(part)
            if reply.isolated is not None:
                attributed += (yield from attribute([reply.isolated], has_canary)).attributed
            continue
        if reply.failure.kind is FailureKind.MEMORY:
            now = (yield FreeMemory(reply.failure)).now
        step.failed(part, reply.failure)
        if len(part) == 1:
            if not step.answered and step.healthy is None:
                healthy, now = yield from _is_healthy(reply.failure, has_canary, now)
                step.note_canary(healthy)
            yield Settle(part, reply.failure, alone=step.healthy is not False)
            step.settle(part)
    expired, rest = step.expired(now), step.wanted(now)  # at one time, so that none is in neither
    if expired:
        yield Expire(expired)
    if rest:
        yield Settle(rest, step.failure, alone=step.healthy is not False and len(rest) == 1)
        step.settle(rest)
    if not step.answered and step.healthy is not True:
        attributed.append(Attributed(step.failure, step.healthy, items))
    return Conclusions(attributed, step.too_large(), None if step.failed_items else step.failure)


def attribute(isolated: Sequence[Isolated], has_canary: bool) -> Recovery:
    """Find out whether failures of single items are the model's: one run of the canary for all of them."""
    candidates = [each for each in isolated if not each.failure.rejects_input]
    if not candidates:
        return Conclusions()
    healthy, _ = yield from _is_healthy(candidates[-1].failure, has_canary, 0.0)
    if healthy is True:
        return Conclusions()
    return Conclusions([Attributed(each.failure, healthy, [each.item]) for each in candidates])


def _is_healthy(
    failure: Failure, has_canary: bool, now: float
) -> Generator[Request, Reply, tuple[bool | None, float]]:
    """Whether the model works in spite of `failure` (None: not known), and the time after that."""
    if failure.rejects_input:
        return True, now
    if failure.kind is FailureKind.DEVICE:
        return False, now
    if not has_canary:
        return None, now
    reply = yield RunCanary()
    return reply.healthy, reply.now


class _FailedStep:
    """One step that raised: what is known about its items and the model."""

    def __init__(
        self,
        items: Sequence[Item],
        failure: Failure,
        now: float,
        *,
        retry: bool,
        thorough: bool,
        packed: bool,
    ) -> None:
        self.items = items
        self.failure = failure  # the last one
        self.healthy: bool | None = None  # whether the model answers its canary; None: not known
        self.answered = False  # whether a part of the step was
        self.failed_items: set[Item] = set()
        self._retry = retry
        self._packed = packed
        self._settled: set[Item] = set()  # answered or failed
        self._did_not_fit: list[TooLarge] = []
        self._part = range(len(items))  # that runs now
        self._note_memory(items)
        self._halving = retry and bool(self._did_not_fit) and len(items) > 1
        self._unwanted = not self.wanted(now)
        self._over = not retry
        miscounted = failure.kind is FailureKind.OUTPUTS
        self._bisection = Bisection(len(items), known_healthy=self._halving or thorough, alone=miscounted)

    @property
    def needs_canary(self) -> bool:
        """Whether to run the canary first: parts of what was too large run anyway."""
        return not (self._halving or self._unwanted)

    def note_canary(self, healthy: bool | None) -> None:
        """Note what came of the canary."""
        self.healthy = healthy
        self._over = self._over or healthy is False
        if healthy:
            self._bisection.passed()

    def next(self, now: float) -> list[Item]:
        """The items to run again; empty: the bisection is over."""
        while not self._over and (part := self._bisection.next()) is not None:
            wanted = self._wanted([self.items[i] for i in part], now)
            if wanted:
                self._part = part
                return wanted
        return []

    def passed(self, items: Sequence[Item]) -> None:
        """Those of `next` ran without raising."""
        self.answered = True
        self._settled.update(items)
        self._bisection.passed()

    def failed(self, items: Sequence[Item], failure: Failure) -> None:
        """Those of `next` raised."""
        self.failure = failure
        self._note_memory(items)
        self._bisection.failed(self._part, alone=failure.kind is FailureKind.OUTPUTS)
        self._over = self._over or failure.kind is FailureKind.DEVICE  # whatever ran next would fail as well

    def settle(self, items: Sequence[Item]) -> None:
        """They have got the last failure."""
        self._settled.update(items)
        self.failed_items.update(items)

    def wanted(self, now: float) -> list[Item]:
        """Those that are not settled, whose client waits and whose time is not up."""
        return self._wanted(self.items, now)

    def expired(self, now: float) -> list[Item]:
        """Those that are not settled and whose time is up."""
        return [item for item in self.items if item not in self._settled and item.deadline <= now]

    def too_large(self) -> TooLarge | None:
        """The least that did not fit into memory together, though each item does.

        Without a retry it is not known whether each does, and assumed.
        """
        several = [part for part in self._did_not_fit if len(part.items) > 1]
        fit_alone = self._settled - self.failed_items
        together = [part for part in several if not self._retry or fit_alone.issuperset(part.items)]
        return min(together, key=lambda part: part.computed_tokens, default=None)

    def _wanted(self, items: Sequence[Item], now: float) -> list[Item]:
        return [item for item in items if item not in self._settled and item.is_wanted(now)]

    def _note_memory(self, items: Sequence[Item]) -> None:
        if self.failure.kind is FailureKind.MEMORY:
            # Measured now: items that go on have the tokens of their next step later.
            self._did_not_fit.append(TooLarge(items, longest(items), computed(items, packed=self._packed)))
