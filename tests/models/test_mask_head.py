"""The shortcut of fill-mask gives the pipeline's own answers, for every family, or is not taken."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import transformers

from serving_kit.models.pipeline import build_pipeline_model
from tests.support_models import answers, assert_same, plain, tiny, tokenizer

FAMILIES = ["Bert", "Roberta", "DistilBert", "Electra", "Albert", "ModernBert", "DebertaV2"]
SMALL: dict[str, dict[str, Any]] = {
    "DistilBert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "ModernBert": {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102},
    "Albert": {"embedding_size": 16},
    "Electra": {"embedding_size": 16},
    "Roberta": {"pad_token_id": 0, "max_position_embeddings": 200},
}
TEXTS = ["a [MASK]", "the [MASK] of the river runs past an old [MASK] in paris", "[MASK] is a stone house"]


def masked(family: str) -> Any:
    """A fill-mask pipeline of one family with random weights."""
    torch.manual_seed(3)
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": len(tokenizer()),
        "max_position_embeddings": 128,
    }
    own, words = SMALL.get(family, {}), tokenizer()
    if family == "DistilBert":  # it takes no token types, and its own tokeniser makes none
        words.model_input_names = ["input_ids", "attention_mask"]
        common = {key: common[key] for key in ("vocab_size", "max_position_embeddings")}
    config = getattr(transformers, f"{family}Config")(**{**common, **own})
    model = getattr(transformers, f"{family}ForMaskedLM")(config).eval()
    return transformers.pipeline("fill-mask", model=model, tokenizer=words, device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_same_answers_for_every_family(family: str) -> None:
    pipe = masked(family)
    model = build_pipeline_model(pipe)
    assert model.stepper.shortcut is not None
    for parameters in ({}, {"top_k": 3}, {"targets": ["house", "river"]}):
        want = [plain(pipe(text, **parameters)) for text in TEXTS]
        assert_same(answers(model, TEXTS, parameters), want)
        assert_same(answers(model, TEXTS[:1], parameters), want[:1])


def test_head_computes_only_the_masks() -> None:
    pipe = masked("Bert")
    model = build_pipeline_model(pipe)
    seen = []
    hook = model.pipe.model.cls.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    try:
        answers(model, TEXTS, {})
    finally:
        hook.remove()
    assert [tuple(shape) for shape in seen] == [(1, 4, 32)]


@pytest.mark.parametrize("family", FAMILIES)
def test_shortcut_in_bfloat16(family: str) -> None:
    """Its rounding is coarser, which is no other structure."""
    pipe = masked(family)
    pipe.model.bfloat16()
    assert build_pipeline_model(pipe).stepper.shortcut is not None


@pytest.mark.parametrize("narrow", [False, True])
def test_unknown_structure_runs_in_full(narrow: bool) -> None:
    pipe = masked("Bert")
    if narrow:
        pipe.model.bfloat16()
    head = type(pipe.model.cls)

    class Mixing(head):  # type: ignore[misc, valid-type]
        """A head that mixes positions, as none should: the trial at load finds out."""

        def forward(self, hidden: Any) -> Any:
            return super().forward(hidden + hidden.flip(1))

    pipe.model.cls.__class__ = Mixing
    model = build_pipeline_model(pipe)
    assert model.stepper.shortcut is None
    assert model.pipe.model is pipe.model, "its modules are copied only where a shortcut applies"
    assert_same(answers(model, TEXTS[:1], {}), [plain(pipe(TEXTS[0]))])


def test_no_hook_on_the_users_modules() -> None:
    pipe = masked("Bert")
    pipe.model.cls.forward = pipe.model.cls.forward  # as accelerate does: such a model cannot be copied
    model = build_pipeline_model(pipe)
    assert model.pipe.model is pipe.model
    assert model.stepper.shortcut is None
    assert_same(answers(model, TEXTS[:1], {}), [plain(pipe(TEXTS[0]))])


def test_hooks_are_removed() -> None:
    pipe = masked("Bert")
    model = build_pipeline_model(pipe)
    answers(model, TEXTS, {})
    assert not model.pipe.model.base_model._forward_hooks


def test_switch() -> None:
    assert build_pipeline_model(tiny("fill-mask")).stepper.shortcut is not None
    assert build_pipeline_model(tiny("fill-mask"), shortcuts=False).stepper.shortcut is None
