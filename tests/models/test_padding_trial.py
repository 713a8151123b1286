"""Padded steps give the answers of each text alone, whatever side the tokenizer says."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import transformers

from serving_kit.models.padding_trial import rounding
from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import (
    LABELS,
    LENGTHS,
    answers,
    assert_same,
    example,
    fresh,
    gpt2_classifier,
    plain,
    tokenizer,
)

ENCODERS = ["fill-mask", "feature-extraction", *LABELS]
PARAMETERS: dict[str, dict[str, Any]] = {"zero-shot-classification": {"candidate_labels": ["travel", "war"]}}


def check_answers(pipe: Any, task: str) -> Any:
    """The model, whose answers for texts of several lengths are those for each alone."""
    model = build_pipeline_model(pipe, shortcuts=False)
    texts, parameters = [example(task, words) for words in LENGTHS], PARAMETERS.get(task, {})
    assert_same(answers(model, texts, parameters), [plain(pipe(text, **parameters)) for text in texts])
    return model


@pytest.mark.parametrize("task", ENCODERS)
def test_tokenizer_of_text_generation_is_served(task: str) -> None:
    """`pipeline("text-generation")` sets its tokenizer's side to left."""
    pipe = fresh(task)
    pipe.tokenizer.padding_side = "left"
    model = check_answers(pipe, task)
    assert model.limits.max_batch_size is None
    assert pipe.tokenizer.padding_side == "left"


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_that_classifies(side: str) -> None:
    words = tokenizer()
    words.padding_side = side
    pipe = gpt2_classifier(words, 0)
    assert check_answers(pipe, "text-classification").limits.max_batch_size is None


def test_number_of_a_token_is_its_own() -> None:
    """Relative positions allow padding on the left, which moves the rows that are counted."""
    torch.manual_seed(3)
    words = tokenizer()
    words.padding_side = "left"
    config = transformers.DebertaV2Config(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
        id2label=dict(enumerate(LABELS["token-classification"])),
    )
    model = transformers.DebertaV2ForTokenClassification(config).eval()
    pipe = transformers.pipeline("token-classification", model=model, tokenizer=words, device="cpu")
    assert check_answers(pipe, "token-classification").limits.max_batch_size is None


@pytest.mark.parametrize(("precision", "most"), [("highest", 1e-4), ("high", 5e-3), ("medium", 3e-2)])
def test_rounding_follows_the_precision_of_products(precision: str, most: float) -> None:
    """TF32 differs by 3e-4 for rows of other lengths, which is no wrong side."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert rounding(fresh("text-classification")) == most
    finally:
        torch.set_float32_matmul_precision(usual)


def test_model_that_reads_the_last_row_is_padded_on_the_left() -> None:
    class Last(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden[:, -1]

    pipe = fresh("text-classification")
    pipe.model.bert.pooler = Last()
    pipe.model.bert.embeddings.position_embeddings.weight.data.zero_()
    model = check_answers(pipe, "text-classification")
    assert model.limits.max_batch_size is None
    assert (model.pipe.tokenizer.padding_side, pipe.tokenizer.padding_side) == ("left", "right")


def test_output_that_the_library_cannot_cut_up_gets_one_text_in_a_step() -> None:
    """XLNet returns a memory for each layer, here for one; the library takes one for each text."""
    torch.manual_seed(3)
    words = tokenizer()
    config = transformers.XLNetConfig(vocab_size=len(words), d_model=32, n_layer=1, n_head=2, d_inner=64)
    model = transformers.XLNetForSequenceClassification(config).eval()
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=words, device="cpu")
    limit = check_answers(pipe, "text-classification").limits.max_batch_size
    assert limit is not None
    assert (limit.value, "raise IndexError" in limit.reason) == (1, True)


def test_model_without_a_mask_gets_one_text_in_a_step() -> None:
    class Head(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden + hidden.mean(dim=1, keepdim=True))

    pipe = fresh("token-classification")
    pipe.model.classifier = Head(32, pipe.model.config.num_labels)
    limit = check_answers(pipe, "token-classification").limits.max_batch_size
    assert limit is not None
    assert (limit.value, "where the text is padded" in limit.reason) == (1, True)


def test_model_that_raises_in_the_trial_is_left_as_it_is() -> None:
    pipe = fresh("text-classification")
    pipe.model.register_forward_pre_hook(lambda *_: 1 / 0)
    pipe.tokenizer.padding_side = "left"
    model = build_pipeline_model(pipe, shortcuts=False)
    assert (model.limits.max_batch_size, model.pipe.tokenizer.padding_side) == (None, "left")
