"""A copy in bfloat16 beside an unchanged model, its speed, and outputs in single precision."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.bfloat16 import (
    bfloat16_copy,
    common_layer,
    in_float32,
    layer_speedup,
    seconds,
    speedup,
)
from tests.support_models import fresh

BF16, FP32 = torch.bfloat16, torch.float32


def dtypes(tensors: Any) -> set[Any]:
    return {each.dtype for each in tensors}


def test_model_that_is_copied_stays_as_it_is() -> None:
    model = fresh("fill-mask").model
    before = {name: (id(each), each.clone()) for name, each in model.state_dict(keep_vars=True).items()}
    copied = bfloat16_copy(model)
    assert copied is not None
    assert dtypes(copied.model.parameters()) == {BF16}
    assert copied.bytes == sum(2 * each.numel() for each in model.parameters())
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == which for name, (which, _) in before.items())
    assert all(torch.equal(after[name], value) for name, (_, value) in before.items())


def test_tied_weights_stay_tied() -> None:
    copied = bfloat16_copy(fresh("fill-mask").model)
    assert copied is not None
    model = copied.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_buffers_are_converted_only_if_asked() -> None:
    model = torch.nn.BatchNorm1d(4)
    kept, converted = bfloat16_copy(model), bfloat16_copy(model, buffers=True)
    assert kept is not None
    assert converted is not None
    assert kept.model.running_mean is model.running_mean
    assert (converted.model.running_mean.dtype, model.running_mean.dtype) == (BF16, FP32)
    assert converted.model.num_batches_tracked.dtype == torch.int64
    assert (kept.bytes, converted.bytes) == (2 * 8, 2 * 16)


def test_what_cannot_be_copied() -> None:
    hooked = torch.nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    assert bfloat16_copy(hooked) is None
    assert bfloat16_copy(len) is None


def test_layer_of_the_commonest_shape() -> None:
    small, large, other = (torch.nn.Linear(*shape) for shape in ((4, 4), (8, 4), (8, 4)))
    layers = torch.nn.Sequential(small, large, other, *(torch.nn.Linear(9, 9).bfloat16() for _ in range(3)))
    assert common_layer(layers) is large
    assert common_layer(torch.nn.Sequential(torch.nn.ReLU())) is None
    assert common_layer(len) is None


def test_best_times_are_compared() -> None:
    ran: list[str] = []
    times = iter([3.0, 1.0, 2.0, 5.0])

    def timer(work: Any) -> float:
        work()
        return next(times)

    assert speedup(lambda: ran.append("exact"), lambda: ran.append("fast"), timer) == 2.0
    assert ran == ["exact", "fast"] * 2, "in turns, and not again once two seconds are over"


def test_short_work_is_timed_more_often() -> None:
    times = itertools.chain([1e-3, 1e-3] * 4, itertools.repeat(1e-4))
    assert speedup(list, list, lambda _: next(times)) == 1.0
    assert next(times) == 1e-4
    assert 0 <= seconds(list) < 60


def test_layer_is_run_in_both_precisions() -> None:
    layer, seen = torch.nn.Linear(4, 3), []
    assert layer_speedup(layer, lambda work: seen.append(work()) or 1.0) == 1.0
    assert seen[0] == pytest.approx(seen[1], abs=0.02)
    assert seen[0] != seen[1]
    assert layer.weight.dtype == FP32


def test_outputs_in_single_precision() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    narrow, ids = torch.ones(2, dtype=BF16), torch.ones(2, dtype=torch.int64)
    given = {"logits": narrow, "input_ids": ids, "word": "a"}
    own = in_float32([given, (narrow, ids)])
    assert (own[0]["logits"].dtype, own[1][0].dtype) == (FP32, FP32)
    assert (own[0]["input_ids"], own[0]["word"], own[1][1]) == (ids, "a", ids)
    assert given["logits"] is narrow, "the output that was given stays as it is"
    output = in_float32(BaseModelOutput(last_hidden_state=narrow))
    assert output[0].dtype == output.last_hidden_state.dtype == FP32
