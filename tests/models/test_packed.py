"""A packed step gives each text what it gets alone, whatever shares the row."""

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from serving_kit.models.packed_attention import running
from serving_kit.models.pipeline import PipelineModel, build_pipeline_model
from tests.support_models import (
    LENGTHS,
    PARAMETERS,
    answers,
    assert_same,
    example,
    fresh,
    parts,
    plain,
    tiny,
)

PACKED = [
    "fill-mask",
    "feature-extraction",
    "text-classification",
    "token-classification",
    "zero-shot-classification",
]
pytestmark = pytest.mark.usefixtures("packs")


def packed_model(pipe: Any) -> PipelineModel:
    model = build_pipeline_model(pipe)
    assert model.limits.layout.packed, model.limits.layout.reason
    return model


@pytest.mark.parametrize("task", PACKED)
def test_same_answers_in_a_mixed_row(task: str) -> None:
    pipe, parameters = tiny(task), PARAMETERS.get(task, {})
    texts = [example(task, words) for words in LENGTHS]
    want = [plain(pipe(text, **parameters)) for text in texts]
    model = packed_model(pipe)
    assert_same(answers(model, texts, parameters), want)
    assert_same(answers(model, texts[:1], parameters), want[:1])
    assert_same(answers(model, texts[::-1], parameters), want[::-1])


@pytest.mark.parametrize("task", PACKED)
def test_row_longer_than_the_position_table(task: str) -> None:
    pipe, parameters = tiny(task), PARAMETERS.get(task, {})
    model = packed_model(pipe)
    text = example(task, 60)
    want = plain(pipe(text, **parameters))
    assert 8 * model.prepare(text, parameters).work.computed(packed=True) > 2 * 128
    assert_same(answers(model, [text] * 8, parameters), [want] * 8)


@pytest.mark.parametrize("task", PACKED)
def test_work_is_the_tokens_of_the_text(task: str) -> None:
    model = packed_model(tiny(task))
    prepared = model.prepare(example(task, 9), PARAMETERS.get(task, {}))
    widths = [chunk["input_ids"].shape[1] for chunk in prepared.payload.chunks]
    assert prepared.work.computed(packed=True) == sum(widths)
    assert prepared.work.computed(packed=False) == len(widths) * max(widths)


def test_several_masks_in_a_text() -> None:
    pipe = tiny("fill-mask")
    texts = ["a [MASK]", "the [MASK] of the [MASK] runs past a [MASK]", "[MASK] is a house"]
    assert_same(answers(packed_model(pipe), texts, {}), [plain(pipe(text)) for text in texts])


def test_text_pairs() -> None:
    pipe = tiny("text-classification")
    pairs = [{"text": "a house", "text_pair": "a river " * n} for n in (1, 5, 2)]
    assert_same(answers(packed_model(pipe), pairs, {}), [plain([pipe(pair)]) for pair in pairs])


def test_padded_chunk_runs_padded() -> None:
    """A tokenizer that was told to pad: positions that are masked out are not part of a row."""
    pipe = tiny("feature-extraction")
    model = packed_model(pipe)
    parameters = {"tokenize_kwargs": {"truncation": True, "max_length": 12}}
    prepared = model.prepare("a house", parameters)
    assert model.stepper.packed is not None
    chunk, takes = dict(prepared.payload.chunks[0]), model.stepper.packed.takes
    assert takes(chunk)
    mask = chunk["attention_mask"].clone()
    mask[0, -1] = 0
    chunk["attention_mask"] = mask
    assert not takes(chunk)
    other = prepared._replace(payload=replace(prepared.payload, chunks=[chunk]))
    (result,) = model.step(parts([other]))
    assert_same(plain(result.output[0]), plain(pipe.forward(dict(chunk))[0]))


def test_failed_step_leaves_nothing_behind() -> None:
    model = packed_model(fresh("text-classification"))
    prepared = [model.prepare(example("text-classification", n), {}) for n in (3, 9)]
    usual = model.pipe.model.config._attn_implementation
    hook = model.pipe.model.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.step(parts(prepared))
    hook.remove()
    assert running() is None
    assert model.pipe.model.config._attn_implementation == usual
    assert len(model.step(parts(prepared))) == 2
