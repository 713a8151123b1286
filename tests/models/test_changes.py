"""What a notebook does to the pipeline that it serves gets through, or the server says that it does not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.errors import StartError
from serving_kit.models.changes import versions
from tests.support import until
from tests.support_models import assert_same, example, fresh, plain

Serve = Callable[..., Any]
TEXT = example("fill-mask", 9)


def reason(server: Any) -> str:
    return str(server.stats()["reason"])


def assert_reason(server: Any, words: str) -> None:
    until(lambda: words in reason(server), timeout=30, what=words)


@pytest.mark.parametrize("task", ["fill-mask", "text-classification"])
def test_weights_changed_in_place(serve: Serve, task: str) -> None:
    pipe = fresh(task)
    server, text = serve(pipe), example(task, 9)
    before = plain(server(text))
    with torch.no_grad():
        for each in pipe.model.parameters():
            each.mul_(1.5)
    after = plain(server(text))
    assert after != before
    assert_same(after, plain(pipe(text)) if task == "fill-mask" else [plain(pipe(text))[0]])
    assert reason(server) == ""


def another_head(pipe: Any) -> None:
    pipe.model.cls.predictions.transform.dense = torch.nn.Linear(32, 32)


def another_weight(pipe: Any) -> None:
    layer = pipe.model.cls.predictions.transform.dense
    layer.weight = torch.nn.Parameter(torch.zeros_like(layer.weight))


def a_hook(pipe: Any) -> None:
    pipe.model.cls.register_forward_hook(lambda *_: None)


def a_compiled_forward(pipe: Any) -> None:
    pipe.model.compile(backend="eager")


def a_low_rank_adapter(pipe: Any) -> None:
    """What PEFT does to a layer: another module around it."""

    class Lora(torch.nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base_layer = base

        def forward(self, given: Any) -> Any:
            return self.base_layer(given)

    attention = pipe.model.bert.encoder.layer[0].attention.self
    attention.query = Lora(attention.query)


def another_buffer(pipe: Any) -> None:
    pipe.model.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize(
    "change",
    [another_head, another_weight, a_hook, a_compiled_forward, a_low_rank_adapter, another_buffer],
)
def test_unseen_change_is_noticed(serve: Serve, change: Callable[[Any], None]) -> None:
    pipe = fresh("fill-mask")
    server = serve(pipe)
    server(TEXT)
    assert reason(server) == ""
    change(pipe)
    assert_reason(server, "were replaced since serve(), which is not served: run serve() again")
    assert server.stats()["state"] == "ready"
    again = serve(pipe)
    assert reason(again) == ""
    assert_same(plain(again(TEXT)), plain(pipe(TEXT)))


def test_replaced_member_is_noticed(serve: Serve) -> None:
    """Another model or tokenizer in the pipeline."""
    for task in ("fill-mask", "text-classification"):
        pipe = fresh(task)
        server = serve(pipe)
        model, pipe.model = pipe.model, copy.deepcopy(pipe.model)
        assert_reason(server, "another model since serve()")
        pipe.model, pipe.tokenizer = model, copy.deepcopy(pipe.tokenizer)
        assert_reason(server, "another tokenizer since serve()")


def test_no_shortcut_no_copy(serve: Serve) -> None:
    """Where no shortcut applies, the notebook's own model is served, and its changes count."""
    pipe = fresh("fill-mask")
    server = serve(pipe, shortcuts=False)
    before = plain(server(TEXT))
    another_head(pipe)
    after = plain(server(TEXT))
    assert after != before
    assert_same(after, plain(pipe(TEXT)))
    assert reason(server) == ""


@pytest.mark.usefixtures("pads")
def test_no_shortcut_no_copied_modules(serve: Serve) -> None:
    pipe = fresh("text-classification")
    server, text = serve(pipe), example("text-classification", 9)
    before = plain(server(text))
    pipe.model.classifier = torch.nn.Linear(32, 3)
    assert plain(server(text)) != before
    assert reason(server) == ""


def a_hook_that_was_there(model: Any) -> Any:
    calls: list[int] = []
    model.cls.register_forward_hook(lambda *_: calls.append(1))
    return calls


def a_compiled_forward_that_was_there(model: Any) -> Any:
    calls: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            calls.append(1)
            return graph.forward(*inputs)

        return run

    model.cls.compile(backend=backend)
    return calls


@pytest.mark.parametrize("what", [a_hook_that_was_there, a_compiled_forward_that_was_there])
def test_earlier_hooks_are_kept(serve: Serve, what: Callable[[Any], Any]) -> None:
    """Hooks and compiled forwards from before `serve` run in the served model too."""
    pipe = fresh("fill-mask")
    calls = what(pipe.model)
    server = serve(pipe)
    calls.clear()
    answer = plain(server(TEXT))
    assert calls
    assert_same(answer, plain(pipe(TEXT)))


class Switched(torch.nn.Module):
    """An adapter that can be switched off, as PEFT's."""

    active = True

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, given: Any) -> Any:
        return self.base_layer(given) * (2 if self.active else 1)


def test_switched_adapter(serve: Serve) -> None:
    pipe = fresh("fill-mask")
    pipe.model.cls.predictions.transform.dense = Switched(pipe.model.cls.predictions.transform.dense)
    pipe.model.peft_config = {"default": object()}  # as PEFT and add_adapter() leave it
    server = serve(pipe)
    assert_same(plain(server(TEXT)), plain(pipe(TEXT)))
    before = plain(server(TEXT))
    pipe.model.cls.predictions.transform.dense.active = False
    assert plain(server(TEXT)) != before
    assert_same(plain(server(TEXT)), plain(pipe(TEXT)))


# -- training mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcuts", [True, False])
@pytest.mark.parametrize("task", ["fill-mask", "text-classification"])
def test_training_mode_without_dropout(
    serve: Serve, task: str, shortcuts: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, text = fresh(task), example(task, 9)
    want = plain(pipe(text))
    pipe.model.train()
    assert plain(pipe(text)) != want, "dropout changes the pipeline's own answers"
    server = serve(pipe, shortcuts=shortcuts)
    assert "in training mode; its copy is served in evaluation mode" in capsys.readouterr().out
    for _ in range(3):
        assert_same(plain(server(text)), want if task == "fill-mask" else [want[0]])
    assert pipe.model.training, "and the notebook goes on training"


def test_training_mode_without_a_copy(serve: Serve) -> None:
    """A model in training mode that cannot be copied is refused."""
    pipe = fresh("fill-mask")
    a_hook(pipe)
    pipe.model.train()
    with pytest.raises(StartError, match=r"training mode.*pipe.model.eval\(\)"):
        serve(pipe)


def test_training_mode_after_serve(serve: Serve) -> None:
    """It does not reach a copy, and is noticed where there is none."""
    pipe = fresh("fill-mask")
    want = plain(pipe(TEXT))
    server = serve(pipe)
    pipe.model.train()
    assert_same(plain(server(TEXT)), want)
    assert reason(server) == ""
    pipe.model.eval()
    server = serve(pipe, shortcuts=False)
    pipe.model.train()
    assert_reason(server, "in training mode, so answers vary: call pipe.model.eval()")
    pipe.model.eval()
    until(lambda: reason(server) == "", timeout=30)


def test_loaded_in_evaluation_mode(serve: Serve, tmp_path: Any) -> None:
    pipe = fresh("fill-mask")
    pipe.save_pretrained(tmp_path)
    server = serve(tmp_path, task="fill-mask", device="cpu")
    assert server.stats()["notes"] == []
    assert_same(plain(server(TEXT)), plain(pipe(TEXT)))


def test_versions_of_weights() -> None:
    model = torch.nn.Linear(2, 2)
    before = versions(model)
    with torch.no_grad():
        model.weight.add_(1)
    assert versions(model) > before
    with torch.inference_mode():
        narrow = torch.nn.Linear(2, 2)
    assert versions(narrow) == 0, "torch counts no changes of such tensors"
