"""Pooled features: one vector for a text, as `sentence-transformers` makes it."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy

from serving_kit.models.pipeline import PipelineModel, build_pipeline_model
from serving_kit.models.pooling import pooled
from tests.support_models import answers, minilm_folder

TEXTS = ["a cat", "the quick brown fox jumps over the lazy dog", "rain"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    from transformers import pipeline

    return pipeline("feature-extraction", model=str(minilm_folder()), device="cpu")


@pytest.fixture(scope="module")
def model(pipe: Any) -> PipelineModel:
    return build_pipeline_model(pipe)


@pytest.mark.parametrize(
    ("pooling", "of_rows"),
    [
        ("mean", lambda rows: rows.mean(axis=0)),
        ("cls", lambda rows: rows[0]),
        ("last", lambda rows: rows[-1]),
    ],
)
def test_pooled_vector_of_each_text(pipe: Any, model: PipelineModel, pooling: str, of_rows: Any) -> None:
    """In a batch of several lengths, of the text's own tokens only."""
    vectors = answers(model, TEXTS, {"pooling": pooling})
    for text, vector in zip(TEXTS, vectors, strict=True):
        wanted = of_rows(numpy.array(pipe(text)[0]))
        assert vector == pytest.approx(wanted.tolist(), abs=1e-5)


def test_normalized_vectors_have_length_one(model: PipelineModel) -> None:
    plain, unit = (
        numpy.array(answers(model, TEXTS, {"pooling": "mean", "normalize": each})) for each in (False, True)
    )
    assert numpy.linalg.norm(unit, axis=1) == pytest.approx([1.0] * len(TEXTS))
    assert unit == pytest.approx(plain / numpy.linalg.norm(plain, axis=1, keepdims=True), abs=1e-5)


def test_normalize_without_pooling(pipe: Any, model: PipelineModel) -> None:
    """The vector of each token has length one, and the answer keeps its shape."""
    (answer,) = answers(model, TEXTS[:1], {"normalize": True})
    rows = numpy.array(pipe(TEXTS[0])[0])
    assert numpy.array(answer).shape == (1, *rows.shape)
    assert numpy.linalg.norm(answer[0], axis=1) == pytest.approx([1.0] * len(rows))


def test_a_vector_of_zeros_stays_zero() -> None:
    assert pooled(torch.zeros(1, 3, 4), "mean", normalize=True).tolist() == [[[0.0] * 4]]


def test_other_pooling_is_refused(model: PipelineModel) -> None:
    with pytest.raises(Exception, match=r"pooling must be .*mean"):
        model.check(TEXTS, {"pooling": "median"})


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_padding_of_the_given_pipeline_is_left_out(pipe: Any, model: PipelineModel, pooling: str) -> None:
    from transformers import pipeline

    padding = {"padding": "max_length", "truncation": True, "max_length": 32}
    padded = pipeline(
        "feature-extraction", model=pipe.model, tokenizer=pipe.tokenizer, tokenize_kwargs=padding
    )
    got = answers(build_pipeline_model(padded), TEXTS[:1], {"pooling": pooling})[0]
    assert got == pytest.approx(answers(model, TEXTS[:1], {"pooling": pooling})[0], abs=1e-5)
