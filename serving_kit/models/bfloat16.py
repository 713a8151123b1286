"""bfloat16: a copy of a model in it, its speed in one layer, and outputs back in single precision.

Not here: whether the copy is served (`precision.py`).
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, cast

from serving_kit.models.pipes import Output
from serving_kit.models.shared_weights import with_shared_weights

if TYPE_CHECKING:
    import torch

Work: TypeAlias = Callable[[], object]
Timer: TypeAlias = Callable[[Work], float]  # runs it, and says how many seconds that took

_ROWS = 128
_FEWEST_ROUNDS, _MOST_ROUNDS, _ROUNDS_S = 2, 5, 2.0


class Copy(NamedTuple):
    """A model in bfloat16.

    Attributes:
        model: With modules and weights of its own.
        bytes: Of the weights that are its own.
    """

    model: torch.nn.Module
    bytes: int


def bfloat16_copy(model: torch.nn.Module, *, buffers: bool = False) -> Copy | None:
    """A copy whose parameters in single precision are in bfloat16; None: the model cannot be copied.

    Every other tensor is shared. Nothing in `model` is changed.

    Args:
        model: See `with_shared_weights`, which says what cannot be copied.
        buffers: Convert buffers too. Models compute positions in them, which bfloat16 would round.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        return None
    own = {
        id(each): _narrow(each)
        for each in itertools.chain(model.parameters(), model.buffers() if buffers else ())
        if each.dtype == torch.float32
    }
    copied = with_shared_weights(model, own)
    size = sum(each.numel() * each.element_size() for each in own.values())
    return None if copied is None else Copy(copied, size)


def common_layer(model: torch.nn.Module) -> torch.nn.Linear | None:
    """A linear layer in single precision, of the shape that most of them have; None: there are none."""
    import torch

    layers = [
        each
        for each in (model.modules() if isinstance(model, torch.nn.Module) else ())
        if isinstance(each, torch.nn.Linear) and each.weight.dtype == torch.float32
    ]
    shapes = [tuple(each.weight.shape) for each in layers]
    commonest = max(set(shapes), key=lambda shape: (shapes.count(shape), shape), default=None)
    return None if commonest is None else layers[shapes.index(commonest)]


def layer_speedup(layer: torch.nn.Linear, timer: Timer) -> float:
    """How many times as fast a layer is in bfloat16, for 128 rows. Takes milliseconds."""
    import torch

    rows = torch.linspace(-1, 1, _ROWS * layer.in_features).reshape(_ROWS, layer.in_features).sin()
    exact = rows.to(layer.weight.device)
    fast = exact.bfloat16()
    weight, bias = (None if each is None else each.detach().bfloat16() for each in (layer.weight, layer.bias))

    # An element is read: an accelerator computes later than it is called.
    with torch.inference_mode():
        return speedup(
            lambda: layer(exact)[0, 0].item(),
            lambda: torch.nn.functional.linear(fast, weight, bias)[0, 0].item(),
            timer,
        )


def speedup(exact: Work, fast: Work, timer: Timer) -> float:
    """Time of `exact` / time of `fast`, in turns, each at its best."""
    taken: list[tuple[float, float]] = []
    while len(taken) < _FEWEST_ROUNDS or (len(taken) < _MOST_ROUNDS and sum(map(sum, taken)) < _ROUNDS_S):
        taken.append((timer(exact), timer(fast)))
    return min(exact_s for exact_s, _ in taken) / min(fast_s for _, fast_s in taken)


def seconds(work: Work) -> float:
    """The timer."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_float32(output: Output) -> Output:
    """An output with its bfloat16 tensors in single precision: probabilities are made of them."""
    if type(output) in (list, tuple):
        return type(output)(map(in_float32, output))
    if not isinstance(output, Mapping):
        return output.float() if _is_bfloat16(output) else output
    own: Output = copy.copy(output)  # of its own class: some of them can be indexed by position as well
    for name, each in output.items():
        if _is_bfloat16(each):
            own[name] = each.float()
    return own


def _is_bfloat16(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """The same in bfloat16: a parameter of a parameter."""
    import torch

    narrow = tensor.detach().to(torch.bfloat16)
    if not isinstance(tensor, torch.nn.Parameter):
        return cast("torch.Tensor", narrow)
    return cast("torch.Tensor", torch.nn.Parameter(narrow, requires_grad=False))
