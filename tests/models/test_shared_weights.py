"""A server has its own tokenizer: what a cell does with the pipeline's changes no answer, on any side."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.errors import StartError
from serving_kit.models.pipeline import build_pipeline_model
from serving_kit.models.shared_weights import with_shared_weights
from tests.support_models import assert_same, example, fresh, plain, tiny

Serve = Callable[..., Any]
TASK = "feature-extraction"
REQUESTS = 400
PATIENT: dict[str, Any] = {"timeout_ms": 60_000, "drop_hopeless": False}  # admission is not the subject


@contextmanager
def a_busy_cell(pipe: Any, text: str) -> Iterator[list[int]]:
    """Another thread that truncates texts with the pipeline's tokenizer; the lengths that it got."""
    lengths: list[int] = []
    begun, over = threading.Event(), threading.Event()

    def truncate() -> None:
        while not over.is_set():
            lengths.append(len(pipe.tokenizer(text, truncation=True, max_length=8)["input_ids"]))
            begun.set()

    thread = threading.Thread(target=truncate)
    thread.start()
    try:
        assert begun.wait(30)
        yield lengths
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("shortcuts", [True, False])
def test_truncation_in_a_cell(serve: Serve, shortcuts: bool) -> None:
    """It shortens no client's text."""
    pipe, text = fresh(TASK), example(TASK, 40)
    want = plain(pipe(text))
    server = serve(pipe, shortcuts=shortcuts, **PATIENT)
    with a_busy_cell(pipe, text) as lengths:
        answers = [server([text] * 20) for _ in range(REQUESTS // 20)]
    assert {len(each[0]) for answer in answers for each in answer} == {len(want[0])}
    assert_same(plain(answers[0][0]), want)
    assert set(lengths) == {8}, "and no client lengthens the cell's"


def test_two_servers_on_one_pipeline(serve: Serve) -> None:
    pipe, text = fresh(TASK), example(TASK, 40)
    want = len(plain(pipe(text))[0])
    truncated = {"tokenize_kwargs": {"truncation": True, "max_length": 8}}
    first, second = serve(pipe, name="first", **PATIENT), serve(pipe, name="second", **PATIENT)
    widths: list[set[int]] = [set(), set()]

    def ask(which: int, server: Any, parameters: Any) -> None:
        for _ in range(REQUESTS // 20):
            widths[which] |= {len(each[0]) for each in server([text] * 20, **parameters)}

    threads = [
        threading.Thread(target=ask, args=(0, first, {})),
        threading.Thread(target=ask, args=(1, second, truncated)),
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert widths == [{want}, {8}]


def test_rerun_with_the_same_pipeline(serve: Serve) -> None:
    """The new server gets a tokenizer of its own."""
    pipe, text = fresh(TASK), example(TASK, 40)
    want = len(plain(pipe(text))[0])
    serve(pipe)
    server = serve(pipe, **PATIENT)
    with a_busy_cell(pipe, text):
        widths = {len(each[0]) for _ in range(REQUESTS // 20) for each in server([text] * 20)}
    assert widths == {want}


def test_stop_sequence_of_the_pipeline(serve: Serve) -> None:
    plain_pipe = tiny("text-generation")
    pipe = type(plain_pipe)(
        model=plain_pipe.model,
        tokenizer=copy.deepcopy(plain_pipe.tokenizer),
        task="text-generation",
        device="cpu",
        stop_sequence=["e"],
    )
    parameters = {"max_new_tokens": 20, "do_sample": False}
    server = serve(pipe)
    before = pipe.tokenizer
    assert server("the river", **parameters) == pipe("the river", **parameters)
    assert pipe.tokenizer is before


def test_tokenizer_that_cannot_be_copied(serve: Serve) -> None:
    pipe = fresh(TASK)
    kind = type(pipe.tokenizer)

    class Unique(kind):  # type: ignore[misc, valid-type]
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("there is only one")

    pipe.tokenizer.__class__ = Unique
    with pytest.raises(StartError, match=r"tokenizer cannot be copied .*Serve a function"):
        serve(pipe)


# -- modules ------------------------------------------------------------------------------------------


def test_shared_weights() -> None:
    model = tiny("text-classification").model
    other = with_shared_weights(model)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert mine is theirs
    for mine, theirs in zip(other.modules(), model.modules(), strict=True):
        assert mine is not theirs


def test_tensors_in_place_of_shared_ones() -> None:
    model = torch.nn.Linear(4, 4)
    instead = torch.nn.Parameter(torch.zeros(4, 4))
    other = with_shared_weights(model, {id(model.weight): instead})
    assert other.weight is instead
    assert other.bias is model.bias
    assert model.weight is not instead


@pytest.mark.parametrize(
    "obstacle", ["quantised", "replaced forward", "cannot be copied", "hook", "compiled", "adapter"]
)
def test_no_shared_weights(obstacle: str) -> None:
    class NotCopyable(torch.nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("not me")

    model: Any = NotCopyable(4, 4) if obstacle == "cannot be copied" else torch.nn.Linear(4, 4)
    if obstacle == "quantised":
        model.hf_quantizer = "some"
    elif obstacle == "replaced forward":
        model.forward = lambda x: x
    elif obstacle == "hook":
        model.register_forward_hook(lambda *_: None)
    elif obstacle == "compiled":
        model.compile(backend="eager")
    elif obstacle == "adapter":
        model.peft_config = {"default": None}
    assert with_shared_weights(model) is None


def test_hidden_states_asked_for_in_a_cell_change_nothing() -> None:
    """The library leaves hooks on the model then, which only look."""
    pipe = fresh("fill-mask")
    model = build_pipeline_model(pipe)
    inputs = pipe.tokenizer("a house", return_tensors="pt")
    with torch.no_grad():
        pipe.model(**inputs, output_hidden_states=True)
    assert any(each._forward_hooks for each in pipe.model.modules())
    assert model.changed() == ""
    again = build_pipeline_model(pipe)
    assert again.stepper.takes_shortcuts
    with torch.no_grad():
        hidden = again.pipe.model(**inputs, output_hidden_states=True).hidden_states
    assert len(hidden) == pipe.model.config.num_hidden_layers + 1
