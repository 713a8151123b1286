"""`precision="fast"`: bfloat16 where it is faster, else exact with the reason. Only the time is made up."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit import StartError
from serving_kit.model import Precision
from serving_kit.models import loading, precision
from serving_kit.models.agreement import COMPARED, Agreement, compare
from serving_kit.models.bfloat16 import Timer
from serving_kit.models.loading import load_model
from serving_kit.models.pipeline import PipelineModel
from serving_kit.models.precision import Measured, decide, note
from tests.support_models import IMAGE_TASKS, PARAMETERS, answers, example, fresh, plain, tiny

AGREE = Agreement(1.0, None, 0.004)
GAIN = 2.0


def timer(*speedups: float) -> Timer:
    """Says that fast is so many times as fast: of the layer, then of the model."""
    times = itertools.chain.from_iterable(
        [3.0, 3.0 / each] * 2
        for each in itertools.chain(speedups[:-1], itertools.repeat(speedups[-1]))  # two rounds each
    )

    def timed(work: Any) -> float:
        work()
        return next(times)

    return timed


def fast_or_exact(
    pipe: Any, *speedups: float, handed_over: bool = True, shortcuts: bool = True
) -> PipelineModel:
    model = load_model(pipe, shortcuts=shortcuts)
    assert isinstance(model, PipelineModel)
    clock = timer(*(speedups or (GAIN,)))
    return precision.fast_or_exact(model, pipe, shortcuts=shortcuts, handed_over=handed_over, timer=clock)


def parameter_dtypes(model: Any) -> set[Any]:
    return {each.dtype for each in model.parameters()}


@pytest.mark.parametrize("task", sorted(COMPARED))
def test_faster_is_served_and_close_to_exact(task: str) -> None:
    pipe = fresh(task)
    model = fast_or_exact(pipe)
    assert parameter_dtypes(model.pipe.model) == {torch.bfloat16}
    assert parameter_dtypes(pipe.model) == {torch.float32}, "the pipeline is not converted"
    measured = model.precision
    assert (measured.asked, measured.used, measured.reason, measured.speedup) == ("fast", "fast", "", GAIN)
    assert measured.extra_bytes == sum(2 * each.numel() for each in pipe.model.parameters())
    assert measured.largest_score_difference is not None
    assert 0 < measured.largest_score_difference < 0.1
    texts = [example(task, words) for words in (4, 30)]
    parameters = PARAMETERS.get(task, {})
    got = answers(model, texts, parameters)
    want = [plain(pipe(text, **parameters)) for text in texts]
    assert compare(task, want, got).largest_difference < 0.1


def test_fast_model_is_measured_for_itself() -> None:
    model = fast_or_exact(fresh("text-classification"))
    assert model.example is not None
    assert len(model.timings) >= 3


def test_shortcut_of_fill_mask_is_kept() -> None:
    assert fast_or_exact(fresh("fill-mask")).stepper.shortcut is not None
    assert fast_or_exact(fresh("fill-mask"), shortcuts=False).stepper.shortcut is None


def test_probabilities_are_in_single_precision() -> None:
    model = fast_or_exact(fresh("fill-mask"), shortcuts=False)
    for served in (model, fast_or_exact(fresh("fill-mask"))):
        ((first, *_),) = answers(served, [example("fill-mask", 9)], {})
        assert torch.tensor(first["score"]).bfloat16().item() != first["score"]


@pytest.mark.parametrize(
    ("speedups", "reason"),
    [
        ((0.1,), "bfloat16 is slower here, in a layer of 32 × 32"),
        ((GAIN, 0.9), "bfloat16 is not faster here"),
        ((1.0, 1.0), "bfloat16 is not faster here"),
    ],
)
def test_slower_is_refused(speedups: tuple[float, ...], reason: str) -> None:
    pipe = fresh("text-classification")
    model = fast_or_exact(pipe, *speedups)
    assert parameter_dtypes(model.pipe.model) == {torch.float32}
    assert (model.precision.used, model.precision.reason) == ("exact", reason)
    assert model.precision.speedup == pytest.approx(speedups[-1])
    assert model.precision.extra_bytes == 0
    assert note(model.precision) in model.notes


def test_slow_layer_is_found_before_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[Any] = []
    monkeypatch.setattr(precision, "bfloat16_copy", copied.append)
    fast_or_exact(fresh("fill-mask"), 0.1)
    assert copied == []


def test_this_machine_is_measured() -> None:
    """Whatever it can do: what is served is not slower than exact."""
    model = load_model(fresh("feature-extraction"), precision="fast")
    measured = model.precision
    assert measured.speedup is not None
    assert (measured.used == "fast") == (measured.reason == "")
    assert measured.used == "exact" or measured.speedup > 1


@pytest.mark.parametrize("task", ["text-generation", "text-to-audio", *IMAGE_TASKS[:1]])
def test_tasks_that_are_served_exact(task: str) -> None:
    model = fast_or_exact(tiny(task))
    assert model.precision.reason.startswith(f"not for {task}, because")
    assert (model.precision.used, model.precision.speedup) == ("exact", None)


def test_model_that_is_narrow_already() -> None:
    pipe = fresh("text-classification")
    pipe.model.bfloat16()
    assert fast_or_exact(pipe).precision.reason == "the model has no linear layers in single precision"


def test_model_that_cannot_be_copied() -> None:
    pipe = fresh("text-classification")
    pipe.model.register_forward_hook(lambda *_: None)
    model = fast_or_exact(pipe)
    assert "cannot be copied" in model.precision.reason
    assert model.pipe.model is pipe.model


class Shifted(torch.nn.Module):
    """Adds a buffer in single precision to embeddings, or raises."""

    def __init__(self, inner: Any, error: str = "") -> None:
        super().__init__()
        self.inner, self.error = inner, error
        self.register_buffer("shift", torch.zeros(1, 1, 32))

    def forward(self, *arguments: Any, **more: Any) -> Any:
        embeddings = self.inner(*arguments, **more)
        if self.error and embeddings.dtype == torch.bfloat16:
            raise ValueError(self.error)
        return embeddings + self.shift


def test_buffers_are_converted_where_they_must_be() -> None:
    pipe = fresh("text-classification")
    pipe.model.bert.embeddings = Shifted(pipe.model.bert.embeddings)
    model = fast_or_exact(pipe)
    assert model.precision.used == "fast"
    assert model.pipe.model.bert.embeddings.shift.dtype == torch.bfloat16
    assert pipe.model.bert.embeddings.shift.dtype == torch.float32


def test_model_that_raises_in_bfloat16_is_exact() -> None:
    pipe = fresh("text-classification")
    pipe.model.bert.embeddings = Shifted(pipe.model.bert.embeddings, "not for me")
    model = fast_or_exact(pipe)
    assert model.precision.reason == "bfloat16 could not be tried: ValueError: not for me"
    assert answers(model, ["a text"], {})


def test_changed_weights_are_reported() -> None:
    pipe = fresh("text-classification")
    model = fast_or_exact(pipe)
    assert model.changed() == ""
    with torch.no_grad():
        pipe.model.classifier.weight.mul_(2)
    assert "weights have changed" in model.changed()


def test_changed_modules_are_reported() -> None:
    pipe = fresh("text-classification")
    model = fast_or_exact(pipe)
    pipe.model.classifier = torch.nn.Linear(32, 3)
    assert "replaced since serve()" in model.changed()


def test_weights_loaded_by_name_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipes = [fresh("text-classification")]
    weights = weakref.ref(pipes[0].model.classifier.weight)
    monkeypatch.setattr(loading, "_load_pipeline", lambda *_: pipes.pop())
    monkeypatch.setattr(loading, "fast_or_exact", _with_timer(timer(GAIN)))
    model = load_model("a/name", precision="fast")
    gc.collect()
    assert (model.precision.used, model.precision.extra_bytes) == ("fast", 0)
    assert weights() is None
    assert model.changed() == ""


def _with_timer(clock: Timer) -> Any:
    def with_timer(*arguments: Any, **more: Any) -> PipelineModel:
        return precision.fast_or_exact(*arguments, **more, timer=clock)

    return with_timer


def test_exact_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "fast_or_exact", None)
    model = load_model(fresh("text-classification"))
    assert (model.precision, model.notes) == (Precision(), ())


def test_function_cannot_be_fast() -> None:
    with pytest.raises(StartError, match=r"precision='fast' is for pipelines: sorted is a function"):
        load_model(sorted, precision="fast")
    assert load_model(sorted).precision == Precision()


@pytest.mark.parametrize(
    ("measured", "used", "reason"),
    [
        (Measured(1.2, AGREE, 7), "fast", ""),
        (Measured(1.01, AGREE, 7), "exact", "bfloat16 is not faster here"),
        (Measured(3.0, Agreement(0.5, None, math.nan), 7), "exact", "in bfloat16 some scores are no numbers"),
    ],
)
def test_decision(measured: Measured, used: str, reason: str) -> None:
    decision = decide(measured)
    assert (decision.used, decision.reason, decision.speedup) == (used, reason, measured.speedup)
    assert decision.extra_bytes == (7 if used == "fast" else 0)
    assert not math.isnan(decision.largest_score_difference or 0.0), "it must fit into JSON"


@pytest.mark.parametrize(
    ("served", "text"),
    [
        (
            Precision("fast", "fast", "", 2.345, 0.96875, None, 0.00412, 66_000_000),
            "precision is fast: bfloat16, 2.35 times as fast as exact, 96.9 % of the first choices for 32 "
            "texts are the same, scores differ by at most 0.0041, 66 MB more memory",
        ),
        (
            Precision("fast", "fast", "", 2.0, None, 0.999, 0.05),
            "precision is fast: bfloat16, 2 times as fast as exact, cosine similarity of 32 texts at least "
            "0.99900, scores differ by at most 0.05",
        ),
        (
            Precision("fast", "exact", "bfloat16 is slower here", 0.15),
            "precision is exact, not fast: bfloat16 is slower here (0.15 times as fast as exact)",
        ),
        (Precision("fast", "exact", "not for it"), "precision is exact, not fast: not for it"),
    ],
)
def test_note(served: Precision, text: str) -> None:
    assert note(served) == text
