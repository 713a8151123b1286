"""Which models are packed is found by trying them: numbers first, then time."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import transformers

from serving_kit.models import packing_trial
from serving_kit.models.pipeline import PipelineModel, build_pipeline_model
from tests.support_models import (
    LABELS,
    answers,
    assert_same,
    fresh,
    gpt2_classifier,
    plain,
    tiny,
    tokenizer,
)

SMALL = {
    "vocab_size": len(tokenizer()),
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 140,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SMALL,
    "Roberta": {**SMALL, "pad_token_id": 1},
    "XLMRoberta": {**SMALL, "pad_token_id": 1},
    "Camembert": {**SMALL, "pad_token_id": 1},
    "Electra": {**SMALL, "embedding_size": 16},
    "Albert": {**SMALL, "embedding_size": 16},
    "DistilBert": {
        "vocab_size": len(tokenizer()),
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 3,
        "n_heads": 2,
        "max_position_embeddings": 140,
    },
    "ModernBert": {
        **SMALL,
        "pad_token_id": 0,
        "cls_token_id": 101,
        "sep_token_id": 102,
        "local_attention": 16,
    },
}
OWN_ATTENTION: dict[str, dict[str, Any]] = {"DebertaV2": SMALL, "MPNet": {**SMALL, "pad_token_id": 1}}
HEADS = {
    "fill-mask": "MaskedLM",
    "text-classification": "SequenceClassification",
    "token-classification": "TokenClassification",
}


def pipeline_of(family: str, task: str, config: dict[str, Any]) -> Any:
    """A pipeline of one family with random weights."""
    torch.manual_seed(5)
    words = tokenizer()
    if config.get("pad_token_id") == 1:
        words.pad_token = words.convert_ids_to_tokens(1)
    labels = dict(enumerate(LABELS.get(task, ["a", "b"])))
    settings = getattr(transformers, f"{family}Config")(**config, id2label=labels)
    model = getattr(transformers, f"{family}For{HEADS[task]}")(settings).eval()
    return transformers.pipeline(task, model=model, tokenizer=words, device="cpu")


def texts(task: str) -> list[str]:
    piece = "a [MASK] house " if task == "fill-mask" else "a stone house "
    return [piece * times for times in (1, 9, 3, 20, 3)]


def in_one_batch(pipe: Any) -> PipelineModel:
    """The model, after a batch whose answers were those of the pipeline."""
    model = build_pipeline_model(pipe)
    assert_same(answers(model, texts(pipe.task), {}), [plain(pipe(text)) for text in texts(pipe.task)])
    return model


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_packed_with_its_own_answers(family: str, task: str) -> None:
    model = in_one_batch(pipeline_of(family, task, FAMILIES[family]))
    assert model.limits.layout.packed, model.limits.layout.reason
    assert "2.0 times as fast" in model.limits.layout.reason


@pytest.mark.usefixtures("packs")
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_attention_of_its_own_is_padded(family: str, task: str) -> None:
    model = in_one_batch(pipeline_of(family, task, OWN_ATTENTION[family]))
    assert not model.limits.layout.packed
    assert "its attention is its own" in model.limits.layout.reason


@pytest.mark.usefixtures("packs")
def test_other_numbers_are_padded() -> None:
    """A head that looks at the first token of the row."""

    class Head(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden + hidden[:, :1])

    pipe = fresh("token-classification")
    pipe.model.classifier = Head(32, pipe.model.config.num_labels)
    layout = build_pipeline_model(pipe).limits.layout
    assert not layout.packed
    assert "have other numbers" in layout.reason


@pytest.mark.usefixtures("pads")
def test_slower_is_padded_and_leaves_no_hook() -> None:
    pipe = pipeline_of("Bert", "fill-mask", SMALL)
    model = in_one_batch(pipe)
    assert model.pipe.model is not pipe.model
    assert not model.limits.layout.packed
    assert "2.0 times as long as a padded one" in model.limits.layout.reason
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.pipe.model.modules())


@pytest.mark.usefixtures("packs")
def test_asked_for_attentions_is_padded() -> None:
    pipe = fresh("text-classification")
    pipe.model.config.output_hidden_states = True
    layout = build_pipeline_model(pipe).limits.layout
    assert (layout.packed, "hidden states" in layout.reason) == (False, True)


@pytest.mark.usefixtures("packs")
def test_shortcuts_off_is_padded() -> None:
    layout = build_pipeline_model(tiny("text-classification"), shortcuts=False).limits.layout
    assert layout == (False, "shortcuts=False")


def test_one_by_one_says_so() -> None:
    layout = build_pipeline_model(tiny("image-classification")).limits.layout
    assert not layout.packed
    assert "one by one" in layout.reason


@pytest.mark.usefixtures("packs")
def test_given_pipeline_is_unchanged() -> None:
    pipe = fresh("fill-mask")
    before = (pipe.model.config.to_dict(), pipe.model.config._attn_implementation)
    model = build_pipeline_model(pipe)
    answers(model, texts("fill-mask"), {})
    assert (pipe.model.config.to_dict(), pipe.model.config._attn_implementation) == before
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in pipe.model.modules())
    assert model.changed() == ""


def test_time_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a padded and a packed step, in turns."""
    seconds = iter([3.0, 2.0] * packing_trial._TRIES)
    monkeypatch.setattr(packing_trial, "_seconds", lambda work: (work(), next(seconds))[1])
    layout = build_pipeline_model(tiny("text-classification")).limits.layout
    assert layout == (True, "packed steps were 1.5 times as fast as padded ones when tried")


@pytest.mark.usefixtures("packs")
def test_cut_that_does_not_fit_is_not_taken() -> None:
    """A last layer that needs all tokens computes all of them; what is read is taken from its output."""
    pipe = fresh("text-classification")
    layer = pipe.model.bert.encoder.layer[-1]

    class Rows(torch.nn.LayerNorm):
        """Needs as many rows as the embeddings have."""

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            if hidden.shape[1] != seen[-1]:
                raise ValueError(f"{hidden.shape[1]} rows")
            return super().forward(hidden)

    class Embeddings(type(pipe.model.bert.embeddings)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            made = super().forward(*args, **kwargs)
            seen.append(made.shape[1])
            return made

    seen: list[int] = []
    pipe.model.bert.embeddings.__class__ = Embeddings
    layer.output.LayerNorm.__class__ = Rows
    model = in_one_batch(pipe)
    assert model.limits.layout.packed, model.limits.layout.reason
    assert model.stepper.packed is not None
    assert model.stepper.packed.last_layer is not None
    assert not model.stepper.packed.last_layer.cuts


def test_error_in_the_trial_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> float:
        raise ZeroDivisionError

    monkeypatch.setattr(packing_trial, "_gain", fails)
    pipe = fresh("fill-mask")
    model = build_pipeline_model(pipe)
    assert "ZeroDivisionError" in model.limits.layout.reason
    assert model.pipe.model is not pipe.model
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.pipe.model.modules())


@pytest.mark.usefixtures("packs")
def test_trial_stays_within_the_table_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA an index past it makes the device unusable. The padding token of GPT-2 is its last one."""
    words = tokenizer()
    words.pad_token = words.convert_ids_to_tokens(len(words) - 1)
    pipe = gpt2_classifier(words, len(words) - 1)
    looked_up = []
    embedding = torch.nn.functional.embedding

    def look(ids: Any, weight: Any, *others: Any, **named: Any) -> Any:
        looked_up.append(int(ids.max()) < weight.shape[0])
        return embedding(ids, weight, *others, **named)

    monkeypatch.setattr(torch.nn.functional, "embedding", look)
    in_one_batch(pipe)
    assert looked_up
    assert all(looked_up)


@pytest.mark.usefixtures("packs")
def test_padding_token_in_a_text_keeps_its_position() -> None:
    """RoBERTa counts positions of other tokens only."""
    pipe = pipeline_of("Roberta", "text-classification", FAMILIES["Roberta"])
    model = build_pipeline_model(pipe)
    assert model.limits.layout.packed
    text = f"the river {pipe.tokenizer.pad_token} runs {pipe.tokenizer.pad_token} past a house"
    got = answers(model, [text, "a house"], {"top_k": None})
    assert_same(got, [plain(pipe(each, top_k=None)) for each in (text, "a house")])
