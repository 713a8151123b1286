"""A served function: what a list means, whose inputs it sees, and what clients may set."""

from __future__ import annotations

import array
import dataclasses
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import pytest

import serving_kit
from serving_kit.errors import MalformedRequest, ModelFailed, StartError
from serving_kit.failures.classify import WrongNumberOfOutputs
from serving_kit.inline_server import InlineServer, bind
from serving_kit.model import Done, FailureKind, Part, Work
from serving_kit.models.functions import CallableModel
from tests.support import until

pytestmark = pytest.mark.light
HANG_S = 30.0  # after which a call counts as hanging


class Recorder:
    """A function that keeps what it was called with, and waits at its gate before it answers."""

    def __init__(self, answer: Callable[[list[Any]], Any] = list) -> None:
        self.answer = answer
        self.calls: list[list[Any]] = []
        self.inside, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, inputs: list[Any], **parameters: Any) -> Any:
        self.calls.append(list(inputs))
        self.inside.set()
        assert self.gate.wait(HANG_S)
        return self.answer(inputs, **parameters)


@contextmanager
def busy(server: Any, function: Recorder) -> Iterator[ThreadPoolExecutor]:
    """The function is in a call for the block; what the pool asks meanwhile shares the next one."""
    function.gate.clear()
    function.inside.clear()
    with ThreadPoolExecutor(64) as pool:
        pool.submit(server, "busy")
        assert function.inside.wait(HANG_S)
        try:
            yield pool
        finally:
            function.gate.set()
    assert function.calls.pop(0) == ["busy"]


def queued(server: Any, count: int) -> None:
    """Return when so many items wait for the next call."""
    until(lambda: server.stats()["queue_depth"] == count, HANG_S, what=f"a queue of {count}")


def notes(error: BaseException) -> str:
    return "\n".join(getattr(error, "__notes__", []))


# -- what a list means --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "calls", "answer"),
    [
        ("a", [["a"]], "a"),
        ([1, 2, 3], [[1, 2, 3]], [1, 2, 3]),
        ([[1, 2, 3]], [[[1, 2, 3]]], [[1, 2, 3]]),
        ((1, 2, 3), [[(1, 2, 3)]], (1, 2, 3)),
        (array.array("d", [1, 2, 3]), [[array.array("d", [1, 2, 3])]], array.array("d", [1, 2, 3])),
    ],
)
def test_list_is_several_inputs(serve: Any, asked: Any, calls: list[Any], answer: Any) -> None:
    """Anything else is one input."""
    function = Recorder()
    assert serve(function)(asked) == answer
    assert function.calls == calls


def test_list_over_http(serve: Any) -> None:
    function = Recorder()
    server = serve(function)
    assert httpx.post(server.url, json={"inputs": [1, 2, 3]}).json() == [1, 2, 3]
    assert httpx.post(server.url, json={"inputs": [[1, 2, 3]]}).json() == [[1, 2, 3]]
    assert function.calls == [[1, 2, 3], [[1, 2, 3]]]


def test_wrong_number_of_outputs(serve: Any) -> None:
    """The error says what was given, what came back, and what a list means."""

    def two_classes(rows: list[Any]) -> list[float]:
        return [0.25, 0.75]

    with pytest.raises(ModelFailed) as failed:
        serve(two_classes)([1, 2, 3])
    assert "two_classes was called with a list of 1 input and returned 2 outputs" in notes(failed.value)
    assert "is sent as [[1, 2, 3]] or as an array" in notes(failed.value)


# -- a wrong number of outputs ------------------------------------------------------------------------


def test_left_out_input_fails_alone(serve: Any) -> None:
    function = Recorder(lambda texts: [text.upper() for text in texts if text != "left out"])
    server = serve(function)
    with busy(server, function) as pool:
        answers = {text: pool.submit(server, text) for text in ("a", "left out", "c", "d")}
        queued(server, 4)
    assert [answers[text].result() for text in "acd"] == ["A", "C", "D"]
    assert isinstance(answers["left out"].exception(), ModelFailed)
    assert sorted(len(call) for call in function.calls) == [1, 1, 1, 1, 4]


def test_number_right_by_chance(serve: Any) -> None:
    """The words of all texts in one list: "a b" and "" together give two outputs for two inputs."""
    function = Recorder(lambda texts: [word for text in texts for word in text.split()])
    server = serve(function)
    texts = ["a b", "", "c", "d e f"]
    with busy(server, function) as pool:
        answers = []
        for number, text in enumerate(texts, start=1):
            answers.append(pool.submit(server, text))
            queued(server, number)
    assert [each.exception() is None for each in answers] == [False, False, True, False]
    assert answers[2].result() == "c"


@pytest.mark.parametrize("outputs", [{"x"}, frozenset("x"), {"x": 1}, "x", b"x", 1, None, (x for x in "x")])
def test_outputs_must_be_a_list(serve: Any, outputs: Any) -> None:
    """Also where it has as many elements as there are inputs."""
    with pytest.raises(ModelFailed) as failed:
        serve(lambda texts: outputs)("x")
    assert f"it returned {type(outputs).__name__}" in notes(failed.value)


# -- whose inputs the function sees -------------------------------------------------------------------


def raise_for_bad(texts: list[str]) -> list[str]:
    if any("bad" in text for text in texts):
        raise ValueError("secret")
    return [text.upper() for text in texts]


def test_failure_reruns_no_other_input(serve: Any) -> None:
    function = Recorder(raise_for_bad)
    server = serve(function)
    assert server("mine") == "MINE"
    for number in range(3):
        with pytest.raises(ModelFailed):
            server(f"bad {number}")
    assert function.calls == [["mine"], ["bad 0"], ["bad 1"], ["bad 2"]]


@pytest.mark.parametrize("answered_before", [False, True])
def test_bad_inputs_of_one_client(serve: Any, answered_before: bool) -> None:
    """They do not open the circuit breaker for other clients."""
    server = serve(raise_for_bad)
    if answered_before:
        assert server("good") == "GOOD"
    for number in range(20):
        assert httpx.post(server.url, content=f"bad {number}").status_code == 500
    assert httpx.get(f"{server.url}/health").json() == {"status": "ready"}
    assert server("good") == "GOOD"


def test_good_input_among_bad_ones(serve: Any) -> None:
    function = Recorder(raise_for_bad)
    # Budgeted by hand: what is learned from one call that was held depends on how long it was held.
    server = serve(function, max_batch_tokens=1000)
    with busy(server, function) as pool:
        bad = [pool.submit(server, f"bad {number}") for number in range(31)]
        good = pool.submit(server, "good")
        queued(server, 32)
    assert good.result() == "GOOD"
    assert all(isinstance(each.exception(), ModelFailed) for each in bad)
    assert len(function.calls[0]) == 32


def test_without_retry(serve: Any) -> None:
    """A batch fails whole, and the function gets no input twice."""
    function = Recorder(raise_for_bad)
    server = serve(function, retry=False)
    with busy(server, function) as pool:
        asked: list[Future[Any]] = [pool.submit(server, text) for text in ("a", "bad", "c")]
        queued(server, 3)
    assert all(isinstance(each.exception(), ModelFailed) for each in asked)
    assert [sorted(call) for call in function.calls] == [["a", "bad", "c"]]
    assert server("a") == "A"
    assert "retry=False" in server.as_code()


def test_create_app_takes_retry_too() -> None:
    function = Recorder(raise_for_bad)
    server = InlineServer(serving_kit.create_app(function, retry=False), bind("127.0.0.1", 0))
    server.start()
    try:
        assert httpx.post(server.url, json={"inputs": ["a", "bad"]}).status_code == 500
        assert function.calls == [["a", "bad"]]
    finally:
        server.stop()


# -- parameters ---------------------------------------------------------------------------------------


def held_by_position(texts: list[str], model: str = "mine", **more: Any) -> list[str]:
    return [f"{text} {model} {sorted(more)}" for text in texts]


def positional_only(texts: list[str], model: str = "mine", /, **more: Any) -> list[str]:
    return held_by_position(texts, model, **more)


def any_keyword(texts: list[str], **more: Any) -> list[str]:
    return [f"{text} {more.pop('model')} {sorted(more)}" for text in texts]


@functools.wraps(held_by_position)
def decorated(*args: Any, **more: Any) -> list[str]:
    return held_by_position(*args, **more)


@pytest.mark.parametrize(
    "function",
    [
        held_by_position,
        positional_only,
        decorated,
        functools.partial(any_keyword, model="mine"),
        functools.partial(held_by_position, model="mine"),
        functools.partial(functools.partial(any_keyword, model="mine"), other=1),
    ],
)
def test_attributes_are_no_parameters(serve: Any, function: Any) -> None:
    """A client cannot set what a function holds."""
    server = serve(function)
    refused = httpx.post(server.url, json={"inputs": "x", "parameters": {"model": "theirs"}})
    assert (refused.status_code, refused.json()["error_type"]) == (400, "malformed_request")
    assert "'model' cannot be set by clients" in refused.json()["detail"]
    with pytest.raises(MalformedRequest):
        server("x", texts=["theirs"])
    answer = httpx.post(server.url, json={"inputs": "x", "parameters": {"top": 1}})
    assert "mine" in answer.json()
    assert "'top'" in answer.json()


def test_self_is_no_parameter(serve: Any) -> None:
    server = serve(Recorder(lambda inputs, **parameters: inputs))
    refused = httpx.post(server.url, json={"inputs": "x", "parameters": {"self": 1}})
    assert refused.status_code == 400


class Opaque:
    """Every instance looks the same."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Opaque()"


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (Opaque(1), Opaque(2)),
        ({1: "a"}, {"1": "a"}),
        ((1, 2), [1, 2]),
        (1, True),
        (1, 1.0),
        (array.array("d", range(2000)), array.array("d", [0, *range(1, 2000)])),
    ],
)
def test_similar_parameters_do_not_share(serve: Any, mine: Any, theirs: Any) -> None:
    """Parameters that compare equal and differ in type, such as 1 and True."""
    function = Recorder(lambda inputs, by=None: [[by]] * len(inputs))
    server = serve(function)
    with busy(server, function) as pool:
        first = pool.submit(server, ["x", "y"], by=mine)
        queued(server, 2)
        second = pool.submit(server, ["x", "y"], by=theirs)
        queued(server, 4)
    assert [type(by) for (by,) in first.result()] == [type(mine)] * 2
    assert [type(by) for (by,) in second.result()] == [type(theirs)] * 2
    if isinstance(mine, Opaque):
        assert [by.value for (by,) in first.result() + second.result()] == [1, 1, 2, 2]
    assert function.calls == [["x", "y"]] * 2, "the inputs of one request do share one"


def test_equal_parameters_share_a_call(serve: Any) -> None:
    function = Recorder(lambda inputs, by=None: [by] * len(inputs))
    server = serve(function)
    with busy(server, function) as pool:
        asked = [pool.submit(server, "x", by={"a": [n, None]}) for n in (1, 1, 2)]
        queued(server, 3)
    assert [each.result()["a"][0] for each in asked] == [1, 1, 2]
    assert sorted(map(len, function.calls)) == [1, 2]


# -- outputs that the function uses again -------------------------------------------------------------


class Table(OrderedDict[str, Any]):
    """As the outputs of models are."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda buffer: buffer,
        lambda buffer: {"scores": [buffer]},
        lambda buffer: (buffer, "text"),
        lambda buffer: Table(scores=buffer),
    ],
)
def test_reused_buffers(serve: Any, wrap: Any) -> None:
    """An answer does not change when the function writes to its buffer again."""
    numbers, words = array.array("d", [0.0]), ["none"]

    def function(inputs: list[Any]) -> Sequence[Any]:
        numbers[0], words[0] = float(len(inputs[0])), inputs[0]
        return [wrap(numbers if inputs[0] != "words" else words)]

    server = serve(function)
    first, second = server("a"), server("bb")
    assert first == wrap(array.array("d", [1.0]))
    assert second == wrap(array.array("d", [2.0]))
    assert type(first) is type(wrap(numbers))
    third = server("words")
    server("ccc")
    assert third == wrap(["words"])


def test_arrays_are_copied(serve: Any) -> None:
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    for buffer in (numpy.zeros((4, 3)), torch.zeros(4, 3)):

        def function(inputs: list[float], buffer: Any = buffer) -> Any:
            for row, value in enumerate(inputs):
                buffer[row] = value
            return buffer[: len(inputs)]

        server = serve(function)
        first = server([1.0, 2.0])
        server([3.0, 4.0])
        assert [each.tolist() for each in first] == [[1.0] * 3, [2.0] * 3]
        assert type(first[0]) is type(buffer)
        server.stop()


# -- a function that asks a server --------------------------------------------------------------------


def test_call_to_its_own_server(serve: Any) -> None:
    """It is refused at once instead of waiting for itself."""

    def function(texts: list[str]) -> list[str]:
        return [server(text) for text in texts]

    server = serve(function, name="itself", timeout_ms=60_000)
    with pytest.raises(ModelFailed) as failed:
        server("x")
    assert "a function that 'itself' waits for cannot ask 'itself'" in notes(failed.value)


def test_awaited_call_to_its_own_server(serve: Any) -> None:
    import asyncio

    def function(texts: list[str]) -> list[str]:
        return [asyncio.run(server.predict(text)) for text in texts]

    server = serve(function, name="itself", timeout_ms=60_000)
    with pytest.raises(ModelFailed) as failed:
        server("x")
    assert "cannot ask 'itself'" in notes(failed.value)


def test_two_servers_in_a_circle(serve: Any) -> None:
    servers: dict[str, Any] = {}
    servers["one"] = serve(lambda texts: [servers["two"](text) for text in texts], name="one")
    servers["two"] = serve(lambda texts: [servers["one"](text) for text in texts], name="two")
    with pytest.raises(ModelFailed):
        servers["one"]("x")
    assert any("cannot ask 'one'" in incident.error for incident in servers["two"].errors())


def test_call_to_another_server(serve: Any) -> None:
    upper = serve(lambda texts: [text.upper() for text in texts], name="upper")
    outer = serve(lambda texts: [upper(text) + "!" for text in texts], name="outer")
    assert outer(["a", "b"]) == ["A!", "B!"]


# -- a function that changes its inputs ---------------------------------------------------------------


def test_retry_with_unchanged_inputs(serve: Any) -> None:
    """A retry gets the inputs as they were sent, whatever the first call did to them."""

    def take_text(rows: list[Any], *, marks: Any = ("",)) -> list[Any]:
        mark = marks.pop() if isinstance(marks, list) else ""
        return [row if row == "busy" else row.pop("text").upper() + mark for row in rows]

    function = Recorder(take_text)
    server = serve(function)
    marks, rows = ["!"], [{"text": "a"}, {}, {"text": "c"}]
    with busy(server, function) as pool:
        asked = [pool.submit(server, row, marks=marks) for row in rows]
        queued(server, 3)
    assert [each.result() for each in asked[::2]] == ["A!", "C!"]
    assert isinstance(asked[1].exception(), ModelFailed)
    assert (marks, rows) == (["!"], [{"text": "a"}, {}, {"text": "c"}])


# -- what cannot be served ----------------------------------------------------------------------------


class AsyncCall:
    """An object that is to be awaited."""

    async def __call__(self, texts: list[str]) -> list[str]:
        return texts


class GeneratorCall:
    """An object that gives its outputs one by one."""

    def __call__(self, texts: list[str]) -> Iterator[str]:
        yield from texts


async def async_generator(texts: list[str]) -> Any:
    yield texts


@pytest.mark.parametrize(
    "function",
    [AsyncCall(), AsyncCall().__call__, GeneratorCall(), functools.partial(async_generator), async_generator],
)
def test_async_and_generators_are_refused(serve: Any, function: Any) -> None:
    with pytest.raises(StartError, match="must be a plain function from a list to a list, not async"):
        serve(function)


def test_returned_coroutine(serve: Any) -> None:
    """The error says so, and Python warns of no coroutine that was not awaited."""
    with pytest.raises(ModelFailed) as failed:
        serve(lambda texts: AsyncCall()(texts))("x")
    assert "it returned coroutine" in notes(failed.value)


# -- numbers of numpy ---------------------------------------------------------------------------------


def test_numpy_numbers(serve: Any) -> None:
    """For knobs, ports and parameters."""
    numpy = pytest.importorskip("numpy")

    def scale(values: list[float], *, by: Any = 1) -> list[Any]:
        assert type(by) in (int, float)
        return [value * by for value in values]

    server = serve(scale, port=numpy.int64(0), max_batch_size=numpy.int64(8))
    assert server.tune(max_wait_ms=numpy.float32(0.5), group_by_length=numpy.bool_(False)) == server.settings
    assert (server.settings.max_batch_size, server.settings.max_wait_ms) == (8, 0.5)
    assert server.settings.group_by_length is False
    assert server(2.0, by=numpy.int64(3)) == 6
    assert "port=0" in server.as_code()
    with pytest.raises(serving_kit.SettingError):
        server.tune(max_batch_size=numpy.float64(1.5))
    for knob in ("max_batch_size", "max_batch_tokens"):
        with pytest.raises(serving_kit.SettingError):
            server.tune(**{knob: numpy.array([1, 2])})


def test_numpy_numbers_for_a_pipeline(serve: Any) -> None:
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("torch")
    server = serve(None)
    assert len(server("the cat sat on the [MASK].", top_k=numpy.int64(2))) == 2


# -- what outputs may share memory in ---------------------------------------------------------------------


class Pair(NamedTuple):
    """One answer."""

    scores: Any


@dataclasses.dataclass(frozen=True)
class Record:
    """One answer."""

    scores: Any


class Rows(list[Any]):
    """One answer."""


@pytest.mark.parametrize(
    "wrap", [Pair, Record, lambda row: Rows([row]), lambda row: (row,), lambda row: {"s": row}]
)
def test_outputs_share_no_buffer(serve: Any, wrap: Any) -> None:
    """Whatever they are wrapped in."""
    np = pytest.importorskip("numpy")
    buffer = np.zeros((32, 3))

    def function(texts: list[str]) -> list[Any]:
        for row, text in zip(buffer, texts, strict=False):
            row[:] = float(text)
        return [wrap(row) for row in buffer[: len(texts)]]

    server = serve(function)
    first = server("1")
    server("2")
    values = first.scores if hasattr(first, "scores") else first["s"] if isinstance(first, dict) else first[0]
    assert values.tolist() == [1.0, 1.0, 1.0]


def test_exception_without_a_text(serve: Any) -> None:
    class Nameless(RuntimeError):
        def __str__(self) -> str:
            raise LookupError

    def function(texts: list[str]) -> list[str]:
        if "bad" in texts:
            raise Nameless
        return texts

    server = serve(function)
    for _ in range(6):
        answer = httpx.post(server.url, content="bad")
        assert (answer.status_code, answer.json()["error_type"]) == (500, "model_failed")
    assert server("good") == "good"
    assert "Nameless" in server.errors()[0].error


# -- the protocol of a model --------------------------------------------------------------------------


def test_step_arguments() -> None:
    def scale(xs: list[float], held: str = "mine", *, by: float = 1.0) -> list[float]:
        assert held == "mine"
        return [x * by for x in xs]

    model = CallableModel(scale)
    model.check([1.0], {"by": 2.0})
    with pytest.raises(MalformedRequest, match="takes by"):
        model.check([1.0], {"held": "theirs"})
    prepared = [model.prepare(x, {"by": 3.0}) for x in (1.0, 2.0)]
    assert model.estimate(1.0) == prepared[0].work == Work()
    results = model.step([Part(each, 1) for each in prepared])
    assert results == [Done(3.0), Done(6.0)]
    assert model.finish(prepared[0], results[0].output) == 3.0
    model.release(prepared[0])


@pytest.mark.parametrize("wrong", ["text", b"bytes", {"a": 1}, 5, None])
def test_step_without_a_list(wrong: Any) -> None:
    model = CallableModel(lambda xs: wrong)
    with pytest.raises(TypeError, match="must return a list"):
        model.step([Part(model.prepare("x", {}), 1)])


def test_step_with_a_wrong_number() -> None:
    model = CallableModel(lambda xs: [*xs, "more"])
    with pytest.raises(WrongNumberOfOutputs, match="a list of 1 input and returned 2 outputs") as raised:
        model.step([Part(model.prepare("x", {}), 1)])
    assert model.classify(raised.value) is FailureKind.OUTPUTS
