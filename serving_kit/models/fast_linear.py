"""Linear layers on a CPU go through oneDNN where that is faster.

In single precision PyTorch multiplies matrices with MKL, which is slow on processors that Intel
did not make: on an AMD EPYC, 384 x 1536 with 128 rows, 1.4 ms against 0.65 ms by oneDNN, which
PyTorch carries as well and uses for bfloat16 and for compiled models. The weights stay as they are, no
copy, and the sums differ by their rounding only (2e-6 of 3 measured).

The operator is the one that `torch.compile` calls, and not a public one. So it is
tried once, when the model is loaded: if it is missing, wrong or not faster, nothing changes.

Not here: whose modules these are (`shared_weights.py`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Preparing a call of oneDNN takes 10 to 20 us more. It pays from so many rows, or so many multiplications,
# on (measured from 384 x 384 to 384 x 30,522 and from 1 to 128 rows).
_FEWEST_ROWS, _FEWEST_PRODUCTS = 16, 8_000_000
_FEWEST_FEATURES = 64
_ROWS, _TRIES = 32, 5  # of the trial
WORTH_IT = 1.15  # times as fast
_ROUNDING = 1e-5  # of the largest output


def use_fast_linear(model: torch.nn.Module) -> int:
    """Let a model's linear layers in single precision on a CPU use oneDNN; returns how many do.

    Changes the modules of `model`, not their parameters.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        return 0
    layers = [
        each
        for each in model.modules()
        if type(each) is torch.nn.Linear
        and each.weight.dtype == torch.float32
        and each.weight.device.type == "cpu"
        and each.weight.is_contiguous()
        and min(each.weight.shape) >= _FEWEST_FEATURES
    ]
    if not layers:
        return 0
    shapes = [tuple(each.weight.shape) for each in layers]
    commonest = max(set(shapes), key=lambda shape: (shapes.count(shape), shape))
    try:
        fast = fast_linear_class()
        if not _faster(layers[shapes.index(commonest)], fast):
            return 0
    except Exception:  # a PyTorch without the operator, or with another one of that name
        return 0
    for layer in layers:
        layer.__class__ = fast
    return len(layers)


@functools.cache
def fast_linear_class() -> type[torch.nn.Linear]:
    """The class, in a function because torch is imported late."""
    import torch

    multiply = torch.ops.mkldnn._linear_pointwise.default

    class FastLinear(torch.nn.Linear):  # type: ignore[misc]  # unknown to mypy
        """`torch.nn.Linear` by oneDNN, for a batch of rows and without gradients."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            numbers = input.numel()
            small = numbers < _FEWEST_ROWS * self.in_features
            if small and numbers * self.out_features < _FEWEST_PRODUCTS:
                return super().forward(input)
            if input.dtype != torch.float32 or torch.is_grad_enabled():
                return super().forward(input)
            return multiply(input, self.weight, self.bias, "none", [], "")

    return FastLinear


def _faster(layer: torch.nn.Linear, fast: type[torch.nn.Linear]) -> bool:
    """Whether `fast` gives this layer's output, and sooner."""
    import torch

    with torch.inference_mode():
        rows = torch.linspace(-1, 1, _ROWS * layer.in_features).reshape(_ROWS, layer.in_features).sin()
        plain, other = functools.partial(layer.forward, rows), functools.partial(fast.forward, layer, rows)
        wanted, given = plain(), other()
        if (wanted - given).abs().max() > _ROUNDING * wanted.abs().max():
            return False
        return _seconds(plain) > WORTH_IT * _seconds(other)


def _seconds(work: Callable[[], object]) -> float:
    """What one call takes at best."""
    best = float("inf")
    for _ in range(_TRIES):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
