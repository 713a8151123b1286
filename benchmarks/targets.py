"""The bars: what this project promises to reach, and how each is read from results.json.

    {"kinds": {KIND: {"closed": {SERVER: {CLIENTS: [run, ...]}}, "open": {SERVER: {MULTIPLE: [run, ...]}},
                      "knee_per_s": {SERVER: [rate, ...]}, "overload": {MULTIPLE: [run, ...]},
                      "raw_per_s": [rate, ...], "pipe": {"p50_ms": [...]}, "memory_mb": {SERVER: [...]}}},
     "noop": {SERVER: [run, ...]}}

A list has one element for each round. A ratio is taken within a round, where both sides were measured one
after the other, and the median of the rounds counts. "Best of the peers" is the best in that round.

Pure: values in, values out. Not here: the tables (`report.py`), the measurement (`run.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS, PIPE = "ours", "pipe"
PIPELINE_PEERS = ("guide", "guide-batching", "litserve", "mosec", "batched")
ANSWERS, GOODPUT, P99 = "answers_per_s", "goodput_per_s", "p99_ms"
CLASSIFICATION, EMBEDDINGS, FILL_MASK = "text-classification", "embeddings", "fill-mask"
ALL_KINDS = (CLASSIFICATION, EMBEDDINGS, FILL_MASK, "feature-extraction")

Results = Mapping[str, Any]
Run = Mapping[str, Any]
Measure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Bar:
    """One promise. `at_most`: the measured value may not exceed the bound; else it must reach it."""

    what: str
    bound: float
    measure: Measure
    at_most: bool = False


@dataclass(frozen=True)
class Reading:
    """A bar, and what was measured; None: this run has not measured it."""

    bar: Bar
    measured: float | None

    @property
    def met(self) -> bool:
        if self.measured is None:
            return False
        return self.measured <= self.bar.bound if self.bar.at_most else self.measured >= self.bar.bound


def readings(results: Results) -> list[Reading]:
    """Every bar that this run has measured."""
    every = [Reading(bar, bar.measure(results)) for bar in BARS]
    return [reading for reading in every if reading.measured is not None]


# -- how a bar is measured ----------------------------------------------------------------------


def median_ratio(mine: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """The median of the ratios of all rounds; None where one side has nothing to divide."""
    pairs = zip(mine, theirs, strict=False)  # a run that was cut short has fewer rounds of one
    ratios = [a / b if b else float("inf") for a, b in pairs if a is not None and b is not None]
    return statistics.median(ratios) if ratios else None


def closed(kind: str, clients: int, figure: str, peers: Sequence[str]) -> Measure:
    """Ours over the best of the peers, in a closed loop."""

    def measure(results: Results) -> float | None:
        loops = _part(results, kind, "closed")
        own = _figures(loops, OURS, str(clients), figure)
        return median_ratio(own, _best(loops, peers, str(clients), figure))

    return measure


def best_goodput(kind: str, peers: Sequence[str]) -> Measure:
    """The highest goodput of ours at any load over the highest of any peer."""

    def measure(results: Results) -> float | None:
        loops = _part(results, kind, "open")
        if not any(peer in loops for peer in peers):
            return None
        theirs = [_peaks(loops[peer]) for peer in peers if peer in loops]
        return median_ratio(_peaks(loops.get(OURS, {})), [max(each) for each in zip(*theirs, strict=False)])

    return measure


def served_to_raw(kind: str, clients: int) -> Measure:
    """Ours with many clients over the model alone, all texts known beforehand."""

    def measure(results: Results) -> float | None:
        own = _figures(_part(results, kind, "closed"), OURS, str(clients), ANSWERS)
        return median_ratio(own, _part(results, kind, "raw_per_s", ()))

    return measure


def one_client(kind: str) -> Measure:
    """The p50 of ours with one client over the p50 of a loop that calls the pipeline."""

    def measure(results: Results) -> float | None:
        own = _figures(_part(results, kind, "closed"), OURS, "1", "p50_ms")
        return median_ratio(own, _part(results, kind, PIPE).get("p50_ms", ()))

    return measure


def kept(kind: str, multiple: int) -> Measure:
    """Goodput at a multiple of the knee over the peak of the same round."""

    def measure(results: Results) -> float | None:
        overload = _part(results, kind, "overload")
        beyond = [run[GOODPUT] for run in overload.get(str(multiple), ())]
        return median_ratio(beyond, _peaks(overload))

    return measure


def worst(kind: str, figure: str, scale: float = 1.0) -> Measure:
    """The highest value of a figure of ours in any run of open and overload."""

    def measure(results: Results) -> float | None:
        loads = [_part(results, kind, "open").get(OURS, {}), _part(results, kind, "overload")]
        runs = [run for load in loads for rounds in load.values() for run in rounds]
        values = [run[figure] for run in runs if run.get(figure) is not None]
        return scale * max(values) if values else None

    return measure


def memory(kind: str) -> Measure:
    """Megabytes of ours beyond a process with the pipeline alone."""

    def measure(results: Results) -> float | None:
        used = _part(results, kind, "memory_mb")
        pairs = zip(used.get(OURS, ()), used.get(PIPE, ()), strict=False)
        beyond = [own - alone for own, alone in pairs]
        return statistics.median(beyond) if beyond else None

    return measure


def noop(results: Results) -> float | None:
    """Ours around a function that does nothing over a bare Starlette route."""
    runs = results.get("noop", {})
    own, echo = runs.get("ours-noop", ()), runs.get("starlette-echo", ())
    return median_ratio([run[ANSWERS] for run in own], [run[ANSWERS] for run in echo])


def _part(results: Results, kind: str, part: str, default: Any = None) -> Any:
    return results.get("kinds", {}).get(kind, {}).get(part) or ({} if default is None else default)


def _figures(loops: Results, server: str, condition: str, figure: str) -> list[float | None]:
    return [run[figure] for run in loops.get(server, {}).get(condition, ())]


def _best(loops: Results, peers: Sequence[str], condition: str, figure: str) -> list[float | None]:
    """The best peer of each round: the highest, of times the lowest."""
    each = [_figures(loops, peer, condition, figure) for peer in peers if peer in loops]
    choose = min if figure.endswith("_ms") else max
    rounds = [[value for value in values if value is not None] for values in zip(*each, strict=False)]
    return [choose(values) if values else None for values in rounds]


def _peaks(load: Mapping[str, Sequence[Run]]) -> list[float]:
    """The highest goodput of each round at any load."""
    return [max(run[GOODPUT] for run in runs) for runs in zip(*load.values(), strict=False)]


# -- the bars -------------------------------------------------------------------------------------


def _against_vllm(kind: str, *, tail: bool) -> list[Bar]:
    bars = []
    for clients in (4, 16, 64):
        what = f"{kind}, {clients} clients"
        bars.append(Bar(f"{what}: answers/s / vLLM's", 1.25, closed(kind, clients, ANSWERS, ("vllm",))))
        if tail:
            measure = closed(kind, clients, P99, ("vllm",))
            bars.append(Bar(f"{what}: p99 / vLLM's", 0.9, measure, at_most=True))
    return bars


def _of_every_kind(kind: str) -> list[Bar]:
    return [
        Bar(f"{kind}: served with 64 clients / raw limit", 0.9, served_to_raw(kind, 64)),
        Bar(f"{kind}: p50 with one client / pipe(text)", 1.1, one_client(kind), at_most=True),
        Bar(f"{kind}: goodput at 2x the knee / peak", 0.97, kept(kind, 2)),
        Bar(f"{kind}: goodput at 5x the knee / peak", 0.93, kept(kind, 5)),
        Bar(f"{kind}: goodput at 10x the knee / peak", 0.90, kept(kind, 10)),
        Bar(f"{kind}: admitted and late, %", 0.1, worst(kind, "admitted_late_share", 100), at_most=True),
        Bar(f"{kind}: p99 of refusals on admission, ms", 20, worst(kind, "reject_p99_ms"), at_most=True),
        Bar(f"{kind}: memory beyond the pipeline, MB", 40, memory(kind), at_most=True),
    ]


BARS: tuple[Bar, ...] = (
    *_against_vllm(CLASSIFICATION, tail=True),
    *_against_vllm(EMBEDDINGS, tail=False),
    Bar("fill-mask, 16 clients: answers/s / best peer", 3.5, closed(FILL_MASK, 16, ANSWERS, PIPELINE_PEERS)),
    Bar("fill-mask: best goodput / best peer's", 4.5, best_goodput(FILL_MASK, PIPELINE_PEERS)),
    *(bar for kind in ALL_KINDS for bar in _of_every_kind(kind)),
    Bar("no-op model, 32 clients / bare Starlette echo", 0.6, noop),
)
