"""Linear layers by faster roads: the same answers from the same weights, or nothing changes."""

import itertools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models import fast_linear
from serving_kit.models.fast_linear import use_fast_linear
from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import answers, assert_same, example, minilm_folder, plain, tiny


@pytest.fixture(params=sorted(fast_linear.roads()))
def only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A road that is always taken: being faster depends on the machine, being right must not."""
    road = fast_linear.roads()[request.param]
    monkeypatch.setattr(fast_linear, "roads", lambda: {request.param: road})
    monkeypatch.setattr(fast_linear, "WORTH_IT", 0.0)
    return str(request.param)


@pytest.fixture
def took_s(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a call of each road seems to take; 1 s where a test says nothing."""
    took: dict[str, float] = {}
    monkeypatch.setattr(
        fast_linear, "_timed", lambda layers, input, tried: {name: [took.get(name, 1e-3)] for name in tried}
    )
    return took


def taken(layer: Any) -> list[str]:
    """The names of the roads of a layer, by classes of rows."""
    names = {road: name for name, road in fast_linear.roads().items()}
    return [names.get(road, "") for road in layer.roads]


@pytest.fixture(scope="module")
def minilm() -> Any:
    from transformers import pipeline

    return pipeline("feature-extraction", model=str(minilm_folder()), device="cpu")


def layers(model: Any, kind: type) -> int:
    return sum(type(module) is kind for module in model.modules())


@pytest.mark.usefixtures("only")
def test_same_answers_and_same_modules(minilm: Any) -> None:
    """The answers are those of the pipeline, and its modules are not replaced."""
    model = build_pipeline_model(minilm)
    assert layers(model.pipe.model, fast_linear.fast_linear_class()) == 37
    assert layers(minilm.model, torch.nn.Linear) == 37
    texts = [example("feature-extraction", words) for words in (3, 60, 17)]
    assert_same(answers(model, texts, {}), [plain(minilm(text)) for text in texts])
    assert_same(answers(model, texts[:1], {}), [plain(minilm(texts[0]))])


@pytest.mark.usefixtures("only")
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 40, 300])
@pytest.mark.parametrize("shape", [(64, 64), (96, 20_000)])
def test_layer_output(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    layer = torch.nn.Linear(*shape, bias=rows != 40).eval()
    model = torch.nn.Sequential(layer)
    given = torch.randn(2, rows, shape[0])
    with torch.inference_mode():
        want = layer(given)
        assert use_fast_linear(model) == 1
        assert torch.allclose(model(given), want, atol=1e-5)
        assert model(given).is_contiguous()
        assert torch.allclose(model(given[:, ::2]), want[:, ::2], atol=1e-5)
    assert model(given).requires_grad  # who asks for gradients gets them


@pytest.mark.usefixtures("only")
def test_which_layers_are_changed() -> None:
    """Only plain linear layers in single precision."""

    class Own(torch.nn.Linear):
        pass

    assert use_fast_linear(torch.nn.Sequential(torch.nn.Linear(64, 64).bfloat16(), Own(64, 64))) == 0
    assert use_fast_linear(torch.nn.Linear(64, 3)) == 0  # so small that nothing can be gained
    assert use_fast_linear(len) == 0


def raises(layer: Any, input: Any) -> Any:
    raise RuntimeError("another operator of that name")


def test_wrong_roads_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that raises, however fast."""
    wrong = {
        "raises": raises,
        "inexact": lambda layer, input: torch.nn.Linear.forward(layer, input) * 1.001,
        "nan": lambda layer, input: torch.full_like(torch.nn.Linear.forward(layer, input), torch.nan),
        "short": lambda layer, input: torch.nn.Linear.forward(layer, input)[:, :-1],
    }
    monkeypatch.setattr(fast_linear, "roads", lambda: wrong)
    monkeypatch.setattr(fast_linear, "WORTH_IT", 0.0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert use_fast_linear(model) == 0
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize(
    ("onednn", "turned", "road"), [(0.95, 0.92, ""), (0.95, 0.8, "turned"), (0.7, 0.8, "onednn")]
)
def test_the_fastest_road_that_is_worth_it(
    took_s: dict[str, float], onednn: float, turned: float, road: str
) -> None:
    took_s.update(onednn=onednn * 1e-3, turned=turned * 1e-3)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    assert use_fast_linear(model) == (2 if road else 0)
    assert [taken(layer) for layer in model if road] == ([[road] * 5] * 2 if road else [])


@pytest.mark.parametrize(("road", "rest"), [("onednn", "onednn"), ("turned", "")])
def test_what_is_not_tried(
    took_s: dict[str, float], monkeypatch: pytest.MonkeyPatch, road: str, rest: str
) -> None:
    """When time is up every shape has still been tried with few rows; many rows keep oneDNN only."""
    monkeypatch.setattr(fast_linear, "_BUDGET_S", 0.0)
    took_s[road] = 1e-4
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 96))
    assert use_fast_linear(model) == 2
    assert [taken(layer) for layer in model] == [[road] + [rest] * 4] * 2


def test_calls_that_take_too_long_are_not_tried(took_s: dict[str, float]) -> None:
    took_s.update({"": 0.015, "turned": 0.005, "onednn": 0.02})
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    assert use_fast_linear(model) == 1
    assert taken(model[0]) == ["turned", "", "", "", ""]


@pytest.mark.parametrize(
    ("rows", "road"), [(1, ""), (2, "a"), (8, "a"), (9, "b"), (128, "c"), (384, "d"), (385, "e")]
)
def test_which_road_is_for_how_many_rows(rows: int, road: str) -> None:
    seen = []

    def made(name: str) -> Any:
        return lambda layer, input: seen.append(name) or torch.nn.Linear.forward(layer, input)

    layer = torch.nn.Linear(64, 64)
    layer.__class__, layer.roads = fast_linear.fast_linear_class(), tuple(map(made, "abcde"))
    with torch.inference_mode():
        layer(torch.ones(rows, 64))
        layer(torch.ones(rows, 1, 64))
    assert seen == [road] * 2 * bool(road)


def test_rotates_the_layers_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Successive calls of the trial use different weights, so that no road finds its own in the cache."""
    used: list[Any] = []

    def road(layer: Any, input: Any) -> Any:
        used.append(layer)
        return torch.nn.Linear.forward(layer, input)

    monkeypatch.setattr(fast_linear, "roads", lambda: {"a": road, "b": road})
    use_fast_linear(torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)]))
    timed = used[2:10]  # after a call of each that shows whether it is right
    assert all(one is not other for one, other in itertools.pairwise(timed))
    assert len({*timed}) == 4


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
