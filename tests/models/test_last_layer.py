"""The last layer computes what is read, and nothing else."""

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import example, fresh, parts

pytestmark = pytest.mark.usefixtures("packs")


@pytest.mark.parametrize(("task", "rows"), [("text-classification", 3), ("fill-mask", 3)])
def test_feed_forward_of_what_is_read(task: str, rows: int) -> None:
    """Three texts, of which the first tokens or the masks are read."""
    model = build_pipeline_model(fresh(task))
    prepared = [model.prepare(example(task, words), {}) for words in (4, 9, 20)]
    tokens = sum(each.work.computed(packed=True) for each in prepared)
    layers = model.pipe.model.bert.encoder.layer
    seen: list[tuple[int, ...]] = []
    for layer in layers:
        for part in (layer.intermediate.dense, layer.attention.self.query, layer.attention.self.key):
            part.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    model.step(parts(prepared))
    *before, query, key, feed_forward = seen
    assert set(before) == {(1, tokens)}
    assert (query, key, feed_forward) == ((1, rows), (1, tokens), (1, rows))


def test_other_forwards_are_left_alone() -> None:
    """The hooks act in a packed step only."""
    pipe = fresh("text-classification")
    model = build_pipeline_model(pipe)
    chunk = model.prepare("a stone house", {}).payload.chunks[0]
    with torch.inference_mode():
        given = model.pipe.model.bert(**chunk).last_hidden_state
        wanted = pipe.model.bert(**chunk).last_hidden_state
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)


def test_a_layer_that_runs_many_times() -> None:
    """ALBERT has one module for all layers; only its last call is the last layer."""
    import transformers

    from tests.support_models import assert_same, plain, tokenizer

    config = transformers.AlbertConfig(
        vocab_size=len(tokenizer()),
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
    )
    torch.manual_seed(1)
    own = transformers.AlbertForSequenceClassification(config).eval()
    pipe = transformers.pipeline("text-classification", model=own, tokenizer=tokenizer(), device="cpu")
    model = build_pipeline_model(pipe)
    assert model.stepper.packed is not None
    assert model.stepper.packed.last_layer is not None
    assert model.stepper.packed.last_layer.cuts
    (result,) = model.step(parts([model.prepare("a stone house", {})]))
    given = model.finish(model.prepare("a stone house", {}), result.output)
    assert_same(plain(given), plain(pipe("a stone house")))
