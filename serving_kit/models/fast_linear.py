"""Linear layers on a CPU take the fastest road for their shape and rows, found when a model is loaded.

    plain      `F.linear`: MKL in single precision, slow on some processors that Intel did not make
    onednn     the operator that `torch.compile` calls: on one AMD EPYC, 384 x 1536 with 128 rows, 0.65 ms
               against 1.4 ms; on another one 0.9 to 1.2 times as fast
    turned     weight @ rows.T: up to 1.6 times as fast for few rows on some processors; its result is copied
               into the usual layout, and that counts

The weights stay as they are, no copy, and the sums differ by their rounding only (2e-6 of 3 measured).

The operator of oneDNN is not a public one. So every road is tried: one that is missing, wrong or not faster
is not taken. A trial takes a few calls for each distinct shape, from layer to layer, so that weights are not
in the cache, as in a real forward. It counts the time of this thread only: what else the machine does, while
a model is loaded, would decide otherwise.

Not here: whose modules these are (`shared_weights.py`).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

Road: TypeAlias = "Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor]"
Layers: TypeAlias = "Sequence[torch.nn.Linear]"  # of one shape

WORTH_IT = 1.1  # times as fast
_ROWS = (4, 16, 64, 256, 512)  # of the trials
_BOUNDS = (8, 32, 128, 384)  # most rows of each class but the last; one row alone is always plain
_FEWEST_FEATURES = 64
_ROUNDING = 1e-5  # of the largest output
_ROUNDS, _ROUNDS_IF_LONG = 4, 2
_LONG_S, _TOO_LONG_S = 0.005, 0.05  # of one call
_BUDGET_S = 0.25  # of all trials of a model; no trial begins after it, but the first of each shape
_CACHE_FLOATS = 2**20  # touched between calls where a shape has too few layers to change

_now = time.perf_counter if sys.platform == "win32" else time.thread_time  # there it ticks every 16 ms


def use_fast_linear(model: torch.nn.Module) -> int:
    """Let a model's linear layers in single precision on a CPU take faster roads; returns how many do.

    Changes the modules of `model`, not their parameters.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        return 0
    by_shape: dict[tuple[object, ...], list[torch.nn.Linear]] = {}
    for each in model.modules():
        if _can_be_faster(each):
            by_shape.setdefault((*each.weight.shape, each.bias is None), []).append(each)
    changed = 0
    for layers, taken in _choose(list(by_shape.values())):
        if any(taken):
            for layer in layers:
                layer.__class__ = fast_linear_class()
                layer.roads = taken
            changed += len(layers)
    return changed


@functools.cache
def fast_linear_class() -> type[torch.nn.Linear]:
    """The class, in a function because torch is imported late."""
    import torch

    class FastLinear(torch.nn.Linear):  # type: ignore[misc]  # unknown to mypy
        """`torch.nn.Linear` by the road for the number of rows, without gradients."""

        roads: Sequence[Road | None]  # for each class of rows; None: plain

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            rows = input.numel() // self.in_features
            road = self.roads[bisect.bisect_left(_BOUNDS, rows)]
            if road is None or rows < 2 or input.dtype != torch.float32 or torch.is_grad_enabled():
                return super().forward(input)
            return road(self, input)

    return FastLinear


@functools.cache
def roads() -> Mapping[str, Road]:
    """The roads other than the plain one that this PyTorch has."""
    import torch

    def onednn(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        return multiply(input, layer.weight, layer.bias, "none", [], "")

    def turned(layer: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        columns = input.reshape(-1, layer.in_features).t()
        if layer.bias is None:
            product = layer.weight @ columns
        else:
            product = torch.addmm(layer.bias.unsqueeze(1), layer.weight, columns)
        return product.t().contiguous().view(*input.shape[:-1], layer.out_features)

    try:
        multiply = torch.ops.mkldnn._linear_pointwise.default
    except AttributeError:
        return {"turned": turned}
    return {"onednn": onednn, "turned": turned}


def _can_be_faster(module: torch.nn.Module) -> bool:
    import torch

    if type(module) is not torch.nn.Linear:
        return False
    weight = module.weight
    single = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return bool(single and weight.is_contiguous() and min(weight.shape) >= _FEWEST_FEATURES)


def _choose(groups: Sequence[Layers]) -> list[tuple[Layers, tuple[Road | None, ...]]]:
    """The roads of layers of each shape, one for each class of rows; None: plain.

    Few rows are tried first, for all shapes. Where the time is up, or one call would take too long for a
    trial, oneDNN stays with those that it was faster for with fewer rows. `turned` does not: it is for few.
    """
    import torch

    until = time.perf_counter() + _BUDGET_S
    taken: list[list[Road | None]] = [[] for _ in groups]
    per_row_s = [0.0 for _ in groups]
    with torch.inference_mode():
        for rows, (number, layers) in itertools.product(_ROWS, enumerate(groups)):
            own = taken[number]
            if own and (time.perf_counter() > until or per_row_s[number] * rows > _TOO_LONG_S):
                own.append(own[-1] if own[-1] is roads().get("onednn") else None)
                continue
            road, took_s = _fastest(layers, rows, roads())
            own.append(road)
            per_row_s[number] = took_s / rows
    return [(layers, tuple(own)) for layers, own in zip(groups, taken, strict=True)]


def _fastest(layers: Layers, rows: int, given: Mapping[str, Road]) -> tuple[Road | None, float]:
    """The road for so many rows, and the seconds of a plain call."""
    import torch

    features = layers[0].in_features
    input = torch.linspace(-1, 1, rows * features).reshape(rows, features).sin()
    wanted = torch.nn.Linear.forward(layers[0], input)
    right = {name: road for name, road in given.items() if _is_right(road, layers[0], input, wanted)}
    took_s = _timed(layers, input, {"": torch.nn.Linear.forward, **right})
    gains = {name: _gain(took_s[""], took_s[name]) for name in right}
    best = max(gains, key=gains.__getitem__, default="")
    return given[best] if best and gains[best] > WORTH_IT else None, min(took_s[""])


def _is_right(road: Road, layer: torch.nn.Linear, input: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether a road gives a layer's output, apart from rounding. The first call of a road prepares it."""
    try:
        error = float((wanted - road(layer, input)).abs().max())
    except Exception:  # an operator of that name that is another one
        return False
    return error <= _ROUNDING * float(wanted.abs().max())


def _timed(layers: Layers, input: torch.Tensor, tried: Mapping[str, Road]) -> dict[str, list[float]]:
    """Seconds of the calls of each road, in rounds: what slows one down for a while slows all of them."""
    import torch

    took_s: dict[str, list[float]] = {name: [] for name in tried}
    other = torch.zeros(_CACHE_FLOATS) if len(layers) < len(tried) else None
    calls = 0
    for number in range(_ROUNDS):
        for name, road in tried.items():
            if other is not None:
                other.add_(1)
            calls += 1
            start = _now()
            road(layers[calls % len(layers)], input)
            took_s[name].append(max(1e-9, _now() - start))
        if number + 1 >= _ROUNDS_IF_LONG and took_s[""][-1] > _LONG_S:
            break
    return took_s


def _gain(plain_s: Sequence[float], other_s: Sequence[float]) -> float:
    """How many times as fast a road is: the median of the rounds."""
    return statistics.median_low([plain / other for plain, other in zip(plain_s, other_s, strict=True)])
