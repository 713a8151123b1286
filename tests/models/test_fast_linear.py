"""Linear layers by oneDNN: the same answers from the same weights, or nothing changes."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models import fast_linear
from serving_kit.models.fast_linear import use_fast_linear
from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import answers, assert_same, example, minilm_folder, plain, tiny


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is faster depends on the machine; whether it is right must not."""
    monkeypatch.setattr(fast_linear, "WORTH_IT", 0.0)


@pytest.fixture(scope="module")
def minilm() -> Any:
    from transformers import pipeline

    return pipeline("feature-extraction", model=str(minilm_folder()), device="cpu")


def layers(model: Any, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.usefixtures("always")
def test_same_answers_and_same_modules(minilm: Any) -> None:
    """The answers are those of the pipeline, and its modules are not replaced."""
    model = build_pipeline_model(minilm)
    assert layers(model.pipe.model, fast_linear.fast_linear_class()) == 37
    assert layers(minilm.model, torch.nn.Linear) == 37
    texts = [example("feature-extraction", words) for words in (3, 60, 17)]
    assert_same(answers(model, texts, {}), [plain(minilm(text)) for text in texts])
    assert_same(answers(model, texts[:1], {}), [plain(minilm(texts[0]))])


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("rows", [1, 15, 16, 40])
@pytest.mark.parametrize("shape", [(64, 64), (96, 200_000)])
def test_layer_output(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(*shape, bias=rows != 40).eval()
    model = torch.nn.Sequential(layer)
    given = torch.randn(2, rows, shape[0])
    with torch.inference_mode():
        want = layer(given)
        assert use_fast_linear(model) == 1
        assert torch.allclose(model(given), want, atol=1e-5)
        assert torch.allclose(model(given[:, ::2]), want[:, ::2], atol=1e-5)
    assert model(given).requires_grad  # who asks for gradients gets them


@pytest.mark.usefixtures("always")
def test_which_layers_are_changed() -> None:
    """Only plain linear layers in single precision."""

    class Own(torch.nn.Linear):
        pass

    assert use_fast_linear(torch.nn.Sequential(torch.nn.Linear(64, 64).bfloat16(), Own(64, 64))) == 0
    assert use_fast_linear(torch.nn.Linear(64, 3)) == 0  # so small that nothing can be gained
    assert use_fast_linear(len) == 0


@pytest.mark.parametrize("fault", ["missing", "wrong", "slow"])
def test_operator_with_wrong_results(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(torch.nn.Linear):
        def forward(self, input: Any) -> Any:
            return super().forward(input) * 1.001

    def missing() -> Any:
        raise AttributeError("no such operator")

    if fault == "missing":
        monkeypatch.setattr(fast_linear, "fast_linear_class", missing)
    elif fault == "wrong":
        monkeypatch.setattr(fast_linear, "WORTH_IT", 0.0)
        monkeypatch.setattr(fast_linear, "fast_linear_class", lambda: Odd)
    else:
        monkeypatch.setattr(fast_linear, "WORTH_IT", 1000.0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert use_fast_linear(model) == 0
    assert type(model[0]) is torch.nn.Linear


def test_pipeline_used_during_a_step() -> None:
    pipe = tiny("fill-mask")
    model = build_pipeline_model(pipe)
    text = example("fill-mask", 9)
    want, seen = plain(pipe(text)), []
    hook = model.pipe.model.cls.register_forward_pre_hook(lambda *_: seen.append(plain(pipe(text))))
    try:
        assert_same(answers(model, [text], {}), [want])
    finally:
        hook.remove()
    assert seen == [want]
